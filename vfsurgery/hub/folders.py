"""Networks in folders that others load, and such folders on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from torch import fx, nn

from vfsurgery.checkpoints import INDEX, ONNX, PROGRAM, WEIGHTS, FileRecord, provenance, save_state_dict, write_text
from vfsurgery.checkpoints.refusals import refuse_damaged
from vfsurgery.errors import CheckpointError, HubError, OptionError, explain
from vfsurgery.hub.cards import CARD, CLASSIFICATION, Card, Network, Summary, check_card, described, is_card
from vfsurgery.hub.loading import CONFIG, TIMM_WEIGHTS, Written, is_of_timm
from vfsurgery.records.results import report_of

NETWORKS = (WEIGHTS, PROGRAM, ONNX)

UPLOADED = (CARD, CONFIG, "report.json", "*.report.json", f"*{INDEX}", *(f"*{suffix}" for suffix in NETWORKS))
PICTURES = ("*.png", "*.svg", "*.html")
"""What of a folder goes to the Hub, beside networks and what belongs to them; nothing else ever does."""


def save_folder(
    model: nn.Module,
    folder: str | Path,
    *,
    title: str | None = None,
    sources: Sequence[str | Path] = (),
    license: str | None = None,
    base_models: Sequence[str] = (),
) -> Path:
    """Write a network that this library made into a folder that others load, and that :func:`push_to_hub` takes.

    It holds ``model.safetensors``, ``report.json``, a card (``README.md``) and, for models of timm, the ``config.json``
    with which ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads it.

    Args:
        model: What :func:`~vfsurgery.merge`, :func:`~vfsurgery.prune`, :func:`~vfsurgery.renormalize`,
            :func:`~vfsurgery.soup` or another of this library's functions returned; not a graph module.
        folder: Made when missing; a README.md in it that is no card of ours is left alone, with an error.
        title: Heading of the card; by default the folder's name.
        sources: Files or names of what went in; files are written down with their hashes.
        license: As the Hub names licences, as in ``"apache-2.0"``; nothing is said without.
        base_models: Hub names of what went in, as in ``"timm/resnet18.a1_in1k"``.

    Returns:
        The folder.

    Raises:
        OptionError: The model does not come from this library, or is a graph module.
        CheckpointError: Something cannot be written, or another README.md is there.

    >>> import torch, vfsurgery as surgery
    >>> nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2)]
    >>> merged = surgery.merge(*nets, example_inputs=torch.randn(2, 4))
    >>> sorted(path.name for path in save_folder(merged, tempfile.mkdtemp()).iterdir())
    ['README.md', 'model.safetensors', 'report.json']
    """
    folder = Path(folder)
    report = report_of(model)
    if isinstance(model, fx.GraphModule):
        remedy = "vfsurgery.checkpoints.save_program writes it whole, or vfsurgery merge --card -o NAME.pt2"
        raise OptionError(explain("a graph module has no architecture that its weights load into", remedy=remedy))
    check_card(folder)
    records = [FileRecord.of(Path(source)) if Path(source).is_file() else str(source) for source in sources]
    files = [record for record in records if isinstance(record, FileRecord)]
    save_state_dict(model.state_dict(), folder / TIMM_WEIGHTS, provenance(report, "", files))
    write_text(folder / "report.json", report.to_json() + "\n")
    title = title or folder.resolve().name
    of_timm = is_of_timm(model)
    written, told = Written((TIMM_WEIGHTS,), _class_of(model), of_timm=of_timm), Summary.of(report)
    network = Network(name=title, written=written, summary=told, sources=described(records), model=model)
    Card(
        title=title,
        summary="A network and how it was made.",
        networks=[network],
        license=license,
        base_models=base_models,
        task=CLASSIFICATION if of_timm else None,
    ).write(folder)
    return folder


def push_to_hub(
    folder_or_model: str | Path | nn.Module,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    message: str | None = None,
    **card: Any,
) -> str:
    """Put a network with its card on the Hugging Face Hub, in one commit.

    Of a folder go, from its top level alone, the card, networks (``.safetensors``, ``.pt2``, ``.onnx``),
    ``config.json``, reports, pictures and pages. Links, hidden files, folders and pickled checkpoints never do.

    Args:
        folder_or_model: A folder with a card, as ``vfsurgery run``, ``vfsurgery merge --card`` and :func:`save_folder`
            write, or a model for which one is made.
        repo_id: ``USER/NAME`` or ``ORGANISATION/NAME``; the repository is made when missing.
        private: Make a private repository. One that is there and public is refused.
        token: By default that of ``hf auth login`` or of the environment variable ``HF_TOKEN``.
        revision: A branch that is there; by default the main one.
        message: Of the commit.
        card: For a model, keywords of :func:`save_folder`.

    Returns:
        The address of the repository.

    Raises:
        HubError: huggingface_hub is missing or too old, no one is logged in, the Hub cannot be reached, or it refuses.
        OptionError: ``repo_id`` is no such name, or as for :func:`save_folder`.
        CheckpointError: The folder has no card or no network.
    """
    _check_name(repo_id)
    if isinstance(folder_or_model, nn.Module):
        with tempfile.TemporaryDirectory() as scratch:
            card = {"title": repo_id.rpartition("/")[2], **card}
            folder = save_folder(folder_or_model, Path(scratch) / "model", **card)
            return push_to_hub(folder, repo_id, private=private, token=token, revision=revision, message=message)
    if card:
        raise OptionError(explain(f"a folder has its card already, so {', '.join(card)} cannot be given"))
    files = listed(folder_or_model)
    with _hub_errors(repo_id):
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(url.repo_id).private:
            raise HubError(
                explain(f"{url.repo_id} is there and public", remedy="make it private on the Hub, or name another one")
            )
        api.create_commit(
            url.repo_id,
            [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in files],
            commit_message=message or f"Upload {len(files)} files with vfsurgery",
            revision=revision,
        )
    return str(url)


def listed(folder: str | Path) -> list[Path]:
    """The files of a folder that :func:`push_to_hub` uploads, by name.

    Raises:
        CheckpointError: There is no such folder, or it has no card or no network.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(explain(f"there is no folder {folder}", remedy="vfsurgery run writes one, into out/NAME"))
    found = {
        path
        for pattern in (*UPLOADED, *PICTURES)
        for path in folder.glob(pattern)
        if path.is_file() and not path.is_symlink() and not path.name.startswith(".")
    }
    if folder / CARD not in found or not is_card(folder / CARD):
        remedy = "vfsurgery run writes one, vfsurgery merge does with --card, surgery.save_folder(model, FOLDER) too"
        raise CheckpointError(explain(f"{folder} has no card, a README.md of vfsurgery", remedy=remedy))
    if not any(path.suffix in NETWORKS for path in found):
        raise CheckpointError(explain(f"{folder} has no network", expected=", ".join(f"*{each}" for each in NETWORKS)))
    _check_shards(folder, {path.name for path in found})
    return sorted(found)


def _check_shards(folder: Path, names: set[str]) -> None:
    """Refuse a folder that lacks a shard which its index names."""
    for index in sorted(name for name in names if name.endswith(INDEX)):
        try:
            shards = set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            refuse_damaged(folder / index, error)
        if missing := sorted(shards - names):
            raise CheckpointError(explain(f"{folder} lacks {missing[0]}", because=f"{index} names it"))


def _check_name(repo_id: str) -> None:
    part = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
    known = re.fullmatch(rf"({part}/)?{part}", repo_id)
    if not known or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git") or len(repo_id) > 96:
        raise OptionError(
            explain(
                f"{repo_id!r} is no name of a repository",
                expected="USER/NAME, of letters, digits, single - and ., and _",
                remedy="as in ada/digits-merged",
            )
        )


@contextlib.contextmanager
def _hub_errors(repo_id: str) -> Generator[None]:
    """Raise what goes wrong with the Hub as a :class:`HubError` that says what to do."""
    fact = f"cannot push to {repo_id}"
    try:
        from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
    except ImportError as error:
        raise HubError(explain(fact, cause=error, remedy="pip install 'vfsurgery[hub]'")) from error
    login = "hf auth login, or set HF_TOKEN; a token that may write is needed: huggingface.co/settings/tokens"
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise HubError(explain(fact, cause="no one is logged in", remedy=login)) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        cause = str(error).strip().partition("\n")[0]
        raise HubError(explain(fact, cause=cause, remedy=login if status in (401, 403) else None)) from error
    except OfflineModeIsEnabled as error:
        raise HubError(explain(fact, cause="HF_HUB_OFFLINE is set", remedy="unset it to push")) from error
    except (HTTPError, ConnectionError, TimeoutError) as error:
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise HubError(explain(fact, cause=cause, remedy="is huggingface.co reached from here? try again")) from error


def _class_of(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"
