"""Places that cannot be written to, disks that are full, Ctrl-C, and reports that lie: nothing half-written is left."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quick_cli import call
from tiny_nets import images, net, same_state, state_of
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.checkpoints import (
    atomic,
    check_writable,
    files,
    load_state_dict,
    save_onnx,
    save_program,
    save_sharded,
    save_state_dict,
    write_text,
)
from vfsurgery.errors import CheckpointError, InvalidWeightsError, OptionError
from vfsurgery.networks.demo import TinyConvNet
from vfsurgery.training import from_seed
from vfsurgery.training.resuming import Progress

resource = pytest.importorskip("resource", reason="limits of POSIX")

DEMO = ["--model", "vfsurgery.networks.demo:TinyConvNet", "--input-size", "1x8x8", "--quiet"]
MODEL = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
INPUTS = (torch.zeros(2, 64),)

WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "weights": (".safetensors", lambda path: save_state_dict(MODEL.state_dict(), path)),
    "shards": (".safetensors", lambda path: save_sharded(MODEL.state_dict(), path, "20KB")),
    "program": (".pt2", lambda path: save_program(MODEL, INPUTS, path)),
    "onnx": (".onnx", lambda path: save_onnx(MODEL, INPUTS, path)),
    "training": (".pt", lambda path: Progress({"net": MODEL}, torch.Generator(), "").save(path, 1)),
    "text": (".json", lambda path: write_text(path, "x" * 50_000)),
}
every_writer = pytest.mark.parametrize("writer", WRITERS)


@pytest.fixture(scope="module", autouse=True)
def _exported_once() -> Iterator[None]:
    """The exporters take seconds, and here it is about what comes after them."""
    kept: dict[object, Any] = {}

    def once(export: Callable[..., Any]) -> Callable[..., Any]:
        def cached(model: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> Any:
            if model is not MODEL:
                return export(model, inputs, **options)
            if export not in kept:
                kept[export] = export(model, inputs, **options)
            return kept[export]

        return cached

    with pytest.MonkeyPatch.context() as patch:
        for module in (torch.export, torch.onnx):
            patch.setattr(module, "export", once(module.export))
        yield


@pytest.fixture
def full() -> Iterator[None]:
    """As on a full disk: no file may grow beyond 8 kB. Root may write anywhere, but not more than this."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


@every_writer
@pytest.mark.parametrize("older", [False, True])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, writer: str, older: bool, request: pytest.FixtureRequest
) -> None:
    suffix, write = WRITERS[writer]
    path = tmp_path / f"net{suffix}"
    if older:
        path.write_text("older")
    request.getfixturevalue("full")
    with pytest.raises(CheckpointError, match=r"cannot write .*net\S*\n  cause  "):
        write(path)
    assert [each.name for each in tmp_path.iterdir()] == [path.name] * older
    assert not older or path.read_text() == "older"


@every_writer
def test_the_same_is_written_where_there_is_room(tmp_path: Path, writer: str) -> None:
    suffix, write = WRITERS[writer]
    write(tmp_path / f"net{suffix}")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 3 * 8192


@every_writer
@pytest.mark.parametrize("moment", ["made", "moved"])
def test_ctrl_c_in_a_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, moment: str
) -> None:
    suffix, write = WRITERS[writer]
    (tmp_path / f"net{suffix}").write_text("older")

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    def at_the_end(partial: Path, target: Path) -> None:
        assert partial.stat().st_size > 5000  # all of it has been written when it is to take its place
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "close" if moment == "made" else "replace", interrupted if moment == "made" else at_the_end)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / f"net{suffix}")
    monkeypatch.undo()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"net{suffix}"}
    assert (tmp_path / f"net{suffix}").read_text() == "older"


def test_shards_of_two_writes_are_never_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.safetensors"
    *_, index = save_sharded(MODEL.state_dict(), path, "20KB")
    moved: list[Path] = []

    def one_then_interrupted(partial: Path, target: Path, move: Callable[..., None] = os.rename) -> None:
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        move(partial, target)

    monkeypatch.setattr(os, "replace", one_then_interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_sharded({key: tensor + 1 for key, tensor in MODEL.state_dict().items()}, path, "20KB")
    assert len(moved) == 1
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_state_dict(index)
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


PLACES = {
    "below a file": "file/net",
    "deep below a file": "file/a/b/net",
    "below a device": "/dev/null/net",
    "below /proc": "/proc/net-of-nobody/net",
    "below a link to nowhere": "broken/net",
    "below a link to itself": "loop/net",
    "a name too long": "n" * 300,
    "a folder too long": "n" * 300 + "/net",
    "characters too long": "é" * 150,
    "a zero": "a\x00b",
    "a line break": "a\nb",
    "an escape": "a\x1b[2Jb",
    "a turned direction": "a\u202eb",
    "half a character": "a\udc80b",
}


@every_writer
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_places_where_nothing_can_be(tmp_path: Path, writer: str, place: str) -> None:
    (tmp_path / "file").write_text("file")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere" / "at" / "all")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(path.name for path in tmp_path.iterdir())
    suffix, write = WRITERS[writer]
    with pytest.raises(CheckpointError, match=r"cannot write|is no name for a file") as caught:
        write(tmp_path / f"{place}{suffix}")
    assert str(caught.value).replace("\n", "").isprintable()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "file").read_text() == "file"


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_such_places_are_refused_before_the_work(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("file")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere" / "at" / "all")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    if place.startswith("/proc"):
        pytest.skip("only the attempt shows it, for root")
    with pytest.raises(CheckpointError):
        check_writable(tmp_path / f"{place}.safetensors")


def test_a_folder_that_may_not_be_written_to_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(CheckpointError, match="may not be written to"):
        check_writable(tmp_path / "net.safetensors")


@every_writer
@pytest.mark.parametrize("kind", ["a file", "a device", "nowhere", "itself"])
def test_links_are_replaced_and_not_followed(tmp_path: Path, writer: str, kind: str) -> None:
    suffix, write = WRITERS[writer]
    victim, link = tmp_path / "victim", tmp_path / f"net{suffix}"
    victim.write_text("precious")
    link.symlink_to({"a file": victim, "a device": "/dev/full", "nowhere": tmp_path / "new", "itself": link}[kind])
    write(link)
    assert victim.read_text() == "precious" and not (tmp_path / "new").exists()
    assert writer == "shards" or not link.is_symlink()


def test_a_link_planted_where_the_unfinished_file_would_be_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "guessed")
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".net.guessed.partial.safetensors").symlink_to(tmp_path / "victim")
    with pytest.raises(CheckpointError, match="File exists"):
        save_state_dict(MODEL.state_dict(), tmp_path / "net.safetensors")
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / ".net.guessed.partial.safetensors").is_symlink()  # it is theirs, so it is left alone


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, RecursionError, GeneratorExit])
def test_whatever_ends_a_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic(tmp_path / "net.bin") as partial:
        partial.write_text("half")
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["5XB", "-5GB", "0GB", "0.0MB", "nanGB", "infGB", "", "GB", "1e99GB", 0, -1, "９GB\n"])
def test_sizes_of_shards_that_are_none(tmp_path: Path, size: int | str) -> None:
    with pytest.raises(OptionError, match=r"is no size of a shard\n  remedy  write bytes, or as in 5GB"):
        save_sharded(MODEL.state_dict(), tmp_path / "net.safetensors", size)
    assert not list(tmp_path.iterdir())


class Interrupted:
    """Four batches, and Ctrl-C after so many, whichever pass over them that is in."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def __iter__(self) -> Iterator[Tensor]:
        for batch in images(32).split(8):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("batches", [0, 1, 3, 5, 7])
def test_ctrl_c_in_a_merge_leaves_the_sources(batches: int, inplace: bool) -> None:
    a, b = net("residual", 1), net("residual", 2)
    a.train()
    before, modes = (state_of(a), state_of(b)), [module.training for module in a.modules()]
    data, random = Interrupted(batches), torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        surgery.merge(a, b, data=data, matching="activations", renormalize="repair", inplace=inplace, progress=False)
    assert same_state(state_of(a), before[0]) and same_state(state_of(b), before[1])
    assert [module.training for module in a.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for model in (a, b) for module in model.modules())


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    for seed, name in enumerate("ab"):
        save_state_dict(from_seed(TinyConvNet, seed).state_dict(), tmp_path / f"{name}.safetensors")
    return tmp_path / "a.safetensors", tmp_path / "b.safetensors"


@pytest.mark.parametrize(
    "where",
    ["merge.merge", "jobs.load_models", "merge.example_inputs_of", "merge.merge_report_of"],
    ids=lambda where: f"in {where}",
)
def test_ctrl_c_on_the_command_line(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    before = [path.read_bytes() for path in pair]
    monkeypatch.setattr(f"vfsurgery.cli.{where}", interrupted)
    result = call("merge", *pair, *DEMO, "-o", tmp_path / "ab.onnx")
    assert (result.exit_code, result.stderr.strip()) == (1, "Aborted!")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    assert [path.read_bytes() for path in pair] == before


def test_a_full_disk_on_the_command_line(
    pair: tuple[Path, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("full")
    result = call("merge", *pair, *DEMO, "-o", tmp_path / "ab.safetensors")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: cannot write {tmp_path}/ab.safetensors\n  cause  ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["convs.0.weight", "fc.bias"])
def test_weights_that_are_no_numbers_are_not_merged(
    pair: tuple[Path, Path], tmp_path: Path, value: float, key: str
) -> None:
    state = load_state_dict(pair[1])
    state[key].view(-1)[0] = value
    save_state_dict(state, pair[1])
    with pytest.raises(InvalidWeightsError, match=key):
        surgery.merge(from_seed(TinyConvNet, 0), loaded(state), example_inputs=torch.randn(2, 1, 8, 8), progress=False)
    result = call("merge", *pair, *DEMO, "-o", tmp_path / "ab.safetensors")
    assert result.exit_code == 1 and key in result.stderr
    assert not (tmp_path / "ab.safetensors").exists()


def loaded(state: dict[str, Tensor]) -> nn.Module:
    model = TinyConvNet()
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of a merge, beside its sources and its result."""
    folder = tmp_path_factory.mktemp("merged")
    for seed, name in enumerate("ab"):
        save_state_dict(from_seed(TinyConvNet, seed).state_dict(), folder / f"{name}.safetensors")
    result = call("merge", folder / "a.safetensors", folder / "b.safetensors", *DEMO, "-o", folder / "ab.safetensors")
    assert result.exit_code == 0, result.output
    return folder / "ab.report.json"


REPORTS: dict[str, Callable[[dict[str, object]], object]] = {
    "a list": lambda content: [content],
    "a number": lambda content: 3,
    "no record": lambda content: {},
    "a record that is none": lambda content: {"replay": 3},
    "another command": lambda content: {"replay": {**content, "command": "run"}},
    "no sources": lambda content: {"replay": {**content, "sources": []}},
    "sources as text": lambda content: {"replay": {**content, "sources": "ab"}},
    "one source": lambda content: {"replay": {**content, "sources": [{"path": "a", "sha256": "0" * 64}]}},
    "no hash": lambda content: {"replay": {**content, "sources": [{"path": "a.safetensors"}] * 2}},
    "a short hash": lambda content: {"replay": {**content, "sources": [{"path": "a", "sha256": "00"}] * 2}},
    "a zero in a path": lambda content: {"replay": {**content, "sources": [{"path": "a\0", "sha256": "0" * 64}] * 2}},
    "an output without a name": lambda content: {"replay": {**content, "output": [{"path": "", "sha256": "0" * 64}]}},
    "options as list": lambda content: {"replay": {**content, "options": ["--quiet"]}},
    "options in options": lambda content: {"replay": {**content, "options": {"model": {"a": 1}}}},
    "no threads": lambda content: {"replay": {**content, "threads": 0}},
    "a million threads": lambda content: {"replay": {**content, "threads": 10**6}},
    "threads as text": lambda content: {"replay": {**content, "threads": "1"}},
}


@pytest.mark.parametrize("change", REPORTS.values(), ids=REPORTS.keys())
def test_reports_that_are_none(report: Path, tmp_path: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(report.read_text())["replay"]
    (tmp_path / "odd.report.json").write_text(json.dumps(change(content)))
    result = call("replay", tmp_path / "odd.report.json", "--quiet")
    assert result.exit_code == 1
    assert "odd.report.json is no report that can be replayed\n  cause   " in result.stderr


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 10**5, b"9" * 10**4, b'{"replay": NaN}'], ids=range(6))
def test_reports_that_are_no_json(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "odd.report.json").write_bytes(text)
    result = call("replay", tmp_path / "odd.report.json", "--quiet")
    assert result.exit_code == 1
    assert "is no report that can be replayed" in result.stderr


@pytest.mark.parametrize("option", ["output", "help", "quiet", "nonsense", "model x -o /tmp/x", "../a"])
def test_reports_set_no_options_but_those_of_a_merge(report: Path, tmp_path: Path, option: str) -> None:
    content = json.loads(report.read_text())
    content["replay"]["options"][option] = str(tmp_path / "stolen.safetensors")
    changed = report.with_name("changed.report.json")
    changed.write_text(json.dumps(content))
    result = call("replay", changed, "--quiet")
    assert result.exit_code == (0 if option == "output" else 2)  # the place is ours, which comes last
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../../stolen.safetensors", "/tmp/vfsurgery-stolen.safetensors", "a/b.safetensors"])
def test_reports_do_not_choose_where_files_go(report: Path, tmp_path: Path, name: str) -> None:
    content = json.loads(report.read_text())
    content["replay"]["output"][0]["path"] = name
    changed = report.with_name("changed.report.json")
    changed.write_text(json.dumps(content))
    result = call("replay", changed, "--quiet", "-o", tmp_path / "new")
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert Path(name).name in {path.name for path in (tmp_path / "new").iterdir()}
    assert not Path("/tmp/vfsurgery-stolen.safetensors").exists()
