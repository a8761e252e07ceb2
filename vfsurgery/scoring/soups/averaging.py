"""Soups: average models that come from one ancestor, all of them or greedily, with one mask.

Models fine-tuned or retrained from one ancestor need no alignment (Wortsman et al., "Model soups", ICML 2022). If they
were retrained with one mask, their average has it as well (Zimmer et al., "Sparse Model Soups", ICLR 2024).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from vfsurgery.data.batches import Batches, Data
from vfsurgery.data.progress import progress as progress_bar
from vfsurgery.discovery.recording import record
from vfsurgery.errors import DataError, OptionError, TraceError, did_you_mean, explain
from vfsurgery.groups import GroupSet
from vfsurgery.merging.prepared import common_device
from vfsurgery.merging.shares import shares_of
from vfsurgery.merging.sparse import MaskPlan, plan_masks, refuse_hooks
from vfsurgery.passes import Context, KeepZeros, Reset
from vfsurgery.passes.mask import Choice, Support, check_zeros
from vfsurgery.records.report import MergedMasks, Report
from vfsurgery.records.results import remember
from vfsurgery.scoring.evaluation import device_of, evaluate, first_images
from vfsurgery.stats.batch_norms import is_batch_norm
from vfsurgery.stats.collect import Survey
from vfsurgery.stats.imagined import stand_in
from vfsurgery.stats.precision import batches_for
from vfsurgery.tracing.borrowed import borrowed
from vfsurgery.tracing.compatibility import check_same_architecture, check_weights
from vfsurgery.tracing.constants import check_saved_whole_numbers, check_unsaved, whole_numbers
from vfsurgery.tracing.copies import copied, fresh
from vfsurgery.tracing.precision import is_inexact
from vfsurgery.tracing.sources import Source, canonical_state, eval_mode
from vfsurgery.tracing.wrappers import network

MASKS = ("same", "intersect", "union", "reprune")


@dataclass(frozen=True, slots=True)
class Ingredient:
    """One model offered to a soup, by its place among those given.

    ``accuracy`` is its own, ``soup`` that of the soup with it in, both from 0 to 1 and ``None`` where not measured.
    """

    model: int
    accuracy: float | None
    soup: float | None
    kept: bool
    weight: float


@dataclass(frozen=True)
class SoupReport(Report):
    """What went into a soup, in the order in which it was tried. Print it for a table."""

    model: str
    greedy: bool
    ingredients: tuple[Ingredient, ...]
    masks: MergedMasks | None
    recalibrated: int
    seconds: float

    @property
    def accuracy(self) -> float | None:
        """Accuracy of a greedy soup on its validation data, 0 to 1."""
        return max((found.soup for found in self.ingredients if found.kept and found.soup is not None), default=None)

    def __str__(self) -> str:
        kept, kind = sum(found.kept for found in self.ingredients), "greedy" if self.greedy else "average"
        lines = [f"{kind} soup of {kept} of {len(self.ingredients)} x {self.model}, {self.seconds:.1f} s"]
        lines.append(f"  {'model':<7}{'accuracy':>10}{'soup':>10}{'weight':>9}")
        lines += [
            f"  {found.model:<7}{_cell(found.accuracy)}{_cell(found.soup)}"
            + (f"{found.weight:>9.3f}" if found.kept else f"{'left out':>9}")
            for found in self.ingredients
        ]
        lines += [f"  {self.masks}"] * (self.masks is not None)
        lines += [f"  {self.recalibrated} BatchNorm layers recalibrated"] * bool(self.recalibrated)
        return "\n".join(lines)


def soup(
    models: Sequence[nn.Module],
    *,
    data: Data | str | None = None,
    mask: str | None = "same",
    greedy: bool = True,
    weights: Sequence[float] | None = None,
    recalibrate: bool = True,
    calibration: Data | str | None = None,
    progress: bool = True,
) -> nn.Module:
    """Average models of one ancestor as they are, unit by unit: ``sum_i w_i theta_i``.

    A greedy soup starts from the model of the best accuracy and goes through the others, best first: one stays in
    (with equal weights) if the soup with it is at least as accurate as the best so far. So it is never worse on
    ``data`` than the best model, which comes back as it was if no other helps.

    BatchNorm statistics are measured again before each soup is judged: exact moments of all calibration images, every
    batch normalized by its own, dropout off. The original implementation instead runs the whole model in training mode
    with the layers' momentum, so that the last few batches count most, and differences between batches are not seen.

    Args:
        models: At least two, of one architecture and on one device. Models trained from different initialisations have
            to be aligned and are for :func:`~vfsurgery.merge`.
        data: Labelled validation images: what ``greedy`` compares accuracies on. See :mod:`vfsurgery.data.batches`.
        mask: ``"same"`` keeps the mask that sparse models (a twentieth of zeros) share, and refuses different ones;
            ``"intersect"``, ``"union"`` and ``"reprune"`` as ``masks`` of :func:`~vfsurgery.merge`, over the models
            that stay in; ``None`` averages without a look at zeros.
        greedy: Whether models have to earn their place; otherwise all are averaged and nothing is evaluated.
        weights: Shares of all models, summing to one, where ``greedy`` is off; equal ones by default.
        recalibrate: Whether BatchNorm statistics are measured anew; averaged ones are wrong.
        calibration: Images for that, labels ignored; some hundred training images are better than ``data``, the
            default, on which accuracies then are judged, too. ``"imagined"`` for images made from the models.
        progress: Show a bar when it takes over a second.

    Returns:
        A module of the first model's class, with its ``state_dict`` keys and training modes; its
        :func:`~vfsurgery.records.results.report_of` is a :class:`SoupReport`. Integer buffers are those of the first
        model in the soup. Beside the models, memory is needed for two of them, and for one byte per weight of sparse
        ones.

    Raises:
        OptionError: an argument is not acceptable, the masks differ, or pruning hooks are still on.
        DataError: ``greedy`` without labelled data, or BatchNorm layers without any.
        IncompatibleModelsError: the models are not of one architecture, or compute with different saved integers.
        InvalidWeightsError: a model holds NaN or infinite values, or shares storage with another.
        SurgeryError: the mask was not kept; nothing is returned.

    >>> import copy, vfsurgery as surgery
    >>> ancestor = surgery.prune(nn.Linear(4, 3), 0.5)
    >>> models = [copy.deepcopy(ancestor) for _ in range(3)]
    >>> mixed = soup(models, greedy=False)
    >>> torch.equal(mixed.weight, ancestor.weight)
    True
    >>> surgery.report_of(mixed).masks.result
    0.5
    """
    if greedy:
        _refuse_greedy(data, weights)
    images = stand_in(models, data if calibration is None else calibration, progress=progress)
    data = images if data is None or isinstance(data, str) else data
    started, given = time.perf_counter(), _checked(models, images)
    shares = shares_of(len(given), 0.5, weights)
    plan = _plan(given, mask, shares)
    pot = Pot.of(given[0], plan, images, recalibrate, progress)
    states = [canonical_state(model) for model in given]
    with torch.no_grad():
        found = (
            _mixed(pot, states, shares) if data is None or not greedy else _greedy(pot, given, states, data, progress)
        )
        masks = None
        if plan is not None:
            if plan.choice == "keep":
                check_zeros(pot.state, {name: states[0][name] == 0 for name in plan.weights}, "the average")
            masks = replace(plan.record(pot.model), choice=str(mask))
    seconds = time.perf_counter() - started
    recalibrated = len(pot.norms) if sum(one.kept for one in found) > 1 else 0
    report = SoupReport(type(given[0]).__name__, greedy, tuple(found), masks, recalibrated, seconds)
    remember(pot.model, report)
    return pot.model


@dataclass
class Pot:
    """The soup so far: the running mean of its members, and the model that it is poured into to be judged."""

    model: nn.Module
    state: dict[str, Tensor]
    plan: MaskPlan | None
    graph_module: fx.GraphModule | None
    images: Batches | None
    progress: bool
    norms: tuple[nn.Module, ...]
    mean: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    supports: dict[str, Support] = field(default_factory=dict[str, Support])
    share: float = 0.0
    members: int = 0

    @staticmethod
    def of(model: nn.Module, plan: MaskPlan | None, images: Data | None, recalibrate: bool, progress: bool) -> Pot:
        """An empty one for models like this.

        Raises:
            DataError: there are BatchNorm layers to recalibrate and no images.
            TraceError: such a model cannot be recorded.
        """
        poured = copied(model if images is None else fresh(model, (first_images(model, images),)))
        norms = tuple(norm for norm in poured.modules() if recalibrate and _keeps_statistics(norm))
        graph_module, batches = None, None
        if norms:
            if images is None:
                raise DataError(
                    explain(
                        f"{len(norms)} BatchNorm layers have to be recalibrated, and there are no images",
                        remedy="pass calibration=, any iterable of images, or recalibrate=False",
                    )
                )
            graph_module = record(poured, (first_images(poured, images),))
            batches = batches_for(poured, images, device_of(poured))
        return Pot(poured, canonical_state(poured), plan, graph_module, batches, progress, norms)

    def add(self, state: Mapping[str, Tensor], share: float) -> None:
        """Take one member in."""
        for name, tensor in state.items():
            self.mean[name] = self._mean_with(name, tensor, share)
        self.supports = {name: self._support_with(name, state, share) for name in self._masked}
        self.share += share
        self.members += 1

    def pour(self, state: Mapping[str, Tensor] | None = None, share: float = 0.0) -> nn.Module:
        """The soup, with one more member if given, as a model in working order; it is always the same one."""
        for name, target in self.state.items():
            target.copy_(self.mean[name] if state is None else self._mean_with(name, state[name], share))
        for name in self._masked:
            support = self.supports[name] if state is None else self._support_with(name, state, share)
            support.apply(self.state[name], self._choice)
        if self.graph_module is not None and self.members + (state is not None) > 1:
            self._recalibrate(self.graph_module)
        return self.model

    @property
    def _masked(self) -> tuple[str, ...]:
        return () if self.plan is None else self.plan.weights

    @property
    def _choice(self) -> Choice:
        return "union" if self.plan is None else self.plan.choice

    def _mean_with(self, name: str, tensor: Tensor, share: float) -> Tensor:
        """The mean with one more member, in float32 or better; equal members have exactly their value as mean."""
        if not is_inexact(tensor):
            return self.mean.get(name, tensor)  # integers are not numbers to average: the first member's are kept
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        return torch.lerp(self.mean[name], wide, share / (self.share + share)) if self.members else wide

    def _support_with(self, name: str, state: Mapping[str, Tensor], share: float) -> Support:
        if not self.members:
            return Support.of(state[name], share)
        return self.supports[name].joined(state[name], share)

    def _recalibrate(self, graph_module: fx.GraphModule) -> None:
        context = Context(GroupSet(()), (), (), (), _no_survey, self.images, self.progress)
        steps = KeepZeros(steps=(Reset(),)) if self.plan is not None else Reset()
        with eval_mode(self.model, graph_module):
            steps.run(graph_module, context)


def _no_survey() -> Survey:
    raise AssertionError("a soup looks at no statistics of its members")


def _mixed(pot: Pot, states: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> list[Ingredient]:
    """Average all models that have a share."""
    for state, share in zip(states, shares, strict=True):
        if share:
            pot.add(state, share)
    pot.pour()
    return [Ingredient(number, None, None, share > 0, share) for number, share in enumerate(shares)]


def _greedy(
    pot: Pot, models: Sequence[nn.Module], states: Sequence[Mapping[str, Tensor]], data: Data, progress: bool
) -> list[Ingredient]:
    """Start from the best model, and keep of the others, best first, what does not make the soup worse."""
    alone = [_accuracy(model, data) for model in progress_bar(models, "accuracy of the models", len(models), progress)]
    first, *others = sorted(range(len(models)), key=lambda number: -alone[number])
    pot.add(states[first], 1.0)
    best, found, rejected = alone[first], [Ingredient(first, alone[first], alone[first], True, 1.0)], False
    for number in progress_bar(others, "greedy soup", len(others), progress):
        accuracy = _accuracy(pot.pour(states[number], 1.0), data)
        rejected = accuracy < best
        if not rejected:
            pot.add(states[number], 1.0)
            best = accuracy
        found.append(Ingredient(number, alone[number], accuracy, not rejected, 1.0))
    if rejected:
        pot.pour()  # the last one tried is still in it
    return [replace(one, weight=1 / pot.members if one.kept else 0.0) for one in found]


def _accuracy(model: nn.Module, data: Data) -> float:
    try:
        with borrowed(model, {}):  # what a forward keeps would be stale once other weights are poured in
            return evaluate(model, data, progress=False).accuracy
    except DataError as error:
        if "labels" not in str(error):
            raise
        raise DataError(f"{error}\n  or greedy=False, which averages all models and needs no labels") from error


def _checked(models: Sequence[nn.Module], images: Data | None) -> list[nn.Module]:
    """The models, if they can be averaged."""
    given = [network(model, f"model {number} of the soup") for number, model in enumerate(models)]
    if len(given) < 2:
        raise OptionError(explain("a soup needs at least two models", remedy="soup([a, b, c])"))
    refuse_hooks(given)
    common_device(given)
    check_same_architecture(given)
    check_weights(given)
    inputs = () if images is None else (first_images(given[0], images),)
    twins = [fresh(model, inputs) for model in given]
    check_unsaved(twins)
    check_saved_whole_numbers(given, lambda: _whole_numbers_read(twins[0], inputs))
    return given


def _whole_numbers_read(model: nn.Module, inputs: tuple[Tensor, ...]) -> set[str] | None:
    """Saved integers that outputs depend on; ``None`` without images or a trace to see it by."""
    with contextlib.suppress(TraceError), torch.no_grad(), eval_mode(model):
        return whole_numbers(Source.of(model, record(model, inputs))) if inputs else None
    return None


def _plan(models: Sequence[nn.Module], mask: str | None, shares: Sequence[float]) -> MaskPlan | None:
    if mask is None:
        return None
    if mask not in MASKS:
        raise OptionError(explain(f"mask={mask!r} is unknown", remedy=did_you_mean(str(mask), MASKS)))
    plan = plan_masks(models, None if mask == "same" else mask, shares)
    if plan is None:
        return None
    states = [canonical_state(model) for model in models]
    plan = replace(plan, option="mask", equal=False)  # no matching to blame
    plan.check(lambda name: [(state[name], share) for state, share in zip(states, shares, strict=True) if share])
    return plan


def _refuse_greedy(data: Data | str | None, weights: Sequence[float] | None) -> None:
    if weights is not None:
        raise OptionError(
            explain("weights= is for the average of all models", remedy="greedy=False, or leave weights out")
        )
    if data is None or isinstance(data, str):
        raise DataError(
            explain(
                f"a greedy soup compares accuracies, and there {'is no data' if data is None else 'are no labels'}",
                remedy="pass data= with labels, or greedy=False to average all models",
            )
        )


def _keeps_statistics(module: nn.Module) -> bool:
    return is_batch_norm(module) and getattr(module, "running_var", None) is not None


def _cell(accuracy: float | None) -> str:
    return f"{'':>10}" if accuracy is None else f"{accuracy:>10.2%}"
