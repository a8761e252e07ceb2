"""The conformance suite of pruners."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vfsurgery.pruning import PRUNERS, Masks, Pruner, PruneReport, prune
from vfsurgery.records.results import report_of
from vfsurgery.testing.nets import CLASSES, NETS, example_images, make_net
from vfsurgery.testing.watching import expect, first_change, untouched

IMAGES, SPARSITY = 512, 0.5
WAYS: tuple[dict[str, Any], ...] = (
    *({"sparsity": SPARSITY, "scope": scope} for scope in ("global", "layer", "row")),
    {"pattern": "1:2"},
)
"""Whatever entries compete, a pruner only says how salient each is."""


def check_pruner(pruner: Pruner, *, nets: Sequence[str] | None = None, registered: bool = True) -> None:
    """Check all that the library expects of a pruner, on several tiny networks.

    It has a name and says whether it needs data, with labels or without; prunes in every scope and in a pattern; gives
    the same again; leaves no fewer zeros than were asked for, and those that were there already; keeps what it keeps
    finite; and leaves the model and the global random states alone.

    Args:
        pruner: An instance.
        nets: Names of :data:`~vfsurgery.testing.NETS`; all by default.
        registered: Whether its name is to be found in the registry.

    Raises:
        AssertionError: something does not hold; the message says what.
        SurgeryError: what it yields is refused, as of another shape or NaN.

    >>> from vfsurgery.pruning import Wanda
    >>> check_pruner(Wanda(), nets=["chain"])
    """
    expect(not isinstance(pruner, type), f"{pruner!r} is a class", remedy="give check_pruner an instance")
    expect(isinstance(pruner, Pruner), f"{pruner!r} is no pruner", remedy="subclass vfsurgery.Pruner")
    if registered:
        expect(
            pruner.name in PRUNERS,
            f"pruner {pruner.name!r} is not registered under its name",
            remedy='put @PRUNERS.register("...") over it, or check_pruner(..., registered=False)',
        )
    for name in NETS if nets is None else nets:
        for way in WAYS:
            _check_on(pruner, name, way)


def _check_on(pruner: Pruner, net: str, way: dict[str, Any]) -> None:
    where = f"pruner {pruner.name!r} on {net!r}, {', '.join(f'{key} {value}' for key, value in way.items())}"
    model, images = make_net(net), example_images(IMAGES)
    sparse = prune(model, 0.2, method="random")  # has zeros that have to stay
    data = [(images, torch.arange(IMAGES) % CLASSES)] if pruner.needs_data else None
    with untouched(where, [sparse]):
        first, second = (_pruned(pruner, sparse, data, way) for _ in range(2))
    expect(
        first_change(first.state_dict(), second.state_dict()) is None,
        f"{where} gives other weights the second time",
        remedy="draw from work.generator",
    )
    _check_zeros(where, sparse, first)
    if pruner.needs_data:
        _pruned(pruner, sparse, images, way)  # data may have no labels


def _pruned(pruner: Pruner, model: nn.Module, data: Any, way: dict[str, Any]) -> nn.Module:
    return prune(model, method=pruner, data=data, allow_empty=True, progress=False, **way)


def _check_zeros(where: str, before: nn.Module, after: nn.Module) -> None:
    kept = Masks.of(after)
    for name, mask in Masks.of(before).items():
        expect(not bool((kept[name] & ~mask).any()), f"{where} brings pruned entries back", weight=name)
        finite = bool(after.get_parameter(name).isfinite().all())
        expect(finite, f"{where} gives values that are not finite", weight=name)
    report = report_of(after)
    assert isinstance(report, PruneReport)
    judged = [layer for layer in report.layers if not layer.dense]
    zeros, count = sum(layer.zeros for layer in judged), sum(layer.entries for layer in judged)
    expect(zeros >= (SPARSITY - 0.02) * count > 0, f"{where} leaves {zeros} zeros among {count} weights")
