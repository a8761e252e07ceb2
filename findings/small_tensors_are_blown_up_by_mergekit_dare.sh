#!/usr/bin/env bash
# mergekit 0.1.5: dare_linear and dare_ties do not divide what they keep by the share that is kept, as the paper says
# (Yu et al., "Language models are super mario", ICML 2024: 1 / (1 - p)). They give each tensor its L1 norm from before.
#
# For matrices both are nearly the same. A bias, a norm or a scale with few numbers may be multiplied by a hundred and more,
# where by chance only small numbers are left; the mean over many draws is not the tensor any more.
#
# One would guess: every kept number of a tensor at density 0.3 is multiplied by 3.33.
# Seen: over 2,000 draws of a tensor of 5 numbers the factor lies between 1 and over 100.
# Way out: rescale: false, and lambda of 1 / density.
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

base, delta = torch.zeros(5), torch.tensor([1.0, -0.4, 0.1, -0.02, 0.005])
group = TensorGroup.from_tensors([base, delta], ids=["base", "model"], base_index=0)
own = {"weight": {"model": 1.0}, "density": {"model": 0.3}, "int8_mask": False, "normalize": False, "lambda": 1.0}
method = registry.get("dare_linear")
rescale = {parameter.name: parameter.default for parameter in method.spec.parameters}["rescale"]
torch.manual_seed(0)
draws = torch.stack([method.merge_group(group, **own, rescale=rescale) for _ in range(2000)])
factors = (draws / delta)[draws != 0]
print("mergekit", version("mergekit"), "| rescale by default:", rescale)
print("factors of what is kept: least", round(float(factors.min()), 2), "most", round(float(factors.max()), 1))
print("mean over draws / tensor:", [round(float(x), 1) for x in draws.mean(0) / delta])
assert rescale is True
assert float(factors.min()) < 1.5 and float(factors.max()) > 50, "what is kept is divided by the density now"
PYTHON
