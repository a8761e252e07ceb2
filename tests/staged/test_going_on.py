"""A run that was cut off goes on to the same files, and takes over nothing that has changed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from small import RECIPE, ROOT, staged

import vfsurgery as surgery
from vfsurgery.checkpoints import file_hash, load_state_dict
from vfsurgery.data.datasets import DATA
from vfsurgery.errors import CheckpointError, SurgeryError
from vfsurgery.matching import MATCHERS, Matching
from vfsurgery.pruning import PRUNERS
from vfsurgery.recipes import bench as bench_module
from vfsurgery.recipes import running as running_module
from vfsurgery.recipes.stages import comparing as comparing_module
from vfsurgery.recipes.stages import looking as looking_module
from vfsurgery.recipes.stages import surgery as surgery_module


def counted(monkeypatch) -> list[str]:
    """What the stages call, by name, as it happens; an evaluation of several counts as one."""
    calls: list[str] = []
    called = {
        surgery_module: ("train", "merge", "prune"),
        looking_module: ("diagnose", "barrier"),
        bench_module: ("compare",),
        comparing_module: ("evaluate", "prune_each"),
    }
    for module, names in called.items():
        for name in names:
            original = getattr(module, name)

            def call(*args, name=name, original=original, **options):
                calls.append("evaluate" if name == "compare" else name)
                return original(*args, **options)

            monkeypatch.setattr(module, name, call)
    return calls


def taken_over(run) -> tuple[bool, ...]:
    """Stage by stage; an export never is."""
    return tuple(step.taken_over for step in run.findings[0].steps)


def test_a_second_run_takes_over_what_is_the_same(tmp_path, monkeypatch, ran):
    recipe = surgery.Recipe.from_yaml(RECIPE)
    recipe.run(tmp_path, progress=False)
    calls = counted(monkeypatch)
    again = recipe.run(tmp_path, progress=False, resume=True)
    assert calls == [] and taken_over(again) == (True, True, True, False)
    assert file_hash(tmp_path / "small.safetensors") == file_hash(ran.output / "small.safetensors")
    assert again.findings[0].said("evaluate").lines == ran.findings[0].said("evaluate").lines
    surgery.Recipe.from_yaml(RECIPE, {"stages.merge.alpha": 0.3}).run(tmp_path, progress=False, resume=True)
    assert calls == ["merge", "evaluate"]
    calls.clear()
    surgery.Recipe.from_yaml(RECIPE, {"sources.1.seed": 8}).run(tmp_path, progress=False, resume=True)
    assert calls == ["train", "train", "merge", "evaluate"]
    calls.clear()
    recipe.run(tmp_path, progress=False)
    assert calls == ["train", "train", "merge", "evaluate"]


def test_damaged_steps_are_made_anew(tmp_path, monkeypatch, ran):
    recipe = surgery.Recipe.from_yaml(RECIPE)
    recipe.run(tmp_path, progress=False)
    (merged,) = (tmp_path / ".stages").rglob("merged.safetensors")
    content = bytearray(merged.read_bytes())
    merged.write_bytes(content[:-100])
    calls = counted(monkeypatch)
    recipe.run(tmp_path, progress=False, resume=True)
    assert calls == ["merge"]
    assert file_hash(tmp_path / "small.safetensors") == file_hash(ran.output / "small.safetensors")


DAMAGES = {
    "no object": lambda record: [],
    "a number": lambda record: 3,
    "a key less": lambda record: {key: value for key, value in record.items() if key != "lines"},
    "lines that are none": lambda record: record | {"lines": 3},
    "values that are none": lambda record: record | {"values": ["x"]},
    "metadata that is none": lambda record: record | {"metadata": "x"},
    "a summary of other keys": lambda record: record | {"summaries": {"merged": {"x": 1}}},
    "scores that are none": lambda record: record | {"scores": 3},
    "a score of text": lambda record: record | {"scores": {"a": {"accuracy": "x", "loss": 0.0, "count": 1}}},
    "rows that are not there": lambda record: record | {"scores": {}, "rows": {}},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_records_of_another_shape_are_made_anew(tmp_path, ran, damage):
    shutil.copytree(ran.output, tmp_path / "out")
    records = [*(tmp_path / "out/.stages").glob("*/record.json")]
    assert len(records) == 3
    for path in records:
        whole, _, text = path.read_text().partition("\n")
        path.write_text(f"{whole}\n{json.dumps(damage(json.loads(text)))}")
    again = ran.recipe.run(tmp_path / "out", progress=False, resume=True)
    assert not all(taken_over(again)[:3])
    assert file_hash(tmp_path / "out/small.safetensors") == file_hash(ran.output / "small.safetensors")
    assert again.findings[0].bench.shown.scores == ran.findings[0].bench.shown.scores
    assert taken_over(ran.recipe.run(tmp_path / "out", progress=False, resume=True)) == (True, True, True, False)


@pytest.mark.skipif(os.name != "posix", reason="files of POSIX")
@pytest.mark.parametrize("planted", ["pipe", "link", "deep", "folder", "loop", "no text"])
def test_planted_files_are_not_followed(tmp_path, ran, planted):
    shutil.copytree(ran.output, tmp_path / "out")
    (merged,) = (tmp_path / "out/.stages").glob("*/merged.safetensors")
    record = merged.parent / "record.json"
    record.unlink()
    if planted == "pipe":
        os.mkfifo(record)
    elif planted == "link":
        record.symlink_to("/dev/zero")
    elif planted == "loop":
        record.symlink_to(record.name)
    elif planted == "folder":
        record.mkdir()
    else:
        record.write_bytes(b"[" * 200_000 if planted == "deep" else b"\xff\xfe")
    again = ran.recipe.run(tmp_path / "out", progress=False, resume=True)
    assert taken_over(again) == (True, False, True, False)
    assert file_hash(tmp_path / "out/small.safetensors") == file_hash(ran.output / "small.safetensors")


def test_a_link_in_the_place_of_kept_steps_is_refused(tmp_path):
    kept = tmp_path / "mine"
    kept.mkdir()
    (kept / "x.partial").mkdir()
    (kept / "letter.txt").write_text("dear")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.stages").symlink_to(kept)
    recipe = surgery.Recipe.from_yaml(staged("evaluate"))
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=r"cannot keep steps in .*stages"):
            recipe.run(tmp_path / "out", progress=False, resume=resume)
    assert {path.name for path in kept.iterdir()} == {"letter.txt", "x.partial"}


def test_a_recipe_that_cannot_begin_leaves_what_is_kept(tmp_path, ran):
    shutil.copytree(ran.output, tmp_path / "out")
    before = sorted((tmp_path / "out/.stages").rglob("*"))
    for changes in ({"sources.1.checkpoint": "none.pt"}, {"sources.0.model": "vfsurgery.networks.demo:Tiny"}):
        with pytest.raises(SurgeryError):
            surgery.Recipe.from_yaml(RECIPE, changes).run(tmp_path / "out", progress=False)
    assert sorted((tmp_path / "out/.stages").rglob("*")) == before


def test_a_page_that_is_asked_for_later_has_the_merge_s_report(tmp_path, monkeypatch):
    surgery.Recipe.from_yaml(RECIPE).run(tmp_path, progress=False)
    first = file_hash(tmp_path / "small.safetensors")
    text = RECIPE + "  - diagnose\n"
    calls = counted(monkeypatch)
    surgery.Recipe.from_yaml(text).run(tmp_path, progress=False, resume=True)
    assert calls == ["merge", "diagnose"]
    assert "certificate" in (tmp_path / "small.html").read_text().lower()
    assert load_state_dict(tmp_path / "small.safetensors")["fc.weight"].shape == (10, 16)
    assert file_hash(tmp_path / "small.safetensors") != first  # its header has the other recipe


def test_a_training_goes_on_at_its_epoch(tmp_path, ran, monkeypatch):
    recipe = surgery.Recipe.from_yaml(RECIPE)
    from vfsurgery.training import resuming

    original, saved = resuming.Progress.save, []

    def save(self, path, epoch):
        original(self, path, epoch)
        saved.append(epoch)
        if len(saved) == 3:  # in the second network, after its first epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(resuming.Progress, "save", save)
    with pytest.raises(KeyboardInterrupt):
        recipe.run(tmp_path, progress=False)
    assert not (tmp_path / "small.safetensors").exists()
    recipe.run(tmp_path, progress=False, resume=True)
    assert saved == [1, 2, 1, 2]
    assert file_hash(tmp_path / "small.safetensors") == file_hash(ran.output / "small.safetensors")
    assert not [*(tmp_path / ".stages").glob("*.pt")]


@pytest.mark.parametrize(
    "moment",
    [
        "*.training.pt",
        *(pytest.param(f"*/{name}", marks=pytest.mark.thorough) for name in ("a.safetensors", "merged.safetensors")),
    ],
)
def test_a_run_that_is_killed_goes_on_to_the_same_file(tmp_path, ran, moment):
    (tmp_path / "small.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "vfsurgery", "run", "small.yaml", "--output", "out", "--quiet", "--resume"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not [*(tmp_path / "out/.stages").glob(moment)]:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert file_hash(tmp_path / "out/small.safetensors") == file_hash(ran.output / "small.safetensors")


class Backwards:
    """A matcher of somebody else."""

    name, needs_data = "backwards", False

    def match(self, problem):
        return [Matching({group.name: group.identity() for group in problem.groups}) for _ in problem.states[1:]]


@dataclasses.dataclass(frozen=True)
class Same(surgery.Pruner):
    """A pruner of somebody else."""

    name = "same"

    def score(self, work):
        yield from work.weights.items()


def squares(seed: int = 0):
    images = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.utils.data.TensorDataset(images, torch.arange(40) % 10)


@pytest.mark.parametrize(
    ("stages", "taken"),
    [
        ([{"shrink": {"factor": 0.25}}], (False,)),
        ([{"prune": {"sparsity": 0.5, "method": "same"}}], (False,)),
        ([{"fold": {}}, {"merge": {"matching": "backwards"}}], (True, False)),
        ([{"fold": {}}, {"merge": {"matching": "weights"}}], (True, True)),
    ],
    ids=["pass", "pruner", "matcher", "ours"],
)
def test_another_code_of_yours_is_another_step(tmp_path, shrink, monkeypatch, stages, taken):
    for registry, one in ((MATCHERS, Backwards), (PRUNERS, Same)):
        monkeypatch.setattr(registry, "_entries", {**registry._entries, one.name: one})
    recipe = surgery.Recipe.from_yaml(staged(*stages))
    recipe.run(tmp_path, progress=False)
    assert all(taken_over(recipe.run(tmp_path, progress=False, resume=True))[:-1])
    monkeypatch.setattr(running_module, "file_hash", lambda path: "another")
    assert taken_over(recipe.run(tmp_path, progress=False, resume=True))[:-1] == taken


def test_another_code_of_data_is_another_run(tmp_path, monkeypatch):
    monkeypatch.setattr(DATA, "_entries", {**DATA._entries, "squares": squares})
    recipe = surgery.Recipe.from_yaml(staged({"prune": {"sparsity": 0.5}}, data={"name": "squares"}))
    recipe.run(tmp_path, progress=False)
    assert taken_over(recipe.run(tmp_path, progress=False, resume=True)) == (True, False)
    monkeypatch.setattr(running_module, "file_hash", lambda path: "another")
    assert taken_over(recipe.run(tmp_path, progress=False, resume=True)) == (False, False)


@pytest.mark.parametrize("module", ["typed", "__main__"])
def test_passes_typed_into_an_interpreter_have_no_file(tmp_path, shrink, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    monkeypatch.setattr(shrink, "__module__", module)
    run = surgery.Recipe.from_yaml(staged({"shrink": {"factor": 0.25}})).run(tmp_path, progress=False)
    assert taken_over(run) == (False, False)


def test_nothing_is_written_when_a_step_fails(tmp_path):
    text = staged({"export": "early.safetensors"}, {"merge": {"pins": ["nothing"]}})
    with pytest.raises(SurgeryError, match="nothing"):
        surgery.Recipe.from_yaml(text).run(tmp_path, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {".stages"}


COMPARED = """\
name: small
threads: 1
data: {name: digits}
sources: [{model: "vfsurgery.networks.demo:TinyConvNet", options: {width: 4}}, {}]
stages:
  - compare:
      ways:
        - plain: {merge: {matching: identity, renormalize: none}}
        - trained: [merge: {matching: weights, renormalize: none}, train: {epochs: 1}]
        - repaired: {merge: {matching: weights, renormalize: rescale}}
      expect: [ratio plain < 9, plain < 101]
      goes_on: trained
      flips: true
  - barrier: {alphas: 3}
  - evaluate
"""


def test_a_comparison_is_taken_over_with_the_way_that_goes_on(tmp_path, monkeypatch):
    recipe = surgery.Recipe.from_yaml(COMPARED, {"stages.compare.goes_on": "repaired"})
    first = recipe.run(tmp_path, progress=False)
    written = file_hash(tmp_path / "small.safetensors")
    (tmp_path / "small_barrier.png").unlink()
    calls = counted(monkeypatch)
    again = recipe.run(tmp_path, progress=False, resume=True)
    assert calls == [] and taken_over(again) == (True, True, True, False)
    assert file_hash(tmp_path / "small.safetensors") == written
    assert (tmp_path / "small_barrier.png").read_bytes().startswith(b"\x89PNG")
    assert again.outcomes() == first.outcomes() and str(again).count("(taken over)") == 3
    steps = [json.loads(json.dumps(run.findings[0].to_dict()["steps"])) for run in (first, again)]
    assert steps[0] == steps[1]
    other = surgery.Recipe.from_yaml(COMPARED, {"stages.compare.goes_on": "plain"}).run(
        tmp_path, progress=False, resume=True
    )
    assert not any(taken_over(other)) and file_hash(tmp_path / "small.safetensors") != written


def test_what_a_way_makes_is_what_its_stages_make_alone(tmp_path):
    """And a line through a network that was trained behind its merge is refused, since no merge made it."""
    text = COMPARED.replace("  - barrier: {alphas: 3}\n", "")
    surgery.Recipe.from_yaml(text).run(tmp_path / "compared", progress=False)
    stages = {"merge": {"matching": "weights", "renormalize": "none"}}, {"train": {"epochs": 1}}
    alone = surgery.Recipe.from_yaml(text, {"stages": list(stages)})
    alone.run(tmp_path / "alone", progress=False)
    weights = [load_state_dict(tmp_path / folder / "small.safetensors") for folder in ("compared", "alone")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    with pytest.raises(SurgeryError, match="was not made by merge"):
        surgery.Recipe.from_yaml(COMPARED).run(tmp_path / "line", progress=False)


def test_a_comparison_that_is_killed_goes_on_to_the_same_files(tmp_path):
    text = COMPARED.replace("goes_on: trained", "goes_on: repaired")
    whole = surgery.Recipe.from_yaml(text).run(tmp_path / "whole", progress=False)
    (tmp_path / "small.yaml").write_text(text)
    command = [sys.executable, "-m", "vfsurgery", "run", "small.yaml", "--output", "out", "--quiet", "--resume"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not [*(tmp_path / "out/.stages").glob("*/merged.safetensors")]:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run([*command[:-2], "--resume"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "1 compare (taken over)" in done.stdout, done.stderr
    assert file_hash(tmp_path / "out/small.safetensors") == file_hash(whole.output / "small.safetensors")
