#!/usr/bin/env bash
# torch 2.14.1: under FakeTensorMode(allow_non_fake_inputs=True) a BatchNorm layer in training mode counts up its *real*
# num_batches_tracked, while its real running statistics stay as they are.
#
# People run networks under this mode to learn shapes, count operations, or estimate memory, without a copy.
#
# One would guess: nothing real changes. The mode gives tensors without data, and running_mean indeed stays as it was.
# Seen: num_batches_tracked is 1 after a run without data. With momentum=None that number weighs all later batches, and
# a state that seems untouched has another hash.
# Way out: eval mode for such runs (or training = False on the norm layers), or fake copies of the buffers.
#
# Exits 0 as long as torch does so, 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 numpy==2.3.5
"$folder/env/bin/python" - <<'PYTHON'
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

norm = nn.BatchNorm2d(3)
with FakeTensorMode(allow_non_fake_inputs=True):
    y = norm(torch.empty(2, 3, 4, 4))
assert isinstance(y, FakeTensor)
counted, mean = int(norm.num_batches_tracked), norm.running_mean.tolist()
print("torch", torch.__version__, "| batches counted by a run without data:", counted, "| running mean:", mean)
assert mean == [0.0] * 3, "floating point buffers change, too, now"
assert counted == 1, "integer buffers stay as they are now"
PYTHON
