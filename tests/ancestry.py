"""Copies of one model with task vectors that are drawn: real architectures made small, and tensors of odd shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
import torch
from torch import Tensor

import vfsurgery as surgery
from vfsurgery.combining import Combiner, Kind, Trait, combine_states
from vfsurgery.combining.traits import traits_of_graph
from vfsurgery.discovery.verification import randomize

EXACT = 1e-10
"""Relative, in float64: what solves and decompositions leave."""

SMALL: dict[str, dict[str, Any]] = {
    "resnet18": {"channels": (4, 6, 8, 10)},
    "convnext_atto": {"depths": (1, 1, 2, 1), "dims": (6, 8, 10, 12)},
    "vit_tiny_patch16_224": {"depth": 2, "embed_dim": 24, "img_size": 32},
    "swin_tiny_patch4_window7_224": {
        "depths": (1, 1, 2, 1),
        "embed_dim": 12,
        "num_heads": (1, 2, 3, 4),
        "img_size": 56,
    },
    "mobilenetv3_small_050": {},
}  # fmt: skip
LARGE = 2**14
"""Larger tensors of networks are left out: tests take seconds."""
ODD = {
    "matrix": (6, 4), "square": (6, 6), "turned": (4, 6, 2), "conv": (5, 3, 3, 3), "row": (1, 7), "no_rows": (0, 3),
    "depthwise": (6, 1, 3, 3), "bias": (64,), "one": (1,), "scalar": (), "empty": (0,),
}  # fmt: skip
MATRICES = {"matrix": 1, "square": 1, "turned": 0, "conv": 1, "row": 1, "no_rows": 1}
CASES = ["odd", *SMALL]
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """State dicts in float64: of the base, of four models that differ from it; and what their tensors are."""

    base: State
    sources: Sequence[State]
    traits: Mapping[str, Trait]

    @property
    def trained(self) -> list[str]:
        return [name for name, trait in self.traits.items() if trait.kind in (Kind.MATRIX, Kind.REST)]

    def combine(self, combiner: Combiner, count: int = 3, **options: Any) -> dict[str, Tensor]:
        """What comes of the first sources, or of those given; trained tensors only."""
        states = options.pop("states", self.sources[:count])
        found = combine_states(states, combiner, **{"base": self.base, "traits": self.traits, **options})
        return {name: found[name] for name in self.trained}

    def moved(self, combiner: Combiner, count: int = 3, **options: Any) -> dict[str, Tensor]:
        """The same, less the base."""
        found = self.combine(combiner, count, **options)
        return {name: tensor - options.get("base", self.base)[name] for name, tensor in found.items()}

    def mapped(self, change: Callable[[Tensor], Tensor]) -> list[State]:
        """The sources, all trained tensors' task vectors changed."""
        names = set(self.trained)
        return [
            {n: self.base[n] + change(t - self.base[n]) if n in names else t for n, t in source.items()}
            for source in self.sources
        ]


@cache
def traced(name: str) -> tuple[State, dict[str, Trait]]:
    """State and traits of a whole network; norms, biases and buffers are drawn, too."""
    options, generator = SMALL[name], torch.Generator().manual_seed(0)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=5, **options).eval()
    randomize(model, generator)
    traits = traits_of_graph(surgery.trace(model, torch.zeros(2, 3, *[options.get("img_size", 32)] * 2)))
    return model.state_dict(), traits


def varied(state: State, traits: Mapping[str, Trait]) -> set[str]:
    """Of tensors of one kind and form the first, the last and the one between: what methods tell apart."""
    alike: dict[object, list[str]] = {}
    for name, trait in traits.items():
        if name in state and state[name].numel() < LARGE:
            form = [size == 1 for size in state[name].shape]
            alike.setdefault((trait.kind, trait.reads, *form), []).append(name)
    return {names[place] for names in alike.values() for place in (0, len(names) // 2, -1)}


@cache
def case(name: str) -> Case:
    """One by name, of the odd shapes or of a network."""
    generator = torch.Generator().manual_seed(0)
    traits: dict[str, Trait]
    if name == "odd":
        state: dict[str, Tensor] = {n: torch.randn(s, generator=generator).double() for n, s in ODD.items()}
        traits = {n: Trait(Kind.MATRIX if n in MATRICES else Kind.REST, MATRICES.get(n, 1), 0.5) for n in ODD}
        state["steps"], traits["steps"] = torch.tensor(3), Trait(Kind.FIXED)
    else:
        found, known = traced(name)
        state = {n: t.double() if t.is_floating_point() else t for n, t in found.items() if n in varied(found, known)}
        traits = {n: known[n] for n in state}
    sources: list[dict[str, Tensor]] = []
    for _ in range(4):
        sources.append(dict(state))
        for n, tensor in state.items():
            if traits[n].kind is not Kind.FIXED and tensor.numel():
                draws = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                sources[-1][n] = tensor + draws * (0.1 * tensor.abs().mean() + 0.01)
    return Case(state, sources, traits)


def two(*vectors: Sequence[float], **traits: Trait) -> Case:
    """Sources of one tensor ``w`` with these task vectors, from a base of zeros."""
    tensors = [torch.tensor(vector, dtype=torch.float64) for vector in vectors]
    kind = Trait(Kind.MATRIX if tensors[0].ndim > 1 else Kind.REST, depth=0.5)
    return Case({"w": torch.zeros_like(tensors[0])}, [{"w": tensor} for tensor in tensors], {"w": kind})


def of_matrices(*matrices: Tensor) -> Case:
    """The same of one matrix ``w``."""
    return Case({"w": torch.zeros_like(matrices[0])}, [{"w": m} for m in matrices], {"w": Trait(Kind.MATRIX)})


def assert_same(found: State, expected: State, tolerance: float = EXACT) -> None:
    """Within a tolerance relative to each tensor; 0 for to the bit."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        error, size = float((found[name] - tensor).norm()), float(tensor.norm())
        assert torch.isfinite(found[name]).all() and error <= tolerance * max(size, 1e-3), (name, error, size)


def differ(found: State, expected: State, tolerance: float = 1e-3) -> bool:
    """Whether they differ by far, as a negative control has to."""
    return any(
        float((found[name] - tensor).norm()) > tolerance * max(float(tensor.norm()), 1e-3)
        for name, tensor in expected.items()
    )
