"""One network for several tasks: its heads are the experts', its trunk what a merge makes of theirs."""

from __future__ import annotations

import copy
import json
import math
import warnings

import pytest
import timm
import torch
from tiny_nets import Chain, Residual, groups_of, images, lively, planted, state_of
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.combining import Ties
from vfsurgery.errors import (
    CheckpointError,
    DataError,
    IncompatibleModelsError,
    InvalidWeightsError,
    OptionError,
    SurgeryError,
    SurgeryWarning,
)
from vfsurgery.merging.multitask.unions import union_model
from vfsurgery.tracing.sources import canonical_state

pytestmark = pytest.mark.filterwarnings("ignore:.*fine-tuned from:vfsurgery.errors.SurgeryWarning")

EXACT = 1e-10
INPUT = images(4, dtype=torch.float64)
KINDS = {"chain": (Chain, "10"), "residual": (Residual, "fc")}


def experts(name: str, same_trunk: bool = True) -> dict[str, nn.Module]:
    """Two networks with heads of 3 and 6 classes, all numbers random; by default with one trunk."""
    kind, head = KINDS[name]
    first, other = (lively(kind(classes=count), seed).double() for seed, count in enumerate((3, 6)))
    if same_trunk:
        trunk = {key: x for key, x in first.state_dict().items() if not key.startswith(f"{head}.")}
        other.load_state_dict(copy.deepcopy(trunk), strict=False)
    return {"cars": first, "pets": other}


def joined(tasks, **options) -> surgery.Multitask:
    given = {"example_inputs": INPUT, "batchnorm": "average", "matching": "weights", "progress": False}
    if "base" in options:
        del given["matching"]
    return surgery.multitask(tasks, **{**given, **options})


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def permuted_pets(name: str) -> dict[str, nn.Module]:
    """The second expert's units in another order."""
    tasks = experts(name)
    return {**tasks, "pets": planted(tasks["pets"], groups_of(copy.deepcopy(tasks["pets"]).float()))}


@pytest.mark.filterwarnings("ignore::vfsurgery.errors.SurgeryWarning")
@pytest.mark.parametrize("name", KINDS)
def test_a_network_and_a_permuted_copy_with_another_head_give_both_tasks_back(name):
    tasks = permuted_pets(name)
    before = {task: state_of(model) for task, model in tasks.items()}
    both = joined(tasks, renormalize=None)
    for task, model in tasks.items():
        assert error(both(INPUT)[task], model(INPUT)) < EXACT
        assert error(both.task(task)(INPUT), model(INPUT)) < EXACT
        assert all(torch.equal(x, before[task][key]) for key, x in model.state_dict().items())
    unmatched = joined(tasks, matching="identity", renormalize=None)
    assert error(unmatched(INPUT)["pets"], tasks["pets"](INPUT)) > 0.1


@pytest.mark.parametrize("name", KINDS)
def test_equal_experts_of_one_base_come_back_to_the_last_bit(name):
    tasks = experts(name)
    both = joined(tasks, base=tasks["cars"], method="mean")
    for task, model in tasks.items():
        assert torch.equal(both(INPUT)[task], model(INPUT))
        plain = both.task(task)
        assert type(plain) is type(model)
        assert plain.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(x, plain.state_dict()[key]) for key, x in model.state_dict().items())


@pytest.mark.parametrize("method", ["task-arithmetic", Ties(scope="tensor")], ids=str)
def test_a_task_is_the_trunk_that_the_method_makes_with_its_own_head(method):
    tasks = experts("residual", same_trunk=False)
    base = lively(Residual(classes=9), 7).double()
    both = joined(tasks, base=base, method=method, scale=0.4)
    shared = ("stem", "norm", "block1", "block2")

    def trunk(model: nn.Module) -> nn.Module:
        """With a head of 5 classes, the same in all."""
        found = lively(Residual(classes=5), 8).double()
        found.load_state_dict({k: x for k, x in model.state_dict().items() if k.startswith(shared)}, strict=False)
        return found

    merged = surgery.merge(
        [trunk(model) for model in tasks.values()],
        base=trunk(base), combine=method, scale=0.4, renormalize=None, example_inputs=INPUT, progress=False,
    )  # fmt: skip
    for task, model in tasks.items():
        by_hand = {k: x if k.startswith(shared) else model.state_dict()[k] for k, x in merged.state_dict().items()}
        plain = both.task(task)
        assert all(torch.equal(x, by_hand[key]) for key, x in plain.state_dict().items())
        built = Residual(classes=len(model.fc.bias)).double().eval()
        built.load_state_dict(plain.state_dict(), strict=True)
        assert torch.equal(built(INPUT), both(INPUT, task=task))
    assert error(both(INPUT)["cars"], tasks["cars"](INPUT)) > 1e-3


def test_a_base_that_experts_do_not_come_from_is_told():
    base, tasks = apart("residual")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        joined(tasks, base=base, method="task-arithmetic")
    with pytest.warns(SurgeryWarning, match="the base is not what the sources were fine-tuned from"):
        joined(tasks, base=lively(Residual(classes=9), 7).double(), method="task-arithmetic")


def test_the_base_has_any_head_and_what_it_lacks_is_of_heads():
    tasks = experts("residual")
    headless = {key: x for key, x in tasks["cars"].state_dict().items() if not key.startswith("fc.")}
    both = joined(tasks, base=headless)
    assert all(torch.equal(both(INPUT)[task], model(INPUT)) for task, model in tasks.items())


@pytest.mark.parametrize("matching", ["activations", "zipit"])
def test_matching_on_images_gives_both_tasks_back_too(matching):
    tasks = permuted_pets("residual")
    both = joined(tasks, matching=matching, data=images(64, dtype=torch.float64))
    assert all(error(both(INPUT)[task], model(INPUT)) < EXACT for task, model in tasks.items())


def test_the_units_of_different_seeds_are_matched_and_each_head_reads_them_in_their_order():
    tasks = experts("chain", same_trunk=False)
    both = joined(tasks, data={task: images(64, seed, dtype=torch.float64) for seed, task in enumerate(tasks)})
    report = surgery.report_of(both)
    assert [certificate.source for certificate in report.merge.certificates] == [1]
    assert all(report.merge.certificates)
    assert sum(match.moved for match in report.merge.matches) > 10


def custom(classes: int, hidden: int | None) -> nn.Module:
    """A trunk that is common to all, and a head with a hidden layer or without."""
    head = nn.Linear(10, classes) if hidden is None else nn.Sequential(
        nn.ReLU(inplace=True), nn.Linear(10, hidden), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(hidden, classes)
    )  # fmt: skip
    model = Residual()
    model.fc = head
    return model


@pytest.mark.parametrize("matching", ["weights", "activations"])
def test_heads_may_have_other_layers_and_write_in_place(matching):
    torch.manual_seed(0)
    first, other = (lively(custom(*form), seed).double() for seed, form in enumerate([(4, 8), (4, None)]))
    trunk = {k: x for k, x in first.state_dict().items() if not k.startswith("fc.")}
    other.load_state_dict(copy.deepcopy(trunk), strict=False)
    tasks = {"deep": first, "flat": planted(other, groups_of(copy.deepcopy(other).float()))}
    both = joined(tasks, matching=matching, data=images(64, dtype=torch.float64))
    assert all(error(both(INPUT)[task], model(INPUT)) < EXACT for task, model in tasks.items())
    assert both.places.heads["deep"].layers == ["fc.1", "fc.4"]
    assert [type(both.task(task).fc) for task in tasks] == [nn.Sequential, nn.Linear]


def test_equal_numbers_of_classes_leave_heads_apart_and_same_merges_them():
    first, other = (lively(Residual(classes=4), seed).double() for seed in range(2))
    tasks = {"a": first, "b": other}
    kept = joined(tasks, base=first)
    assert all(torch.equal(kept.task(t).fc.weight, m.fc.weight) for t, m in tasks.items())
    same = joined(tasks, base=first, heads="same")
    assert torch.allclose(same.task("a").fc.weight, (first.fc.weight + other.fc.weight) / 2)
    assert torch.equal(same(INPUT)["a"], same(INPUT)["b"])
    other_head = joined(tasks, base=lively(Residual(classes=9), 3).double(), heads="same", method="task-arithmetic")
    assert torch.allclose(other_head.task("b").fc.weight, (first.fc.weight + other.fc.weight) / 2)
    with pytest.raises(OptionError, match="different classes"):
        joined(experts("residual"), heads="same")
    with pytest.raises(OptionError, match="different classes"):
        joined(tasks, heads="same", labels={"a": list("wxyz"), "b": list("abcd")})


def test_classes_of_one_name_get_the_mean_of_their_rows_in_a_union():
    tasks = experts("residual")
    labels = {"cars": ["van", "bus", "cat"], "pets": ["cat", "dog", "hen", "cow", "fox", "bus"]}
    both = joined(tasks, base=tasks["cars"], heads="union", labels=labels)
    model, classes = union_model(both)
    assert classes == ["van", "bus", "cat", "dog", "hen", "cow", "fox"]
    logits = model(INPUT)
    for task, names in labels.items():
        places = [classes.index(name) for name in names]
        assert error(both(INPUT)[task], logits[:, places]) < EXACT
    rows = [tasks[task].fc.weight[labels[task].index("bus")] for task in tasks]
    assert torch.allclose(model.fc.weight[1], (rows[0] + rows[1]) / 2)
    assert torch.equal(model.fc.weight[0], tasks["cars"].fc.weight[0])
    assert model.fc.out_features == 7
    with pytest.raises(OptionError, match="cannot be joined"):
        deep = [lively(custom(3, 8), seed).double() for seed in range(2)]
        joined({"a": deep[0], "b": deep[1]}, base=deep[0], heads="union", head="fc")


def test_concat_has_log_probabilities_of_each_head_and_within_a_task_its_own_order():
    tasks = experts("residual")
    both = joined(tasks, base=tasks["cars"])
    concat = both.concat()
    found = concat(INPUT)
    assert found.shape == (4, 9)
    for task in tasks:
        part = found[:, concat.places[task]]
        assert torch.allclose(part, both(INPUT)[task].log_softmax(1))
        assert torch.equal(part.argmax(1), both(INPUT)[task].argmax(1))
    cooler = both.concat({"pets": 4.0})(INPUT)
    assert torch.allclose(cooler[:, 3:], (both(INPUT)["pets"] / 4).log_softmax(1))
    assert not torch.allclose(cooler[:, 3:], found[:, 3:])
    labels = {"cars": ["a", "b", "cat"], "pets": ["cat", *"vwxyz"]}
    named = joined(tasks, base=tasks["cars"], labels=labels).concat()
    assert len(named.classes) == 8
    each = [both(INPUT)[task].softmax(1)[:, place] for task, place in (("cars", 2), ("pets", 0))]
    assert torch.allclose(named(INPUT)[:, 2].exp(), (each[0] + each[1]) / 2)
    for bad in (0, math.inf, {"pets": -1.0}, "fited"):
        with pytest.raises(OptionError, match="temperature"):
            both.concat(bad)


def moved(model: nn.Module, data: Tensor) -> dict[str, Tensor]:
    """Statistics that training leaves with a cumulative average over one batch of all images."""
    twin = copy.deepcopy(model)
    norms = [m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    twin(data)
    return {key: x for key, x in twin.state_dict().items() if "running" in key}


def test_statistics_are_of_each_task_or_of_all():
    tasks = experts("residual", same_trunk=False)
    data = {task: images(60, seed, dtype=torch.float64) + seed for seed, task in enumerate(tasks)}
    base = tasks["cars"]
    apart = joined(tasks, base=base, data=data, batchnorm="per-task")
    together = joined(tasks, base=base, data=data, batchnorm="joint")
    average = joined(tasks, base=base, data=data)
    for task in tasks:
        plain = apart.task(task)
        expected = moved(plain, data[task])
        assert all(torch.allclose(x, plain.state_dict()[key]) for key, x in expected.items())
        assert torch.equal(apart(INPUT)[task], plain(INPUT))
        assert torch.equal(apart(INPUT, task=task), plain(INPUT))
        assert torch.equal(together(INPUT)[task], together.task(task)(INPUT))
    assert not torch.allclose(apart.task("cars").norm.running_mean, apart.task("pets").norm.running_mean)
    assert torch.equal(together.task("cars").norm.running_mean, together.task("pets").norm.running_mean)
    mean = (tasks["cars"].norm.running_var + tasks["pets"].norm.running_var) / 2
    assert torch.allclose(average.task("cars").norm.running_var, mean)
    assert [surgery.report_of(each).batchnorm for each in (apart, together, average)] == [
        "per-task",
        "joint",
        "average",
    ]
    assert surgery.report_of(joined(tasks, base=base, data=data, batchnorm="auto")).batchnorm == "per-task"
    report = surgery.report_of(apart)
    assert all(0 <= record.agreement <= 1 for record in report.tasks)
    assert json.loads(report.to_json())["tasks"][1]["task"] == "pets"
    assert "agrees with its expert" in str(report)


def test_scales_are_tried_on_images_and_the_experts_scale_wins():
    tasks = experts("residual")
    base = lively(Residual(), 9).double()
    both = joined(
        tasks, base=base, method="task-arithmetic", scale=[0.1, 0.5, 2.0], data=images(80, dtype=torch.float64)
    )
    report = surgery.report_of(both)  # both trunks are equal: half of twice the difference
    assert report.merge.combine == "task-arithmetic x0.5"
    assert [record.agreement for record in report.tasks] == [1, 1]
    with pytest.raises(OptionError, match="nothing to judge"):
        joined(tasks, base=base, method="task-arithmetic", scale=[0.1, 0.5])


def apart(name: str) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A base, and two experts with heads of their own whose trunks are at some distance from it."""
    tasks = experts(name)
    base = copy.deepcopy(tasks["cars"])
    for seed, expert in enumerate(tasks.values()):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(0.3 * parameter.abs().mean() * torch.randn_like(parameter))
    return base, tasks


@pytest.mark.parametrize("name", KINDS)
def test_coefficients_that_were_not_moved_are_task_arithmetic(name):
    base, tasks = apart(name)
    data = {task: images(40, seed, dtype=torch.float64) for seed, task in enumerate(tasks)}
    learned = joined(tasks, base=base, method=surgery.AdaMerging(steps=0), data=data)
    plain = joined(tasks, base=base, method="task-arithmetic", scale=0.3, data=data)
    assert all(error(x, plain(INPUT)[task]) < EXACT for task, x in learned(INPUT).items())
    moved = joined(tasks, base=base, method=surgery.AdaMerging(start=0.5, steps=0), data=data)  # negative control
    assert all(error(x, plain(INPUT)[task]) > 1e-4 for task, x in moved(INPUT).items())


@pytest.mark.parametrize("name", KINDS)
def test_coefficients_are_learned_and_reported(name):
    base, tasks = apart(name)
    before = [copy.deepcopy(model.state_dict()) for model in (base, *tasks.values())]
    data = {task: images(80, seed, dtype=torch.float64) for seed, task in enumerate(tasks)}
    both = joined(tasks, base=base, method=surgery.AdaMerging(lr=0.05, steps=60), data=data)
    report = surgery.report_of(both)
    found = report.learned
    assert found.tasks == ("cars", "pets") and found.chosen.mean >= found.looks[0].mean and found.step > 0
    assert len({value for row in found.coefficients for value in row}) > 1
    assert "AdaMerging of 2 tasks" in str(report) and found.rows[0] in str(report)
    assert json.loads(report.to_json())["learned"]["coefficients"].keys() == {*found.rows}
    state = both.state_of("pets")
    for row, values in zip(found.rows, found.coefficients, strict=True):
        for key in found.members[row]:
            start = base.state_dict()[key]
            expected = start + sum(
                value * (model.state_dict()[key] - start) for value, model in zip(values, tasks.values(), strict=True)
            )
            assert error(state[key], expected) < EXACT, key
    for model, old in zip((base, *tasks.values()), before, strict=True):
        assert all(torch.equal(x, old[key]) for key, x in model.state_dict().items())
    KINDS[name][0](classes=6).double().load_state_dict(both.task("pets").state_dict(), strict=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": None}, "needs a base"),
        ({"data": None}, "learns on images"),
        ({"scale": 0.5}, "learns scales itself"),
        ({"method": surgery.AdaMerging(by="layer")}, "layer"),
    ],
    ids=["base", "data", "scale", "by"],
)
def test_what_adamerging_needs_is_said(options, message):
    base, tasks = apart("chain")
    data = {task: images(40, dtype=torch.float64) for task in tasks}
    with pytest.raises(SurgeryError, match=message):
        joined(tasks, **{"base": base, "data": data, "method": "adamerging", **options})


@pytest.mark.parametrize("batchnorm", ["average", "per-task"])
def test_it_is_saved_loaded_copied_and_exported(tmp_path, batchnorm):
    tasks = experts("residual", same_trunk=False)
    data = {task: images(40, seed, dtype=torch.float64) + seed for seed, task in enumerate(tasks)}
    labels = {"cars": ["é", "b", "c"]}
    both = joined(tasks, base=tasks["cars"], data=data, batchnorm=batchnorm, labels=labels)
    expected = both(INPUT)
    surgery.save_multitask(both, tmp_path / "both")
    again = surgery.load_multitask(tmp_path / "both", lambda k: Residual(classes=k).double(), example_inputs=INPUT)
    exported = torch.export.export(both, (INPUT,)).module()
    for other in (again, copy.deepcopy(both), exported):
        assert [*other(INPUT)] == ["cars", "pets"]
        assert all(torch.equal(x, expected[task]) for task, x in other(INPUT).items())
    assert again.labels() == both.labels() == {"cars": ("é", "b", "c"), "pets": None}
    assert again.temperatures == both.temperatures
    single = torch.export.export(both, (INPUT,), {"task": "pets"}).module()
    assert torch.equal(single(INPUT, task="pets"), expected["pets"])
    from safetensors.torch import load_file

    state = {**load_file(tmp_path / "both/trunk.safetensors"), **load_file(tmp_path / "both/heads/pets.safetensors")}
    plain = Residual(classes=6).double().eval()
    plain.load_state_dict(state, strict=True)
    assert torch.equal(plain(INPUT), expected["pets"])
    with pytest.raises(OptionError, match="nothing says how to build"):
        surgery.load_multitask(tmp_path / "both")
    with pytest.raises(OptionError, match="is not the one that was saved"):
        surgery.load_multitask(tmp_path / "both", lambda k: Chain(classes=k).double())
    other = tmp_path / "both/heads/cars.safetensors"
    other.write_bytes((tmp_path / "both/heads/pets.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="is not the file that was saved"):
        surgery.load_multitask(tmp_path / "both", lambda k: Residual(classes=k).double(), example_inputs=INPUT)
    with pytest.raises(CheckpointError, match="no network of several tasks"):
        surgery.load_multitask(tmp_path)


def test_it_runs_in_onnxruntime(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    tasks = {task: model.float() for task, model in experts("residual", same_trunk=False).items()}
    data = {task: images(40, seed) for seed, task in enumerate(tasks)}
    both = joined(tasks, base=tasks["cars"], data=data, example_inputs=None, batchnorm="per-task")
    x = images(4)
    torch.onnx.export(both, (x,), tmp_path / "both.onnx", dynamo=True, verbose=False)
    found = onnxruntime.InferenceSession(tmp_path / "both.onnx").run(None, {"images": x.numpy()})
    for mine, theirs in zip(found, both(x).values(), strict=True):
        assert error(torch.from_numpy(mine), theirs) < 1e-4


def test_a_timm_model_of_each_task_loads_strictly(tmp_path):
    sizes = {"depth": 1, "embed_dim": 24, "num_heads": 3, "img_size": 32}
    name = "deit_tiny_distilled_patch16_224"
    tasks = {f"t{k}": timm.create_model(name, num_classes=k, **sizes).double().eval() for k in (5, 5, 7)[1:]}
    base = timm.create_model(name, num_classes=9, **sizes).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    both = surgery.multitask(tasks, base=base, example_inputs=x, progress=False)
    contents = json.loads((surgery.save_multitask(both, tmp_path) / "multitask.json").read_text())
    for task, model in tasks.items():
        plain = both.task(task)
        built = timm.create_model(name, num_classes=model.num_classes, **sizes).double().eval()
        built.load_state_dict(plain.state_dict(), strict=True)
        assert torch.equal(built(x), both(x)[task])
        for layer in ("head", "head_dist"):
            assert torch.equal(plain.get_submodule(layer).weight, model.get_submodule(layer).weight)
        mean = sum(each.pos_embed for each in tasks.values()) / 2
        assert contents["tasks"][task]["model"] == f"timm:{name}"
        assert torch.allclose(plain.pos_embed, mean)


def wrong_trunk() -> dict[str, nn.Module]:
    tasks = experts("chain")
    return {"cars": tasks["cars"], "pets": lively(Chain(classes=4, stride=1), 1).double()}


def nan() -> dict[str, nn.Module]:
    tasks = experts("chain")
    with torch.no_grad():
        tasks["pets"][0].weight[0] = math.nan
    return tasks


def renamed(*names: str) -> dict[str, nn.Module]:
    return dict(zip(names, experts("chain").values(), strict=True))


class Headless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


BAD = {
    "one task": (lambda: {"cars": experts("chain")["cars"]}, {}, OptionError, "there are 1 tasks"),
    "no mapping": (lambda: [*experts("chain").values()], {}, OptionError, "models by task"),
    "no file name": (lambda: renamed("a/b", "c"), {}, OptionError, "no name of a task"),
    "hidden": (lambda: renamed(".a", "c"), {}, OptionError, "no name of a task"),
    "one name": (lambda: renamed("a", "A"), {}, OptionError, "two tasks are called"),
    "trunks": (wrong_trunk, {}, IncompatibleModelsError, "differ in more than their heads"),
    "kinds": (
        lambda: {"a": experts("chain")["cars"], "b": experts("residual")["cars"]},
        {}, IncompatibleModelsError, "more than their heads|no layer with weights in common",
    ),
    "no head": (
        lambda: {"a": Headless(), "b": Headless()}, {"example_inputs": torch.randn(2, 4)},
        IncompatibleModelsError, "no head can be found",
    ),
    "no such head": (lambda: experts("chain"), {"head": "fc"}, OptionError, "matches nothing"),
    "NaN": (nan, {}, InvalidWeightsError, "NaN"),
    "precisions": (
        lambda: {"a": experts("chain")["cars"], "b": experts("chain")["pets"].float()},
        {}, IncompatibleModelsError, "different precisions",
    ),
    "unknown heads": (lambda: experts("chain"), {"heads": "unoin"}, OptionError, "'union'"),
    "unknown batchnorm": (lambda: experts("chain"), {"batchnorm": "pertask"}, OptionError, "'per-task'"),
    "unknown method": (lambda: experts("chain"), {"method": "tise"}, OptionError, "unknown combining method"),
    "no data": (lambda: experts("chain"), {"batchnorm": "per-task"}, DataError, "needs data"),
    "no data for the method": (lambda: experts("chain"), {"method": "regmean"}, DataError, "needs data"),
    "a task without images": (lambda: experts("chain"), {"data": {"cars": INPUT}}, DataError, "'pets' has no images"),
    "images of no task": (
        lambda: experts("chain"), {"data": {"cars": INPUT, "pets": INPUT, "cats": INPUT}}, DataError, "'cats'",
    ),
    "no images": (lambda: experts("chain"), {"data": {"cars": INPUT, "pets": []}}, DataError, "empty"),
    "labels": (lambda: experts("chain"), {"labels": {"cars": ["a", "b", "a"]}}, OptionError, "'a' more than once"),
    "too few labels": (lambda: experts("chain"), {"labels": {"cars": ["a", "b"]}}, OptionError, "has 3 classes"),
    "labels of no task": (lambda: experts("chain"), {"labels": {"dogs": ["a"]}}, OptionError, "labels are given for"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(case):
    make, options, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        joined(make(), **options)


def test_an_unknown_task_is_named():
    tasks = experts("residual")
    both = joined(tasks, base=tasks["cars"])
    with pytest.raises(OptionError, match="there is no task 'car'"):
        both(INPUT, task="car")
    with pytest.raises(OptionError, match="did you mean 'cars'"):
        both.task("car")


def test_experts_that_expect_other_images_are_warned_of():
    tasks = experts("chain")
    for number, model in enumerate(tasks.values()):
        model.pretrained_cfg = {"mean": (0.1 * number,) * 3, "std": (0.2,) * 3}
    with pytest.warns(SurgeryWarning, match="differently normalized images"):
        joined(tasks, base=tasks["cars"])


def test_statistics_of_one_state_stay_in_the_other():
    """What a task has of its own is no part of another's state, nor of the trunk's."""
    tasks = experts("residual", same_trunk=False)
    data = {task: images(40, seed, dtype=torch.float64) for seed, task in enumerate(tasks)}
    both = joined(tasks, base=tasks["cars"], data=data, batchnorm="per-task")
    before = canonical_state(both.network)
    kept = {name: x.clone() for name, x in before.items()}
    both(INPUT)
    assert all(torch.equal(x, kept[name]) for name, x in before.items())
