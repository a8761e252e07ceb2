"""Training without chance: dropout off and random draws the same for all units, so that two runs can be compared."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DRAWN: dict[str, Callable[..., float]] = {
    **dict.fromkeys(("bernoulli", "bernoulli_"), lambda *_: 1.0),
    **dict.fromkeys(("rand", "rand_like"), lambda *_: 0.5),
    **dict.fromkeys(("randn", "randn_like"), lambda *_: 1.0),
    **dict.fromkeys(("uniform", "uniform_"), lambda _, low=0.0, high=1.0, *rest: (low + high) / 2),
    **dict.fromkeys(("_sample_dirichlet",), lambda *_: 0.5),
    **dict.fromkeys(("_standard_gamma", "poisson", "binomial"), lambda *_: 1.0),
    "randint": lambda low, high, *_: low if isinstance(high, int) else 0,
    **dict.fromkeys(("cauchy_", "exponential_", "geometric_", "log_normal_", "normal", "normal_"), lambda *_: 1.0),
}
"""What takes the place of numbers that ops of aten draw, each by itself, given the op's arguments."""


class Certain(TorchDispatchMode):
    """Gives all numbers of a random draw one value, which no order or number of units can tell from another.

    A mask of dropout is all ones, and a random order the last one first. Dropout inside of fused ops is turned off.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op of aten."""
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        for place, argument in enumerate(func._schema.arguments):
            off = {"dropout_p": 0.0} if argument.name == "dropout_p" else {}
            off |= {"training": False} if argument.name == "training" and name.startswith("rrelu") else {}
            if off and place < len(args):
                args = (*args[:place], off[argument.name], *args[place + 1 :])
            elif off and argument.name in kwargs:
                kwargs = {**kwargs, **off}
        result = func(*args, **kwargs)
        if name == "randperm":
            result.copy_(torch.arange(len(result), device=result.device).flip(0))
        if name in DRAWN and isinstance(result, Tensor):
            result.fill_(DRAWN[name](*args))
        return result


@contextmanager
def without_chance(training: bool = True) -> Generator[None]:
    """Take out what training leaves to chance; random states are afterwards what they were. Or do nothing.

    >>> with without_chance():
    ...     torch.nn.functional.dropout(torch.ones(4), 0.5)
    tensor([2., 2., 2., 2.])
    """
    if not training:
        yield
        return
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices), Certain():
            random.seed(0)
            np.random.seed(0)
            torch.manual_seed(0)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def several(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Inputs for training: of a single image, that image and another one, since BatchNorm wants several.

    >>> several([torch.ones(1, 3), torch.ones(1, 2)])[0].shape, several([torch.ones(4, 3)])[0].shape
    (torch.Size([2, 3]), torch.Size([4, 3]))
    """
    if not all(x.ndim and len(x) == 1 for x in inputs):
        return tuple(inputs)
    generator = torch.Generator().manual_seed(0)

    def other(x: Tensor) -> Tensor:
        order = torch.randperm(x.numel(), generator=generator).to(x.device)
        return x.flatten()[order].view_as(x)

    return tuple(torch.cat([x, other(x)]) for x in inputs)
