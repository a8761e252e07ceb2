"""``prune_units``: from a trained network to a smaller one of the same class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from vfsurgery.data.batches import Data
from vfsurgery.errors import DataError, OptionError, did_you_mean, explain
from vfsurgery.passes.costs import cost_of
from vfsurgery.passes.normalizations import Renormalization, normalizations
from vfsurgery.pruning.units.candidates import excluded
from vfsurgery.pruning.units.cut import Cut
from vfsurgery.pruning.units.quota import Quota
from vfsurgery.pruning.units.report import GroupCut, LeftWhole, UnitPruneReport
from vfsurgery.pruning.units.restore import check_restoring
from vfsurgery.pruning.units.saliency import Saliency
from vfsurgery.pruning.units.work import Shrinking
from vfsurgery.records.results import remember
from vfsurgery.tracing.examples import ExampleInputs
from vfsurgery.tracing.sources import eval_mode
from vfsurgery.tracing.wrappers import network

SALIENCIES, SCOPES, REMOVALS = ("magnitude", "activation"), ("group", "global"), ("drop", "fold")


def prune_units(
    model: nn.Module,
    fraction: float,
    *,
    saliency: str | Saliency = "magnitude",
    scope: str = "group",
    removed: str = "drop",
    rotate: bool = False,
    data: Data | str | None = None,
    renormalize: Renormalization = "auto",
    exclude: str | Sequence[str] = (),
    floor: float = 0.1,
    multiple_of: int = 1,
    example_inputs: ExampleInputs | None = None,
    progress: bool = True,
) -> nn.Module:
    """Remove whole units (channels, neurons) from a network, in all places where they lie: a smaller plain network.

    Units are removed from permutation groups, so all layers still fit together. Groups whose units the forward cannot
    lose (it holds their number as a constant) are found by trying it without weights, and left whole. The result is
    certified to compute what the network computes with the removed units silent, and then renormalized on ``data``.
    :func:`~vfsurgery.report_of` the result has units, parameters, FLOPs, and why groups were left whole.

    Args:
        model: Any network that :func:`~vfsurgery.trace` records. It is not changed.
        fraction: Share of units to remove, from 0 up to but not including 1. At least one unit of a group stays.
        saliency: Which units matter: ``"magnitude"``, the L2 norm of all weights that write a unit;
            ``"activation"``, the mean square of its activations on ``data``; or a
            function from a group and all parameters by name to one number per unit, ``(units,)``.
        scope: ``"group"`` removes ``fraction`` of every group; ``"global"`` ranks the units of all groups together,
            each saliency divided by its group's mean, and leaves each group at least the share ``floor``.
        removed: ``"drop"`` leaves removed units out; ``"fold"`` merges each into the survivor that it is most
            correlated with on ``data``, at every layer that reads it (ZipIt!'s map with one source).
        rotate: Remove principal directions of streams between LayerNorms or RMSNorms, and not single units (SliceGPT,
            Ashkboos et al., ICLR 2024): those in which ``data`` has the least energy behind the norms, or without data
            what weights write. With ``removed="fold"`` those that stay stand in for them, by least squares. Other
            groups lose units as they do without it.
        data: Calibration images, as for :func:`~vfsurgery.merge`; ``"imagined"`` for images made from the model.
        renormalize: How statistics of the units that are left are restored on ``data``: ``"reset"``, ``"repair"``,
            ``"rescale"``, ``"reshift"``, a pass, ``None``, or ``"auto"``: what suits the architecture, and nothing
            without data.
        exclude: Groups that stay whole: names of groups, or modules or parameters that write units, or patterns of
            those, as in ``("conv1", "layer4.*")``.
        floor: With ``scope="global"``, the share of its units that every group keeps.
        multiple_of: The units that a group (or a block of a nested one) keeps are rounded up to a multiple of this.
        example_inputs: As for :func:`~vfsurgery.trace`; by default the shape of ``data``'s images.
        progress: Show bars for work that takes over a second.

    Returns:
        A model of the same class and training mode, with tensors of its own. Beside the original, memory is needed for
        one copy of it while the certificate is made.

    Raises:
        OptionError: an argument is not acceptable, hooks or a parametrization compute a weight, or with ``rotate`` the
            network has no such stream, or its weights are sparse or in half precision.
        DataError: data is missing where it is needed, or does not fit the model.
        TraceError: the forward cannot be recorded as an fx graph.
        InvalidWeightsError: a weight is NaN or infinite.
        CertificateError: the forward gives different outputs each time it runs, or others once it is rotated.

    >>> net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
    >>> smaller = prune_units(net, 0.3, example_inputs=torch.randn(2, 4))
    >>> [tuple(weight.shape) for weight in smaller.parameters()]
    [(7, 4), (7,), (2, 7), (2,)]
    """
    _check_options(fraction, saliency, scope, removed, floor, multiple_of)
    if data is None and (saliency == "activation" or removed == "fold"):
        option = "saliency='activation'" if saliency == "activation" else "removed='fold'"
        raise DataError(
            explain(f"{option} needs data", remedy="pass data=, or data='imagined', or leave the option out")
        )
    model = network(model)
    work = Shrinking.prepare(model, data, example_inputs, progress)
    restoring = None if data is None and renormalize == "auto" else renormalize
    passes = normalizations(restoring, work.source.graph_module, work.groups, work.data is not None)
    check_restoring(passes)
    devices = [work.source.device] if work.source.device.type == "cuda" else []
    quota = Quota(fraction, scope, floor, multiple_of)
    with torch.random.fork_rng(devices), eval_mode(work.source.model, work.source.graph_module):
        work.score(saliency)
        if rotate:
            work.find_directions(saliency, removed == "fold")
        cut = work.choose(quota, excluded(work.groups, exclude))
        work.rotate(cut)
        if removed == "fold":
            work.correlate()
        cut, smaller, certificate = work.make(cut)
        restored = work.restore(cut, smaller, passes)
        with work.clock("costs"):
            costs = [cost_of(each, work.inputs) for each in (work.source.model, smaller)]
    for before, after in zip(model.modules(), smaller.modules(), strict=True):
        after.training = before.training
    name = saliency if isinstance(saliency, str) else getattr(saliency, "__name__", type(saliency).__name__)
    cuts, whole = _outcome(work, cut)
    report = UnitPruneReport(
        model=type(model).__name__,
        fraction=fraction,
        saliency=name,
        scope=scope,
        removed=removed,
        renormalize=tuple(step.name for step in passes) if restored else (),
        groups=cuts,
        left_whole=whole,
        before=costs[0],
        after=costs[1],
        certificate=certificate,
        not_folded=work.not_folded(cut) if removed == "fold" else (),
        rotated=work.energies(cut),
        created_biases=tuple(restored.created_biases) if restored else (),
        notes=(*work.groups.notes, *work.said_of_rotation(cut), *(restored.notes if restored else ())),
        seconds=tuple(work.seconds),
    )
    remember(smaller, report)
    return smaller


def _outcome(work: Shrinking, cut: Cut) -> tuple[tuple[GroupCut, ...], tuple[LeftWhole, ...]]:
    """What became of each group."""
    cuts = [
        GroupCut(group.name, group.label, group.units, int(kept.sum()), tuple(kept.nonzero()[0].tolist()))
        for group in work.groups
        if (kept := cut.kept.get(group.name)) is not None
    ]
    whole = [
        LeftWhole(group.name, group.label, group.units, reason)
        for group in work.groups
        if (reason := work.whole.get(group.name)) is not None
    ]
    return tuple(cuts), tuple(whole)


def _check_options(
    fraction: float, saliency: str | Saliency, scope: str, removed: str, floor: float, multiple_of: int
) -> None:
    for name, value in (("fraction", fraction), ("floor", floor)):
        if not 0 <= value < 1:
            remedy = "0.3 removes three units of ten" if name == "fraction" else "0.1 keeps a tenth of each group"
            raise OptionError(explain(f"{name} must lie in [0, 1) but is {value}", remedy=remedy))
    if multiple_of < 1:
        raise OptionError(explain(f"multiple_of must be at least 1 but is {multiple_of}", remedy="1 rounds nothing"))
    choices = (("saliency", saliency, SALIENCIES), ("scope", scope, SCOPES), ("removed", removed, REMOVALS))
    for name, value, accepted in choices:
        if not callable(value) and value not in accepted:
            remedy = did_you_mean(str(value), accepted) + (", or a function" if name == "saliency" else "")
            raise OptionError(explain(f"{name}={value!r} is not known", remedy=remedy))
