"""Fixtures of recipes with stages."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small import RECIPE

import vfsurgery as surgery
from vfsurgery.passes import PASSES


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return surgery.Recipe.from_yaml(RECIPE).run(tmp_path_factory.mktemp("ran") / "out", progress=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrink(surgery.Pass):
    """Multiply all weights."""

    factor: float = 0.5

    def run(self, graph_module, context):
        """Multiply."""
        for parameter in graph_module.parameters():
            parameter.mul_(self.factor)
        return graph_module


@pytest.fixture
def shrink(monkeypatch):
    monkeypatch.setattr(PASSES, "_entries", dict(PASSES._entries))
    return surgery.register_pass(name="shrink")(Shrink)
