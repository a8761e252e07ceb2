"""A combined model as a LoRA adapter of its base, written as peft reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vfsurgery.checkpoints import save_state_dict, write_text
from vfsurgery.checkpoints.refusals import listing
from vfsurgery.combining.adapter_files import CONFIG, PREFIX, WEIGHTS
from vfsurgery.errors import IncompatibleModelsError, OptionError, explain

NEGLIGIBLE = 1e-6
"""Of the largest singular value: smaller ones are rounding."""

TARGETS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""What peft attaches factors to, where there are no groups."""


@dataclass(frozen=True)
class SavedAdapter:
    """What was written.

    Attributes:
        folder: Where.
        ranks: Of each weight that has factors.
        kept: The share of the squared norm of all their changes that the factors have.
        whole: Modules that are saved as they are, since no factors say what changed in them.
        beside: Tensors of no such module; peft reads them, but does not write them again.
    """

    folder: Path
    ranks: Mapping[str, int]
    kept: float
    whole: tuple[str, ...]
    beside: tuple[str, ...]

    def __str__(self) -> str:
        least, most = min(self.ranks.values(), default=0), max(self.ranks.values(), default=0)
        share = f"{self.kept:.2%} of the squared norm of their changes"
        told = [f"{self.folder}: {len(self.ranks)} weights of rank {least} to {most}, {share}"]
        if self.whole:
            told.append(f"saved whole: {listing(self.whole)}")
        if self.beside:
            told.append(f"saved beside, lost when peft saves them again: {listing(self.beside)}")
        return "\n".join(told)


def save_adapter(
    merged: nn.Module | Mapping[str, Tensor],
    base: nn.Module,
    folder: str | Path,
    *,
    rank: int | None = None,
    base_name: str | None = None,
) -> SavedAdapter:
    """Write what a model adds to its base as a LoRA adapter that peft loads.

    Of each changed weight the best factors of ``rank`` are found by SVD, for convolutions as matrices of outputs by all
    else. Other changes (norms, running statistics, biases, grouped convolutions, ``nn.MultiheadAttention``) are
    written whole.

    Args:
        merged: The model, or its state dict.
        base: What it was fine-tuned from; it stays as it is.
        folder: Takes ``adapter_config.json`` and ``adapter_model.safetensors``.
        rank: Of the factors, at most; by default as many as there are, which loses nothing.
        base_name: What the folder says of its base: a name of the Hub or a path.

    Raises:
        IncompatibleModelsError: names or shapes differ.
        OptionError: ``rank`` is none.
        CheckpointError: nothing can be written there.

    >>> import tempfile
    >>> base = nn.Sequential(nn.Linear(4, 3))
    >>> tuned = {name: tensor + (tensor.ndim > 1) for name, tensor in base.state_dict().items()}
    >>> folder = Path(tempfile.mkdtemp())
    >>> saved = save_adapter(tuned, base, folder)
    >>> dict(saved.ranks)
    {'0.weight': 1}
    >>> from vfsurgery.combining.adapters import fold_adapter
    >>> torch.allclose(fold_adapter(base, folder)["0.weight"], tuned["0.weight"])
    True
    """
    if rank is not None:
        check_rank(rank)
    entries = merged.state_dict() if isinstance(merged, nn.Module) else merged
    state, origin = ({name: each.detach() for name, each in of.items()} for of in (entries, base.state_dict()))
    _check_same(state, origin)
    changed = {name for name, tensor in state.items() if not torch.equal(tensor, origin[name])}
    targets = {f"{path}.weight": path for path, module in base.named_modules() if _is_target(module)}
    inside_attention = {
        f"{path}.{own}"
        for path, module in base.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        for own in module.state_dict()
    }
    written: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    lost = total = 0.0
    for name in sorted(changed & targets.keys() - inside_attention):
        down, up, left, all_of_it = _factors(state[name], origin[name], rank)
        lost, total = lost + left, total + all_of_it
        ranks[name] = len(down)
        written[f"{PREFIX}{targets[name]}.lora_A.weight"] = down
        written[f"{PREFIX}{targets[name]}.lora_B.weight"] = up
    attached = {targets[name] for name in ranks}
    whole = sorted({*_whole(base, changed - ranks.keys(), attached)})
    inside = {name for name in state if any(name.startswith(f"{path}.") for path in whole)}
    beside = sorted(changed - ranks.keys() - inside)
    for name in sorted({*inside, *beside}):
        path, _, last = name.rpartition(".")
        written[f"{PREFIX}{path}.base_layer.{last}" if path in attached else f"{PREFIX}{name}"] = state[name]
    folder = Path(folder)
    save_state_dict(written, folder / WEIGHTS[0])
    config = config_of(ranks, targets, whole, base_name)
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return SavedAdapter(folder, ranks, 1 - lost / total if total else 1.0, tuple(whole), tuple(beside))


def check_rank(rank: object) -> None:
    """Refuse what is no rank.

    Raises:
        OptionError: it is no whole number, or less than 1.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise OptionError(explain(f"rank is no whole number of at least 1 but {rank!r}"))


def _is_target(module: nn.Module) -> bool:
    return type(module) in TARGETS and getattr(module, "groups", 1) == 1


def _factors(tensor: Tensor, origin: Tensor, rank: int | None) -> tuple[Tensor, Tensor, float, float]:
    """As :func:`best_factors`, without directions that are rounding."""
    _, s, _ = found = _decomposed(tensor, origin)
    kept = max(int((s > NEGLIGIBLE * s[0]).sum()), 1)
    return _cut(found, tensor, kept if rank is None else min(kept, rank))


def best_factors(tensor: Tensor, origin: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """``A`` and ``B`` of a rank whose product is the change, as nearly as can be.

    Returns:
        ``(rank, inputs, ...)``, ``(outputs, rank, 1, ...)``, and the squared norms of what they lack and of all.
    """
    return _cut(_decomposed(tensor, origin), tensor, rank)


def _decomposed(tensor: Tensor, origin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    change = tensor.double() - origin.double()
    return torch.linalg.svd(change.flatten(1), full_matrices=False)


def _cut(found: tuple[Tensor, Tensor, Tensor], tensor: Tensor, kept: int) -> tuple[Tensor, Tensor, float, float]:
    u, s, v = found
    root = s[:kept].sqrt()
    down = (root[:, None] * v[:kept]).reshape(kept, *tensor.shape[1:]).to(tensor.dtype)
    up = (u[:, :kept] * root).reshape(len(tensor), kept, *[1] * (tensor.ndim - 2)).to(tensor.dtype)
    squares = s.square()
    return down, up, float(squares[kept:].sum()), float(squares.sum())


def _whole(base: nn.Module, changed: set[str], attached: set[str]) -> Iterator[str]:
    """The smallest modules that have changed tensors and nothing that factors are attached to."""
    for name in changed:
        path = name.rpartition(".")[0]
        while (parent := path.rpartition(".")[0]) and isinstance(base.get_submodule(parent), nn.MultiheadAttention):
            path = parent  # whose out_proj is never called
        if path and not any(f"{each}.".startswith(f"{path}.") for each in attached):
            yield path


def config_of(
    ranks: Mapping[str, int], targets: Mapping[str, str], whole: list[str], base_name: str | None
) -> Mapping[str, object]:
    """What the folder says: patterns match whole paths alone, and every product counts once."""
    usual = max(set(ranks.values()), key=[*ranks.values()].count, default=1)
    patterns = {f"^{re.escape(targets[name])}": own for name, own in ranks.items() if own != usual}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_name,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": "|".join(re.escape(targets[name]) for name in ranks),
        "modules_to_save": whole or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _check_same(state: Mapping[str, Tensor], origin: Mapping[str, Tensor]) -> None:
    for name in [*origin, *state]:
        shapes = [tuple(each[name].shape) if name in each else "absent" for each in (state, origin)]
        if shapes[0] != shapes[1]:
            raise IncompatibleModelsError(
                explain(
                    "an adapter is for one architecture: the model and its base differ",
                    tensor=name,
                    shapes=f"{shapes[0]}, {shapes[1]}",
                    remedy="of another number of classes, build the base with it",
                )
            )
