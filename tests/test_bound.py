"""Traces that hold for one number of images: data is run in batches of so many, and no such graph is given away."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.errors import OptionError
from vfsurgery.tracing.bound import bound_to

GENERATOR = torch.Generator().manual_seed(0)


class Tokens(nn.Module):
    """Layers on the tokens of each image, whose mean is normalized; how they find the images is for subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.out = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def tokens(self, x: Tensor) -> Tensor:
        return self.a(x).relu().view(len(x), -1, self.a.out_features).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.tokens(x)))


class Number(Tokens):
    def tokens(self, x: Tensor) -> Tensor:
        return self.a(x).relu().view(int(x.shape[0]), -1, self.a.out_features).mean(1)


class Dropped(Number):
    def tokens(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().tokens(x), 0.5, self.training)


class Loop(Tokens):
    def tokens(self, x: Tensor) -> Tensor:
        return torch.stack([self.a(image).relu().mean(0) for image in x])


class Places(Tokens):
    def tokens(self, x: Tensor) -> Tensor:
        return torch.stack([self.a(x[place]).relu().mean(0) for place in range(x.shape[0])])


BOUND = [Number, Dropped, Loop, Places]


class Kept(Tokens):
    """Weighs its tokens by a table that the first forward makes and keeps, of a number of Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Linear(1, 1, bias=False)
        self.register_buffer("table", torch.zeros(1, 1), persistent=False)

    def tokens(self, x: Tensor) -> Tensor:
        if self.table.shape[0] != x.shape[1]:
            self.table = torch.zeros(x.shape[1], 1) + torch.arange(int(x.shape[1])).view(-1, 1).to(x.dtype)
        return (self.a(x).relu() * (1 + self.place(self.table)).to(x.dtype)).mean(1)


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 4, 6, generator=GENERATOR, dtype=torch.float64)


def net(kind: type[Tokens], seed: int = 0) -> Tokens:
    torch.manual_seed(seed)
    model = kind().double()
    for tensor in (model.norm.weight, model.norm.bias, model.norm.running_mean):
        nn.init.normal_(tensor)
    return model.eval()


def mean_seen(model: Tokens, data: list[Tensor]) -> Tensor:
    """What the norm of a model sees, by its own forward."""
    with torch.no_grad():
        return model.tokens(torch.cat(data)).mean(0)


def test_the_length_of_a_tensor_goes_with_the_batch() -> None:
    graph = surgery.trace(net(Tokens), images(2))
    x = images(5)
    assert graph.meta["guards"] == () and bound_to(graph) == 0
    assert torch.allclose(graph(x), net(Tokens)(x))
    assert len([1, 2]) == 2 and len.__name__ == "len"  # Python's own is back


@pytest.mark.parametrize("kind", BOUND)
def test_a_number_made_of_the_batch_size_binds_the_trace(kind: type[Tokens]) -> None:
    graph = surgery.trace(net(kind), images(3))
    assert bound_to(graph) == 3 and "images in a batch == 3" in graph.meta["guards"]


def test_what_a_forward_keeps_while_it_is_recorded_is_not_run_again() -> None:
    """Run again with proxies in its table, the network would be recorded a second time, behind the outputs."""
    graph = surgery.trace(net(Kept), images(3))
    assert graph.meta["guards"] and bound_to(graph) == 0
    assert [node.op for node in graph.graph.nodes].index("output") == len(graph.graph.nodes) - 1
    assert sum(node.target == "out" for node in graph.graph.nodes) == 1
    groups = surgery.find_groups(net(Kept), images(3))
    assert not any("constant" in str(pin) for pin in groups.pinned)


@pytest.mark.parametrize("kind", [Tokens, *BOUND])
def test_statistics_are_those_of_single_images(kind: type[Tokens]) -> None:
    data = [images() for _ in range(3)]
    merged = surgery.merge(net(kind, 0), net(kind, 1), data=data, renormalize="reset", matching="weights",
                           progress=False)  # fmt: skip
    assert isinstance(merged, kind)
    assert torch.allclose(merged.norm.running_mean, mean_seen(merged, data), atol=1e-12)
    assert any("runs of 2" in note for note in surgery.report_of(merged).notes) == (kind in BOUND)


def test_larger_batches_would_take_parts_of_several_images_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: nothing raises, and the statistics are wrong."""
    monkeypatch.setattr("vfsurgery.merging.prepared.in_bound_runs", lambda batches, graph_module: batches)
    data = [images() for _ in range(3)]
    merged = surgery.merge(net(Number, 0), net(Number, 1), data=data, renormalize="reset", matching="weights",
                           progress=False)  # fmt: skip
    assert isinstance(merged, Number)
    variance = torch.cat([merged.tokens(x) for x in data]).var(0, correction=0)
    assert not torch.allclose(merged.norm.running_var, variance, rtol=0.1)


def repaired(model: Tokens, data: list[Tensor]) -> nn.Module:
    sparse = copy.deepcopy(model)
    sparse.a.weight.data[:, :2] = 0
    return surgery.renormalize(sparse, reference=model, data=data, renormalize="reset", progress=False)


ACTS: dict[str, Callable[[Tokens, list[Tensor]], nn.Module]] = {
    "passes": lambda model, data: surgery.run_passes(model, "reset", data=data, progress=False),
    "units": lambda model, data: surgery.prune_units(model, 0.25, data=data, renormalize="reset", progress=False),
    "repair": repaired,
}


@pytest.mark.parametrize("act", ACTS)
def test_every_entry_point_with_data_heeds_it(act: str) -> None:
    data = [images() for _ in range(3)]
    result = ACTS[act](net(Number), data)
    assert isinstance(result, Number)
    assert torch.allclose(result.norm.running_mean, mean_seen(result, data), atol=1e-12)


def test_no_graph_is_given_away_that_holds_for_one_number_of_images() -> None:
    models, data = [net(Number, 0), net(Number, 1)], [images() for _ in range(3)]
    with pytest.raises(OptionError, match=r"batches of 2 images alone\n +because +int\(getitem\) == 2"):
        surgery.merge(models, data=data, preserve=2, matching="weights", renormalize=None, progress=False)
    models = [net(Tokens, 0), net(Tokens, 1)]
    graph = surgery.merge(models, data=data, preserve=2, matching="weights", renormalize=None, progress=False)
    assert graph(images(5)).shape == (5, 3)
