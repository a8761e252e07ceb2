"""``match`` and ``merge``: check the arguments, plan the work, have it done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from vfsurgery.data.batches import Data
from vfsurgery.errors import OptionError, explain
from vfsurgery.matching import Given, Identity, Orders
from vfsurgery.merging.adapters import with_adapters
from vfsurgery.merging.aligned import match_sources
from vfsurgery.merging.ancestry import (
    Combining,
    Scale,
    check_data,
    fitting_to,
    images_apart,
    plan_combining,
    read_apart,
)
from vfsurgery.merging.arguments import (
    Matchings,
    allows_maps,
    asks_for_images,
    matcher_of,
    networks_of,
    sources_of,
    suiting,
    warn_of_norms,
)
from vfsurgery.merging.budget import Budget, plan_prefix
from vfsurgery.merging.choosing import choose, sensible
from vfsurgery.merging.combined import Terms
from vfsurgery.merging.finished import finish, report_on
from vfsurgery.merging.prepared import group_units, trace_sources
from vfsurgery.merging.shares import Alpha, Weights, equal_shares, plan_shares
from vfsurgery.merging.sparse import plan_masks
from vfsurgery.merging.surveyed import Way, can_judge, plan_survey
from vfsurgery.passes import Pass, Preserve
from vfsurgery.passes.normalizations import Renormalization, normalizations
from vfsurgery.records.results import remember, way_of
from vfsurgery.tracing.examples import ExampleInputs
from vfsurgery.tracing.selection import Leaf
from vfsurgery.tracing.wrappers import as_given


@dataclass(frozen=True)
class Made:
    """How :func:`merge` made a model of two: what ``"auto"`` came to, so that the same can be done with other shares.

    ``alpha`` is the share of b, ``None`` where layers have shares of their own.
    """

    matching: Given
    passes: tuple[Pass, ...]
    preserve: int | Preserve
    masks: str | None
    alpha: float | None


def match(
    a: nn.Module | Sequence[nn.Module],
    b: nn.Module | None = None,
    *,
    data: Data | str | None = None,
    matching: Matchings = "auto",
    symmetries: str = "auto",
    imagine: bool = True,
    example_inputs: ExampleInputs | None = None,
    leaf: Leaf | Sequence[Leaf] = (),
    pins: str | Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> Orders:
    """Find the order of b's units that matches a's; arguments and errors as for :func:`merge`.

    Returns:
        For each group's name the order, ``aligned[r] = b[order[r]]``, or a :class:`~vfsurgery.discovery.maps.UnitMap`.
        A tuple of such mappings for more than two sources (one for each after the first), and for matchers that map the
        first source too (one for each). Hand it to ``matching=Given(...)`` to merge several times with one matching.
    """
    models = networks_of(sources_of(a, b))
    imagine = imagine and asks_for_images(matching)
    matcher_of(matching, imagine or data is not None)
    traced = trace_sources(models, data, example_inputs, leaf=leaf, imagine=imagine, seed=seed, progress=progress)
    grouped = group_units(traced, pins, maps=allows_maps(matching, symmetries))
    matcher = matcher_of(matching, grouped.data is not None)
    zeros = plan_masks(models, None, plan_shares(len(models), 0.5, None).over(grouped.graph_module).overall)
    matcher = suiting(zeros, matching, matcher)
    with grouped.running():
        found = match_sources(plan_survey(grouped, [Way(matcher, ())]), matcher).orders.permutations
    return found[0] if isinstance(found, tuple) and len(found) == 1 else found


def merge(
    a: nn.Module | str | Path | Sequence[nn.Module | str | Path],
    b: nn.Module | None = None,
    *,
    data: Data | Mapping[int, Data] | str | None = None,
    base: nn.Module | Mapping[str, Tensor] | str | None = None,
    combine: Combining | None = None,
    scale: Scale = None,
    alpha: Alpha = 0.5,
    weights: Weights | None = None,
    matching: Matchings = "auto",
    renormalize: Renormalization = "auto",
    preserve: int | str | Preserve = 0,
    max_flops: float | None = None,
    max_params: float | None = None,
    masks: str | None = None,
    symmetries: str = "auto",
    imagine: bool = True,
    example_inputs: ExampleInputs | None = None,
    leaf: Leaf | Sequence[Leaf] = (),
    pins: str | Sequence[str] = (),
    inplace: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Merge separately trained networks of one architecture into one network of that architecture.

    The units of every source are reordered to match those of the first (more than two are also matched to each other:
    see docs/several_sources.md), the weights are averaged, and the statistics that averaging destroys are restored.
    Every reordering is certified: if a source does not compute the same as before, the merge is refused. What was done
    is in :func:`~vfsurgery.records.results.report_of` the result.

    Args:
        a: The first source (the *reference*, whose order of units is kept), or a list of all sources. With a base, a
            folder in which peft saved a LoRA adapter is a source, too.
        b: The second source; left out when ``a`` is a list.
        data: Calibration images, labels ignored: a loader, a dataset, or any iterable of images or (images, labels)
            that can be read more than once. A few thousand images are enough. ``"imagined"`` for images that
            :func:`~vfsurgery.imagine` makes of the sources; see ``imagine``. ``{0: images, 1: images}`` gives each
            source, by its number, images of its own, as for different tasks: then what is tried is judged by each
            source on those, and statistics are of all.
        base: The checkpoint that all sources were fine-tuned from, a model or its state dict: what they added to it
            is combined, their units are in one order already, and one source is enough. It may have another head. Of
            sources without one, ``"mean"`` (of the aligned sources, the default) or ``"first"``.
        combine: A method in place of the weighted average: ``"task-arithmetic"``, ``"ties"``, ... as listed in
            docs/fine_tuned.md, a :class:`~vfsurgery.combining.Combiner` with options, or ``"auto"``: with data,
            several are tried at several scales. With ``base`` the default is that; without data it means ``"mean"``.
        scale: What the combined differences are multiplied by, instead of the method's own number; several numbers
            are tried on held-out images, and the best is kept.
        alpha: Share of b, from 0 (a itself) to 1; other values are refused. ``[0.2, 0.8]`` goes from one to the other
            along the depth of the network; ``{"layer1": 0.2, "layer[23]": [0.2, 0.8], "*.bias": 0.5}`` sets shares by
            module path, parameter name or pattern: the first that fits a parameter decides, and where none fits,
            shares are equal. Statistics are restored to those of the sources with the same shares.
        weights: Shares of all sources, summing to one; instead of ``alpha``. More than two sources default to equal
            ones. Along depth, or by layer, as for ``alpha``: ``{"layer1": [.5, .3, .2]}``. With ``combine``, any
            number for each source, by default 1; a negative one takes away what a source has learned.
        matching: ``"activations"`` (correlation of activations on ``data``), ``"zipit"``, ``"cca"`` (maps of units, on
            ``data``), ``"weights"`` (no data), ``"identity"`` (no reordering), a matcher, or ``"auto"``: with data
            those that suit the model are tried, without data it means weights.
        renormalize: ``"reset"``, ``"repair"``, ``"closed-form-repair"``, ``"rescale"``, ``"reshift"``, ``"regress"``,
            ``"bias-calibration"``, ``"bias-removal"``, ``"closed-form-reset"``, a pass such as
            ``Repair(sequential=True)``, a list of those run in order, ``None``, or ``"auto"``: with data those that
            suit the architecture are tried, and what agrees best with the sources' ensemble on held-out images is kept;
            docs/merge.md has the table. Without data, BatchNorm layers lose much, and a ``SurgeryWarning`` says so.
        preserve: What to keep of each source, side by side, before the merged rest: a number of first weight layers on
            the longest path, or the name of a module (as in ``"layer2"``) or node up to whose output all is kept. 1 is
            plain merging, all layers are the ensemble of logits. A ``Preserve`` pass says the form too. See
            docs/preserve.md.
        max_flops: Instead of ``preserve``, keep as many layers as fit into that many times one source's FLOPs.
        max_params: The same for parameters; with both, both hold.
        masks: What the result of pruned sources keeps: ``"keep"`` their mask, which has to be the same in all;
            ``"intersect"`` the weights that all sources keep; ``"union"`` those that any keeps; ``"reprune"`` the
            largest of the average, in each layer as many as a source keeps. ``None`` is ``"keep"`` where 5 % of a
            source's weights are zero, else zeros mean nothing. Nothing that follows gives a pruned weight a value,
            which is asserted; ``"regress"`` would, and is refused. Preserved layers keep their source's zeros. See
            docs/sparse.md.
        symmetries: What may be made of units to align them: ``"permutations"``, orders alone; ``"all"``, matrices too
            where the function allows it: rotations of the streams of transformers, and any maps inside their heads.
            All sources are then brought to a canonical form: scales of norms are folded into the layers behind them.
            ``"auto"`` is all, and with data both are tried where the matching is chosen. See docs/symmetries.md.
        imagine: Whether images are imagined where there is no ``data`` and images would help; docs/without_data.md says
            what they are. Otherwise, and for models that do not take images, weights alone are used.
        example_inputs: As for :func:`trace`; by default the shape of ``data``'s images, else as configured. A model
            that does not compute each image by itself (frames of a clip in the batch) is run on whole batches of their
            size.
        leaf: As for :func:`trace`.
        pins: As for :func:`find_groups`: units that stay in the order they have. The report lists them.
        inplace: Write the result into model a, whose tensors keep their storage, once all has succeeded. Otherwise all
            sources stay as they are. Either way the peak is the sources, one model more, and what a batch needs.
        seed: Seeds the orders of visits in matching. torch's global random state is neither used nor changed.
        progress: Show bars for work that takes over a second.

    Returns:
        An instance of a's class with a's ``state_dict`` keys (and a bias more where the report says so); model a itself
        if ``inplace``. Beside the sources, memory is needed for one model and the largest similarity matrix. With a
        preserved prefix, an ``fx.GraphModule`` that saves, loads, exports and runs without this library.

    Raises:
        IncompatibleModelsError: the sources differ in shape or computation; names the first difference.
        InvalidWeightsError: a source holds NaN or infinite values, or shares storage with another.
        DataError: the data is empty, cannot be read twice, or does not fit the model.
        OptionError: an argument is not acceptable.
        CertificateError: a reordering changed a source's function; nothing is written.

    >>> import torch
    >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
    >>> merged = merge(a, b, example_inputs=torch.randn(2, 4))
    >>> list(merged.state_dict()) == list(a.state_dict())
    True
    """
    given = with_adapters(sources_of(a, b), base)
    models = networks_of(given, fewest=2 if base is None or isinstance(base, str) else 1)
    combining = plan_combining(len(models), base, combine, scale, weights)
    if combining is not None:
        matching = fitting_to(combining, matching, alpha)
        imagine = imagine and combining.aligned
        check_data(combining, data is not None)
    planned = plan_shares(len(models), alpha, weights) if combining is None else equal_shares(len(models))
    imagine = asks_for_images(matching, renormalize) and imagine
    data, apart = images_apart(data, len(models))
    matcher_of(matching, imagine or data is not None)
    budget = Budget(max_flops, max_params)
    if inplace and (preserve or budget != Budget()):
        raise OptionError(
            explain(
                f"inplace=True and preserve={preserve or 'a budget'} exclude each other",
                because="a network with several prefixes does not fit into model a",
                remedy="leave inplace out",
            )
        )
    traced = trace_sources(models, data, example_inputs, leaf=leaf, imagine=imagine, seed=seed, progress=progress)
    grouped = group_units(traced, pins, maps=allows_maps(matching, symmetries), masks=masks)
    grouped = read_apart(grouped, apart)
    matcher, graph_module, shares = (
        matcher_of(matching, grouped.data is not None),
        grouped.graph_module,
        planned.over(grouped.graph_module),
    )
    passes = normalizations(renormalize, graph_module, grouped.groups, grouped.data is not None)
    zeros = plan_masks(models, masks, shares.overall)
    if zeros is not None:
        zeros.refuse(passes)
    matcher = suiting(zeros, matching, matcher)
    ways = [Way(matcher, passes)]
    judged = can_judge(grouped.data)
    if combining is not None:
        ways = combining.ways(grouped.sources[0], matcher, passes, chosen=renormalize == "auto", judged=judged)
    elif (matching == "auto" or renormalize == "auto") and judged:
        tried = None if matching == "auto" and matcher != Identity() else matcher
        ways = sensible(graph_module, grouped.groups, tried, passes, fixed=renormalize != "auto", masks=zeros)
    with grouped.running():
        kept, told = plan_prefix(graph_module, grouped.inputs, sum(planned.used), preserve, budget) or (None, None)
        ancestry = None if combining is None else combining.ancestry.over(grouped.sources)
        choice = choose(grouped, ways, Terms(shares, kept, zeros, ancestry))
        if renormalize == "auto" and grouped.data is None and sum(planned.used) > 1 and combining is None:
            warn_of_norms(graph_module)  # once nothing else can fail, and before a is written to
        merged = finish(grouped, choice.combined, inplace, preserved=kept is not None)
    notes: list[str] = [] if ancestry is None else [*ancestry.doubts]
    if shares.by_name:
        notes.append(f"shares by layer: {planned}")
    if matching == "auto" and matcher == Identity():
        notes.append("matching identity: the sources' masks are equal, so their units correspond already")
    if renormalize == "auto" and grouped.data is not None and not choice.way.passes and combining is None:
        notes.append("nothing is renormalized: no layer takes a scale and a shift, or keeps statistics")
    report = report_on(choice, notes, told, ancestry)
    if zeros is not None:
        report = replace(report, masks=zeros.record(merged))
    alone = None if shares.by_name else shares.overall[-1]
    remember(merged, report, Made(choice.certified.orders, choice.way.passes, kept or 0, masks, alone))
    return as_given(merged, given[0])


def made(merged: nn.Module) -> Made:
    """How :func:`merge` made a model that it returned.

    Raises:
        OptionError: it did not.
    """
    found = way_of(merged)
    if not isinstance(found, Made):
        raise OptionError(
            explain(
                f"this {type(merged).__name__} was not made by merge",
                remedy="pass the very model that merge returned, not a copy of it, nor one loaded from a file",
            )
        )
    return found
