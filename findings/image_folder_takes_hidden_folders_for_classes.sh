#!/usr/bin/env bash
# torchvision 0.29.1: datasets.ImageFolder takes hidden folders for classes, and hidden files of an image's ending for
# images. An empty hidden folder is an error; one that holds an image shifts the numbers of all classes.
#
# Such things appear by themselves: .ipynb_checkpoints when someone looks at an image in Jupyter, .thumbnails, ._cat.png
# from macOS.
#
# One would guess: names with a leading dot are left out, as ls and glob do.
# Seen: the dot sorts first, so "cat" was class 0 and is class 1. A network that was trained before is judged on shifted
# labels; the hidden file ends the epoch with an error hours later, when it is read.
# Way out: delete them; or a subclass whose find_classes leaves out what starts with a dot, and is_valid_file likewise.
#
# Exits 0 as long as torchvision does so, 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torchvision==0.29.1 torch==2.14.1 numpy==2.3.5
"$folder/env/bin/python" - <<'PYTHON'
import tempfile
from pathlib import Path

import torchvision
from PIL import Image
from torchvision.datasets import ImageFolder

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    for kind in ("cat", "dog"):
        (folder / kind).mkdir()
        Image.new("RGB", (4, 4)).save(folder / kind / "1.png")
    before = ImageFolder(folder)
    (folder / ".ipynb_checkpoints").mkdir()
    Image.new("RGB", (4, 4)).save(folder / ".ipynb_checkpoints" / "1-checkpoint.png")
    (folder / "cat" / "._1.png").write_bytes(b"a resource fork")
    after = ImageFolder(folder)
print("torchvision", torchvision.__version__, "| before:", before.class_to_idx, "| after:", after.class_to_idx)
print("files:", [Path(path).name for path, _ in after.samples])
assert before.class_to_idx["cat"] == 0
assert after.class_to_idx["cat"] == 1, "hidden folders are no classes any more"
assert len(after) == 4, "hidden files are left out now"
PYTHON
