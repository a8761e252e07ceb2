"""Prune a model: ask a pruner for saliencies, choose what is kept, write the new weights."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vfsurgery.data.batches import Batches, Data
from vfsurgery.errors import DataError, InvalidWeightsError, OptionError, did_you_mean, explain
from vfsurgery.pruning.base import PRUNERS, Pruner, Pruning, Scope
from vfsurgery.pruning.layers import prunable, stored_weight
from vfsurgery.pruning.masks import Masks
from vfsurgery.pruning.report import PrunedLayer, PruneReport
from vfsurgery.pruning.schedule import Schedule, by_pattern, by_sparsity, check_scope, read_pattern
from vfsurgery.pruning.selection import select
from vfsurgery.records.results import remember
from vfsurgery.stats.imagined import stand_in
from vfsurgery.stats.inputs import Layout
from vfsurgery.stats.precision import batches_for
from vfsurgery.tracing.compatibility import first_not_finite
from vfsurgery.tracing.copies import copied
from vfsurgery.tracing.sources import eval_mode
from vfsurgery.tracing.wrappers import as_given, network


def prune(
    model: nn.Module,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    method: str | Pruner = "magnitude",
    scope: Scope | None = None,
    pattern: str | None = None,
    exclude: str | Sequence[str] = (),
    data: Data | str | None = None,
    inplace: bool = False,
    allow_empty: bool = False,
    memory: float = 2.0,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Set the least salient weights of all convolutions and linear layers to zero, at once and without training.

    Of ``n`` competing weights, the ``ceil(n (1 - sparsity))`` most salient ones are kept; of equal ones, the first.
    Biases and norms are left alone. What is zero already stays zero and counts as pruned. What was done is in
    :func:`~vfsurgery.records.results.report_of` the result; its zero pattern is ``Masks.of`` the result.

    Args:
        model: Any module; need not be traceable.
        sparsity: Share of weights to set to zero, in [0, 1). Or shares by pattern of layers, as in
            ``{"conv1": 0, "layer4": 0.95, "*": 0.8}``: the first pattern that matches a layer decides, and a layer that
            none matches stays dense. Not needed with ``pattern``, which decides alone.
        method: ``"magnitude"``, ``"random"``, ``"wanda"``, ``"sparsegpt"``, ``"diagonal-fisher"``, ``"woodfisher"``,
            another name in ``PRUNERS``, or a :class:`~vfsurgery.pruning.base.Pruner` with options of its own;
            docs/pruners.md has the table.
        scope: Among which weights the most salient ones are kept: ``"global"`` (of all layers; with several sparsities,
            of all layers that one pattern decides about), ``"layer"``, or ``"row"`` (of each output unit). By default
            what the pruner was made for.
        pattern: ``"2:4"`` keeps 2 of every 4 consecutive inputs of each unit: of a linear layer's input features, and
            of a convolution's input channels at each kernel position, as NVIDIA's sparse kernels want it. Layers with a
            number of inputs (per group) that is no multiple of 4 stay dense.
        exclude: Layers to leave dense: module paths, names of weights, or patterns of either.
        data: Calibration images for pruners that need some, as for ``merge``; labels matter to some of them.
            ``"imagined"`` for images that :func:`~vfsurgery.imagine` makes of the model.
        inplace: Write the result into ``model``, whose tensors keep their storage, once all has succeeded.
        allow_empty: Accept that a layer loses all of its weights, as a global threshold may have it.
        memory: GiB that the statistics of a pruner may take.
        seed: Seeds random choices. torch's global random state is neither used nor changed.
        progress: Show bars for work that takes over a second.

    Returns:
        A module of the same class with the same ``state_dict`` keys, zeros in place; ``model`` itself if ``inplace``.
        Either way memory is needed for one model more, the masks (a byte per weight) and the pruner's statistics; with
        a global scope for the saliencies of all layers.

    Raises:
        OptionError: an argument is not acceptable; a layer would lose all of its weights; or hooks of
            ``torch.nn.utils.prune`` compute a weight.
        DataError: the pruner needs data and there is none, or it is empty or does not fit the model.
        InvalidWeightsError: a weight is NaN or infinite.

    >>> import vfsurgery as surgery
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> sparse = prune(net, 0.75, scope="layer")
    >>> surgery.Masks.of(sparse).sparsity, surgery.Masks.of(net).sparsity
    (0.75, 0.0)
    >>> prune(net, pattern="2:4")[2].weight.count_nonzero(dim=1).tolist()
    [4, 4]
    """
    started = time.perf_counter()
    given, model = model, network(model)
    pruner = _pruner(method)
    wanted = read_pattern(pattern)
    if sparsity is None and wanted is None:
        raise OptionError(
            explain("neither a sparsity nor a pattern is given", remedy='say sparsity 0.8, or pattern "2:4"')
        )
    weights = _weights(model, exclude)
    layouts = {name: Layout.of(model, name) for name in weights}
    schedule = by_sparsity(weights, sparsity) if wanted is None else by_pattern(weights, layouts, wanted)
    _check(model, pruner, scope, pattern, data, schedule)
    options = {"scope": scope or pruner.scope, "pattern": wanted, "memory": memory, "progress": progress}
    work = _begin(model, schedule, layouts, data, seed, **options)
    if wanted is not None and sparsity is not None:
        work.notes.append(f"the pattern {pattern} decides alone: sparsity={sparsity} was not used")
    with eval_mode(work.model):
        scores = pruner.score(work) if work.weights else ()
        masks, values = _choose(pruner, scores, work, schedule, allow_empty)
    result = model if inplace else work.model
    asked = sparsity if pattern is None and sparsity is not None else str(pattern)
    _write(result, masks, values)
    _remember(result, pruner, work, asked, weights, seed, time.perf_counter() - started)
    return as_given(result, given)


def prune_each(
    model: nn.Module,
    sparsities: Sequence[float],
    *,
    method: str | Pruner = "magnitude",
    scope: Scope | None = None,
    exclude: str | Sequence[str] = (),
    data: Data | str | None = None,
    allow_empty: bool = False,
    memory: float = 2.0,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[nn.Module]:
    """Prune a model to several sparsities, with the saliencies computed once for all of them.

    What comes is bit for bit what :func:`prune` gives for each sparsity, one after the other as they are asked for.
    Statistics that a pruner keeps for its step (SparseGPT's second moments, WoodFisher's diagonal) are shared as well.

    Args:
        model: Any module, left as it is.
        sparsities: Shares of weights to set to zero, each above 0 and below 1.
        method, scope, exclude, data, allow_empty, memory, seed, progress: As for :func:`prune`.

    Returns:
        An iterator over modules as :func:`prune` returns them. Beside them, memory is needed for one model more and
        for the saliencies of all layers.

    Raises:
        OptionError, DataError, InvalidWeightsError: as for :func:`prune`; or a sparsity is 0.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [Masks.of(sparse).sparsity for sparse in prune_each(net, [0.25, 0.5, 0.75], scope="layer")]
    [0.25, 0.5, 0.75]
    """
    model = network(model)
    pruner = _pruner(method)
    weights = _weights(model, exclude)
    layouts = {name: Layout.of(model, name) for name in weights}
    schedules = [(sparsity, _above_zero(weights, sparsity)) for sparsity in sparsities]
    for _, schedule in schedules:
        _check(model, pruner, scope, None, data, schedule)

    def each() -> Iterator[nn.Module]:
        started = time.perf_counter()
        options = {"scope": scope or pruner.scope, "memory": memory, "progress": progress}
        work = _begin(model, schedules[0][1], layouts, data, seed, **options)
        with eval_mode(work.model):
            scores = list(pruner.score(work))
        scoring = time.perf_counter() - started
        for sparsity, schedule in schedules:
            started = time.perf_counter()
            own = _branch(work)
            with eval_mode(work.model):
                masks, values = _choose(pruner, scores, own, schedule, allow_empty)
            result = copied(work.model)
            _write(result, masks, values)
            _remember(result, pruner, own, sparsity, weights, seed, scoring + time.perf_counter() - started)
            yield result

    return each() if schedules else iter(())


def _begin(
    model: nn.Module,
    schedule: Schedule,
    layouts: Mapping[str, Layout],
    data: Data | str | None,
    seed: int,
    **options: Any,
) -> Pruning:
    """What pruners work on: a private copy of the model, and the weights in it that have a goal."""
    own = copied(model)
    return Pruning(
        model=own,
        weights={name: own.get_parameter(name) for name in schedule.goals},
        layouts=layouts,
        data=_batches(own, stand_in([own], data, seed=seed, progress=options["progress"])),
        generator=torch.Generator().manual_seed(seed),
        dense=dict(schedule.dense),
        **options,
    )


def _branch(work: Pruning) -> Pruning:
    """The work for one more sparsity: it finds what scoring has left, and what it leaves itself is no other's."""
    generator = torch.Generator()
    generator.set_state(work.generator.get_state())
    return replace(work, generator=generator, notes=[*work.notes], dense={**work.dense}, cache={**work.cache})


def _choose(
    pruner: Pruner, scores: Iterable[tuple[str, Tensor]], work: Pruning, schedule: Schedule, allow_empty: bool
) -> tuple[Masks, dict[str, Tensor]]:
    """The masks, and the new values of those weights that the pruner updates; all are for the model as it was."""
    masks = select(scores, work, schedule.goals)
    for name in work.weights:
        if name not in masks:
            work.dense.setdefault(name, f"{pruner.name} cannot judge it")
    if work.weights and not masks:
        reasons = "; ".join(f"{name}: {work.dense[name]}" for name in list(work.weights)[:3])
        raise OptionError(explain(f"{pruner.name} can judge no layer of this model", layers=reasons))
    _check_alive(masks, work, allow_empty)
    values: dict[str, Tensor] = {}
    for name, value in pruner.update(work, masks):
        _check_update(pruner, name, value, masks, work)
        values[name] = value
    return masks, values


@torch.no_grad()
def _write(result: nn.Module, masks: Masks, values: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        weight = stored_weight(result, name)
        if name in values:
            weight.copy_(values[name])
        else:
            weight.masked_fill_(~mask, 0)


def _remember(
    result: nn.Module,
    pruner: Pruner,
    work: Pruning,
    asked: float | str | Mapping[str, float],
    weights: Mapping[str, Tensor],
    seed: int,
    seconds: float,
) -> None:
    """Keep the report of one pruning."""
    remember(
        result,
        PruneReport(
            model=type(result).__name__,
            method=pruner.name,
            scope="pattern" if work.pattern else work.scope,
            requested=dict(asked) if isinstance(asked, Mapping) else asked,
            layers=_layers(result, weights, work),
            parameters=sum(parameter.numel() for parameter in result.parameters()),
            seed=seed,
            seconds=seconds,
            notes=tuple(work.notes),
        ),
    )


def _above_zero(weights: Mapping[str, Tensor], sparsity: object) -> Schedule:
    """One sparsity for all weights, so that every schedule asks for the saliencies of the same ones."""
    schedule = by_sparsity(weights, sparsity)
    if isinstance(sparsity, Mapping) or not schedule.goals:
        raise OptionError(
            explain(
                f"prune_each takes sparsities that are numbers above 0, not {sparsity!r}",
                remedy="prune takes one sparsity by layer at a time; of 0 the model itself is the result",
            )
        )
    return schedule


def _pruner(method: str | Pruner) -> Pruner:
    if isinstance(method, Pruner):
        return method
    if not isinstance(method, str):
        raise OptionError(
            explain(f"method must be a name or a Pruner but is {method!r}", remedy=did_you_mean("", PRUNERS))
        )
    return PRUNERS[method]()


def _weights(model: nn.Module, exclude: str | Sequence[str]) -> dict[str, Tensor]:
    weights = prunable(model, exclude)
    if not weights:
        raise OptionError(
            explain(
                f"there is nothing to prune in this {type(model).__name__}",
                because="it has no convolution or linear layer" + (" that is not excluded" if exclude else ""),
            )
        )
    return weights


def _check(
    model: nn.Module,
    pruner: Pruner,
    scope: str | None,
    pattern: str | None,
    data: Data | str | None,
    schedule: Schedule,
) -> None:
    """Refuse what cannot work before anything is copied."""
    check_scope(scope, pattern)
    if pruner.needs_data and data is None:
        raise DataError(
            explain(f"method {pruner.name!r} needs data", remedy="pass data=, some hundred images, or data='imagined'")
        )
    weights = {name: stored_weight(model, name).detach() for name in schedule.goals}
    name = first_not_finite(weights)
    if name is not None:
        raise InvalidWeightsError(
            explain(
                f"{name} holds NaN or infinite values",
                count=int((~torch.isfinite(weights[name])).sum()),
                remedy="check that the checkpoint was loaded completely and its training did not diverge",
            )
        )


def _batches(model: nn.Module, data: Data | None) -> Batches | None:
    if data is None:
        return None
    return batches_for(model, data, next(model.parameters()).device)


def _check_alive(masks: Masks, work: Pruning, allow_empty: bool) -> None:
    """Note which layers lose all of their weights, or refuse it."""
    lost = [name for name, mask in masks.items() if not bool(mask.any()) and bool(work.weights[name].any())]
    if not lost:
        return
    if not allow_empty:
        raise OptionError(
            explain(
                f"{lost[0]} would lose all of its weights" + (f", and {len(lost) - 1} more" if lost[1:] else ""),
                because=f"the scope is {work.scope!r}, and all of its entries are less salient than those of others",
                remedy=f"a lower sparsity, scope='layer', exclude={lost[0].rpartition('.')[0]!r}, or allow_empty=True",
            )
        )
    work.notes.append(f"without any weight left: {', '.join(lost)}")


def _check_update(pruner: Pruner, name: str, value: Tensor, masks: Masks, work: Pruning) -> None:
    """Hold a pruner to its masks, or where it chooses again, to their counts and to the zeros that were there."""
    fact = None
    weight = work.weights.get(name)
    if weight is None or name not in masks or value.shape != weight.shape:
        fact = f"updated {name}, which is no weight of that shape that it was given"
    elif not bool(torch.isfinite(value).all()):
        fact = f"made {name} NaN or infinite"
    elif pruner.rechooses:
        if int(value.count_nonzero()) > int(masks[name].count_nonzero()) or bool(value[weight == 0].any()):
            fact = f"kept more entries of {name} than its mask does"
    elif bool(value[~masks[name]].any()):
        fact = f"wrote to entries of {name} that its mask does not keep"
    if fact is not None:
        raise OptionError(
            explain(f"{type(pruner).__name__} {fact}", remedy="update yields zeros wherever a mask is false")
        )


def _layers(result: nn.Module, weights: Mapping[str, Tensor], work: Pruning) -> tuple[PrunedLayer, ...]:
    now = prunable(result)
    counts = {name: int(now[name].count_nonzero()) for name in weights}
    return tuple(
        PrunedLayer(name, weight.numel(), weight.numel() - counts[name], work.dense.get(name, ""))
        for name, weight in weights.items()
    )
