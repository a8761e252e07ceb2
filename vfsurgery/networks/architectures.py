"""Models by written name: ``timm:NAME``, ``torchvision:NAME`` or ``import.path:factory``.

Nothing is downloaded, unless trained weights are asked for.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from vfsurgery.errors import OptionError, did_you_mean, explain

ELSEWHERE = ("hf-hub:", "hf_hub:", "local-dir:")
"""How timm's names of weights begin that come from a hub or a folder."""

FORMS = "timm:NAME, torchvision:NAME or import.path:factory"

MOVED = {f"vfsurgery.{name}": f"vfsurgery.networks.{name}" for name in ("demo", "paper_networks")}
"""Modules of networks by the names that they had at first, which recipes and reports may still have."""


def build_model(spec: str, num_classes: int | None = None, *, pretrained: bool = False, **others: Any) -> nn.Module:
    """Build a model from its written name, with random weights or with those that its library publishes.

    ``import.path:factory`` imports and calls code: write only names whose code you trust.

    Args:
        spec: ``timm:NAME``, ``torchvision:NAME``, or ``import.path:factory`` for any callable that returns a module.
        num_classes: Passed on when given; else the architecture's own default counts.
        pretrained: Take timm's weights of that name, or torchvision's default ones; fetched where they are not there.
            timm's names may then begin with ``hf-hub:`` or ``local-dir:``, as in ``timm:hf-hub:timm/resnet18.a1_in1k``.
        others: Passed on to the architecture's constructor.

    Raises:
        OptionError: The name is unknown, or the factory cannot be imported or called, or returns no module; or there
            are no trained weights.

    >>> build_model("torchvision:resnet18", num_classes=10).fc.out_features
    10
    """
    source, separator, name = spec.partition(":")
    if not (source and separator and name):
        raise OptionError(explain(f"{spec!r} does not name a model", remedy=f"write {FORMS}"))
    options: dict[str, Any] = others if num_classes is None else {"num_classes": num_classes, **others}
    try:
        model = _builder(source, pretrained)(name, options)
    except (TypeError, ValueError, KeyError, AssertionError, RuntimeError) as error:
        if not options or isinstance(error, OptionError):
            raise
        raise _wrong_options(spec, options, error) from error
    if not isinstance(model, nn.Module):
        raise OptionError(explain(f"{spec} returns a {type(model).__name__}, not a torch.nn.Module"))
    return model


def _wrong_options(spec: str, options: Mapping[str, Any], error: Exception) -> OptionError:
    """Constructors raise nearly anything on options that they do not know, or values that they cannot take."""
    cause = str(error).strip().partition("\n")[0] or type(error).__name__
    given = ", ".join(f"{name}={value!r}" for name, value in options.items())
    unknown = re.search(r"unexpected keyword argument '(\w+)'", cause)
    remedy = f"{spec} has no option {unknown[1]!r}: leave it out, or mend its spelling" if unknown else None
    return OptionError(explain(f"{spec} cannot be built with the options {given}", cause=cause, remedy=remedy))


def _builder(source: str, pretrained: bool) -> Callable[[str, dict[str, Any]], object]:
    if source == "timm":
        return partial(_build_timm, pretrained)
    if source == "torchvision":
        return partial(_build_torchvision, pretrained)
    if pretrained:
        raise OptionError(
            explain(f"nobody publishes weights of a model of {source}", remedy="load a checkpoint, or train it")
        )
    return partial(_call_factory, source)


def _build_timm(pretrained: bool, name: str, options: dict[str, Any]) -> object:
    import timm

    elsewhere = name.startswith(ELSEWHERE)
    if elsewhere and not pretrained:  # create_model downloads the configuration of such names
        raise OptionError(
            explain(f"{name} names published weights", remedy="ask for them with pretrained: true, or name a model")
        )
    if not elsewhere and not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except (RuntimeError, OSError, ValueError) as error:  # an unknown tag, as in resnet18.nonsense; no network; no file
        cause = str(error).partition("\n")[0]
        raise OptionError(explain(f"timm cannot build {name!r}", cause=cause)) from error


def _build_torchvision(pretrained: bool, name: str, options: dict[str, Any]) -> object:
    from torchvision import models

    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    builder = models.get_model_builder(name)
    keywords: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None, **options}
    if "weights_backbone" in inspect.signature(builder).parameters:
        keywords["weights_backbone"] = None  # the default of segmentation and detection models is a download
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # googlenet and inception_v3 on their default initialization
        try:
            return builder(**keywords)
        except (OSError, ValueError) as error:  # no network, or other classes than the weights have
            if not pretrained:
                raise
            raise OptionError(explain(f"torchvision has no weights for {name!r}", cause=error)) from error


def find_factory(path: str, name: str, kind: str, forms: str) -> Callable[..., Any]:
    """What ``import path; path.name`` is, for names of models and of data.

    Raises:
        OptionError: It cannot be imported, or is nothing that can be called.
    """
    try:
        if not all(part.isidentifier() for part in path.split(".")):
            raise ImportError(f"{path!r} is no import path")
        module = importlib.import_module(path)
    except ImportError as error:
        fact = f"cannot import the {kind} {path}:{name}"
        remedy = f"write {MOVED[path]}:{name}, which is its name now" if path in MOVED else f"write {forms}"
        raise OptionError(explain(fact, cause=error, remedy=remedy)) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise OptionError(explain(f"{path} has no {kind} factory {name!r}", remedy=did_you_mean(name, known)))
    return factory


def _call_factory(path: str, name: str, options: dict[str, Any]) -> object:
    factory, spec = find_factory(path, name, "model", FORMS), f"{path}:{name}"
    try:
        inspect.signature(factory).bind(**options)
    except (TypeError, ValueError) as error:
        wanted = ", ".join(f"{key}={value}" for key, value in options.items())
        raise OptionError(explain(f"{spec} cannot be called as {name}({wanted})", cause=error)) from error
    return factory(**options)


def _unknown(source: str, name: str, known: Iterable[str]) -> OptionError:
    """A library has over a thousand names: show the nearest few, and say how to list all."""
    near = difflib.get_close_matches(name, list(known), n=5, cutoff=0.5)
    remedy = f"nearest names: {', '.join(near)}" if near else "no name is near it"
    lister = "timm.list_models()" if source == "timm" else "torchvision.models.list_models()"
    return OptionError(explain(f"{source} has no model {name!r}", remedy=f"{remedy}; {lister} names all"))
