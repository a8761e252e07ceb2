"""What ``vfsurgery merge`` leaves behind: files that timm and torchvision load, and a record that makes them again."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import Result
from quick_cli import call
from safetensors import safe_open

from vfsurgery.checkpoints import file_hash, load_state_dict, save_sharded, save_state_dict
from vfsurgery.networks.architectures import build_model
from vfsurgery.networks.demo import TinyConvNet
from vfsurgery.training import from_seed

DEMO = ["--model", "vfsurgery.networks.demo:TinyConvNet", "--input-size", "1x8x8", "--quiet"]


def done(*arguments: object) -> Result:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    folder = tmp_path / "models"
    save_state_dict(from_seed(TinyConvNet, 0).state_dict(), folder / "a.safetensors")
    torch.save({"state_dict": from_seed(TinyConvNet, 1).state_dict()}, folder / "b.pt")
    return folder / "a.safetensors", folder / "b.pt"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ab.safetensors", ["--alpha", "0.3", "--seed", "5", "--renormalize", "none"]),
        ("ab.safetensors", ["--data", "digits", "--limit", "200", "--matching", "activations"]),
        ("ab.safetensors", ["--max-shard-size", "200KB"]),
        ("ab.pt2", ["--preserve", "2"]),
        ("ab.onnx", ["--max-params", "1.5"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_replay_makes_the_same_files(pair, tmp_path, name, options):
    done("merge", *pair, *DEMO, *options, "-o", tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    result = done("replay", tmp_path / "ab.report.json", "-o", tmp_path / "again")
    assert result.stdout.startswith("the same: ab")
    assert {path: path.read_bytes() for path in before} == before
    for path in before:
        assert path.name == "ab.report.json" or (tmp_path / "again" / path.name).read_bytes() == before[path]


def test_the_report_names_sources_and_results_by_hash(pair, tmp_path):
    done("merge", *pair, *DEMO, "-o", tmp_path / "ab.safetensors")
    record = json.loads((tmp_path / "ab.report.json").read_text())["replay"]
    assert [source["path"] for source in record["sources"]] == ["models/a.safetensors", "models/b.pt"]
    assert [source["sha256"] for source in record["sources"]] == [file_hash(path) for path in pair]
    assert record["output"] == [{"path": "ab.safetensors", "sha256": file_hash(tmp_path / "ab.safetensors")}]
    assert record["options"]["alpha"] == 0.5  # defaults included: those of a later version may be others


def test_the_file_says_where_it_comes_from(pair, tmp_path):
    done("merge", *pair, *DEMO, "--no-imagine", "-o", tmp_path / "ab.safetensors")
    with safe_open(tmp_path / "ab.safetensors", "pt") as file:
        found = file.metadata()
    assert json.loads(found["sources"]) == [file_hash(path) for path in pair]
    assert json.loads(found["recipe"])["matching"] == "auto"
    assert torch.__version__.startswith(json.loads(found["versions"])["torch"])
    assert json.loads(found["certificate"]) == [{"source": 1, "holds": True, "tolerance": 1e-4, "dtype": "float32"}]
    assert found["model"] == "vfsurgery.networks.demo:TinyConvNet"
    assert str(tmp_path) not in "".join(found.values())


def test_a_replay_goes_where_the_folder_goes_or_where_the_sources_are_said_to_be(pair, tmp_path):
    done("merge", *pair, *DEMO, "-o", tmp_path / "models" / "ab.safetensors")
    shutil.move(tmp_path / "models", tmp_path / "moved")
    done("replay", tmp_path / "moved" / "ab.report.json", "--quiet")
    shutil.move(tmp_path / "moved" / "b.pt", tmp_path / "c.pt")
    result = call("replay", tmp_path / "moved" / "ab.report.json", "--quiet")
    assert result.exit_code == 1 and "there is no checkpoint" in result.stderr
    assert "name both sources: vfsurgery replay ab.report.json A B" in result.stderr
    done("replay", tmp_path / "moved" / "ab.report.json", tmp_path / "moved" / "a.safetensors", tmp_path / "c.pt")


def test_other_sources_are_refused_before_they_are_merged(pair, tmp_path, monkeypatch):
    done("merge", *pair, *DEMO, "-o", tmp_path / "ab.safetensors")
    save_state_dict(from_seed(TinyConvNet, 2).state_dict(), pair[0])
    monkeypatch.setattr(sys.modules["vfsurgery.cli.replay"], "merge_files", lambda **options: pytest.fail("merged"))
    result = call("replay", tmp_path / "ab.report.json")
    assert result.exit_code == 1
    assert "a.safetensors is not the file that was merged\n  merged  " in result.stderr
    result = call("replay", tmp_path / "ab.report.json", pair[0])
    assert "is of 2 sources, not of 1" in result.stderr


def test_a_shard_that_changed_is_another_source(pair, tmp_path):
    *parts, index = save_sharded(load_state_dict(pair[0]), tmp_path / "a.safetensors", "200KB")
    done("merge", index, pair[1], *DEMO, "-o", tmp_path / "ab.safetensors")
    done("replay", tmp_path / "ab.report.json")
    content = bytearray(parts[0].read_bytes())
    content[-1] ^= 1
    parts[0].write_bytes(content)
    result = call("replay", tmp_path / "ab.report.json")
    assert result.exit_code == 1 and "is not the file that was merged" in result.stderr


def test_another_result_is_an_error(pair, tmp_path):
    done("merge", *pair, *DEMO, "-o", tmp_path / "ab.safetensors")
    report = tmp_path / "ab.report.json"
    report.write_text(report.read_text().replace('"alpha": 0.5', '"alpha": 0.25'))
    result = call("replay", report, "--quiet")
    assert result.exit_code == 1
    assert "ab.safetensors made again differs from what" in result.stderr and "\n  then     " in result.stderr


def test_a_replay_takes_as_many_threads_as_then_and_gives_them_back(pair, tmp_path, monkeypatch):
    seen = []
    done("merge", *pair, *DEMO, "-o", tmp_path / "ab.safetensors")
    report = tmp_path / "ab.report.json"
    report.write_text(report.read_text().replace(f'"threads": {torch.get_num_threads()}', '"threads": 3'))
    monkeypatch.setattr(
        sys.modules["vfsurgery.cli.replay"], "merge_files", lambda **options: seen.append(torch.get_num_threads())
    )
    before = torch.get_num_threads()
    call("replay", report)
    assert seen == [3] and torch.get_num_threads() == before


def test_averages_are_taken_unless_told_otherwise(pair, tmp_path):
    plain, averaged = (from_seed(TinyConvNet, seed).state_dict() for seed in (1, 7))
    torch.save({"model": plain, "model_ema": averaged}, pair[1])
    for option, expected in (("--ema", averaged), ("--no-ema", plain)):
        end = [option, "--alpha", "1", "--matching", "identity", "--renormalize", "none"]
        done("merge", *pair, *DEMO, *end, "-o", tmp_path / "ab.safetensors")
        found = load_state_dict(tmp_path / "ab.safetensors")
        torch.testing.assert_close(found, dict(expected))
        done("replay", tmp_path / "ab.report.json", "--quiet")


@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
def test_a_plain_merge_is_written_whole_where_the_ending_says_so(pair, tmp_path, ending):
    done("merge", *pair, *DEMO, "-o", tmp_path / "ab.safetensors")
    done("merge", *pair, *DEMO, "-o", tmp_path / f"ab{ending}")
    model, x = TinyConvNet().eval(), torch.randn(5, 1, 8, 8)
    model.load_state_dict(load_state_dict(tmp_path / "ab.safetensors"))
    if ending == ".pt2":
        found = torch.export.load(tmp_path / "ab.pt2").module()(x)
    else:
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(tmp_path / "ab.onnx", providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with torch.no_grad():
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


def test_an_odd_shard_size_is_refused_before_the_work(pair, tmp_path):
    result = call("merge", *pair, *DEMO, "--max-shard-size", "5 apples", "-o", tmp_path / "ab.safetensors")
    assert (result.exit_code, "'5 apples' is no size of a shard" in result.stderr) == (2, True)


@pytest.fixture
def timm_merge(tmp_path):
    """A merge of two small networks of timm, under the name that timm looks for in a folder."""
    options = ["--model", "timm:test_resnet", "--num-classes", 7, "--input-size", "3x64x64", "--quiet"]
    for seed, name in enumerate("ab"):
        save_state_dict(
            from_seed(lambda: build_model("timm:test_resnet", 7), seed).state_dict(), tmp_path / f"{name}.safetensors"
        )
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    done("merge", *paths, *options, "-o", tmp_path / "merged" / "model.safetensors")
    return tmp_path / "merged"


def test_timm_loads_what_was_merged(timm_merge):
    import timm

    path = timm_merge / "model.safetensors"
    state = safetensors.torch.load_file(path)
    for model in (
        timm.create_model("test_resnet", num_classes=7, checkpoint_path=str(path)),
        timm.create_model(f"local-dir:{timm_merge}", pretrained=True),
    ):
        assert model.num_classes == 7
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        assert model.load_state_dict(state, strict=True)


def test_preprocessing_of_timm_is_kept(timm_merge):
    import timm

    config = json.loads((timm_merge / "config.json").read_text())
    expected = timm.create_model("test_resnet", pretrained=False).pretrained_cfg
    assert config["architecture"] == "test_resnet" and config["num_classes"] == 7
    assert tuple(config["pretrained_cfg"]["mean"]) == tuple(expected["mean"])
    assert tuple(config["pretrained_cfg"]["input_size"]) == tuple(expected["input_size"])
    with safe_open(timm_merge / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["timm_config"]) == config


def test_no_config_is_written_beside_other_names(pair, tmp_path):
    done("merge", *pair, *DEMO, "-o", tmp_path / "out" / "model.safetensors")  # no network of timm
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.report.json", "model.safetensors"]


def test_torchvision_loads_what_was_merged(tmp_path):
    from torchvision.models import squeezenet1_1

    options = ["--model", "torchvision:squeezenet1_1", "--num-classes", 3, "--input-size", "3x64x64", "--quiet"]
    for seed, name in enumerate("ab"):
        model = from_seed(lambda: build_model("torchvision:squeezenet1_1", 3), seed)
        torch.save({"model": model.state_dict(), "epoch": 1, "args": None}, tmp_path / f"{name}.pth")
    done("merge", tmp_path / "a.pth", tmp_path / "b.pth", *options, "-o", tmp_path / "ab.safetensors")
    state = safetensors.torch.load_file(tmp_path / "ab.safetensors")
    assert squeezenet1_1(num_classes=3).load_state_dict(state, strict=True)
