#!/usr/bin/env bash
# Pillow 13.0.0: Image.convert("RGB") on a 16-bit greyscale PNG (mode "I;16": X-rays, microscopes, depth maps) does not
# scale to 8 bits; every value above 255 becomes 255.
#
# The usual loaders of data sets call just that: Image.open(path).convert("RGB").
#
# One would guess: 65,535 becomes 255 and half of it 127, as it is for colour images of 16 bits and in image viewers.
# Seen: the image is white but for its darkest 256th. No error, no warning; a network trains on white images.
# Way out: look at Image.mode, and for "I;16" take the upper 8 bits of the array: np.asarray(image) >> 8.
#
# Exits 0 as long as Pillow does so, 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet pillow==13.0.0 numpy==2.3.5
"$folder/env/bin/python" - <<'PYTHON'
import io

import numpy as np
import PIL
from PIL import Image

ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
file = io.BytesIO()
Image.fromarray(ramp).save(file, format="PNG")
image = Image.open(file)
seen = np.asarray(image.convert("RGB"))[..., 0]
white = float((seen == 255).mean())
print("Pillow", PIL.__version__, "| mode", image.mode, "| white in RGB:", f"{white:.1%}", "| expected: about 0.4%")
assert image.mode == "I;16" and (np.asarray(image) == ramp).all()
assert white > 0.99, "16 bits are scaled now"
PYTHON
