"""Every error vfsurgery raises on purpose, in one small tree under :class:`SurgeryError`.

A message has a fact in its first line, then indented ``label  text`` lines: where it happened (module path, node,
shapes, group) and, last, the remedy. :func:`explain` lays those lines out, so that all messages look alike.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Sequence


class SurgeryError(Exception):
    """Base of all errors that vfsurgery raises on purpose."""


class SurgeryWarning(UserWarning):
    """What was asked for was done, and is probably not what is wanted."""


class TraceError(SurgeryError):
    """The model's forward could not be recorded as a graph."""


class HookError(SurgeryError):
    """A forward hook does what cannot be followed; names the hook, its module, and the way out."""


class ExampleInputError(SurgeryError):
    """No example input was given and none could be derived from the model."""


class UnknownOpError(SurgeryError):
    """An op without a coupling rule was met under ``strict=True``."""


class IncompatibleModelsError(SurgeryError):
    """The source models are not the same architecture."""


class InvalidWeightsError(SurgeryError):
    """A model holds NaN or infinite values, or shares storage where it must not."""


class CertificateError(SurgeryError):
    """An aligned source does not compute what the source computes, or the result nothing finite; it is refused."""


class DataError(SurgeryError, ValueError):
    """Calibration or evaluation data is empty, unlabeled or of the wrong shape."""


class OptionError(SurgeryError, ValueError):
    """An argument, a recipe key or a registered name is not acceptable."""


class CheckpointError(SurgeryError):
    """A checkpoint is missing, damaged, or of a kind that would run code when loaded."""


class HubError(SurgeryError):
    """Something could not be put on the Hugging Face Hub."""


class RecipeError(OptionError):
    """A recipe file does not describe a runnable recipe."""


class PluginWarning(UserWarning):
    """An installed plugin could not be imported and was left out."""


def explain(fact: str, **details: object) -> str:
    """Lay out one message: the fact, then one aligned line per detail that is not ``None``.

    >>> print(explain("no coupling rule for torch.frexp", node="frexp_2", remedy="register @rule(torch.frexp)"))
    no coupling rule for torch.frexp
      node    frexp_2
      remedy  register @rule(torch.frexp)
    """
    shown = {label: str(text) for label, text in details.items() if text is not None}
    width = max(map(len, shown), default=0)
    return "\n".join([fact, *(f"  {label:<{width}}  {text}" for label, text in shown.items())])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return what is accepted instead of ``word``: the nearest spelling first, then all of them.

    >>> did_you_mean("weigths", ["weights", "activations"])
    "did you mean 'weights'? accepted: activations, weights"
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    accepted = f"accepted: {', '.join(known)}" if known else "nothing is accepted here"
    return f"did you mean {close[0]!r}? {accepted}" if close else accepted


def refuse_unknown(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a name that is not known, and offer the nearest spelling.

    Raises:
        OptionError: one is not.

    >>> refuse_unknown("row", ["mergd"], ["a", "merged"])
    Traceback (most recent call last):
    vfsurgery.errors.OptionError: unknown row 'mergd'; did you mean 'merged'? accepted: a, merged
    """
    known = list(known)
    for name in names:
        if name not in known:
            raise OptionError(f"unknown {kind} {name!r}; {did_you_mean(name, known)}")


def refuse_repeated(kind: str, names: Sequence[str]) -> None:
    """Refuse two entries of one name.

    Raises:
        OptionError: two have.

    >>> refuse_repeated("row", ["a", "b"])
    """
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise OptionError(f"two entries have the {kind} name {repeated[0]!r}")


def warn(message: str) -> None:
    """Warn with a :class:`SurgeryWarning` at the line of the user's code, which lies outside of this library.

    >>> with warnings.catch_warnings(record=True) as seen:
    ...     warnings.simplefilter("always")
    ...     warn("this loses accuracy; pass data=")
    >>> seen[0].category.__name__, str(seen[0].message)
    ('SurgeryWarning', 'this loses accuracy; pass data=')
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and f"{frame.f_globals.get('__name__', '')}.".startswith(f"{__package__}."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, SurgeryWarning, stacklevel=level)
