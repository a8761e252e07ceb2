#!/usr/bin/env bash
# mergekit 0.1.5: with merge_method ties or della, and normalize on, as it is by default, a model of weight -1 is added
# like one of weight 1. In arithmetic between tasks a negative weight takes away what a model has learned.
#
# Its differences from the base are weighted, and the sum is divided by the sum of the weights that agree in sign: the two
# minus signs cancel. The same holds for -0.3.
#
# One would guess: base - (model - base), as task_arithmetic gives with the same weight.
# Seen: base + (model - base), which is the model itself.
# Way out: normalize: false.
#
# Exits 0 as long as mergekit does so, 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 mergekit==0.1.5
"$folder/env/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import TensorGroup

base, model = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([2.0, 0.5, 1.0])
group = TensorGroup.from_tensors([base, model], ids=["base", "model"], base_index=0)
own = {"weight": {"model": -1.0}, "density": {"model": 1.0}, "int8_mask": False, "rescale": False, "lambda": 1.0}


def merged(name, normalize, **more):
    return registry.get(name).merge_group(group, **own, **more, normalize=normalize).tolist()


ties, plain = merged("ties", True), merged("ties", False)
della, arithmetic = merged("della", True, epsilon={"model": 0.15}), merged("task_arithmetic", False)
print("mergekit", version("mergekit"), "| base", base.tolist(), "| model", model.tolist(), "| weight -1")
print("ties", ties, "| della", della, "| ties, normalize: false", plain, "| task_arithmetic", arithmetic)
assert ties == della == model.tolist(), "a negative weight is not added any more"
assert plain == arithmetic == (2 * base - model).tolist()
PYTHON
