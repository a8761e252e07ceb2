"""``surgery.merge`` from end to end: what it gives, what it leaves alone, what it proves, what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny_nets import (
    Chain,
    LayerNormed,
    Outputs,
    Residual,
    groups_of,
    images,
    lively,
    net,
    permuted,
    planted,
    same_state,
    state_of,
)
from torch import Tensor, fx, nn

import vfsurgery as surgery
from vfsurgery.discovery import discover
from vfsurgery.discovery.verification import TOLERANCE
from vfsurgery.errors import (
    CertificateError,
    DataError,
    ExampleInputError,
    IncompatibleModelsError,
    InvalidWeightsError,
    OptionError,
    SurgeryError,
    TraceError,
)
from vfsurgery.groups import GroupSet, Permutation, PermutationGroup, random_permutations
from vfsurgery.matching import Given
from vfsurgery.merging import prepared as merging
from vfsurgery.passes import Context, Pass, Rescale
from vfsurgery.tracing.compatibility import check_weights
from vfsurgery.tracing.sources import canonical_state

SAME = TOLERANCE[torch.float32]
"""Relative output error of two float32 networks that compute the same."""

PLAIN = {"imagine": False, "renormalize": None, "progress": False, "example_inputs": images(2)}


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor | None = None) -> Tensor:
    return model.eval()(images(16, 9) if x is None else x)


class Everything:
    """All of a model that a merge must leave alone, and torch's random state."""

    def __init__(self, *models: nn.Module) -> None:
        self.models = models
        self.found = self.look()

    def look(self) -> list[Any]:
        per_model = [
            (
                {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()},
                [(name, module.training) for name, module in model.named_modules()],
                [(name, parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()],
                [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
            )
            for model in self.models
        ]
        return [per_model, torch.random.get_rng_state().clone()]

    def changes(self) -> list[str]:
        """What is no longer as it was."""
        (before, random), (now, other) = self.found, self.look()
        found = [] if torch.equal(random, other) else ["random state"]
        for number, (old, new) in enumerate(zip(before, now, strict=True)):
            same = old[0].keys() == new[0].keys() and all(
                old[0][name][0] == new[0][name][0] and torch.equal(old[0][name][1], new[0][name][1]) for name in old[0]
            )
            found += [] if same else [f"state of {number}"]
            kinds = zip(("modes", "gradients", "hooks"), old[1:], new[1:], strict=True)
            found += [f"{kind} of {number}" for kind, x, y in kinds if x != y]
        return found


def odd_modes(model: nn.Module) -> nn.Module:
    """Every other module in training, a parameter frozen."""
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    next(model.parameters()).requires_grad_(False)
    return model


# What a merge gives


@pytest.mark.parametrize(
    ("name", "renormalize"),
    [
        *(("chain", choice) for choice in ("auto", None, "repair", "rescale", "reshift", "bias-calibration")),
        *(("residual", choice) for choice in ("auto", "repair", ["reset", "repair"])),
    ],
)
def test_sources_stay_untouched_and_in_place_gives_the_same_values(name: str, renormalize: Any) -> None:
    a, b = odd_modes(net(name, 1)), odd_modes(net(name, 2))
    everything = Everything(a, b)
    options = {"data": list(images(32).split(16)), "renormalize": renormalize, "progress": False}
    merged = surgery.merge(a, b, **options)
    assert everything.changes() == []
    assert type(merged) is type(a)
    assert list(merged.state_dict()) == list(a.state_dict())
    assert [p.requires_grad for p in merged.parameters()] == [p.requires_grad for p in a.parameters()]
    pointers = {tensor.data_ptr() for model in (a, b) for tensor in model.state_dict().values()}
    assert not pointers & {tensor.data_ptr() for tensor in merged.state_dict().values()}
    own = {key: tensor.data_ptr() for key, tensor in a.state_dict().items()}
    assert surgery.merge(a, b, inplace=True, **options) is a
    assert {key: tensor.data_ptr() for key, tensor in a.state_dict().items()} == own
    assert same_state(a.state_dict(), merged.state_dict())
    assert everything.changes() == ["state of 0"]  # and nothing else: modes, gradients, b and the random state stay


@pytest.mark.parametrize("matching", ["weights", "activations"])
@pytest.mark.parametrize("name", ["chain", "residual"])
def test_a_model_merged_with_its_permuted_copy_is_itself(name: str, matching: str) -> None:
    a = net(name, 1)
    b = planted(a, groups_of(a))
    options = {"data": images(48), "renormalize": None, "progress": False}
    merged = surgery.merge(a, b, matching=matching, **options)
    assert distance(outputs(merged), outputs(a)) <= SAME
    naive = surgery.merge(a, b, matching="identity", **options)
    assert distance(outputs(naive), outputs(a)) > 100 * SAME


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_alpha_goes_from_a_to_b(alpha: float) -> None:
    a, b = net("residual", 1), net("residual", 2)
    merged = surgery.merge(a, b, alpha=alpha, **PLAIN)
    orders = surgery.match(a, b, matching="weights", example_inputs=images(2), progress=False)
    states = [canonical_state(a), canonical_state(permuted(b, groups_of(a), orders))]
    for name, found in canonical_state(merged).items():
        if found.is_floating_point():
            assert distance(found, (1 - alpha) * states[0][name] + alpha * states[1][name]) <= SAME
    if alpha in (0, 1):
        assert distance(outputs(merged), outputs((a, b)[int(alpha)])) <= SAME
        assert distance(outputs(merged), outputs((b, a)[int(alpha)])) > 100 * SAME


def test_three_models_with_shares_of_their_own() -> None:
    a = net("chain", 1)
    groups = groups_of(a)
    noisy = [planted(a, groups, seed) for seed in (3, 4)]
    weights = (0.2, 0.3, 0.5)
    merged = surgery.merge([a, *noisy], weights=weights, **PLAIN)
    assert distance(outputs(merged), outputs(a)) <= SAME
    models = [net("chain", seed) for seed in range(3)]
    merged = surgery.merge(models, weights=weights, matching="identity", **PLAIN)
    expected = sum(w * model[10].weight for w, model in zip(weights, models, strict=True))
    assert distance(merged[10].weight.detach(), expected.detach()) <= SAME
    report = surgery.report_of(merged)
    assert (report.sources, report.weights, len(report.certificates)) == (3, weights, 2)
    equal = surgery.merge(models, matching="identity", **PLAIN)
    assert surgery.report_of(equal).weights == (1 / 3,) * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("renormalize", ["reset", "repair"])
def test_weights_of_every_precision(dtype: torch.dtype, renormalize: str) -> None:
    a, b = net("residual", 1), net("residual", 2)
    options = {"data": images(32), "matching": "weights", "renormalize": renormalize, "progress": False}
    wide = surgery.merge(a, b, **options)
    merged = surgery.merge(copy.deepcopy(a).to(dtype), copy.deepcopy(b).to(dtype), **options)
    assert {t.dtype for t in merged.state_dict().values() if t.is_floating_point()} == {dtype}
    close = 50 * torch.finfo(dtype).eps if dtype.itemsize < 4 else SAME
    for name, tensor in merged.state_dict().items():
        assert distance(tensor, wide.state_dict()[name]) <= close
    checked = torch.promote_types(dtype, torch.float32)
    (certificate,) = surgery.report_of(merged).certificates
    assert certificate.tolerance == TOLERANCE[checked] and certificate.dtype == str(checked).removeprefix("torch.")


def test_given_orders_are_merged_as_they_are() -> None:
    a, b = net("chain", 1), net("chain", 2)
    orders = random_permutations(groups_of(a), torch.Generator().manual_seed(0))
    merged = surgery.merge(a, b, alpha=1.0, matching=Given(orders), **PLAIN)
    assert same_state(merged.state_dict(), permuted(b, groups_of(a), orders).state_dict())


def test_a_pass_with_options_and_a_list_of_steps() -> None:
    a, b = net("chain", 1), net("chain", 2)
    options = {"data": images(16), "progress": False}
    merged = surgery.merge(a, b, renormalize=[Rescale(include_output=True), "reshift"], **options)
    assert surgery.report_of(merged).renormalize == ("rescale", "reshift")
    assert "rescale: 5 layers" in surgery.report_of(merged).notes


# Choices


@pytest.mark.parametrize(
    ("make", "with_data", "without"),
    [
        (lambda seed: net("residual", seed), ("reset",), ("closed-form-reset",)),
        (lambda seed: net("dense", seed), ("reset",), ("closed-form-reset",)),
        (lambda seed: lively(LayerNormed(), seed), ("repair",), ()),
        (lambda seed: net("chain", seed), ("rescale",), ("bias-calibration",)),
    ],
    ids=["residual", "dense", "layer-norm", "chain"],
)
def test_auto_chooses_by_architecture_and_data(
    make: Callable[[int], nn.Module], with_data: tuple[str, ...], without: tuple[str, ...]
) -> None:
    a, b = make(1), make(2)
    report = surgery.report_of(surgery.merge(a, b, data=images(16), progress=False))
    assert (report.matching, report.renormalize) == ("activations", with_data)
    assert "statistics of 16 images" in report.notes
    blind = (
        pytest.warns(surgery.SurgeryWarning, match="pass data=") if "closed-form-reset" in without else nullcontext()
    )
    with blind:
        report = surgery.report_of(surgery.merge(a, b, example_inputs=images(2), imagine=False, progress=False))
    assert (report.matching, report.renormalize) == ("weights", without)
    assert not any("statistics of" in note for note in report.notes)


# The report


def test_the_report_can_be_read_by_people_and_machines() -> None:
    a, b = net("residual", 1), net("residual", 2)
    merged = surgery.merge(a, b, data=images(32), seed=7, progress=False)
    report = surgery.report_of(merged)
    assert report.model == "Residual" and report.seed == 7 and report.weights == (0.5, 0.5)
    assert [match.group for match in report.matches] == ["g0", "g1", "g2", "g3"]
    assert all(match.after >= match.before and match.moved <= match.size for match in report.matches)
    assert all(report.certificates) and report.certificates[0].error <= report.certificates[0].tolerance
    assert torch.__version__.startswith(dict(report.versions)["torch"])
    assert {name for name, _ in report.seconds} >= {"trace", "groups", "statistics", "matching", "certificate"}
    text = str(report)
    for line in (
        "merge of 2 x Residual, weights 0.5, 0.5",
        "matching activations; renormalization reset; seed 7",
        "4 permutation groups over ",
        "aligned source 1 == source 1: holds",
        "statistics of 32 images",
        "g0 stem",
        "pinned fc.weight[0] x5: network output",
    ):
        assert line in text
    plain = json.loads(report.to_json())
    assert plain == report.to_dict()
    assert plain["matching"] == "activations" and plain["renormalize"] == ["reset"]
    assert plain["matches"][0] == dataclasses.asdict(report.matches[0])
    assert plain["groups"][0]["name"] == "g0" and "stem.weight[0]" in plain["groups"][0]["members"]
    assert plain["certificates"][0]["source"] == 1 and plain["coverage"] == report.groups.coverage
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.seed = 0  # type: ignore[misc]


def test_the_report_names_biases_that_were_made() -> None:
    a, b = (lively(Chain(bias=False), seed) for seed in (1, 2))
    merged = surgery.merge(a, b, data=images(16), renormalize="repair", progress=False)
    report = surgery.report_of(merged)
    assert report.created_biases == ("0.bias", "2.bias", "4.bias")
    assert "created 0.bias: load the state with strict=False, or set bias=True on that layer" in str(report)
    with_biases = Chain().eval()
    with_biases.load_state_dict(merged.state_dict(), strict=False)
    assert distance(outputs(with_biases), outputs(merged)) == 0


def test_a_report_belongs_to_the_merged_model_alone() -> None:
    a, b = net("chain", 1), net("chain", 2)
    merged = surgery.merge(a, b, **PLAIN)
    assert surgery.report_of(merged) is surgery.report_of(merged)
    for other in (a, copy.deepcopy(merged)):
        with pytest.raises(OptionError, match=r"(?s)this Chain has no report.*remedy  ask for the report of the model"):
            surgery.report_of(other)


# The certificate


def without_member(groups: GroupSet, name: str, parameter: str) -> GroupSet:
    """Groups as they would be found by a rule that forgets one parameter."""

    def broken(group: PermutationGroup) -> PermutationGroup:
        members = tuple(member for member in group.members if member.parameter != parameter)
        assert len(members) < len(group.members) or group.name != name
        return dataclasses.replace(group, members=members) if group.name == name else group

    return dataclasses.replace(groups, groups=tuple(map(broken, groups)))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("name", "group", "parameter"),
    [("chain", "g1", "2.bias"), ("residual", "g2", "block2.bn1.running_mean"), ("residual", "g3", "fc.weight")],
)
def test_a_wrong_group_is_found_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, name: str, group: str, parameter: str, inplace: bool
) -> None:
    a, b = odd_modes(net(name, 1)), odd_modes(net(name, 2))
    monkeypatch.setattr(
        merging, "discover", lambda *args, **options: without_member(discover(*args, **options), group, parameter)
    )
    everything = Everything(a, b)
    with pytest.raises(CertificateError, match=rf"(?s)aligned source 1 does not compute.*group +{group} \(.*remedy"):
        surgery.merge(a, b, data=images(16), inplace=inplace, progress=False)
    assert everything.changes() == []
    monkeypatch.undo()
    assert all(surgery.report_of(surgery.merge(a, b, data=images(16), progress=False)).certificates)


class Drawing(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.rand(1, 5)


@pytest.mark.parametrize("matching", ["identity", "weights"])
def test_a_forward_that_draws_random_numbers_is_refused(matching: str) -> None:
    a, b = lively(Drawing(), 1), lively(Drawing(), 2)
    everything = Everything(a, b)
    with pytest.raises(SurgeryError, match=r"(?s)random|different outputs each time"):
        surgery.merge(a, b, matching=matching, inplace=True, **PLAIN)
    assert everything.changes() == []


# Errors on the way


class Fails(Pass):
    name = "fails"

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        torch.rand(3)
        raise ZeroDivisionError("midway")


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["chain", "residual"])
def test_an_error_midway_leaves_the_sources_as_they_were(name: str, inplace: bool) -> None:
    a, b = odd_modes(net(name, 1)), odd_modes(net(name, 2))
    everything = Everything(a, b)
    with pytest.raises(ZeroDivisionError, match="midway"):
        surgery.merge(a, b, data=images(16), renormalize=["repair", Fails()], inplace=inplace, progress=False)
    assert everything.changes() == []


@pytest.mark.parametrize(
    ("name", "renormalize", "message"),
    [
        ("residual", "bias-calibration", "without normalization layers"),
        ("chain", "reset", "reset needs BatchNorm layers"),
    ],
)
def test_a_step_that_does_not_fit_is_refused_before_an_in_place_merge_writes(
    name: str, renormalize: str, message: str
) -> None:
    a, b = net(name, 1), net(name, 2)
    everything = Everything(a, b)
    with pytest.raises(OptionError, match=message):
        surgery.merge(a, b, data=images(16), matching="weights", renormalize=renormalize, inplace=True, progress=False)
    assert everything.changes() == []


@pytest.mark.parametrize("matching", ["weights", "activations"])
def test_three_sources_are_each_matched_to_the_first(matching: str) -> None:
    a = net("residual", 1)
    groups = groups_of(a)
    sources = [a, planted(a, groups, 3), planted(a, groups, 4)]
    merged = surgery.merge(sources, data=images(48), matching=matching, renormalize=None, progress=False)
    x = images(8, seed=5)
    with torch.no_grad():
        assert torch.allclose(merged(x), a(x), atol=1e-4)
        naive = surgery.merge(sources, matching="identity", renormalize=None, example_inputs=images(2), progress=False)
        assert not torch.allclose(naive(x), a(x), atol=1e-4)


def test_models_without_values_are_refused() -> None:
    a, b = Chain().to("meta"), Chain().to("meta")
    with pytest.raises(InvalidWeightsError, match="on the meta device and hold no values"):
        surgery.merge(a, b, example_inputs=images(2).to("meta"))


@pytest.mark.parametrize("matching", ["weights", "activations"])
def test_bad_data_found_midway_leaves_the_sources_as_they_were(matching: str) -> None:
    a, b = odd_modes(net("residual", 1)), odd_modes(net("residual", 2))
    everything = Everything(a, b)
    batches = [images(8), images(8) * float("nan")]
    with pytest.raises(DataError, match="batch 1 holds NaN or infinite values"):
        surgery.merge(a, b, data=batches, matching=matching, renormalize="reset", progress=False)
    assert everything.changes() == []


# Bad inputs: each is named before anything is written


def spoiled(value: float) -> nn.Module:
    model = net("chain", 2)
    with torch.no_grad():
        model[4].weight[1, 2, 0, 0] = value
    return model


def sharing(a: nn.Module) -> nn.Module:
    model = net("chain", 2)
    model[2].weight = a[2].weight
    return model


def other_activation() -> nn.Module:
    model = net("chain", 2)
    model[3] = nn.GELU()
    return model


def generator_of_batches() -> Iterator[Tensor]:
    yield images(8)


class Wider(nn.Sequential):
    """Not an architecture like :class:`Chain`."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


Case = tuple[Callable[[nn.Module], tuple[Any, ...]], dict[str, Any], type[Exception], str]
EXAMPLE = {"example_inputs": images(2)}
CASES: dict[str, Case] = {
    "another architecture": (
        lambda a: (a, lively(Wider())), EXAMPLE, IncompatibleModelsError,
        r"(?s)are not the same architecture.*classes +Chain, Wider.*parameter +2\.weight.*absent.*remedy",
    ),
    "another width": (
        lambda a: (a, net("chain", 2, width=9)), EXAMPLE, IncompatibleModelsError,
        r"(?s)not the same architecture.*parameter +0\.weight.*\(8, 3, 3, 3\), \(9, 3, 3, 3\).*only networks of one",
    ),
    "another number of classes": (
        lambda a: (a, net("chain", 2, classes=7)), EXAMPLE, IncompatibleModelsError,
        r"(?s)parameter +10\.weight.*\(5, 12\), \(7, 12\).*only 10 differs, with 5 and 7 outputs: trained on other",
    ),
    "another stride": (
        lambda a: (a, net("chain", 2, stride=1)), EXAMPLE, IncompatibleModelsError,
        r"(?s)equal parameter shapes but compute different.*node +_2\n.*stride=\(2, 2\).*stride=\(1, 1\).*remedy",
    ),
    "another activation": (
        lambda a: (a, other_activation()), EXAMPLE, IncompatibleModelsError,
        r"(?s)compute different things.*node +_3\n.*ReLU.*GELU",
    ),
    "NaN in b": (
        lambda a: (a, spoiled(float("nan"))), EXAMPLE, InvalidWeightsError,
        r"(?s)source 1 holds NaN or infinite values.*parameter +4\.weight.*count +1\n.*remedy",
    ),
    "infinity in the first": (
        lambda a: ([spoiled(float("inf")), a],), EXAMPLE, InvalidWeightsError, r"source 0 holds NaN or infinite values",
    ),
    "no example input": (
        lambda a: (a, net("chain", 2)), {}, ExampleInputError,
        r"(?s)Chain does not say what input it takes.*remedy  pass example_inputs=",
    ),
    "an empty loader": (
        lambda a: (a, net("chain", 2)), {"data": []}, DataError, r"(?s)the data is empty.*remedy",
    ),
    "a generator": (
        lambda a: (a, net("chain", 2)), {"data": generator_of_batches()}, DataError,
        r"(?s)a generator, which can be read only once.*remedy",
    ),
    "no data at all": (
        lambda a: (a, net("chain", 2)), {"data": 3}, DataError, r"(?s)data of type int cannot be iterated over",
    ),
    "wrong channels": (
        lambda a: (a, net("chain", 2)), {"data": images(8, channels=1)}, DataError,
        r"(?s)the model cannot run on images like those in the data",
    ),
    "wrong example": (
        lambda a: (a, net("chain", 2)), {"example_inputs": images(2, channels=1)}, TraceError, r"(?s)channels",
    ),
    "alpha below 0": (
        lambda a: (a, net("chain", 2)), {**EXAMPLE, "alpha": -0.1}, OptionError,
        r"(?s)alpha must lie in \[0, 1\] but is -0\.1.*remedy  0 gives model a, 1 gives model b",
    ),
    "alpha above 1": (lambda a: (a, net("chain", 2)), {**EXAMPLE, "alpha": 1.5}, OptionError, r"alpha must lie in"),
    "alpha is NaN": (
        lambda a: (a, net("chain", 2)), {**EXAMPLE, "alpha": float("nan")}, OptionError, r"alpha must lie in",
    ),
    "alpha for three": (
        lambda a: ([a, net("chain", 2), net("chain", 3)],), {**EXAMPLE, "alpha": 0.3}, OptionError,
        r"(?s)alpha is for two models, not 3.*remedy  pass 3 weights=",
    ),
    "weights that do not sum to one": (
        lambda a: (a, net("chain", 2)), {**EXAMPLE, "weights": (0.5, 0.6)}, OptionError,
        r"(?s)weights must lie in \[0, 1\] and sum to 1 but are \(0\.5, 0\.6\), sum 1\.1.*remedy  divide each",
    ),
    "negative weights": (
        lambda a: (a, net("chain", 2)), {**EXAMPLE, "weights": (1.5, -0.5)}, OptionError, r"must lie in \[0, 1\]",
    ),
    "too few weights": (
        lambda a: (a, net("chain", 2)), {**EXAMPLE, "weights": (1.0,)}, OptionError, r"1 weights were given for 2",
    ),
    "b beside a list": (
        lambda a: ([a, net("chain", 2)], net("chain", 3)), EXAMPLE, OptionError,
        r"(?s)b was given beside a list of models.*remedy  put all models into the list",
    ),
    "one model": (lambda a: (a,), EXAMPLE, OptionError, r"(?s)at least two models.*remedy  merge\(a, b\)"),
    "no module": (
        lambda a: (a, a.state_dict()), EXAMPLE, OptionError, r"source 1 is no torch\.nn\.Module but OrderedDict",
    ),
    "no parameters": (
        lambda a: (a, nn.ReLU()), EXAMPLE, OptionError, r"source 1, a ReLU, has no parameters",
    ),
    "the same model twice": (
        lambda a: (a, a), EXAMPLE, InvalidWeightsError, r"(?s)sources 0 and 1 share the storage.*parameter +0\.weight",
    ),
    "a shared parameter": (
        lambda a: (a, sharing(a)), EXAMPLE, InvalidWeightsError,
        r"(?s)sources 0 and 1 share the storage of a parameter.*parameter +2\.weight.*remedy +give each source",
    ),
    "a misspelt matching": (
        lambda a: (a, net("chain", 2)), {**EXAMPLE, "matching": "wieghts"}, OptionError,
        r"(?s)unknown matching 'wieghts'.*did you mean 'weights'\? accepted: activations",
    ),
    "a misspelt renormalization": (
        lambda a: (a, net("chain", 2)), {**EXAMPLE, "renormalize": "repare"}, OptionError,
        r"(?s)unknown renormalization 'repare'.*did you mean 'repair'\? accepted: bias-calibration",
    ),
    "a misspelt step of a list": (
        lambda a: (a, net("chain", 2)), {"data": images(8), "renormalize": ["reset", "rescal"]}, OptionError,
        r"(?s)unknown renormalization 'rescal'.*did you mean 'rescale'",
    ),
    "no matcher": (
        lambda a: (a, net("chain", 2)), {**EXAMPLE, "matching": 3}, OptionError,
        r"(?s)matching is no matcher but 3.*accepted +auto, activations",
    ),
    "preserve in place": (
        lambda a: (a, net("chain", 2)), {**EXAMPLE, "preserve": 2}, OptionError,
        r"(?s)inplace=True and preserve=2 exclude each other.*remedy +leave inplace out",
    ),
    "activations without data": (
        lambda a: (a, net("chain", 2)), {**EXAMPLE, "matching": "activations", "imagine": False}, DataError,
        r"(?s)matching='activations' needs data.*remedy  pass data=, or data='imagined', or matching='weights'",
    ),
    "repair without data": (
        lambda a: (a, net("chain", 2)), {**EXAMPLE, "renormalize": "repair", "imagine": False}, DataError,
        r"(?s)renormalize='repair' needs data.*remedy  pass data=, or data='imagined', or renormalize='auto', or",
    ),
    "orders of another size": (
        lambda a: (a, net("chain", 2)), {**EXAMPLE, "matching": Given({"g0": Permutation((1, 0))})}, OptionError,
        r"(?s)a permutation of 2 units was given for group 'g0'.*units +8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_named_and_nothing_is_written(case: str) -> None:
    arguments, options, error, message = CASES[case]
    a = odd_modes(net("chain", 1))
    given = arguments(a)
    models = [x for item in given for x in (item if isinstance(item, list) else [item]) if isinstance(x, nn.Module)]
    everything = Everything(*models)
    with pytest.raises(error, match=message):
        surgery.merge(*given, inplace=True, progress=False, **options)
    # NaN is not equal to itself, so a source that holds it cannot be compared
    assert [change for change in everything.changes() if "NaN" not in case or change != "state of 1"] == []


@pytest.mark.parametrize("case", ["another width", "NaN in b", "no example input", "a misspelt matching"])
def test_match_refuses_what_merge_refuses(case: str) -> None:
    arguments, options, error, message = CASES[case]
    with pytest.raises(error, match=message):
        surgery.match(*arguments(net("chain", 1)), progress=False, **options)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("matching", ["weights", "activations"])
@pytest.mark.parametrize("name", ["chain", "residual"])
def test_a_merge_on_a_gpu_happens_in_place_and_there(name: str, matching: str) -> None:
    a, b = net(name, 1), net(name, 2)
    options = {"data": images(32), "matching": matching, "progress": False}
    expected = surgery.merge(a, b, **options)
    a, b = a.cuda(), b.cuda()
    pointers = [tensor.data_ptr() for tensor in a.state_dict().values()]
    before, random = state_of(b), torch.cuda.get_rng_state()
    merged = surgery.merge(a, b, inplace=True, **options)
    assert merged is a and [tensor.data_ptr() for tensor in a.state_dict().values()] == pointers
    assert {tensor.device.type for tensor in merged.state_dict().values()} == {"cuda"}
    assert same_state(b.state_dict(), before) and torch.equal(torch.cuda.get_rng_state(), random)
    assert distance(outputs(merged, images(16, 9).cuda()).cpu(), outputs(expected)) <= 10 * SAME


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_sources_on_two_devices_are_refused() -> None:
    with pytest.raises(IncompatibleModelsError, match=r"(?s)the sources live on several devices: cpu, cuda:0.*remedy"):
        surgery.merge(Residual(), Residual().cuda(), example_inputs=images(2), progress=False)


def test_weights_are_checked_without_a_tensor_of_their_size() -> None:
    models = [nn.Linear(50, 40), nn.Linear(50, 40)]
    with Outputs() as outputs:
        check_weights(models)
    assert outputs.sizes and max(outputs.sizes) < models[0].weight.numel()


def test_data_for_one_of_two_inputs_is_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x, y):
            return self.last((self.first(x) + self.second(y)).relu())

    torch.manual_seed(0)
    inputs = (torch.randn(2, 3), torch.randn(2, 3))
    with pytest.raises(DataError, match="the model takes 2 inputs, and data has images alone"):
        surgery.merge(Two(), Two(), data=[torch.randn(8, 3)], example_inputs=inputs, progress=False)
    assert isinstance(surgery.merge(Two(), Two(), example_inputs=inputs, progress=False), Two)
