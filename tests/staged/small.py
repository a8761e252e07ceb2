"""A small recipe, and its networks."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from vfsurgery.data import digits
from vfsurgery.networks.demo import TinyConvNet
from vfsurgery.training import from_seed, train

ROOT = Path(__file__).resolve().parent.parent.parent

RECIPE = """\
name: small
threads: 1
data: {name: digits}
sources:
  - {model: "vfsurgery.networks.demo:TinyConvNet", options: {width: 4}}
  - {seed: 7}
stages:
  - train: {epochs: 2}
  - merge: {matching: activations, alpha: 0.4, renormalize: [rescale]}
  - evaluate
"""


def staged(*stages: object, **keys: object) -> str:
    """The recipe with other stages, and with other keys."""
    content = yaml.safe_load(RECIPE) | {"stages": list(stages)} | keys
    return yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)


def small(seed: int, epochs: int = 2) -> TinyConvNet:
    model = from_seed(lambda: TinyConvNet(width=4), seed)
    if epochs:
        options = {"lr": 0.05, "seed": seed, "progress": False}
        train(model, digits().train, epochs=epochs, **options)
    return model.eval()


def assert_same(state: dict, other: dict) -> None:
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
