"""The conformance suite of passes."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from vfsurgery.errors import OptionError
from vfsurgery.passes import PASSES, Context, Pass
from vfsurgery.passes.running import PassReport, run_passes
from vfsurgery.records.options import build, written
from vfsurgery.records.report import Report
from vfsurgery.records.results import report_of
from vfsurgery.testing.nets import NETS, example_images, make_net
from vfsurgery.testing.watching import copied_state, expect, first_change, untouched

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
BATCHES = (1, 7)
IMAGES = 32


def check_pass(
    step: Pass, *, nets: Sequence[str] | None = None, dtypes: Sequence[torch.dtype] = DTYPES, registered: bool = True
) -> None:
    """Check all that the library expects of a pass, on several tiny networks.

    - Options: a frozen dataclass, hashable, equal to what is built from its options as a mapping; pickles; registered
      under its name; ``after`` and ``before`` name passes that exist.
    - Results: the graph is valid and runs for batches of 1 and 7 and in every dtype; outputs, parameters and buffers
      keep dtype and device; ``state_dict`` keys are the model's and what ``context.created_biases`` lists, unless the
      graph itself was changed; deep copies and pickles compute the same; twice the same pass gives the same bits.
    - Manners: sources stay untouched, training modes too, no global random state is used.
    - Promises: ``preserves_function`` holds, if declared.

    A pass may decline a network with an :class:`~vfsurgery.errors.OptionError` that says why, but not all of them.

    Args:
        step: The pass, with the options to test.
        nets: Names of :data:`~vfsurgery.testing.NETS`; all by default.
        dtypes: In which precisions.
        registered: Whether its name is to be found in the registry.

    Raises:
        AssertionError: something does not hold; the message says what.
        CertificateError: the pass preserves the function by its word alone.

    >>> from vfsurgery.passes import Reset
    >>> check_pass(Reset(), nets=["residual"], dtypes=[torch.float32])
    """
    _check_options(step, registered)
    chosen = list(NETS) if nets is None else list(nets)
    reasons: dict[str, str] = {}
    for name in chosen:
        for dtype in dtypes:
            reason = _check_on(step, name, dtype)
            if reason is not None:
                reasons[name] = reason
    expect(
        len(reasons) < len(chosen),
        f"pass {step.name!r} declines all networks of the suite",
        **{name: reason.partition("\n")[0] for name, reason in reasons.items()},
        remedy="test it with options that suit one of them, or name it: check_pass(..., nets=[...])",
    )


def _check_options(step: Pass, registered: bool) -> None:
    name, kind = getattr(step, "name", None), type(step)
    expect(isinstance(step, Pass), f"{step!r} is no Pass", remedy="give check_pass an instance: MyPass()")
    expect(isinstance(name, str) and bool(name), f"{kind.__name__} has no name", remedy='name: ClassVar[str] = "..."')
    frozen = dataclasses.is_dataclass(step) and getattr(kind, "__dataclass_params__").frozen  # noqa: B009
    expect(frozen, f"pass {name!r} is no frozen dataclass", remedy="@dataclass(frozen=True, kw_only=True)")
    try:
        hash(step)
    except TypeError as error:
        expect(False, f"pass {name!r} cannot be hashed", because=error, remedy="use tuples for lists")
    expect(copy.deepcopy(step) == step, f"pass {name!r} does not equal its copy", remedy="compare options by value")
    mapping = written(step)
    rebuilt = build(kind, mapping)
    expect(rebuilt == step, f"pass {name!r} is another one when read from its options", options=mapping, found=rebuilt)
    if registered:
        expect(
            step.name in PASSES and PASSES[step.name] is kind,
            f"pass {name!r} is not registered under its name",
            remedy="put @register_pass over it, or check_pass(..., registered=False)",
        )
    for other in (*step.after, *step.before):
        expect(other in PASSES, f"pass {name!r} stands after or before a pass that does not exist", name=other)
    try:
        again = pickle.loads(pickle.dumps(step))
    except Exception as error:
        raise AssertionError(f"pass {name!r} cannot be pickled: {error}") from error
    expect(again == step, f"pass {name!r} does not equal its pickle")


def _check_on(step: Pass, net: str, dtype: torch.dtype) -> str | None:
    """Check a pass on one network; why it declines it, if it does."""
    where = f"pass {step.name!r} on {net!r} in {str(dtype).removeprefix('torch.')}"
    model, sources = make_net(net).to(dtype), [make_net(net, seed).to(dtype) for seed in (0, 1)]
    model.train()
    data = example_images(IMAGES, dtype=dtype) if step.needs_data or step.holds_out() else None
    arguments: dict[str, Any] = {"sources": sources, "data": data, "example_inputs": example_images(2, dtype=dtype)}
    with untouched(where, [model, *sources]):
        try:
            result = run_passes(model, [_watched(step)], progress=False, **arguments)
        except OptionError as error:
            return str(error)
    report = report_of(result)
    assert isinstance(report, PassReport)
    _check_state(where, model, result, report)
    _check_outputs(where, model.eval(), result.eval(), dtype)
    again = run_passes(model.train(), [step], progress=False, **arguments)
    changed = first_change(copied_state(result), copied_state(again))
    expect(changed is None, f"{where} gives another result the second time", tensor=changed)
    return None


def _watched(step: Pass) -> Pass:
    """The same pass, watched while it runs: ``run_passes`` itself would put global random states back."""
    kind: Any = type(step)

    class Watched(kind):
        __slots__ = ()

        def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
            with untouched(f"pass {step.name!r}", [source.model for source in context.sources]):
                return kind.run(self, graph_module, context)

    twin = copy.copy(step)
    object.__setattr__(twin, "__class__", Watched)
    return twin


def _check_state(where: str, model: nn.Module, result: nn.Module, report: Report) -> None:
    """Keys, dtypes and devices are as before, but for what is declared."""
    assert isinstance(report, PassReport)
    before, after = model.state_dict(), result.state_dict()
    if not report.restructured:
        expect(type(result) is type(model), f"{where} gives a {type(result).__name__}")
        expected = [*before, *(name for name in report.created_biases if name not in before)]
        odd = sorted(set(after) ^ set(expected))
        expect(
            not odd,
            f"{where} changes the state_dict keys",
            keys=", ".join(odd),
            remedy="append new parameters to context.created_biases, or change the graph",
        )
    device = next(iter(before.values())).device
    floats = {tensor.dtype for tensor in before.values() if tensor.is_floating_point()}
    for name, tensor in after.items():
        same = tensor.dtype == before[name].dtype if name in before else tensor.dtype in floats
        expect(
            (same or not tensor.is_floating_point()) and tensor.device == device,
            f"{where} changes dtype or device of a tensor",
            tensor=name,
            found=f"{tensor.dtype} on {tensor.device}",
            remedy="write into tensors with copy_, or make new ones with tensor.new_...(...)",
        )


def _check_outputs(where: str, model: nn.Module, result: nn.Module, dtype: torch.dtype) -> None:
    """The result runs for any batch, and so do its copies."""
    images = found = torch.empty(0)
    for count in BATCHES:
        images = example_images(count, seed=count, dtype=dtype)
        with torch.no_grad():
            expected: Tensor = model(images.clone())
            try:
                found = result(images.clone())
            except Exception as error:
                raise AssertionError(f"{where}: the result does not run for a batch of {count}: {error}") from error
        expect(
            found.shape == expected.shape and found.dtype == expected.dtype,
            f"{where} changes the outputs' shape or dtype for a batch of {count}",
            found=f"{tuple(found.shape)} {found.dtype}",
            expected=f"{tuple(expected.shape)} {expected.dtype}",
        )
        expect(bool(found.isfinite().all()), f"{where} gives outputs that are not finite")
    for kind, copied in (("deep copy", _copied), ("pickle", _pickled)):
        try:
            twin = copied(result)
        except Exception as error:
            raise AssertionError(f"{where}: the result has no {kind}: {error}") from error
        with torch.no_grad():
            same = torch.equal(twin(images.clone()), found)
        expect(same, f"{where}: a {kind} of the result computes something else")


def _copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))
