"""What goes to the Hub is what was listed, in one commit; what cannot go there is refused with the way out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

import vfsurgery as surgery
from vfsurgery.cli import main
from vfsurgery.errors import CheckpointError, HubError, OptionError
from vfsurgery.hub import listed, push_to_hub, save_folder
from vfsurgery.hub.cards import CARD
from vfsurgery.training import from_seed

IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


@dataclass
class Hub:
    """Stands in for the Hub: repositories by name, private or not, and the files of their commits."""

    repositories: dict[str, bool] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    failure: Exception | None = None

    def api(self, token: str | None = None) -> Hub:
        self.tokens.append(token)
        return self

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        if self.failure is not None:
            raise self.failure
        full = repo_id if "/" in repo_id else f"ada/{repo_id}"
        assert exist_ok
        self.repositories.setdefault(full, bool(private))

        class Url(str):
            repo_id = full

        return Url(f"https://huggingface.co/{full}")

    def model_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=self.repositories[repo_id])

    def create_commit(
        self, repo_id: str, operations: list[CommitOperationAdd], *, commit_message: str, revision: str | None
    ) -> None:
        files = {each.path_in_repo: Path(each.path_or_fileobj).read_bytes() for each in operations}
        self.commits.append({"repo": repo_id, "files": files, "message": commit_message, "revision": revision})


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    found = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", found.api)
    yield found


@pytest.fixture(scope="module")
def merged() -> torch.nn.Module:
    a, b = (from_seed(lambda: timm.create_model("test_resnet", num_classes=5), seed) for seed in (0, 1))
    return surgery.merge(a, b, example_inputs=IMAGES, renormalize=None)


@pytest.fixture
def folder(merged, tmp_path) -> Path:
    return save_folder(merged, tmp_path / "ab")


def test_a_folder_goes_up_in_one_commit(folder, hub):
    assert push_to_hub(folder, "ada/ab", token="hf_x", message="first") == "https://huggingface.co/ada/ab"
    (commit,) = hub.commits
    assert (commit["repo"], commit["message"], commit["revision"]) == ("ada/ab", "first", None)
    assert commit["files"] == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.tokens == ["hf_x"]
    assert hub.repositories == {"ada/ab": False}


def test_nothing_else_goes_up(folder, hub, tmp_path):
    kept = {path.name for path in folder.iterdir()} | {"plot.png", "page.html", "ab.report.json"}
    for name in kept | {"weights.pt", "weights.bin", "data.pkl", ".env", ".card.partial.png", "notes.txt", "keys.json"}:
        if not (folder / name).exists():
            (folder / name).write_text("secret")
    (folder / ".stages").mkdir()
    (folder / ".stages" / "a.safetensors").write_text("cache")
    (folder / "sub.png").mkdir()
    (tmp_path / "elsewhere.png").write_text("secret")
    os.symlink(tmp_path / "elsewhere.png", folder / "link.png")
    push_to_hub(folder, "ada/ab")
    assert set(hub.commits[0]["files"]) == kept == {path.name for path in listed(folder)}


def test_a_model_goes_up_with_a_card_of_its_own(merged, hub):
    push_to_hub(merged, "ada/ab-merged", license="mit")
    files = hub.commits[0]["files"]
    assert set(files) == {"README.md", "config.json", "model.safetensors", "report.json"}
    assert b"license: mit" in files["README.md"]
    assert b"# ab-merged" in files["README.md"]


def test_timm_loads_it_from_the_hub(merged, hub, monkeypatch, tmp_path):
    push_to_hub(merged, "ada/ab")

    def download(repo_id: str, filename: str, **_: object) -> str:
        assert repo_id == "ada/ab"
        (tmp_path / filename).write_bytes(hub.commits[0]["files"][filename])
        return str(tmp_path / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    loaded = timm.create_model("hf-hub:ada/ab", pretrained=True)
    torch.testing.assert_close(loaded.eval()(IMAGES), merged.eval()(IMAGES))


def test_private_is_private(folder, hub):
    push_to_hub(folder, "ada/new", private=True)
    assert hub.repositories == {"ada/new": True}
    hub.repositories["ada/old"] = False
    with pytest.raises(HubError, match="ada/old is there and public\n  remedy  make it private"):
        push_to_hub(folder, "ada/old", private=True)
    assert [commit["repo"] for commit in hub.commits] == ["ada/new"]


@pytest.mark.parametrize("name", ["", "a b", "ada/ab/c", "../ab", "a--b", "ada/ab.git", "ada/", "-a", "ä/b", "a" * 97])
def test_bad_names_are_refused_before_anything(folder, hub, name):
    with pytest.raises(OptionError, match=r"is no name of a repository\n  expected  USER/NAME"):
        push_to_hub(folder, name)
    assert hub.tokens == []


def test_folders_that_are_not_ready(folder, hub, tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere"):
        push_to_hub(tmp_path / "nowhere", "ada/ab")
    text = (folder / CARD).read_text()
    (folder / CARD).write_text("# Mine\n")
    with pytest.raises(CheckpointError, match=r"has no card, a README\.md of vfsurgery\n  remedy  vfsurgery run"):
        push_to_hub(folder, "ada/ab")
    (folder / CARD).write_text(text)
    (folder / "model.safetensors").rename(folder / "model.pt")
    with pytest.raises(CheckpointError, match=r"has no network\n  expected  \*\.safetensors, \*\.pt2, \*\.onnx"):
        push_to_hub(folder, "ada/ab")
    assert hub.tokens == []


def test_a_missing_shard_is_named(folder, hub):
    index = '{"weight_map": {"a": "net-00001-of-00002.safetensors"}}'
    (folder / "net.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"lacks net-00001-of-00002\.safetensors\n  because  net\.safetensors"):
        push_to_hub(folder, "ada/ab")
    (folder / "net.safetensors.index.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"net\.safetensors\.index\.json is damaged"):
        push_to_hub(folder, "ada/ab")


def test_a_folder_takes_no_words_for_its_card(folder, hub):
    with pytest.raises(OptionError, match="a folder has its card already, so license cannot be given"):
        push_to_hub(folder, "ada/ab", license="mit")


def refusal(status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError(f"{status} Client Error: no\n\nlong story", response=response)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (LocalTokenNotFoundError("no token"), "cause   no one is logged in\n  remedy  hf auth login, or set HF_TOKEN"),
        (refusal(401), "cause   401 Client Error: no\n  remedy  hf auth login"),
        (refusal(403), "cause   403 Client Error: no\n  remedy  hf auth login"),
        (refusal(500), "cause  500 Client Error: no$"),
        (OfflineModeIsEnabled("offline"), "cause   HF_HUB_OFFLINE is set\n  remedy  unset it"),
        (HTTPError("no route"), "cause   no route\n  remedy  is huggingface.co reached from here"),
        (ConnectionResetError("reset"), "cause   reset\n  remedy  is huggingface.co reached from here"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_hub_refuses_is_explained(folder, hub, failure, message):
    hub.failure = failure
    with pytest.raises(HubError, match=f"cannot push to ada/ab\n  {message}"):
        push_to_hub(folder, "ada/ab")


def test_other_errors_are_not_dressed_up(folder, hub):
    hub.failure = KeyError("a bug")
    with pytest.raises(KeyError, match="a bug"):
        push_to_hub(folder, "ada/ab")


def test_without_huggingface_hub(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", None)
    with pytest.raises(HubError, match=r"remedy  pip install 'vfsurgery\[hub\]'"):
        push_to_hub(folder, "ada/ab")


def test_the_command_lists_and_uploads(folder, hub):
    call = CliRunner().invoke
    result = call(main, ["push", str(folder), "ada/ab", "--dry-run"])
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()] == [path.name for path in listed(folder)]
    assert hub.commits == []
    result = call(main, ["push", str(folder), "ada/ab", "--private", "--revision", "dev", "--message", "m"])
    assert result.output.endswith("\nuploaded to https://huggingface.co/ada/ab\n")
    assert (hub.commits[0]["revision"], hub.commits[0]["message"]) == ("dev", "m")
    assert hub.repositories == {"ada/ab": True}
    hub.failure = LocalTokenNotFoundError("no token")
    result = call(main, ["push", str(folder), "ada/ab"])
    assert result.exit_code == 1
    assert "error: cannot push to ada/ab\n  cause   no one is logged in" in result.output
    assert "Traceback" not in result.output
