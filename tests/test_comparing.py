"""Comparing fine-tuned models with their base: figures, cautions that each name their fault, and the command."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional

import vfsurgery as surgery
from vfsurgery.checkpoints import save_state_dict
from vfsurgery.cli import main
from vfsurgery.combining import check_ancestor
from vfsurgery.combining.comparison import Comparison
from vfsurgery.errors import CheckpointError, IncompatibleModelsError, InvalidWeightsError, OptionError, SurgeryWarning

State = dict[str, Tensor]


class Net(nn.Module):
    """Convolutions with BatchNorm, positions, a hidden layer, a head."""

    def __init__(self, classes: int = 4, side: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, 2, padding=1), nn.BatchNorm2d(16)
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1, side * side, 16))
        self.fc, self.head = nn.Linear(16, 32), nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu().flatten(2).transpose(1, 2)
        return self.head(self.fc((x + self.pos_embed).mean(1)).relu())


def task(seed: int, turned: int = 0) -> tuple[Tensor, Tensor]:
    """Images of four classes, each a pattern in noise; ``turned`` makes a task of its own of the same classes."""
    generator = torch.Generator().manual_seed(99)
    patterns = torch.randn(4, 3, 8, 8, generator=generator)
    own = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (256,), generator=own)
    images = patterns[labels] + torch.randn(256, 3, 8, 8, generator=own)
    return torch.rot90(images, turned, (2, 3)) * (1 if turned % 2 == 0 else -1), labels


def train(model: Net, data: tuple[Tensor, Tensor], steps: int, rate: float) -> Net:
    images, labels = data
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    model.train()
    for step in range(steps):
        part = slice(32 * (step % 8), 32 * (step % 8 + 1))
        optimizer.zero_grad()
        functional.cross_entropy(model(images[part]), labels[part]).backward()
        optimizer.step()
    return model.eval()


def pretrained(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return train(Net(), task(seed), 60, 0.05)


def tune(model: Net, seed: int, turned: int) -> Net:
    return train(copy.deepcopy(model), task(seed, turned), 24, 0.005)


@pytest.fixture(scope="module")
def base() -> Net:
    return pretrained()


@pytest.fixture(scope="module")
def experts(base) -> list[Net]:
    return [tune(base, 1, 1), tune(base, 2, 2), tune(base, 3, 3)]


@pytest.fixture(scope="module")
def compared(base, experts) -> Comparison:
    return surgery.compare(experts, base=base)


def faults(found: Comparison) -> set[str]:
    return {caution.fault for caution in found.cautions}


def state_of(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_figures_are_those_of_whole_vectors(base, experts, compared):
    origin = state_of(base)
    names = [name for name, tensor in origin.items() if tensor.is_floating_point() and "running" not in name]
    assert set(compared.tensors) == set(names)
    moved = [{name: model.state_dict()[name].double() - origin[name].double() for name in names} for model in experts]
    flat = [torch.cat([each.flatten() for each in own.values()]) for own in moved]
    weights = torch.cat([origin[name].double().flatten() for name in names])
    total = compared.total
    assert total.numbers == len(weights)
    for a in range(3):
        assert total.norm(a) == pytest.approx(float(flat[a].norm()), rel=1e-5)
        assert total.ratio(a) == pytest.approx(float(flat[a].norm() / weights.norm()), rel=1e-5)
        kept = functional.cosine_similarity(weights + flat[a], weights, dim=0)
        assert total.kept(a) == pytest.approx(float(kept), rel=1e-5)
        for b in range(a):
            cosine = functional.cosine_similarity(flat[a], flat[b], dim=0)
            assert total.cosine(b, a) == pytest.approx(float(cosine), rel=1e-4)
    signs = torch.stack(flat).sign()
    contested = (signs != 0).sum(0) > 1
    conflict = (signs.amax(0) - signs.amin(0) == 2)[contested].double().mean()
    assert total.conflict == pytest.approx(float(conflict), rel=1e-3)


def test_layers_add_up(compared):
    layers = compared.layers
    assert [*layers] == ["pos_embed", "conv1", "bn1", "conv2", "bn2", "fc", "head"]
    assert sum(moved.norm(0) ** 2 for moved in layers.values()) == pytest.approx(compared.total.norm(0) ** 2)
    assert sum(moved.numbers for moved in layers.values()) == compared.total.numbers


def test_parts_add_up(monkeypatch, base, experts, compared):
    monkeypatch.setattr("vfsurgery.combining.comparing.PART", 7)
    parts, whole = surgery.compare(experts, base=base).total, compared.total
    assert parts.cosine(0, 1) == pytest.approx(whole.cosine(0, 1))
    assert (parts.numbers, parts.contested, parts.conflicts) == (whole.numbers, whole.contested, whole.conflicts)
    assert parts.same == whole.same


def test_files_of_the_older_format_are_read_too(tmp_path, base, experts, compared):
    paths = [tmp_path / f"{number}.pt" for number in range(4)]
    for path, model in zip(paths, (base, *experts), strict=True):
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    assert surgery.compare(paths[1:], base=paths[0]).total == compared.total


def test_nothing_speaks_against_siblings(base, experts, compared):
    assert compared.cautions == ()
    assert check_ancestor(experts, base=base) == []
    assert "went different ways" in compared.outlook and "running statistics" in compared.outlook


def test_a_wrong_base_is_told_by_the_direction_that_all_share(experts):
    stranger = pretrained(7)
    found = surgery.compare(experts, base=stranger)
    assert faults(found) == {"wrong base"}
    (caution,) = found.cautions
    assert caution.figure is not None and caution.figure > 0.8
    assert f"mean cosine {caution.figure:.2f}" in str(caution)
    assert "nothing of use" in found.outlook
    assert check_ancestor(experts, base=stranger) == [caution.text]


def test_a_wrong_base_is_told_before_anything_is_combined(tmp_path, base, experts):
    """By a merge and by files alike, with the figure; of the right base nothing is said."""
    paths = {}
    for name, model in (("right", base), ("wrong", pretrained(7)), *((f"tuned{n}", m) for n, m in enumerate(experts))):
        paths[name] = tmp_path / f"{name}.safetensors"
        save_state_dict(model.state_dict(), paths[name])
    files = [paths[f"tuned{n}"] for n in range(3)]
    options = {"combine": "task-arithmetic", "scale": 0.3, "progress": False}
    example, stranger, output = torch.randn(2, 3, 8, 8), pretrained(7), tmp_path / "out.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        surgery.merge(experts, base=base, example_inputs=example, **options)
        report = surgery.combine_files(paths["right"], files, output, **options)
    assert not any("fine-tuned" in note for note in report.notes)
    told = r"is not what the sources were fine-tuned from.*cosine 0\.[89]"
    with pytest.warns(SurgeryWarning, match=f"the base {told}"):
        merged = surgery.merge(experts, base=stranger, example_inputs=example, **options)
    assert any("mean cosine 0." in note for note in surgery.report_of(merged).notes)
    with pytest.warns(SurgeryWarning, match=rf"wrong\.safetensors {told}"):
        report = surgery.combine_files(paths["wrong"], files, output, **options)
    assert any("mean cosine 0." in note for note in report.notes)
    with pytest.warns(SurgeryWarning, match="source 2 was not fine-tuned from the base: the median cosine"):
        surgery.merge([*experts[:2], tune(stranger, 1, 1)], base=base, example_inputs=example, **options)


def test_runs_of_one_task_are_no_wrong_base(base):
    """Their task vectors have much in common too, but are short."""
    same = [tune(base, 1, 1), tune(base, 1, 1)]
    with torch.no_grad():
        same[1].fc.weight += 1e-3
    found = surgery.compare(same, base=base)
    assert found.total.mean_cosine > 0.8 and faults(found) == set()
    assert "same way" in found.outlook


def test_a_source_of_another_ancestor_is_told(base, experts):
    found = surgery.compare({"a": experts[0], "b": experts[1], "odd": tune(pretrained(7), 1, 1)}, base=base)
    assert [(caution.fault, caution.sources) for caution in found.cautions] == [("other ancestor", ("odd",))]
    assert "odd was not fine-tuned from the base" in str(found)


def test_layers_that_began_anew_are_told(base, experts):
    torch.manual_seed(3)
    state = state_of(experts[1])
    state["head.weight"] = torch.randn_like(state["head.weight"]) * state["head.weight"].std()
    found = surgery.compare({"a": experts[0], "b": state}, base=base)
    (caution,) = found.cautions
    assert (caution.fault, caution.sources) == ("new layers", ("b",))
    assert "head.weight" in caution.text and "fc.weight" not in caution.text


def test_a_head_of_other_classes_is_kept_apart_and_no_fault(base, experts):
    other = Net(classes=7)
    head = {f"head.{own}": each for own, each in other.head.state_dict().items()}
    other.load_state_dict({**state_of(experts[1]), **head})
    found = surgery.compare({"a": experts[0], "b": other}, base=base)
    assert [head.name for head in found.heads] == ["head.weight", "head.bias"]
    assert found.heads[0].classes == (4, 4, 7)
    assert found.cautions == () and "head.weight" not in found.tensors
    assert "head.weight is kept apart: the base 4x32, a 4x32, b 7x32" in str(found)


def test_a_head_that_the_base_lacks_is_kept_apart(base, experts):
    bare = {name: each for name, each in state_of(base).items() if not name.startswith("head")}
    found = surgery.compare(experts[:2], base=bare)
    assert found.heads[0].shapes == (None, (4, 32), (4, 32))
    assert "the base absent" in str(found)


def test_images_of_another_size_are_told(base, experts):
    state = state_of(experts[1])
    state["pos_embed"] = torch.randn(1, 36, 16)
    found = surgery.compare({"a": experts[0], "b": state}, base=base)
    assert faults(found) == {"image size"} and found.heads == ()
    assert "(1, 36, 16)" in str(found.cautions[0])


def test_sources_that_add_nothing_are_told(base, experts):
    found = surgery.compare({"a": experts[0], "b": experts[0], "c": base}, base=base)
    assert [(each.fault, each.sources) for each in found.cautions] == [
        ("equal to base", ("c",)),
        ("equal sources", ("a", "b")),
    ]
    nearly = state_of(experts[0])
    nearly["fc.weight"][0, 0] += 1e-6
    assert faults(surgery.compare([experts[0], nearly], base=base)) == set()
    assert "nothing to combine" in surgery.compare([base], base=base).outlook


def files(folder: Path, base: Net, experts: list[Net]) -> list[str]:
    paths = [folder / f"{name}.safetensors" for name in ("base", "a", "b")]
    for path, model in zip(paths, (base, *experts), strict=False):
        save_state_dict(model.state_dict(), path)
    return [str(path) for path in paths]


def test_a_moving_average_beside_weights_is_told(tmp_path, base, experts):
    averaged = {"state_dict": state_of(experts[0]), "state_dict_ema": state_of(experts[0])}
    torch.save(averaged, tmp_path / "a.pt")
    torch.save({"state_dict": state_of(experts[1])}, tmp_path / "b.pt")
    torch.save({**averaged, "state_dict_ema": state_of(experts[1])}, tmp_path / "c.pt")
    found = surgery.compare([tmp_path / "a.pt", tmp_path / "b.pt"], base=base)
    assert faults(found) == {"moving average"}
    assert "a.pt: the moving average" in str(found) and found.cautions[0].sources == found.sources
    assert faults(surgery.compare([tmp_path / "a.pt", tmp_path / "c.pt"], base=base)) == set()


def test_all_forms_of_a_source_are_one(tmp_path, base, experts, compared):
    paths = files(tmp_path, base, experts)
    found = surgery.compare(paths[1:], base=paths[0])
    assert (found.base, found.sources) == ("base.safetensors", ("a.safetensors", "b.safetensors"))
    states = surgery.compare([state_of(each) for each in experts[:2]], base=state_of(base))
    assert found.total.cosine(0, 1) == pytest.approx(states.total.cosine(0, 1))
    assert {**found.tensors} == {**states.tensors}
    assert surgery.compare([nn.DataParallel(each) for each in experts], base=base).total == compared.total


def test_files_of_one_name_are_told_apart(tmp_path, base, experts):
    paths = [tmp_path / who / "model.safetensors" for who in "abc"]
    for path, model in zip(paths, (base, *experts), strict=False):
        save_state_dict(model.state_dict(), path)
    found = surgery.compare(paths[1:], base=paths[0])
    assert (found.base, found.sources) == ("model.safetensors", tuple(map(str, paths[1:])))
    found.plot(tmp_path / "figure.png")


def test_one_source_is_compared_with_its_base(base, experts):
    found = surgery.compare(experts[:1], base=base)
    assert found.total.pairs == [] and math.isnan(found.total.mean_cosine) and found.cautions == ()
    assert "wise-ft" in found.outlook and "task vectors" not in str(found)


def test_it_reads_as_a_table_and_as_json(compared):
    lines = str(compared).splitlines()
    assert lines[0].startswith("3 sources beside the base: 13 tensors")
    start = next(number for number, line in enumerate(lines) if line.startswith("layer"))
    assert [line.split()[0] for line in lines[start + 1 : start + 8]] == [*compared.layers]
    plain = json.loads(compared.to_json())
    assert plain == compared.to_dict()
    assert plain["tensors"]["conv1.weight"]["kind"] == "matrix" and plain["tensors"]["bn1.bias"]["kind"] == "rest"
    assert set(plain["total"]["cosines"]) == {"0,1", "0,2", "1,2"}


def test_what_has_no_figure_is_none_in_json():
    base = {"a.weight": torch.zeros(2, 2), "b.weight": torch.ones(2, 2)}
    found = surgery.compare([{"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2)}], base=base)
    assert found.to_dict()["tensors"]["a.weight"]["norms_relative_to_base"] == [None]
    assert json.loads(found.to_json())["tensors"]["b.weight"]["sign_conflicts"] is None


@pytest.mark.parametrize("count", [1, 3])
def test_it_is_drawn(tmp_path, base, experts, count):
    found = surgery.compare(experts[:count], base=base)
    assert found.plot(tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    html = found._repr_html_()
    assert html.count("<svg") == min(count, 2) and "conv1" in html


def test_small_and_empty_tensors_are_compared():
    base = {"w": torch.tensor(1.0), "none": torch.zeros(0, 3), "steps": torch.tensor(3)}
    found = surgery.compare([{**base, "w": torch.tensor(2.0)}], base=base)
    assert found.total.norm(0) == 1 and set(found.tensors) == {"w", "none"}


def test_another_architecture_is_refused(base, experts):
    with pytest.raises(IncompatibleModelsError, match=r"not of one architecture\n.*more than half"):
        surgery.compare([experts[0], nn.Linear(2, 3)], base=base)


def test_values_that_are_no_numbers_are_refused(base, experts):
    state = state_of(experts[1])
    state["fc.weight"][0, 0] = math.nan
    with pytest.raises(InvalidWeightsError, match=r"b holds NaN[^\n]*\n.*fc\.weight"):
        surgery.compare({"a": experts[0], "b": state}, base=base)


def test_what_is_no_list_of_models_is_refused(base, experts):
    for sources in ([], {}, state_of(experts[0])):
        with pytest.raises(OptionError, match="nothing to compare"):
            surgery.compare(sources, base=base)
    with pytest.raises(OptionError, match="is a source and the base"):
        surgery.compare({"the base": experts[0]}, base=base)


def test_inputs_stay_as_they_are(base, experts):
    before = [state_of(each) for each in (base, *experts)]
    surgery.compare(experts, base=base)
    for state, model in zip(before, (base, *experts), strict=True):
        assert all(torch.equal(state[name], each) for name, each in model.state_dict().items())


def test_the_command(tmp_path, base, experts):
    paths = files(tmp_path, base, experts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown = CliRunner().invoke(main, ["compare", *paths])
        plain = CliRunner().invoke(main, ["compare", *paths, "--json", "--plot", str(tmp_path / "c.svg"), "--quiet"])
    assert shown.exit_code == 0 and shown.output.strip() == str(surgery.compare(paths[1:], base=paths[0]))
    assert plain.exception is None
    assert json.loads(plain.output)["sources"] == ["a.safetensors", "b.safetensors"] and (tmp_path / "c.svg").exists()
    refused = CliRunner().invoke(main, ["compare", *paths, "--plot", paths[1]])
    assert refused.exit_code == 1 and "would be overwritten" in refused.output
    assert CliRunner().invoke(main, ["compare", str(tmp_path / "absent.pt"), *paths[1:]]).exit_code == 1


def test_a_file_that_is_missing_is_told(tmp_path, base):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        surgery.compare([tmp_path / "absent.pt"], base=base)
