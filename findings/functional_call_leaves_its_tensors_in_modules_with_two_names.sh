#!/usr/bin/env bash
# torch 2.14.1: torch.func.functional_call with tie_weights=True (the default) does not put back the tensors of a module
# that is registered under two names, when the given state names it by one of them.
#
# Such modules are common: an encoder kept whole and layer by layer, a U-Net on a ready-made backbone.
#
# One would guess: the call is pure. Its page says that the module's own parameters and buffers are replaced for the
# time of the call.
# Seen: afterwards the module holds the *given* tensors, as plain tensors instead of nn.Parameter, so it computes what
# the call computed; an optimizer made before the call goes on training tensors that nothing reads.
# Way out: tie_weights=False together with a state that has every name; or swap the tensors yourself and put them back.
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
from torch.func import functional_call


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        self.first = self.encoder[0]  # the same module once more

    def forward(self, x):
        return self.encoder(x)


net = Net()
own = net.first.weight
state = {name: torch.zeros_like(tensor) for name, tensor in net.state_dict().items() if name.startswith("encoder")}
functional_call(net, state, (torch.ones(1, 2),))
kind = type(net.first.weight).__name__
print("torch", torch.__version__, "| still the same parameter:", net.first.weight is own, "| now a", kind)
print("parameters of the network, in sum:", float(sum(t.detach().abs().sum() for t in net.state_dict().values())))
assert net.first.weight is not own and kind == "Tensor", "functional_call puts the tensors back now"
PYTHON
