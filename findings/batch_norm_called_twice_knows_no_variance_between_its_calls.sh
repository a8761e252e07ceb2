#!/usr/bin/env bash
# torch 2.14.1: a BatchNorm layer that is called several times per forward keeps the mean of the calls' means, but of
# variances only the mean *within* the calls. How far the calls lie apart is in neither.
#
# Heads shared by the levels of a pyramid, siamese networks and recurrent blocks call one layer several times.
# torch.optim.swa_utils.update_bn (momentum=None, as here) is used to get such statistics exactly.
#
# One would guess: running_mean and running_var are those of all that the layer has seen.
# Seen: of inputs around +3 and around -3 it keeps mean 0 and variance 1, where 10 is right. In training each call is
# normalized to mean 0 and deviation 1 by itself; in eval mode the outputs lie around +3 and -3.
# Way out: one BatchNorm layer for each call, with shared weight and bias if need be; or one call on all inputs,
# concatenated along the batch.
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

torch.manual_seed(0)
near, far = torch.randn(4096, 1) + 3, torch.randn(4096, 1) - 3
twice, once = nn.BatchNorm1d(1, momentum=None), nn.BatchNorm1d(1, momentum=None)
trained = twice(near).mean(), twice(far).mean()
once(torch.cat([near, far]))
evaluated = twice.eval()(near).mean(), twice(far).mean()
means = [[round(float(m.detach()), 2) for m in pair] for pair in (trained, evaluated)]
variances = twice.running_var.tolist(), once.running_var.tolist()
print("torch", torch.__version__, "| running_var of two calls:", variances[0], "| of one:", variances[1])
print("mean of outputs of both calls, in training:", means[0], "| in eval:", means[1])
assert abs(float(twice.running_mean)) < 0.2 and float(once.running_var) > 9
assert float(twice.running_var) < 1.1, "variance between calls counts now"
assert max(map(abs, means[0])) < 0.01 and min(map(abs, means[1])) > 2
PYTHON
