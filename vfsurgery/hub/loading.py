"""Python that loads a network again, for people who have its files and perhaps not this library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from vfsurgery.checkpoints import INDEX, ONNX, PROGRAM, WEIGHTS, timm_config, write_text

TIMM_WEIGHTS = "model.safetensors"
"""The name under which timm looks for weights in a folder or repository first."""

CONFIG = "config.json"


@dataclass(frozen=True)
class Written:
    """A network on disk.

    Attributes:
        files: Names in their folder; the last one is the one to load, of shards their index.
        model: What builds the network, as in ``"timm:resnet18"``, or the name of its class.
        options: Arguments of that.
        of_timm: Whether it is timm's.
        configured: Whether a config.json beside it says how timm builds it, and that this file has the weights.
        adapter: Whether it is a LoRA adapter, with its configuration beside it.

    >>> print(Written(("ab.safetensors",), "timm:resnet18", {"num_classes": 10}).code())
    import timm
    <BLANKLINE>
    model = timm.create_model("resnet18", checkpoint_path="ab.safetensors", num_classes=10).eval()
    """

    files: tuple[str, ...]
    model: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    of_timm: bool = False
    configured: bool = False
    adapter: bool = False

    @property
    def name(self) -> str:
        """The file to load."""
        return self.files[-1]

    def code(self) -> str:
        """What to type in the folder of the files."""
        if self.configured:
            return (
                "import timm\n\n"
                'model = timm.create_model("local-dir:.", pretrained=True).eval()  # "hf-hub:USER/NAME" from the Hub'
            )
        if self.adapter:
            return (
                "from peft import PeftModel\n\n"
                'model = PeftModel.from_pretrained(..., ".").eval()  # ... is the base, built and loaded'
            )
        suffix = Path(self.name).suffix
        if suffix == PROGRAM:
            return f"import torch\n\nmodel = torch.export.load({_quoted(self.name)}).module()"
        if suffix == ONNX:
            return f"import onnxruntime\n\nmodel = onnxruntime.InferenceSession({_quoted(self.name)})"
        source, _, name = self.model.rpartition(":")
        if source == "timm" and suffix == WEIGHTS:
            call = _call("timm.create_model", _quoted(name), checkpoint_path=self.name, **self.options)
            return f"import timm\n\nmodel = {call}.eval()"
        return "\n".join([*self._imports(source, name), "", f"model = {self._built(source, name)}", *self._loaded()])

    def _imports(self, source: str, name: str) -> list[str]:
        reader = (
            "from vfsurgery.checkpoints import load_state_dict"
            if self.name.endswith(INDEX)
            else "from safetensors.torch import load_file"
        )
        if source in ("timm", "torchvision"):
            return [f"import {source}", reader]
        return [reader, f"from {source} import {name}"] if source else [reader]

    def _built(self, source: str, name: str) -> str:
        if source == "timm":
            return _call("timm.create_model", _quoted(name), **self.options)
        if source == "torchvision":
            return _call("torchvision.models.get_model", _quoted(name), weights=None, **self.options)
        if source:
            return _call(name, **self.options)
        return f"...  # a {name}, built as its sources were"

    def _loaded(self) -> list[str]:
        read = "load_state_dict" if self.name.endswith(INDEX) else "load_file"
        return [f"model.load_state_dict({read}({_quoted(self.name)}))", "model.eval()"]


def write_config(model: nn.Module, folder: Path, weights: str) -> bool:
    """Write timm's config.json beside weights, if ``model`` is timm's and timm will find them; return whether it did.

    In a folder timm takes ``model.safetensors``, else the first by name; from the Hub the file that the config names.

    Raises:
        CheckpointError: It cannot be written.
    """
    config = timm_config(model, weights)
    found = sorted(path.name for path in folder.glob(f"*{WEIGHTS}"))
    first = TIMM_WEIGHTS if TIMM_WEIGHTS in found else next(iter(found), None)
    if config is None or first != weights:
        return False
    write_text(folder / CONFIG, config)
    return True


def is_of_timm(model: nn.Module) -> bool:
    """Whether timm built a network: those carry a configuration."""
    return isinstance(getattr(model, "pretrained_cfg", None), dict)


def _quoted(text: str) -> str:
    """As a Python string in double quotes, which JSON's strings are."""
    return json.dumps(text, ensure_ascii=False)


def _call(function: str, *arguments: str, **options: object) -> str:
    values = {name: _quoted(value) if isinstance(value, str) else repr(value) for name, value in options.items()}
    return f"{function}({', '.join([*arguments, *(f'{name}={value}' for name, value in values.items())])})"
