"""The images that were imagined, as a data set, and as files."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import TensorDataset

from vfsurgery.checkpoints import atomic
from vfsurgery.data.procedural import Pixels
from vfsurgery.errors import CheckpointError, explain
from vfsurgery.shown import Drawn
from vfsurgery.stats.imagined.report import ImagineReport

WEIGHTS = ".safetensors"
CLASS = "imagined"
"""The one folder of images in a folder that is written: it is read as one of its class."""


class Imagined(Drawn, TensorDataset):
    """Imagined images, to be passed as ``data=``; each item is ``(image,)``.

    Attributes:
        images: ``(N, channels, height, width)``, in the networks' own units (normalized), on the CPU.
        pixels: The range of those units, channel by channel.
        report: How they were made.
    """

    def __init__(self, images: Tensor, pixels: Pixels, report: ImagineReport) -> None:
        super().__init__(images)
        self.images, self.pixels, self.report = images, pixels, report

    def save(self, path: str | Path) -> Path:
        """Write the images, whole or not at all; what was there of that name is replaced, but no other folder.

        Args:
            path: A file ``NAME.safetensors`` with the images as they are, and the report beside them (its metadata);
                or a folder of 8-bit PNGs ``imagined/00000.png``, which ``--data PATH`` reads as it reads photographs:
                0 and 255 are the lowest and the highest value of :attr:`pixels`. PNGs have 1 or 3 channels.

        Returns:
            The path.

        Raises:
            CheckpointError: it cannot be written; nothing of it is there then.

        >>> import tempfile, torch
        >>> from vfsurgery import imagine
        >>> made = imagine(torch.nn.Conv2d(3, 2, 3), images=4, example_inputs=torch.zeros(1, 3, 8, 8))
        >>> made.save(Path(tempfile.mkdtemp()) / "images.safetensors").name
        'images.safetensors'
        """
        path = Path(path)
        if path.suffix == WEIGHTS:
            report = json.dumps(self.report.to_dict())
            with atomic(path) as partial:
                save_file({"images": self.images.contiguous()}, partial, metadata={"report": report})
        else:
            self._save_pictures(path)
        return path

    def _save_pictures(self, path: Path) -> None:
        from PIL import Image

        channels = self.images.shape[1]
        if channels not in (1, 3):
            remedy = f"save them as {path}{WEIGHTS}"
            raise CheckpointError(explain(f"images of {channels} channels are no PNGs", remedy=remedy))
        if path.exists() and not _is_ours(path):
            cause = "something else of this name is there"
            raise CheckpointError(explain(f"cannot write {path}", cause=cause, remedy="name a new folder"))
        pictures = self.pixels.to_bytes(self.images).permute(0, 2, 3, 1).squeeze(3).numpy()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".", suffix=".partial") as made:
                folder = Path(made) / "new"
                (folder / CLASS).mkdir(parents=True)
                for number, picture in enumerate(pictures):
                    Image.fromarray(picture).save(folder / CLASS / f"{number:05d}.png")
                if path.exists():
                    os.replace(path, Path(made) / "old")
                shutil.move(folder, path)
        except OSError as error:
            raise CheckpointError(explain(f"cannot write {path}", cause=error)) from error

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.images.shape[1:]))
        return f"Imagined({len(self.images)} images of {shape}, {self.report.how}, seed {self.report.seed})"


def _is_ours(path: Path) -> bool:
    """Whether a folder holds what :meth:`Imagined.save` writes, and nothing else."""
    if not path.is_dir() or path.is_symlink():
        return False
    inside = [entry.name for entry in path.iterdir()]
    if inside and inside != [CLASS]:
        return False
    return all(file.suffix == ".png" and file.stem.isdigit() for entry in inside for file in (path / entry).iterdir())
