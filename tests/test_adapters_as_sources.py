"""Folders of LoRA adapters wherever a source stands: in merges, in files, on the command line."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_adapters import bare, draw, factors, plain, write
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.checkpoints import load_state_dict, save_state_dict
from vfsurgery.cli import main
from vfsurgery.combining import COMBINERS, combine_files, combine_states, fold_adapter
from vfsurgery.combining.files import beside
from vfsurgery.errors import CheckpointError, IncompatibleModelsError, OptionError, SurgeryWarning

METHODS = ("mean", "task-arithmetic", "ties", "dare", "tsv-m", "iso-c", "wudi", "knots")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(self.conv(x).relu().mean((2, 3))).relu())


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def adapter(folder: Path, number: int, **config: object) -> Path:
    """Factors of rank 2 for two layers, and a head of its own."""
    own = factors("fc", (2, 8), (6, 2)) | factors("conv", (2, 3, 3, 3), (8, 2, 1, 1))
    own = {name: tensor + 0.3 * draw(*tensor.shape, seed=10 * number + 7) for name, tensor in own.items()}
    own |= {"head.weight": draw(3, 6, seed=number), "head.bias": draw(3, seed=number + 5)}
    return write(folder, own, lora_alpha=0.02, target_modules=["fc", "conv"], modules_to_save=["head"], **config)


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    return [adapter(tmp_path / f"lora{number}", number) for number in range(2)]


@pytest.fixture
def base(tmp_path) -> Path:
    save_state_dict(net().state_dict(), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], each) for name, each in expected.items())


@pytest.mark.parametrize("method", METHODS)
def test_files_give_what_folded_weights_give(method, base, folders, tmp_path):
    output = tmp_path / "out.safetensors"
    report = combine_files(base, folders, output, method, progress=False)
    folded = [fold_adapter(base, folder) for folder in folders]
    expected = combine_states(folded, COMBINERS[method](), base=load_state_dict(base))
    assert same(load_state_dict(output), expected)
    assert [source.name for source in report.sources] == ["lora0", "lora1"]
    assert len({source.sha256 for source in report.sources}) == 2
    combine_files(base, folders[:1] * 2, output, method, progress=False)  # the control: another adapter
    assert not same(load_state_dict(output), expected)


def test_folders_and_files_stand_beside_each_other_in_any_order(base, folders, tmp_path):
    folded = fold_adapter(base, folders[1])
    save_state_dict(folded, tmp_path / "folded.safetensors")
    found = []
    for sources in ([*folders], [folders[0], tmp_path / "folded.safetensors"]):
        combine_files(base, sources, tmp_path / "out.safetensors", "dare", progress=False)
        found.append(load_state_dict(tmp_path / "out.safetensors"))
    assert same(*found)
    combine_files(base, [tmp_path / "folded.safetensors", folders[0]], tmp_path / "out.safetensors", "dare", seed=0)
    assert not same(load_state_dict(tmp_path / "out.safetensors"), found[0])  # draws belong to places


@pytest.mark.parametrize("method", ["task-arithmetic", "knots"])
def test_a_merge_takes_folders(method, folders):
    model = net()
    before = copy.deepcopy(model.state_dict())
    example = torch.randn(2, 3, 8, 8)
    found = surgery.merge([*folders], base=model, combine=method, example_inputs=example)
    folded = [copy.deepcopy(model) for _ in folders]
    for each, folder in zip(folded, folders, strict=True):
        each.load_state_dict(fold_adapter(model, folder))
    expected = surgery.merge(folded, base=model, combine=method, example_inputs=example)
    assert same(found.state_dict(), expected.state_dict())
    assert same(model.state_dict(), before)
    mixed = surgery.merge([folded[0], str(folders[1])], base=model, combine=method, example_inputs=example)
    assert same(mixed.state_dict(), expected.state_dict())
    alone = surgery.merge(folders[0], base=model, combine=method, example_inputs=example)
    assert not same(alone.state_dict(), expected.state_dict())


def test_a_comparison_takes_folders(base, folders):
    found = surgery.compare(folders, base=base)
    expected = surgery.compare([fold_adapter(base, folder) for folder in folders], base=base)
    assert found.sources == ("lora0", "lora1")
    assert found.tensors == expected.tensors
    assert surgery.compare({"a": folders[0], "b": folders[0]}, base=base).tensors != expected.tensors


def test_written_as_an_adapter_of_enough_rank_it_is_the_dense_result(base, folders, tmp_path):
    expected = combine_states(
        [fold_adapter(base, folder) for folder in folders], COMBINERS["knots"](), base=load_state_dict(base)
    )
    for rank, near in ((4, True), (1, False)):
        report = combine_files(base, folders, tmp_path / f"rank{rank}", "knots", adapter_rank=rank, progress=False)
        found = fold_adapter(base, tmp_path / f"rank{rank}")
        far = max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items())
        assert (far < 1e-5) == near
        assert torch.equal(found["head.weight"], expected["head.weight"])
        (told,) = [note for note in report.notes if note.startswith("written as an adapter")]
        assert ("100.00%" in told) == near
    config = json.loads((tmp_path / "rank4" / "adapter_config.json").read_text())
    assert (config["r"], config["modules_to_save"]) == (4, ["head"])
    written = load_state_dict(tmp_path / "rank4" / "adapter_model.safetensors")
    assert written["base_model.model.conv.lora_A.weight"].shape == (4, 3, 3, 3)
    assert not [name for name in written if name.endswith("conv.weight")]


def test_the_rank_of_an_adapter_is_no_option_of_a_method(base, folders, tmp_path):
    """Iso has a rank of its own."""
    for number, given in enumerate(({}, {"rank": "numerical"})):
        output = tmp_path / f"iso{number}"
        report = combine_files(base, folders, output, "iso-c", adapter_rank=4, progress=False, **given)
        assert report.options["rank"] == given.get("rank", "full")
    found = [fold_adapter(base, tmp_path / f"iso{number}")["fc.weight"] for number in range(2)]
    assert not torch.allclose(*found)


def test_an_adapter_of_adapters_is_a_source_again(base, folders, tmp_path):
    combine_files(base, folders, tmp_path / "both", "task-arithmetic", adapter_rank=4, progress=False)
    combine_files(base, folders, tmp_path / "dense.safetensors", "task-arithmetic", progress=False)
    combine_files(base, [tmp_path / "both"], tmp_path / "again.safetensors", "task-arithmetic", scale=1.0)
    found, expected = (load_state_dict(tmp_path / f"{name}.safetensors") for name in ("again", "dense"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


def test_tables_are_written_whole_beside_factors(tmp_path):
    state = {"table.weight": draw(7, 8), "fc.weight": draw(6, 8), "fc.bias": draw(6)}
    save_state_dict(state, tmp_path / "base.safetensors")
    own = {"table.lora_embedding_A": draw(2, 7, seed=3), "table.lora_embedding_B": draw(8, 2, seed=4)}
    own |= factors("fc", (2, 8), (6, 2)) | {"fc.base_layer.bias": draw(6, seed=5)}
    folder = write(tmp_path / "lora", own, target_modules=["fc", "table"], bias="lora_only")
    options = {"scale": 1.0, "progress": False, "adapter_rank": 2}
    combine_files(tmp_path / "base.safetensors", [folder], tmp_path / "out", "task-arithmetic", **options)
    written = load_state_dict(tmp_path / "out" / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.") for name in written} == {
        "table.weight", "fc.lora_A.weight", "fc.lora_B.weight", "fc.base_layer.bias"
    }  # fmt: skip
    found, expected = (fold_adapter(state, each) for each in (tmp_path / "out", folder))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


def test_tied_weights_are_changed_once(tmp_path):
    state = {"fc.weight": draw(6, 8), "table.weight": draw(6, 8)}
    tied = {"fc.weight": state["fc.weight"], "table.weight": state["fc.weight"]}
    folder = plain(tmp_path / "lora")
    for name, own in (("apart", state), ("tied", tied)):
        torch.save(own, tmp_path / f"{name}.pt")
        combine_files(tmp_path / f"{name}.pt", [folder], tmp_path / f"{name}.safetensors", "task-arithmetic", scale=1.0)
    found = load_state_dict(tmp_path / "tied.safetensors")
    assert torch.equal(found["fc.weight"], found["table.weight"])
    assert not torch.equal(found["fc.weight"], tied["fc.weight"])
    apart = load_state_dict(tmp_path / "apart.safetensors")
    assert torch.equal(apart["table.weight"], state["table.weight"])


FAULTS = {
    "no adapter": (bare, CheckpointError, r"has no adapter_config\.json"),
    "target": (
        lambda folder: write(folder, factors("fcc", (2, 8), (6, 2))),
        IncompatibleModelsError,
        r"changes what its base does not have[\s\S]*fcc\.weight",
    ),
    "shape": (
        lambda folder: write(folder, factors("fc", (2, 9), (6, 2))),
        IncompatibleModelsError,
        r"fc\.weight[\s\S]*\(6, 9\) in the adapter, \(6, 8\) in the base",
    ),
    "NaN": (
        lambda folder: write(folder, {"fc.lora_A.weight": draw(2, 8) / 0, "fc.lora_B.weight": draw(6, 2)}),
        CheckpointError,
        "NaN",
    ),
    "other base": (
        lambda folder: plain(folder, base_model_name_or_path="other"),
        IncompatibleModelsError,
        "different bases",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_named_and_nothing_is_written(fault, base, tmp_path):
    make, error, message = FAULTS[fault]
    good = adapter(tmp_path / "good", 1, base_model_name_or_path="one")
    bad = make(tmp_path / "bad")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=message):
        combine_files(base, [good, bad], tmp_path / "out.safetensors", "ties", progress=False)
    with pytest.raises(error, match=message):
        surgery.merge([good, bad], base=net(), combine="ties", example_inputs=torch.randn(2, 3, 8, 8))
    assert sorted(tmp_path.rglob("*")) == before


def test_without_a_base_the_folder_has_to_name_it(base, tmp_path):
    nameless, named = adapter(tmp_path / "a", 0), adapter(tmp_path / "b", 1, base_model_name_or_path="timm/resnet18")
    output = tmp_path / "out.safetensors"
    for folder, error, message in (
        (nameless, CheckpointError, "does not say which base"),
        (named, OptionError, r"no base[\s\S]*timm/resnet18"),
    ):
        with pytest.raises(error, match=message):
            combine_files(None, [folder], output, "mean", progress=False)
        with pytest.raises((CheckpointError, OptionError), match=message.replace("no base", "no network")):
            surgery.merge([folder, folder], combine="mean")
    with pytest.raises(OptionError, match="as a module"):
        surgery.merge([named], base=net().state_dict(), combine="mean")
    assert not output.exists()


def test_a_head_of_other_classes_is_refused_by_a_merge_and_kept_by_files(base, tmp_path):
    folder = write(tmp_path / "lora", factors("fc", (2, 8), (6, 2)) | {"head.weight": draw(5, 6), "head.bias": draw(5)})
    with pytest.raises(IncompatibleModelsError, match=r"head\.weight[\s\S]*\(5, 6\) in the adapter, \(3, 6\)"):
        surgery.merge([folder], base=net(), combine="task-arithmetic", example_inputs=torch.randn(2, 3, 8, 8))
    report = combine_files(base, [folder], tmp_path / "out.safetensors", "task-arithmetic", progress=False)
    assert torch.equal(load_state_dict(tmp_path / "out.safetensors")["head.weight"], draw(5, 6))
    assert any("head.weight" in note for note in report.notes)


def test_rank_is_for_adapters(base, folders, tmp_path):
    for sources, rank, message in (
        ([folders[0], base], 2, "is no adapter"),
        (folders, 0, "rank is no whole number"),
    ):
        with pytest.raises(OptionError, match=message):
            combine_files(base, sources, tmp_path / "out", "ties", adapter_rank=rank, progress=False)
        assert not (tmp_path / "out").exists()
    with pytest.raises(OptionError, match="exclude each other"):
        combine_files(base, folders, tmp_path / "out", "ties", adapter_rank=2, max_shard_size="5GB")
    with pytest.raises(CheckpointError, match="would be overwritten"):
        combine_files(base, folders, folders[0], "ties", adapter_rank=2, progress=False)


def test_what_a_folder_lacks_is_told(tmp_path):
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(8, 6))
    model.add_module("bn", nn.BatchNorm1d(6))
    save_state_dict(model.state_dict(), tmp_path / "base.safetensors")
    report = combine_files(
        tmp_path / "base.safetensors", [plain(tmp_path / "lora", lora_alpha=0.01)], tmp_path / "out.safetensors"
    )
    assert any("no running statistics for 1 of 1" in note for note in report.notes)
    with pytest.warns(SurgeryWarning, match="no running statistics"):
        surgery.merge([tmp_path / "lora"], base=model, combine="task-arithmetic", example_inputs=torch.randn(4, 8))


def test_the_command_takes_folders(base, folders, tmp_path):
    paths = [str(base), *map(str, folders)]
    dense, factored = tmp_path / "out.safetensors", tmp_path / "lora"
    for output, options in ((dense, []), (factored, ["--adapter-rank", "4", "--card"])):
        found = CliRunner().invoke(main, ["combine", *paths, "--method", "knots", "-o", str(output), *options])
        assert found.exit_code == 0, found.output
    assert beside(factored / "adapter_model.safetensors").exists()
    card = (factored / "README.md").read_text()
    said = json.loads(beside(factored / "adapter_model.safetensors").read_text())
    for told in (
        said["base"]["sha256"],
        said["sources"][1]["sha256"],
        "knots",
        "density",
        "PeftModel",
        "weight 1: lora0",
    ):
        assert told in card
    assert not (tmp_path / "README.md").exists()
    folded = fold_adapter(base, factored)
    for name, tensor in load_state_dict(dense).items():
        torch.testing.assert_close(folded[name], tensor, rtol=0, atol=1e-5)


PEAK = """
import resource, sys
from pathlib import Path
from vfsurgery.combining import combine_files
folder = Path(sys.argv[1])
def run(name):
    sources = [folder / f"{name}-lora{n}" for n in range(2)]
    combine_files(folder / f"{name}.safetensors", sources, folder / "out.safetensors", "ties", progress=False)
run("small")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run("net")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model_nor_with_its_adapters(tmp_path):
    side, layers = 1024, 48  # 4 MiB each, 192 MiB in all, and 48 MiB of factors for each adapter
    for name, size in (("small", 16), ("net", side)):
        tensors = {f"l{n}.weight": draw(size, size, seed=n) for n in range(layers)}
        save_state_dict(tensors, tmp_path / f"{name}.safetensors")
        rank = size // 8
        for number in range(2):
            own: dict[str, Tensor] = {}
            for n in range(layers):
                own |= factors(f"l{n}", (rank, size), (size, rank))
            write(tmp_path / f"{name}-lora{number}", own, r=rank)
    found = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(found.stdout) <= 4 * side * side * 4 + 64 * 2**20
