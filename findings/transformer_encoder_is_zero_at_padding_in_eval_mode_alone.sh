#!/usr/bin/env bash
# torch 2.14.1: nn.TransformerEncoder with src_key_padding_mask gives exact zeros at padded positions in eval mode
# without gradients, and ordinary numbers in training mode, and in eval mode with gradients.
#
# In the fast path the padded tokens are taken out (nested tensors), and zeros are put in their place afterwards.
#
# One would guess: eval mode differs from training mode by dropout alone, and torch.no_grad by nothing.
# Seen: with dropout 0, the same batch gives other outputs. Whoever takes the mean over tokens, or the last token, or a
# maximum, without the mask gets one network in validation and another one in training.
# Way out: pool with the mask; or nn.TransformerEncoder(..., enable_nested_tensor=False); or
# torch.backends.mha.set_fastpath_enabled(False).
#
# Exits 0 as long as torch does so, 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 numpy==2.3.5
"$folder/env/bin/python" - <<'PYTHON'
import warnings

import torch
from torch import nn

warnings.filterwarnings("ignore", message=".*nested tensors.*")
torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
encoder = nn.TransformerEncoder(layer, 1)
x, padded = torch.randn(2, 4, 8), torch.zeros(2, 4, dtype=torch.bool)
padded[0, 2:] = True


def largest(training, gradients=False):
    """The largest output at a padded position, and the outputs at all others."""
    with torch.set_grad_enabled(gradients):
        y = encoder.train(training)(x, src_key_padding_mask=padded).detach()
    return float(y[padded].abs().max()), y[~padded]


trained, kept = largest(training=True)
evaluated, same = largest(training=False)
with_gradients, _ = largest(training=False, gradients=True)
print("torch", torch.__version__, "| largest output at padding, in training:", trained)
print("in eval mode:", evaluated, "| in eval mode with gradients:", with_gradients)
torch.testing.assert_close(kept, same)
assert trained > 0 and with_gradients > 0 and evaluated == 0, "modes agree at padded positions now"
torch.backends.mha.set_fastpath_enabled(False)
assert largest(training=False)[0] > 0, "without the fast path there are zeros, too, now"
PYTHON
