"""What code must leave alone while it runs: tensors of models, and global random states."""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from vfsurgery.errors import explain


def expect(holds: bool, fact: str, **details: object) -> None:
    """Fail with a message laid out like all others."""
    if not holds:
        raise AssertionError(explain(fact, **details))


def copied_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def first_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> str | None:
    """The first entry that differs between two states in any bit, dtype or device; ``None`` if none does."""
    for name in [*before, *(name for name in after if name not in before)]:
        pair = before.get(name), after.get(name)
        if pair[0] is None or pair[1] is None or not _same(pair[0], pair[1]):
            return name
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


@contextmanager
def untouched(what: str, models: Sequence[nn.Module]) -> Generator[None]:
    """Expect that the body changes neither these models nor a global random state."""
    states = [copied_state(model) for model in models]
    modes = [[module.training for module in model.modules()] for model in models]
    randomness = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    yield
    for number, (model, state) in enumerate(zip(models, states, strict=True)):
        changed = first_change(state, model.state_dict())
        expect(
            changed is None,
            f"{what} changed a model that it was to read only",
            model=f"number {number}, a {type(model).__name__}",
            tensor=changed,
            remedy="work on copies; tensors of sources are shared with the user",
        )
    same_modes = modes == [[module.training for module in model.modules()] for model in models]
    expect(same_modes, f"{what} left a model in another training mode", remedy="use eval_mode, or put it back")
    expect(
        torch.equal(torch.get_rng_state(), randomness[0]) and random.getstate() == randomness[1],
        f"{what} used torch's or Python's global random state",
        remedy="draw from the generator that context, problem or work has",
    )
    expect(
        str(np.random.get_state()) == randomness[2],
        f"{what} used numpy's global random state",
        remedy="draw from context.generator(), or make a numpy.random.default_rng of its own",
    )
