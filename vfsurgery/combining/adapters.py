"""LoRA adapters as sources: the folders that peft writes, read without it and folded into the weights of their base.

An adapter adds a product of two small factors to weights of its base: ``W + s B A`` with ``s = lora_alpha / r``, or
``lora_alpha / sqrt(r)`` for rsLoRA. Folded, it is a model that was fine-tuned from the base like any other, and every
method combines it. What is computed is what peft's ``merge_and_unload`` computes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from vfsurgery.checkpoints import StateDict, load_state_dict
from vfsurgery.checkpoints.lazy import LazyCheckpoint
from vfsurgery.checkpoints.refusals import listing, printable
from vfsurgery.combining.adapter_files import CONFIG, Parts, Stored, read_config, read_parts
from vfsurgery.combining.base import InMemory, Store
from vfsurgery.combining.folded import Factors, Folded
from vfsurgery.errors import CheckpointError, IncompatibleModelsError, did_you_mean, explain, warn

PACKED = ("in_proj_weight", "in_proj_bias")
"""What ``nn.MultiheadAttention`` has in the place of ``weight`` and ``bias``."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA of peft, whose numbers stay in its file.

    Attributes:
        folder: Where it lies.
        config: What ``adapter_config.json`` says.
        file: Its weights.
        parts: Factors by the path of the module that they belong to.
        saved: Tensors that take the place of the base's, by name: heads, norms, biases.
    """

    folder: Path
    config: Mapping[str, Any] = field(repr=False)
    file: LazyCheckpoint = field(repr=False)
    parts: Mapping[str, Parts] = field(repr=False)
    saved: Mapping[str, Stored] = field(repr=False)

    @property
    def base_name(self) -> str | None:
        """What the folder says that it was trained on; peft writes it for models of transformers alone."""
        return self.config.get("base_model_name_or_path") or None

    def named_base(self) -> str:
        """The same where it has to be known.

        Raises:
            CheckpointError: the folder does not say.
        """
        if self.base_name is None:
            raise CheckpointError(
                explain(
                    f"{self.folder} does not say which base it was trained on",
                    missing=f"base_model_name_or_path in {CONFIG}",
                    remedy="base= the model that it was trained on",
                )
            )
        return self.base_name

    def onto(self, base: Store, shapes: Mapping[str, tuple[int, ...]]) -> Folded:
        """Fold it into a base.

        Args:
            base: Its tensors.
            shapes: Theirs, by state-dict name.

        Raises:
            IncompatibleModelsError: the base lacks what the adapter attaches to, or has it in another shape.
        """
        weights: dict[str, Factors] = {}
        biases: dict[str, Tensor] = {}
        for path, parts in self.parts.items():
            name = self._owned(path, "weight", PACKED[0], shapes)
            weights[name] = self._factors(path, parts, name, shapes[name])
            if parts.bias is not None and name.endswith("weight") and not name.endswith(PACKED[0]):
                own = self._owned(path, "bias", "bias", shapes)
                biases[own] = parts.bias.tensor() * self._scale(parts)
        for name, tensor in self.saved.items():
            if name not in shapes:
                self._refuse_absent(name, shapes)
            if name in biases and tensor.shape != biases[name].shape:
                self._refuse_shape(name, tensor.shape, shapes[name])
        new = {**shapes, **{name: tensor.shape for name, tensor in self.saved.items()}}
        return Folded(base, new, weights, biases, self.saved, tuple(self._notes(shapes, weights)))

    def _scale(self, parts: Parts) -> float:
        return parts.alpha / (math.sqrt(parts.rank) if self.config.get("use_rslora") else parts.rank)

    def _factors(self, path: str, parts: Parts, name: str, shape: Sequence[int]) -> Factors:
        down, up = parts.down, parts.up
        whole, flat = (up.shape[0], *down.shape[1:]), (up.shape[0], math.prod(down.shape[1:]))
        grouped = len(shape) > 2 and down.shape[1] != shape[1]
        if grouped and up.shape[1] * (down.shape[1] // shape[1]) == down.shape[0]:
            raise IncompatibleModelsError(
                explain(
                    f"{self.folder} attaches to a grouped convolution, and cannot be folded",
                    module=path,
                    because="peft lets every group read all inputs there, which no grouped weight can; it refuses, too",
                    remedy="train without this target",
                )
            )
        straight, turned = tuple(shape) == whole, len(shape) == 2 and tuple(shape) == flat[::-1]
        if not (straight or turned):
            self._refuse_shape(name, whole, shape)
        # of a square weight the shape does not tell, and what peft says holds for some layers alone
        is_turned = turned and (parts.table or not straight or bool(self.config.get("fan_in_fan_out")))
        return Factors(down, up, self._scale(parts) * (1 + parts.doubled), parts.magnitude, is_turned)

    def _owned(self, path: str, usual: str, packed: str, shapes: Mapping[str, object]) -> str:
        for last in (usual, packed):
            if f"{path}.{last}" in shapes:
                return f"{path}.{last}"
        self._refuse_absent(f"{path}.{usual}", shapes)

    def _refuse_absent(self, name: str, shapes: Mapping[str, object]) -> NoReturn:
        near = did_you_mean(printable(name), shapes).partition(" accepted:")[0]
        raise IncompatibleModelsError(
            explain(
                f"{self.folder} changes what its base does not have",
                tensor=printable(name),
                base=self.base_name,
                remedy=near if near.startswith("did") else "base= the model that it was trained on",
            )
        )

    def _refuse_shape(self, name: str, found: Sequence[int], shape: Sequence[int]) -> NoReturn:
        raise IncompatibleModelsError(
            explain(
                f"{self.folder} does not fit its base",
                tensor=printable(name),
                shapes=f"{tuple(found)} in the adapter, {tuple(shape)} in the base",
                base=self.base_name,
                remedy="base= the model that it was trained on",
            )
        )

    def _notes(self, shapes: Mapping[str, object], weights: Mapping[str, Factors]) -> Iterator[str]:
        """What a user should know of a folder that can be folded."""
        statistics = [name for name in shapes if name.endswith("running_mean")]
        if absent := [name for name in statistics if name not in self.saved]:
            yield (
                f"{self.folder} brings no running statistics for {len(absent)} of {len(statistics)} BatchNorm layers, "
                "though training moved them, and the base's stand there: re-estimate them on training images, or the "
                "accuracy may be lost; or train with modules_to_save= these layers"
            )
        if untrained := [name for name, each in weights.items() if not each.up.any and each.magnitude is None]:
            yield (
                f"{self.folder} has {len(untrained)} targets that training never reached (B is zero): "
                f"{listing(untrained)}; nn.MultiheadAttention, for one, does not call its out_proj"
            )
        if doubled := [name for name, parts in self.parts.items() if parts.doubled]:
            yield (
                f"{self.folder} attaches to nn.MultiheadAttention, to whose out_proj peft adds the product twice, in "
                f"training and when it merges; so does this: {listing(doubled)}"
            )
        if fast := [name for name in weights if _in_encoder_layer(name, shapes)]:
            yield (
                f"{self.folder} attaches to nn.TransformerEncoderLayer, whose fast path leaves adapters out in eval "
                f"mode: folded, they count in both modes, so peft's own accuracy is another: {listing(fast)}"
            )


def read_adapter(folder: str | Path) -> Adapter:
    """Read a folder with ``adapter_config.json`` and ``adapter_model.safetensors`` or ``.bin``.

    Raises:
        CheckpointError: a file is missing or damaged, or it is no adapter that can be folded; names what is the matter.
    """
    folder = Path(folder)
    config = read_config(folder)
    return Adapter(folder, config, *read_parts(folder, config))


def fold_adapter(base: nn.Module | Mapping[str, Tensor] | str | Path, folder: str | Path) -> StateDict:
    """The weights of a base with a LoRA adapter of peft folded in, as ``merge_and_unload`` of peft would give them.

    Reads ``r``, ``lora_alpha``, ``rank_pattern``, ``alpha_pattern``, ``use_rslora``, ``use_dora``, ``lora_bias``,
    ``fan_in_fan_out``, biases and ``modules_to_save``; linear layers, convolutions, embeddings, and the packed
    projection of ``nn.MultiheadAttention``. peft need not be installed.

    Args:
        base: The model that the adapter was trained on, its state dict, or a checkpoint.
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The state dict of the fine-tuned model, of the base's dtypes. What the adapter does not change shares memory
        with the base.

    Raises:
        CheckpointError: the folder cannot be read, or is no LoRA.
        IncompatibleModelsError: it attaches to what the base lacks, or has in another shape.

    Warns:
        SurgeryWarning: running statistics are missing, or peft computes something else than the weights say.

    >>> import json, tempfile, torch
    >>> from vfsurgery.checkpoints import save_state_dict
    >>> folder = Path(tempfile.mkdtemp())
    >>> config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["fc"]}
    >>> _ = (folder / "adapter_config.json").write_text(json.dumps(config))
    >>> factors = {"lora_A": torch.tensor([[1.0, 0.0]]), "lora_B": torch.tensor([[0.0], [3.0]])}
    >>> keys = {f"base_model.model.fc.{name}.weight": tensor for name, tensor in factors.items()}
    >>> save_state_dict(keys, folder / "adapter_model.safetensors")
    >>> fold_adapter({"fc.weight": torch.eye(2)}, folder)["fc.weight"]
    tensor([[1., 0.],
            [6., 1.]])
    """
    if isinstance(base, str | Path):
        base = load_state_dict(base)
    entries = base.state_dict() if isinstance(base, nn.Module) else base
    state = {name: tensor.detach() for name, tensor in entries.items()}
    adapter = read_adapter(folder)
    folded = adapter.onto(InMemory(state), {name: tuple(tensor.shape) for name, tensor in state.items()})
    for note in (*folded.notes, *(_differing(base, folded.weights) if isinstance(base, nn.Module) else ())):
        warn(note)
    changed = folded.changed
    found = {
        name: folded.read(name, 0, math.prod(shape)).reshape(shape).to(state[name].dtype)
        if name in changed
        else state[name]
        for name, shape in folded.shapes.items()
    }
    adapter.file.close()
    return found


def check_same_base(adapters: Sequence[Adapter]) -> None:
    """Refuse adapters that say to be of different bases.

    Raises:
        IncompatibleModelsError: names two of them.
    """
    named = {adapter.base_name: adapter.folder for adapter in adapters if adapter.base_name is not None}
    if len(named) > 1:
        (first, one), (second, other), *_ = named.items()
        raise IncompatibleModelsError(
            explain(
                "adapters of different bases cannot be combined",
                bases=f"{printable(str(first))} ({one}), {printable(str(second))} ({other})",
                remedy="take those of one base",
            )
        )


def _differing(base: nn.Module, weights: Iterable[str]) -> Iterator[str]:
    """What peft's layers in training are not, of which only the modules tell."""
    for name in weights:
        module = base.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.modules.conv._ConvNd) and (
            module.padding_mode != "zeros" or {*module.dilation} != {1}
        ):
            yield (
                f"{name}: peft's adapter has neither the padding mode nor the dilation of its convolution, so in "
                "training it computed what no weight of this layer does; measure the folded model"
            )


def _in_encoder_layer(name: str, shapes: Mapping[str, object]) -> bool:
    layer = re.sub(r"(self_attn\.(in_proj_|out_proj\.)|linear[12]\.)\w+$", "", name)
    return layer != name and all(f"{layer}{own}" in shapes for own in ("self_attn.in_proj_weight", "linear1.weight"))
