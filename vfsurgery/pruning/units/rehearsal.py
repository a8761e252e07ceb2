"""Whether a smaller model runs at all, seen without its weights: the forward itself, on shapes alone.

Most forwards read sizes off their inputs; some hold them as constants (a number of heads, a window, a chunk). Which
groups can be cut is found by trying all of them together, and where that fails by halves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vfsurgery.discovery.verification import several, without_chance
from vfsurgery.errors import SurgeryError
from vfsurgery.pruning.units.cut import Cut
from vfsurgery.pruning.units.resize import Resizer
from vfsurgery.tracing.borrowed import borrowed
from vfsurgery.tracing.copies import copied
from vfsurgery.tracing.hooks import ONLOOKERS
from vfsurgery.tracing.modes import in_training
from vfsurgery.tracing.sources import canonical_state
from vfsurgery.tracing.transformers import one_by_one
from vfsurgery.tracing.unhooked import take_away
from vfsurgery.tracing.values import tensors_of


class Rehearsal:
    """Runs smaller versions of a model without weights and says what goes wrong.

    On the meta device, or, where a forward makes tensors elsewhere, on fake tensors, which takes several times as long;
    where it looks at values (``int(self.pointer)``), as it is. In training, too, where that is another graph.
    """

    def __init__(self, model: nn.Module, graph_module: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
        given = {False: tuple(inputs)} if in_training(graph_module) is None else {False: inputs, True: several(inputs)}
        onlookers = graph_module.meta.get(ONLOOKERS, ())
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        ways = (contextlib.nullcontext(), torch.device("meta")), (fake, None), (contextlib.nullcontext(), None)
        for mode, device in ways:
            try:
                self._prepare(model, given, mode, device, onlookers)
                break
            except Exception:  # whatever a forward may raise without values; the last way is that of a real run
                if (mode, device) == ways[-1]:
                    raise
        self._resizer = Resizer.of(self._hollow, graph_module)
        self._state = canonical_state(self._hollow)

    def failure(self, cut: Cut) -> str | None:
        """Why the model cannot be cut so: what its forward raises, or another shape of its outputs; else ``None``."""
        smaller: nn.Module = self._hollow
        try:
            with self._mode:
                smaller = self._resizer.shrink(cut, self._state)
            shapes = self._run(smaller)
        except Exception as error:  # whatever a forward may raise when sizes do not fit
            return reason_of(error, smaller)
        return None if shapes == self._expected else f"outputs would be {shapes} and not {self._expected}"

    def _prepare(
        self,
        model: nn.Module,
        given: Mapping[bool, Sequence[Tensor]],
        mode: AbstractContextManager[Any],
        device: torch.device | None,
        onlookers: Sequence[tuple[str, str, int]],
    ) -> None:
        self._mode = mode
        memo: dict[int, Any] = {}
        real = device is None and not isinstance(mode, FakeTensorMode)
        with mode:
            for tensor in () if real else (*model.parameters(), *model.buffers()):
                hollow = torch.empty_like(tensor, device=device)
                memo[id(tensor)] = nn.Parameter(hollow, False) if isinstance(tensor, nn.Parameter) else hollow
            self._inputs = {
                training: [tensor if real else torch.empty_like(tensor, device=device) for tensor in inputs]
                for training, inputs in given.items()
            }
        self._hollow = copied(model, memo).eval()
        take_away(self._hollow, onlookers)
        self._expected = self._run(self._hollow)

    def _run(self, model: nn.Module) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        for training, inputs in self._inputs.items():
            with borrowed(model, {}), torch.no_grad(), self._mode, one_by_one(), without_chance(training):
                model.train(training)
                shapes += [tuple(tensor.shape) for tensor in tensors_of(model(*inputs))]
        return shapes


def largest_working(
    names: Sequence[str], failure: Callable[[Sequence[str]], str | None]
) -> tuple[list[str], dict[str, str]]:
    """Which names work together, and why each of the others does not.

    All are tried at once; where that fails, each half is searched, and what works of both is joined again, one by one
    if it must be. So a few culprits among many cost a logarithm of tries each.

    >>> largest_working("abcd", lambda names: "c is odd" if "c" in names else None)
    (['a', 'b', 'd'], {'c': 'c is odd'})
    """
    reason = failure(names) if names else None
    if reason is None:
        return list(names), {}
    if len(names) == 1:
        return [], {names[0]: reason}
    half = len(names) // 2
    left, left_out = largest_working(names[:half], failure)
    right, right_out = largest_working(names[half:], failure)
    left_out |= right_out
    if not left or not right or failure([*left, *right]) is None:
        return left + right, left_out
    for name in right:
        reason = failure([*left, name])
        if reason is None:
            left.append(name)
        else:
            left_out[name] = f"not together with others: {reason}"
    return left, left_out


def reason_of(error: BaseException, model: nn.Module) -> str:
    """What a forward raised in one line, with the path of the innermost module that it was in."""
    paths = {id(module): path for path, module in model.named_modules()}
    where, trace = "", error.__traceback__
    while trace is not None:
        where = paths.get(id(trace.tb_frame.f_locals.get("self")), "") or where
        trace = trace.tb_next
    text = str(error).strip().split("\n")[0] or type(error).__name__
    text = text if isinstance(error, SurgeryError | RuntimeError) else f"{type(error).__name__}: {text}"
    return f"{where}: {text}" if where else text
