"""Why a forward could not be recorded: the module, the line of the user's code, and what to do."""

from __future__ import annotations

import linecache
from collections.abc import Iterator, Sequence
from types import FrameType, TracebackType

from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from vfsurgery.errors import TraceError, explain

GENERATED = ("<eval_with_key", "<frozen", "<string>")
"""How names of files begin that nobody wrote: fx's code, Python's own, and that of data classes."""
LIBRARIES = ("torch.", "vfsurgery.tracing")
"""Beginnings of names of modules whose lines are not the user's."""


def not_recorded(model: nn.Module, error: Exception, path: str, inputs: Sequence[Tensor]) -> TraceError:
    """The error about a forward that raises while it is recorded.

    Args:
        model: The model.
        error: What was raised.
        path: The innermost module that was running.
        inputs: What the model was recorded on.
    """
    fact, remedy = str(error), ""
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        number = isinstance(error, DataDependentOutputException)
        asked = "asks for a number that depends" if number else "makes a tensor whose size depends"
        fact = f"its forward {asked} on the values of its input"
        choice = "write the choice with torch.where or a mask"
        kept = f"keep the module as one node: leaf={path!r}" if path else "move it into a module and name that in leaf="
        remedy = f"a graph computes the same for all inputs: {choice}, or {kept}"
    raised = f"{type(error).__name__}: {error}" if remedy else None
    return TraceError(
        explain(
            f"cannot trace {type(model).__name__}: {fact}",
            module=path or f"the model itself, a {type(model).__name__}",
            line=_line_of(error.__traceback__),
            inputs=", ".join(str(tuple(x.shape)) for x in inputs),
            because=raised,
            remedy=remedy
            or "check that the model runs on inputs of this shape, or pass example_inputs=; name a module that cannot "
            "be recorded in leaf= to keep it as one node",
        )
    )


def is_users(frame: FrameType) -> bool:
    """Whether a frame runs code that is neither torch's nor of this package."""
    made = frame.f_code.co_filename.startswith(GENERATED)
    return not made and not f"{frame.f_globals.get('__name__', '')}.".startswith(LIBRARIES)


def shown(frame: FrameType, line: int) -> str:
    """A line of code as a traceback shows it."""
    name = frame.f_code.co_filename
    code = linecache.getline(name, line, frame.f_globals).strip()
    return f'File "{name}", line {line}, in {frame.f_code.co_name}\n    {code}'


def _line_of(traceback: TracebackType | None) -> str | None:
    """The last line of the user's code on the way to an error."""
    found = [step for step in _steps(traceback) if is_users(step.tb_frame)]
    return shown(found[-1].tb_frame, found[-1].tb_lineno).replace("\n   ", ":") if found else None


def _steps(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next
