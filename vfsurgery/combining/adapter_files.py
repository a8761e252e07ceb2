"""The files of an adapter's folder: ``adapter_config.json``, and the factors, as peft writes them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

from torch import Tensor

from vfsurgery.checkpoints.lazy import LazyCheckpoint, open_checkpoint
from vfsurgery.checkpoints.refusals import printable, refuse_damaged
from vfsurgery.errors import CheckpointError, explain

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
"""What peft puts before every name of the base."""

LARGEST_CONFIG = 2**24
"""Bytes; one with a rank for each of ten thousand layers has less than a tenth."""

OTHERWISE: Mapping[str, str] = {
    "target_parameters": "it attaches to parameters, not modules",
    "trainable_token_indices": "it trains single rows of tables",
    "layer_replication": "it repeats layers of its base",
    "alora_invocation_tokens": "it acts on some tokens alone",
    "use_qalora": "it pools the inputs of its layers",
    "use_bdlora": "its factors are in blocks",
    "arrow_config": "it routes between adapters",
    "kasa_config": "it has a third factor, and another base",
    "monteclora_config": "its factors are drawn at random",
}
"""Options under which a layer computes something else than ``(W + s B A) x``, and what."""

OWN_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin training that change the base's weights."""

FACTOR = re.compile(
    r"(?P<path>.+)\.(?:lora_(?P<factor>[AB])\.(?P<kind>weight|bias)|lora_embedding_(?P<table>[AB])"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?)"
)


@dataclass(frozen=True)
class Stored:
    """A tensor of an adapter, which stays in its file.

    Attributes:
        shape: Of the tensor.
        any: Whether a number of it is not zero.
    """

    file: LazyCheckpoint = field(repr=False)
    key: str
    shape: tuple[int, ...]
    any: bool

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.shape)

    def tensor(self) -> Tensor:
        """Its numbers, read now."""
        return self.file.read(self.key, 0, math.prod(self.shape)).reshape(self.shape)


@dataclass(frozen=True)
class Parts:
    """What a folder has for one module: factors ``A`` and ``B``, and what goes along.

    ``doubled`` where peft adds the product twice: to the ``out_proj`` of an ``nn.MultiheadAttention``, whenever it
    runs and when it merges, so that training was with it.
    """

    down: Stored
    up: Stored
    rank: int
    alpha: float
    bias: Stored | None = None
    magnitude: Stored | None = None
    table: bool = False
    doubled: bool = False


def files_of_adapter(folder: Path) -> list[Path]:
    """What is read of a folder.

    Raises:
        CheckpointError: it has no weights.
    """
    return [folder / CONFIG, _weights(folder)]


def read_config(folder: Path) -> Mapping[str, Any]:
    """What the folder says of its adapter.

    Raises:
        CheckpointError: it says nothing, or something that cannot be folded.
    """
    path = folder / CONFIG
    if not path.is_file():
        inside = "there is no such folder" if not folder.is_dir() else f"it has no {CONFIG}"
        raise CheckpointError(
            explain(
                f"{folder} is no folder of an adapter", cause=inside, remedy="name what peft's save_pretrained wrote"
            )
        )
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            refuse_damaged(path, f"more than {LARGEST_CONFIG:,} bytes")
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        refuse_damaged(path, error)
    if not isinstance(content, dict):
        refuse_damaged(path, "it holds no mapping")
    config = cast("dict[str, Any]", content)
    kind = config.get("peft_type")
    if kind != "LORA":
        _refuse(path, f"its peft_type is {printable(repr(kind))}, and LORA can be folded")
    for option, why in OTHERWISE.items():
        if config.get(option):
            _refuse(path, f"{option}: {why}")
    if isinstance(began := config.get("init_lora_weights"), str) and began.lower().startswith(OWN_BASE):
        _refuse(path, f"init_lora_weights={printable(began)}: its base was changed before training, and is not at hand")
    for option in ("r", "lora_alpha"):
        _check_number(path, option, config.get(option, 8))
    for option in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(option) or {}
        if not isinstance(pattern, dict):
            refuse_damaged(path, f"{option} is no mapping")
        for key, value in cast("dict[str, Any]", pattern).items():
            _check_number(path, f"{option}[{printable(key)}]", value)
    return config


def read_parts(folder: Path, config: Mapping[str, Any]) -> tuple[LazyCheckpoint, dict[str, Parts], dict[str, Stored]]:
    """The file of the weights, factors by the path of their module, and tensors that take the place of the base's.

    Every number is looked at, a tensor at a time, and left where it is.

    Raises:
        CheckpointError: the file is missing or damaged, a factor has no other, or ranks differ from what is said.
    """
    path = _weights(folder)
    file = open_checkpoint(path)
    found: dict[str, dict[str, Stored]] = {}
    saved: dict[str, Stored] = {}
    for key, hollow in file.state.items():
        numbers = file.read(key, 0, hollow.numel())
        if not bool(numbers.isfinite().all()):
            raise CheckpointError(explain(f"{path} holds NaN or infinite values", tensor=printable(key)))
        tensor = Stored(file, key, tuple(hollow.shape), bool(numbers.any()))
        name = key.removeprefix(PREFIX)
        if (match := FACTOR.fullmatch(name)) is not None:
            role = "M" if match["magnitude"] else (match["factor"] or f"table {match['table']}")
            role = "bias" if match["kind"] == "bias" else role
            found.setdefault(match["path"], {})[role] = tensor
        elif ".lora_" in name:
            _refuse(path, f"{printable(key)} is nothing that a LoRA has")
        else:
            saved[name.replace("base_layer.", "")] = tensor
    file.close()
    if not found and not saved:
        refuse_damaged(path, "it is empty")
    parts = {module.replace("base_layer.", ""): _parts(path, module, own, config) for module, own in found.items()}
    return file, parts, saved


def _weights(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).exists():
            return folder / name
    raise CheckpointError(
        explain(f"{folder} has no weights", missing=" or ".join(WEIGHTS), remedy="save or copy the adapter again")
    )


def _parts(path: Path, module: str, own: Mapping[str, Stored], config: Mapping[str, Any]) -> Parts:
    table = "table A" in own or "table B" in own
    down, up = (own.get(f"table {factor}" if table else factor) for factor in "AB")
    if down is None or up is None:
        raise CheckpointError(
            explain(
                f"{path} has one factor of two",
                missing=f"lora_{'A' if down is None else 'B'} of {printable(module)}",
                remedy="save or copy the adapter again",
            )
        )
    owner = module.partition(".base_layer.")[0]
    rank = int(_matching(path, config, "rank_pattern", owner, config.get("r", 8)))
    alpha = float(_matching(path, config, "alpha_pattern", owner, config.get("lora_alpha", 8)))
    shapes = f"A {down.shape}, B {up.shape}"
    if down.ndim < 2 or up.ndim < 2 or down.shape[0] != rank:
        raise CheckpointError(
            explain(f"{path} has factors of another rank than {CONFIG} says", module=printable(module), shapes=shapes,
                    rank=rank, remedy="both files of one training belong together")
        )  # fmt: skip
    inner = math.prod(up.shape[1:])
    if inner != rank and (down.ndim == 2 or rank % inner):  # of grouped convolutions, B has the rank of a group
        raise CheckpointError(
            explain(f"{path} has factors that do not fit each other", module=printable(module), shapes=shapes)
        )
    return Parts(down, up, rank, alpha, own.get("bias"), own.get("M"), table, module != owner)


def _matching(path: Path, config: Mapping[str, Any], option: str, module: str, default: float) -> float:
    """The value of the first key that the end of a module's path matches, as peft decides it."""
    for key, value in (config.get(option) or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            refuse_damaged(path.with_name(CONFIG), f"{option}: {printable(key)} is no pattern: {error}")
    return default


def _check_number(path: Path, option: str, value: object) -> None:
    whole = option.startswith("r")
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not math.isfinite(value):
        refuse_damaged(path, f"{option} is {printable(repr(value))}, no {'whole ' if whole else ''}number")
    if whole and value < 1:
        refuse_damaged(path, f"{option} is {value}, less than 1")


def _refuse(path: Path, cause: str) -> NoReturn:
    raise CheckpointError(
        explain(
            f"{path} is of an adapter that cannot be folded here",
            cause=cause,
            remedy="fold it with peft and save the weights: PeftModel.from_pretrained(base, folder).merge_and_unload()",
        )
    )
