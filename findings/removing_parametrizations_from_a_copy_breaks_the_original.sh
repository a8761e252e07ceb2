#!/usr/bin/env bash
# torch 2.14.1: torch.nn.utils.parametrize.remove_parametrizations on a copy.deepcopy of a layer also breaks the layer
# that was copied. Parametrizing gives a layer a class of its own, the copy has the same class, and removal deletes the
# property "weight" from it.
#
# One would guess: a copy can be turned into plain weights for export, while training of the original goes on.
# Seen: the original raises AttributeError: 'ParametrizedLinear' object has no attribute 'weight'.
# Way out: leave copies parametrized; for export, make the network anew without parametrizations and write
# layer.weight.detach() into it.
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
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

layer = weight_norm(nn.Linear(2, 2))
x = torch.ones(1, 2)
layer(x)
exported = copy.deepcopy(layer)
parametrize.remove_parametrizations(exported, "weight")
exported(x)
try:
    layer(x)
    seen = "works"
except AttributeError as error:
    seen = f"AttributeError: {error}"
print("torch", torch.__version__, "| the original, after removal from its copy:", seen)
assert "weight" in seen, "the original is left alone now"
PYTHON
