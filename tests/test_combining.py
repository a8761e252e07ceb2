"""What combining methods are equal to where that is known, on tensors of odd shapes and on real architectures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from ancestry import CASES, Case, assert_same, case, differ, two
from torch import Tensor

from vfsurgery.combining import (
    COMBINERS,
    Breadcrumbs,
    Combiner,
    Consensus,
    Dare,
    Della,
    Emr,
    Entry,
    IsoC,
    IsoCTS,
    Karcher,
    Kind,
    Knots,
    Lines,
    Mean,
    ModelStock,
    MultiSlerp,
    NuSlerp,
    Problem,
    Sce,
    Slerp,
    TaskArithmetic,
    Ties,
    Trait,
    TsvM,
    WiseFT,
    Wudi,
)
from vfsurgery.errors import OptionError

METHODS: dict[str, Combiner] = {
    "mean": Mean(), "task-arithmetic": TaskArithmetic(), "ties": Ties(density=0.5), "ties-sum": Ties(aggregate="sum"),
    "ties-tensor": Ties(density=0.5, scope="tensor"), "dare": Dare(), "dare-ties": Dare(then="ties"), "della": Della(),
    "della-ties": Della(then="ties"), "breadcrumbs": Breadcrumbs(), "breadcrumbs-ties": Breadcrumbs(then="ties"),
    "multislerp": MultiSlerp(), "karcher": Karcher(), "model-stock": ModelStock(), "sce": Sce(density=0.5),
    "consensus": Consensus(), "consensus-ties": Consensus(of="ties"), "emr": Emr(), "lines": Lines(),
    "lines-ties": Lines(of="ties"), "tsv-m": TsvM(), "iso-c": IsoC(), "iso-cts": IsoCTS(), "wudi": Wudi(),
    "slerp": Slerp(), "nuslerp": NuSlerp(by_row=True), "knots": Knots(density=0.5), "knots-sum": Knots(merge="sum"),
}  # fmt: skip
EXPERT: dict[str, Combiner] = {
    "mean": Mean(), "task-arithmetic": TaskArithmetic(), "ties": Ties(density=1.0),
    "ties-sum": Ties(density=1.0, aggregate="sum"), "dare": Dare(density=1.0), "dare-ties": Dare(1.0, "ties"),
    "della": Della(density=1.0, epsilon=0.0), "breadcrumbs": Breadcrumbs(density=1.0, outliers=0.0),
    "wise-ft": WiseFT(), "sce": Sce(), "emr": Emr(), "multislerp": MultiSlerp(), "karcher": Karcher(), "tsv-m": TsvM(),
    "consensus": Consensus(agree=1), "lines": Lines(beta=0.0), "wudi": Wudi(),
}  # fmt: skip
"""Those that give one source back as it is, at scale 1."""


def count_of(combiner: Combiner) -> int:
    return 2 if isinstance(combiner, Slerp) else 3


@dataclass(frozen=True)
class Planted(Combiner):
    """Breaks every law: by a threshold that is no share, by the first source, and by what it moves always."""

    name: ClassVar[str] = "planted"
    ordered: ClassVar[bool] = False

    def combine(self, entry: Entry) -> Tensor:
        own = entry.task_vector(0)
        return torch.where(own.abs() > 0.05, own, 0.01)


def test_all_methods_are_in_the_tests():
    assert {method.name for method in METHODS.values()} | {"wise-ft"} >= {
        name for name in COMBINERS if COMBINERS[name].__module__.startswith("vfsurgery.") and not needs_data(name)
    }


def needs_data(name: str) -> bool:
    return getattr(COMBINERS[name], "needs_data", False)


def order_does_not_matter(net: Case, method: Combiner) -> None:
    count = count_of(method)
    assert_same(net.combine(method, states=net.sources[:count][::-1]), net.combine(method, count))


@pytest.mark.parametrize("net", CASES)
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.ordered])
def test_the_order_of_sources_does_not_matter(method, net):
    order_does_not_matter(case(net), METHODS[method])


def larger_task_vectors_go_further(net: Case, method: Combiner) -> None:
    count = count_of(method)
    thrice = net.moved(method, states=net.mapped(lambda tau: 3 * tau)[:count])
    assert_same(thrice, {name: 3 * tensor for name, tensor in net.moved(method, count).items()}, 1e-9)


@pytest.mark.parametrize("net", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_task_vectors_of_three_times_the_size_move_three_times_as_far(method, net):
    larger_task_vectors_go_further(case(net), METHODS[method])


def zero_stays_zero(net: Case, method: Combiner) -> None:
    found = net.combine(method, states=[net.base] * count_of(method))
    assert all(torch.equal(found[name], net.base[name]) for name in net.trained)


@pytest.mark.parametrize("net", ["odd", "resnet18"])
@pytest.mark.parametrize("method", METHODS)
def test_what_no_source_moved_stays_to_the_bit(method, net):
    zero_stays_zero(case(net), METHODS[method])


@pytest.mark.parametrize("law", [order_does_not_matter, larger_task_vectors_go_further, zero_stays_zero])
def test_a_broken_method_is_found_by_every_law(law):
    with pytest.raises(AssertionError):
        law(case("odd"), Planted())


@pytest.mark.parametrize("net", CASES)
@pytest.mark.parametrize("method", EXPERT)
def test_one_source_comes_back_as_it_is(method, net):
    net = case(net)
    found = net.combine(replace(EXPERT[method], scale=1.0), 1)
    assert_same(found, {name: net.sources[0][name] for name in net.trained})


@pytest.mark.parametrize(
    "method", [IsoC(scale=1.0), Ties(density=0.5), Breadcrumbs(scale=1.0), Dare(scale=1.0), Planted()]
)
def test_one_source_does_not_come_back_where_the_method_changes_it(method):
    net = case("odd")
    assert differ(net.combine(method, 1), {name: net.sources[0][name] for name in net.trained})


@pytest.mark.parametrize("net", CASES)
def test_task_arithmetic_of_scale_zero_and_of_the_mean(net):
    net = case(net)
    nothing = net.combine(TaskArithmetic(scale=0.0))
    assert all(torch.equal(nothing[name], net.base[name]) for name in net.trained)
    mean = {name: sum(source[name] for source in net.sources[:3]) / 3 for name in net.trained}
    assert_same(net.combine(TaskArithmetic(scale=1 / 3)), mean, 1e-12)
    assert_same(net.combine(Mean()), mean, 1e-12)
    assert_same(net.combine(Mean(), base=None), mean, 1e-12)
    assert differ(net.combine(TaskArithmetic(scale=0.3)), mean)


@pytest.mark.parametrize("weight", [-1.0, -0.3])
@pytest.mark.parametrize(
    "method",
    [
        TaskArithmetic(scale=1.0),
        Ties(density=1.0, aggregate="sum"),
        Della(1.0, epsilon=0.0, then="ties", aggregate="sum", scale=1.0),
    ],
)
def test_a_negative_weight_takes_the_task_away(method, weight):
    net = case("odd")
    taken = {name: net.base[name] + weight * (net.sources[0][name] - net.base[name]) for name in net.trained}
    assert_same(net.combine(method, 1, weights=[weight]), taken)


def test_a_mean_of_what_agrees_never_adds_a_task_that_has_a_negative_weight():
    net = two([1.0, -2.0])
    for method in (Ties(density=1.0), Sce(), Dare(1.0, "ties", scale=1.0)):
        assert net.combine(method, 1, weights=[-1.0])["w"].tolist() == [-1.0, 2.0]


REFUSED = [
    (lambda: Dare(density=0.0), r"density must lie in \(0, 1\]"),
    (lambda: Breadcrumbs(density=1.5), r"density must lie in \(0, 1\]"),
    (lambda: Sce(density=-0.1), r"density must lie in \(0, 1\]"),
    (lambda: Lines(density=0.0), r"density must lie in \(0, 1\]"),
    (lambda: IsoCTS(common=0.0), r"common must lie in \(0, 1\]"),
    (lambda: Dare(then="tise"), r"(?s)unknown then 'tise'.*did you mean 'ties'"),
    (lambda: Ties(aggregate="mode"), r"(?s)unknown aggregate 'mode'.*accepted: mean, sum"),
    (lambda: Ties(scope="layer"), "unknown scope 'layer'"),
    (lambda: Lines(of="slerp"), "unknown of 'slerp'"),
    (lambda: IsoC(rank="low"), "unknown rank 'low'"),
    (lambda: Della(density=0.1), r"(?s)probabilities from 0.1 - 0.15.*a smaller epsilon"),
    (lambda: Della(density=0.9), "do not lie"),
    (lambda: Breadcrumbs(density=0.95, outliers=0.1), r"(?s)outliers 0.1 and density 0.95.*outliers=0 drops"),
    (lambda: Consensus(threshold=-1.0), "count from zero up"),
    (lambda: Karcher(iterations=0), "one iteration at least"),
    (lambda: TsvM(tolerance=1.0), "tolerance is a share"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_options_that_mean_nothing_are_refused(number):
    make, message = REFUSED[number]
    with pytest.raises(OptionError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "count", "options", "message"),
    [
        (ModelStock(), 1, {}, r"(?s)angle between two models.*wise-ft"),
        (Slerp(), 3, {}, r"(?s)slerp lies between two models, and there are 3.*multislerp"),
        (NuSlerp(), 1, {}, "nuslerp lies between two models"),
        (Slerp(), 2, {"weights": [0, 0]}, "takes weights from zero up"),
        (Karcher(), 3, {"weights": [1, -1, 1]}, r"(?s)karcher.*takes weights from zero up.*task-arithmetic"),
        (Mean(), 2, {"weights": [1, -1]}, "a sum other than zero"),
        (WiseFT(), 2, {}, "between one model and its base"),
        (Lines(), 2, {"traits": None}, r"(?s)no graph that tells how deep.*tensor +bias"),
        (TsvM(), 2, {"base": None}, r"(?s)tsv-m combines what training added to a base.*combine='mean'"),
    ],
)  # fmt: skip
def test_sources_that_a_method_cannot_combine_are_refused(method, count, options, message):
    with pytest.raises(OptionError, match=message):
        case("odd").combine(method, count, **options)


def test_tensors_that_no_op_reads_count_as_shallow():
    net, notes = case("odd"), list[str]()
    traits = {**net.traits, "bias": Trait(Kind.REST)}
    found = net.moved(Lines(alpha=0.5, beta=1.0), traits=traits, notes=notes)
    assert_same({"bias": found["bias"]}, {"bias": net.moved(TaskArithmetic(scale=0.5))["bias"]})
    assert notes == ["lines takes 1 tensors that no op reads for shallow (first: bias)"]


def test_a_combiner_without_anything_says_so():
    with pytest.raises(TypeError, match="neither plan nor combine"):
        Combiner().plan(Problem(lambda: iter([]), 1))(None)  # type: ignore[arg-type]
