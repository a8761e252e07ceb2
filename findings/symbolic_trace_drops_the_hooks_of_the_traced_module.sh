#!/usr/bin/env bash
# torch 2.14.1: torch.fx.symbolic_trace leaves out the forward hooks and pre-hooks of the module that is traced. Those
# of modules inside are kept: recorded where it traces through, run by the layer itself where that is a leaf.
#
# One would guess: the graph module computes what the module computed. Normalization of the input or scaling of logits
# is often put on a finished network as a hook.
# Seen: the graph module computes something else, without a word; inside one more module the same network is traced
# right.
# Way out: trace nn.Sequential(network) instead of the network, or write the hook into the forward.
#
# Exits 0 as long as torch does so, 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 numpy==2.3.5
"$folder/env/bin/python" - <<'PYTHON'
import torch
from torch import fx, nn

torch.manual_seed(0)
network = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
network.register_forward_hook(lambda module, args, out: out * 2)
x = torch.ones(1, 2)
whole = network(x)
traced, inside = fx.symbolic_trace(network)(x), fx.symbolic_trace(nn.Sequential(network))(x)
print("torch", torch.__version__, "| module:", whole.tolist())
print("traced:", traced.tolist(), "| traced inside another module:", inside.tolist())
torch.testing.assert_close(inside, whole)
torch.testing.assert_close(2 * traced, whole)
assert not torch.allclose(traced, whole), "hooks of the traced module are in the graph now"
PYTHON
