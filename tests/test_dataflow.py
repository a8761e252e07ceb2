"""What the input reaches, and that nothing else is read as an activation: weights that a forward computes are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from proofs import EXACT, Apply, outputs, parameter, proven, vivid
from tiny_nets import planted
from torch import Tensor, fx, nn

import vfsurgery as surgery
from vfsurgery.discovery.roles import SCALES
from vfsurgery.discovery.verification import relative_error
from vfsurgery.passes.producers import find_producers, weight_depths
from vfsurgery.stats import collect
from vfsurgery.stats.collect import group_sites
from vfsurgery.tracing.dataflow import reached_by_input

DATA = torch.randn(160, 6).double()


def low_rank(m: Any, x: Tensor) -> Tensor:
    return x @ m.a.T @ m.b.T


def low_rank_linear(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, m.a.clone()), m.b * 1.0)


def product_of_weights(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.b @ m.a)


def linear_of_weights(m: Any, x: Tensor) -> Tensor:
    return x @ F.linear(m.a.T, m.b)


def masked(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.w * m.keep)


def normalized(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, F.normalize(m.w, dim=1) * m.scale[:, None])


def standardized(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, (m.w - m.w.mean(1, keepdim=True)) / m.w.std(1, keepdim=True))


def joined(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, torch.cat([m.w[:3], m.w[3:]]).relu() - 0.5)


def stacked(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, torch.stack([m.w, m.again]).sum(0))


def written(m: Any, x: Tensor) -> Tensor:
    weight = torch.zeros_like(m.w)
    weight[:, :3] = m.w[:, :3]
    weight[:, 3:] = m.w[:, 3:].tanh()
    return F.linear(x, weight)


COMPUTED = [
    low_rank,
    low_rank_linear,
    product_of_weights,
    linear_of_weights,
    masked,
    normalized,
    standardized,
    joined,
    stacked,
    written,
]


def net(layer: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """A layer whose weight is computed, and two plain ones."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(F.gelu(m.plain(F.gelu(m.layer(x) + m.bias))))

    members = {"a": parameter(4, 6), "b": parameter(8, 4), "w": parameter(8, 6), "again": parameter(8, 6)}
    inner = Apply(layer, **members, scale=parameter(8), keep=(torch.rand(8, 6) > 0.3).float())
    return Apply(forward, layer=inner, bias=parameter(8), plain=nn.Linear(8, 7), last=nn.Linear(7, 3))


def sites_of(model: nn.Module) -> tuple[fx.GraphModule, set[str]]:
    graph_module = surgery.trace(model, DATA[:2])
    groups = surgery.find_groups(graph_module)
    sites = group_sites(graph_module, groups, torch.device("cpu"))
    return graph_module, {site.node for places in sites.values() for site in places}


@pytest.mark.parametrize("layer", COMPUTED)
def test_a_planted_order_is_found_by_activations(layer: Callable[..., Tensor]) -> None:
    model = vivid(net(layer))
    groups = proven(model, DATA[:4])
    graph_module, sites = sites_of(model)
    assert sites and sites <= reached_by_input(graph_module.graph)
    for matching in ("activations", "zipit"):
        other = planted(model, groups)
        merged = surgery.merge(model, other, data=DATA, matching=matching, renormalize=None, progress=False)
        assert relative_error(outputs(merged, (DATA,)), outputs(model, (DATA,))) < EXACT


def test_read_anywhere_the_order_would_not_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def everything(graph: fx.Graph) -> frozenset[str]:
        return frozenset(node.name for node in graph.nodes if node.op != "get_attr")

    model = vivid(
        nn.Sequential(
            net(low_rank).layer,
            nn.Linear(8, 9),
            net(low_rank).layer.__class__(low_rank, a=parameter(4, 9), b=parameter(8, 4)),
            nn.Linear(8, 3),
        )
    )
    groups = surgery.find_groups(model, DATA[:4])

    def error() -> float:
        merged = surgery.merge(
            model,
            planted(model, groups),
            data=DATA,
            matching="activations",
            symmetries="permutations",
            renormalize=None,
            progress=False,
        )
        return float((outputs(merged, (DATA,))[0] - outputs(model, (DATA,))[0]).abs().max())

    assert error() < EXACT
    monkeypatch.setattr(collect, "reached_by_input", everything)
    assert error() > 1e-3


def test_sizes_do_not_count_and_writing_does() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        table = m.table.expand(x.shape[0], -1).tanh()
        buffer = torch.zeros(x.shape[0], 8, dtype=x.dtype)
        window = buffer[:, :6]
        window.copy_(x)
        return buffer + table

    graph = surgery.trace(Apply(forward, table=parameter(1, 8)), torch.randn(4, 6)).graph
    reached = reached_by_input(graph)
    by_target = {str(getattr(node.target, "__name__", node.target)): node.name for node in graph.nodes}
    assert {by_target[name] in reached for name in ("tanh", "expand")} == {False}
    assert {by_target[name] in reached for name in ("zeros", "copy_", "add")} == {True}


def test_layers_that_parameters_alone_go_through_are_no_producers() -> None:
    """A table of positions made by a small network, as of attention biases."""

    def forward(m: Any, x: Tensor) -> Tensor:
        table = m.second(F.relu(m.first(m.places)))
        return m.last(F.relu(m.plain(x)) + table)

    layers = {"first": nn.Linear(2, 5), "second": nn.Linear(5, 8), "plain": nn.Linear(6, 8), "last": nn.Linear(8, 3)}
    model = Apply(forward, places=torch.rand(1, 2), **layers)
    graph_module = surgery.trace(model, DATA[:2].float())
    groups = surgery.find_groups(graph_module)
    assert {producer.path for producer in find_producers(graph_module, groups)} == {"plain", "last"}
    assert {producer.depth for producer in find_producers(graph_module, groups)} == {1, 2}
    assert max(weight_depths(graph_module).values()) == 2
    _, sites = sites_of(model.double())
    assert sites <= reached_by_input(graph_module.graph)


def test_what_becomes_of_a_computed_weight_gives_it_no_role() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(F.relu(m.plain(x)) * m.gain.exp())

    model = Apply(forward, gain=parameter(8), plain=nn.Linear(6, 8), last=nn.Linear(8, 3))
    (group,) = surgery.find_groups(model, DATA[:2].float())
    assert {member.parameter: member.role for member in group.members}["gain"] != SCALES
    assert not group.mappable
