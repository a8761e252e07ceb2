#!/usr/bin/env bash
# peft 0.21.2: LoRA on nn.MultiheadAttention adds the product of its out_proj twice, in forward and in merge_and_unload.
#
# merge() puts W + sBA in the place of the weight, and then calls merge() of the layer around it, which adds sBA again.
# Training is with it, so nothing is wrong with a trained adapter; only its file means W + 2sBA there, and who folds the
# file by the formula of the paper gets another network.
#
# One would guess: the merged out_proj is W + (lora_alpha / r) B A.
# Seen: W + 2 (lora_alpha / r) B A. The packed in_proj has it once.
# Way out: fold keys that end in base_layer.out_proj with twice the scale.
#
# Exits 0 as long as peft does so, 1 if it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.14.1 peft==0.21.2
"$folder/env/bin/python" - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

torch.manual_seed(0)
net = nn.Sequential()
net.add_module("attn", nn.MultiheadAttention(8, 2))
before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
wrapped = get_peft_model(net, LoraConfig(r=2, lora_alpha=2, target_modules=["attn"]))
with torch.no_grad():
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
saved = get_peft_model_state_dict(wrapped)
after = wrapped.merge_and_unload().state_dict()
for key, weight in (("attn.", "attn.in_proj_weight"), ("attn.base_layer.out_proj.", "attn.out_proj.weight")):
    factors = [saved[f"base_model.model.{key}lora_{factor}.weight"] for factor in "BA"]
    change, product = after[weight] - before[weight], factors[0] @ factors[1]
    times = float((change * product).sum() / product.square().sum())
    print(weight, "changed by", round(times, 4), "x (alpha / r) B A")
assert abs(times - 2) < 1e-3, "the product is added once now"
PYTHON
