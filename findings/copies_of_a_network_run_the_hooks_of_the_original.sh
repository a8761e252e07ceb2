#!/usr/bin/env bash
# torch 2.14.1: copy.deepcopy of a network does not copy hooks that are lambdas or nested functions. They go on using
# the layers of the network that they were made in; a bound method of a module is copied along with its module.
#
# One would guess: the copy has nothing to do with the original any more. Averaged models (torch.optim.swa_utils),
# teachers and students, pruned or quantized versions are all made by deepcopy.
# Seen: the copy computes with the *original's* layer. Its own, with the weights that are loaded into the copy, is never
# called; gradients of the copy go to the original. Nothing is raised.
# Way out: hooks as bound methods of a module of the network, or functools.partial of a module-level function, which
# deepcopy follows; or no hooks: write the call into the forward.
#
# Exits 0 as long as torch does so, 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 numpy==2.3.5
"$folder/env/bin/python" - <<'PYTHON'
import copy

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, bound):
        super().__init__()
        self.body, self.gain = nn.Linear(2, 2), nn.Linear(2, 2)
        self.body.register_forward_hook(self.boost if bound else lambda module, args, out: self.gain(out))

    def boost(self, module, args, out):
        return self.gain(out)

    def forward(self, x):
        return self.body(x)


def owner_of_gain(bound):
    """Whose layer a copy uses: that of the two which changes its output when it is set to zero."""
    net = Net(bound)
    twin, x = copy.deepcopy(net), torch.ones(1, 2)
    before = twin(x)
    twin.gain.requires_grad_(False).weight.zero_()
    return "the original's" if torch.equal(twin(x), before) else "its own"


torch.manual_seed(0)
plain, bound = owner_of_gain(bound=False), owner_of_gain(bound=True)
print("torch", torch.__version__, "| a copy uses, by a lambda:", plain, "| by a bound method:", bound)
assert plain == "the original's", "hooks of copies use the copy now"
assert bound == "its own", "bound methods are not copied any more"
PYTHON
