"""The conformance suite of combining methods."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vfsurgery.combining.base import COMBINERS, PART, Combiner, Entry, InMemory, Kind, Problem, Trait
from vfsurgery.combining.running import TRAINED, combine_states
from vfsurgery.combining.traits import traits_of_graph
from vfsurgery.discovery.finding import trace
from vfsurgery.errors import OptionError
from vfsurgery.testing.nets import NETS, example_images, make_net
from vfsurgery.testing.watching import expect, first_change, untouched
from vfsurgery.tracing.sources import Source

TOLERANCE = 1e-8
"""In float64, relative to what is compared: decompositions of matrices have their own."""
COUNTS, IMAGES = (1, 2, 3), 16


class Odd(nn.Module):
    """Tensors of all shapes that models have somewhere: no dim, one number, none at all, more than one part."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {
            "matrix": (6, 4), "turned": (4, 6, 2), "conv": (5, 3, 3, 3), "depthwise": (6, 1, 3, 3), "row": (1, 7),
            "bias": (5,), "one": (1,), "scalar": (), "empty": (0,), "no_rows": (0, 3), "long": (PART + 5,),
        }  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))
        self.register_buffer("steps", torch.tensor(3))


MATRICES = {"matrix": 1, "turned": 0, "conv": 1, "row": 1, "no_rows": 1}


@dataclass(frozen=True)
class Case:
    """A base, models that differ from it, and what their tensors are."""

    name: str
    base: nn.Module
    sources: Sequence[nn.Module]
    traits: Mapping[str, Trait]
    traced: dict[nn.Module, Source] = field(default_factory=dict[nn.Module, Source])

    def looked_at(self, combiner: Combiner, models: Sequence[nn.Module]) -> dict[str, Any]:
        """What a method that looks at data gets besides tensors: graphs, and images, the same for all."""
        if not combiner.needs_data:
            return {}
        for model in models:
            if model not in self.traced:
                self.traced[model] = Source.of(model, trace(model, example_images(2, dtype=torch.float64)))
        images = example_images(IMAGES, dtype=torch.float64)
        return {"traced": [self.traced[model] for model in models], "images": lambda _: iter([images])}


def check_combiner(combiner: Combiner, *, nets: Sequence[str] | None = None, registered: bool = True) -> None:
    """Check all that the library expects of a combining method, on tiny networks and on tensors of odd shapes.

    It is a frozen dataclass with a name; combines one, two or three sources, or refuses that by an ``OptionError``;
    gives task vectors of the shapes and the dtype that are asked for, and the same again; keeps a task vector of zero
    zero; leaves ``scale`` to the library; does not mind the order of sources with equal weights, unless it is
    ``ordered``; gives each number from those at the same place alone if it is ``elementwise``; and leaves sources and
    global random states alone.

    Args:
        combiner: An instance.
        nets: Names of :data:`~vfsurgery.testing.NETS`; all by default. Odd shapes are checked always, but for methods
            that look at data.
        registered: Whether its name is to be found in the registry.

    Raises:
        AssertionError: something does not hold; the message says what.

    >>> from vfsurgery.combining import TaskArithmetic
    >>> check_combiner(TaskArithmetic(), nets=[])
    """
    expect(not isinstance(combiner, type), f"{combiner!r} is a class", remedy="give check_combiner an instance")
    expect(
        isinstance(combiner, Combiner), f"{combiner!r} is no combiner", remedy="subclass vfsurgery.combining.Combiner"
    )
    frozen = dataclasses.is_dataclass(combiner) and type(combiner).__dataclass_params__.frozen  # type: ignore[attr-defined]
    expect(frozen, f"{type(combiner).__name__} is no frozen dataclass", remedy="put @dataclass(frozen=True) over it")
    if registered:
        expect(
            combiner.name in COMBINERS,
            f"combining method {combiner.name!r} is not registered under its name",
            remedy="put @register_combiner over it, or check_combiner(..., registered=False)",
        )
    cases = [] if combiner.needs_data else [_odd()]  # which is no network
    for case in [*cases, *(_net(name) for name in (NETS if nets is None else nets))]:
        accepted = [count for count in COUNTS if _accepts(combiner, case, count)]
        expect(bool(accepted), f"combining method {combiner.name!r} refuses any number of sources from 1 to 3")
        for count in accepted:
            _check_on(combiner, case, count)


def _odd() -> Case:
    traits = {
        name: Trait(Kind.MATRIX if name in MATRICES else Kind.REST, MATRICES.get(name, 1), 0.5) for name in _names()
    }
    return _case("odd shapes", Odd().double(), {**traits, "steps": Trait(Kind.FIXED)})


def _names() -> list[str]:
    return [name for name, _ in Odd().named_parameters()]


def _net(name: str) -> Case:
    return _case(name, make_net(name).double(), _traits(name))


@cache
def _traits(name: str) -> dict[str, Trait]:
    return traits_of_graph(trace(make_net(name), example_images(2)))


def _case(name: str, base: nn.Module, traits: Mapping[str, Trait]) -> Case:
    sources: list[nn.Module] = []
    for seed in range(max(COUNTS)):
        generator = torch.Generator().manual_seed(seed)
        sources.append(copy.deepcopy(base))
        for parameter in sources[-1].parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data.add_(noise, alpha=0.1)
    return Case(name, base, sources, traits)


def _combined(combiner: Combiner, case: Case, sources: Sequence[nn.Module]) -> dict[str, Tensor]:
    states = [source.state_dict() for source in sources]
    notes: list[str] = []
    base, looked_at = case.base.state_dict(), case.looked_at(combiner, sources)
    found = combine_states(states, combiner, base=base, traits=case.traits, seed=1, notes=notes, **looked_at)
    expect(all(isinstance(note, str) for note in notes), f"{combiner.name!r} notes what is no sentence", notes=notes)
    return found


def _problem(combiner: Combiner, case: Case, count: int) -> Problem:
    stores = [InMemory(source.state_dict()) for source in case.sources[:count]]
    base = case.base.state_dict()
    entries = [
        Entry(name, tuple(base[name].shape), trait, (1.0,) * count, torch.float64, stores, InMemory(base), 0,
              math.prod(base[name].shape))
        for name, trait in case.traits.items() if trait.kind in TRAINED
    ]  # fmt: skip
    return Problem(lambda: iter(entries), count, seed=1, **case.looked_at(combiner, case.sources[:count]))


def _accepts(combiner: Combiner, case: Case, count: int) -> bool:
    try:
        combiner.plan(_problem(combiner, case, count))
    except OptionError:
        return False
    return True


def _check_on(combiner: Combiner, case: Case, count: int) -> None:
    where = f"combining method {combiner.name!r} of {count} x {case.name!r}"
    sources, base = case.sources[:count], case.base.state_dict()
    with untouched(where, [case.base, *sources]):
        _check_tensors(where, combiner, case, count)
        found = _combined(combiner, case, sources)
        again = _combined(combiner, case, sources)
    expect(
        first_change(found, again) is None,
        f"{where} gives other numbers the second time",
        tensor=first_change(found, again),
        remedy="draw from entry.generator(problem.seed, source)",
    )
    for name, tensor in found.items():
        expect(bool(tensor.isfinite().all()), f"{where} gives values that are not finite", tensor=name)
    trained = [name for name, trait in case.traits.items() if trait.kind in TRAINED]
    still = _combined(combiner, case, [case.base] * count)
    changed = [name for name in trained if not torch.equal(still[name], base[name])]
    expect(not changed, f"{where} moves what no source moved", tensor=changed[:1], remedy="zero task vectors stay zero")
    if not combiner.ordered:
        turned = _combined(combiner, case, sources[::-1])
        expect(
            (name := _other(found, turned, base, trained)) is None,
            f"{where} gives other numbers if sources come in another order",
            tensor=name,
            remedy="ordered = True declares that it does",
        )
    doubled = _combined(dataclasses.replace(combiner, scale=2 * combiner.scale), case, sources)  # type: ignore[type-var]
    moved = {name: 2 * found[name] - base[name] for name in trained}
    expect(
        (name := _other(moved, doubled, base, trained)) is None,
        f"{where} does not move twice as far with twice the scale",
        tensor=name,
        remedy="give the combined task vector; the library multiplies it by scale",
    )


def _check_tensors(where: str, combiner: Combiner, case: Case, count: int) -> None:
    """Shapes and dtypes of what it gives, and whether parts can be told from wholes."""
    problem = _problem(combiner, case, count)
    combined = combiner.plan(problem)
    for entry in problem.parts() if combiner.elementwise else problem.entries():
        found = combined(entry)
        got, asked = (f"{tuple(shape)}, {dtype}" for shape, dtype in (
            (found.shape, found.dtype), (entry.laid_out, entry.dtype)))  # fmt: skip
        expect(got == asked, f"{where} gives another shape or dtype", tensor=entry.name, got=got, expected=asked)
        if combiner.elementwise and not combiner.ordered and entry.count > 1:
            half = dataclasses.replace(entry, stop=entry.start + entry.count // 2)
            error = combined(half) - found.reshape(-1)[: half.count]
            expect(
                float(error.abs().max()) <= TOLERANCE,
                f"{where} is elementwise, and numbers of a part depend on others",
                tensor=entry.name,
                remedy="elementwise = False, or find out in plan what concerns the whole tensor",
            )


def _other(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], base: Mapping[str, Tensor], names: Sequence[str]
) -> str | None:
    """The first tensor that moved elsewhere."""
    for name in names:
        size = (expected[name] - base[name]).norm()
        if (found[name] - expected[name]).norm() > TOLERANCE * size:
            return name
    return None
