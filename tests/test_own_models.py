"""Own models: modules kept whole, parts pinned by the user, and rules of the user's."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from tiny_nets import Residual, images, lively, same_state
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery.rules import registry
from vfsurgery.errors import IncompatibleModelsError, OptionError, TraceError, UnknownOpError
from vfsurgery.groups.axes import Take, tie, tie_all
from vfsurgery.tracing.ops import canonical_key

X = torch.zeros(2, 6)


class RunningMax(nn.Module):
    """An op without a coupling rule, then a scale."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(size))

    def forward(self, x: Tensor) -> Tensor:
        return x.cummax(1)[0] * self.scale


class Branching(nn.Module):
    """Control flow that depends on values: no tracer records it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x - 1


class Rescaled(nn.Module):
    """Writes into its input and returns it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(size))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.scale)


def net(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Sequential(*between), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.fixture
def rules() -> Iterator[None]:
    """Give the rules back as they were."""
    before = dict(registry._RULES)
    yield
    registry._RULES.clear()
    registry._RULES.update(before)


@torch.library.custom_op("own_models::relu", mutates_args=())
def reversed_units(x: Tensor) -> Tensor:
    """Named like an op that has a rule, but moves units."""
    return x.flip(-1)


@reversed_units.register_fake
def _(x):
    return torch.empty_like(x)


class Reversed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return reversed_units(x)


def test_an_operator_of_another_library_is_not_taken_for_torchs():
    targets = (reversed_units, torch.ops.own_models.relu, torch.ops.own_models.relu.default)
    assert {canonical_key(target) for target in targets} == {"own_models::relu"}
    assert {canonical_key(target) for target in (torch.ops.aten.relu_, torch.ops.aten.relu.default)} == {"relu"}
    with pytest.raises(
        UnknownOpError, match=r"no coupling rule for own_models::relu(?s:.)*rule\(torch.ops.own_models.relu\)"
    ):
        surgery.find_groups(net(Reversed()), X, strict=True)


def test_a_rule_for_an_operator_of_another_library(rules):
    @surgery.rule(reversed_units)
    def flipped(op):
        yield from tie_all(op.input, op.output, skip=(1,))
        yield tie(op.output.axis(1), Take(op.input.axis(1), tuple(reversed(range(op.input.shape[1])))))

    groups = surgery.find_groups(net(Reversed()), X, strict=True)
    assert sorted(group.size for group in groups) == [5, 8]
    assert surgery.verify(net(Reversed()), groups, X)


def moved(groups: surgery.GroupSet) -> set[str]:
    return {str(member) for group in groups for member in group.members}


@pytest.mark.parametrize("leaf", ["block1", "block?", nn.Module, [nn.Conv2d, "block1"]])
def test_a_leaf_is_one_node_with_the_models_keys(leaf):
    model = Residual()
    graph = surgery.trace(model, images(2), leaf=leaf)
    assert any(node.op == "call_module" and node.target == "block1" for node in graph.graph.nodes)
    assert not any(str(node.target).startswith("block1.") for node in graph.graph.nodes)
    assert list(graph.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(graph.eval()(images(3)), model.eval()(images(3)))


def test_a_leaf_without_a_rule_pins_what_it_touches():
    groups = surgery.find_groups(Residual(), images(2), leaf="block1")
    assert [op.partition(" at")[0] for op in groups.unknown_ops] == ["tiny_nets.Block"]
    assert not any("block1" in member or "stem" in member for member in moved(groups))
    assert any(pin.parameter == "stem.weight" and "no coupling rule" in pin.reason for pin in groups.pinned)
    assert surgery.verify(Residual(), groups, images(2))


def test_a_leaf_that_looks_at_values_runs_on_zeros():
    model = net(Branching())
    with pytest.raises(TraceError, match=r"(?s)cannot trace Sequential.*remedy.*leaf="):
        surgery.trace(model, X)
    graph = surgery.trace(model, X, leaf=Branching)
    assert "1.0 gives what it gives for zeros" in graph.meta["guards"]
    groups = surgery.find_groups(model, X, leaf=Branching)
    assert [group.size for group in groups] == [5]
    merged = surgery.merge(model, net(Branching()), example_inputs=X, leaf="1.0")
    assert type(merged) is nn.Sequential


def test_a_leaf_that_writes_into_its_input_is_no_identity():
    groups = surgery.find_groups(net(Rescaled(8)), X, leaf=Rescaled)
    assert [group.size for group in groups] == [5]
    assert len(groups.unknown_ops) == 1


def test_a_class_with_a_rule_is_kept_whole(rules):
    @surgery.rule(Branching)
    def unchanged(op):
        yield from tie_all(op.input, op.output)

    groups = surgery.find_groups(net(Branching()), X, strict=True)
    assert sorted(group.size for group in groups) == [5, 8]


def test_sources_whose_leaves_differ_inside_are_refused():
    def model(slope: float) -> nn.Module:
        return net(nn.Sequential(nn.LeakyReLU(slope)))

    with pytest.raises(IncompatibleModelsError, match=r"(?s)compute different things.*slope=0\.5"):
        surgery.merge(model(0.1), model(0.5), example_inputs=X, leaf="1.0")


@pytest.mark.parametrize(
    ("pins", "stays"),
    [("block1", "block1.conv1.weight"), ("fc.weight", "fc.weight"), ("block*.bn1.*", "block2.bn1.bias")],
)
def test_pins_keep_axes_where_they_are(pins, stays):
    free, groups = (surgery.find_groups(Residual(), images(2), **choice) for choice in ({}, {"pins": pins}))
    assert any(member.startswith(stays) for member in moved(free))
    assert not any(member.startswith(stays) for member in moved(groups))
    assert any(pin.parameter == stays and pin.reason == f"pinned by the user ({pins})" for pin in groups.pinned)
    assert surgery.verify(Residual(), groups, images(2))


def test_pins_of_a_traced_model_and_of_a_shared_module():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    model.add_module("again", model[1])
    graph = surgery.trace(model, X)
    assert len(surgery.find_groups(graph)) == 1
    assert len(surgery.find_groups(graph, pins="again")) == 0


def test_pins_answer_strict():
    model = net(RunningMax(8))
    with pytest.raises(UnknownOpError, match=r"(?s)no coupling rule for cummax.*pins='1\.0'"):
        surgery.find_groups(model, X, strict=True)
    groups = surgery.find_groups(model, X, strict=True, pins="1")
    assert [group.size for group in groups] == [5]
    assert groups.unknown_ops == ()
    assert any(pin.parameter == "0.weight" and pin.reason == "pinned by the user (1)" for pin in groups.pinned)


def test_a_merge_keeps_pinned_units_and_reports_them():
    a, b = lively(Residual(), 0), lively(Residual(), 1)
    before = copy.deepcopy(b.state_dict())
    merged = surgery.merge(a, b, example_inputs=images(2), pins="block1", renormalize=None)
    report = surgery.report_of(merged)
    assert "pinned by the user: block1" in report.notes
    assert "pinned by the user (block1)" in str(report)
    weight = (a.state_dict()["block1.conv1.weight"] + before["block1.conv1.weight"]) / 2
    torch.testing.assert_close(merged.state_dict()["block1.conv1.weight"], weight)
    assert same_state(b.state_dict(), before)
    orders = surgery.match(a, b, example_inputs=images(2), pins=["block1", "block2.bn1.bias"])
    assert len(orders) == 1


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"leaf": "blok1"}, r"leaf='blok1' matches nothing in the model\n +remedy +did you mean 'block1'"),
        ({"leaf": nn.Conv3d}, r"leaf='Conv3d' matches nothing.*\n +remedy +did you mean 'Conv2d'\?"),
        ({"leaf": 3}, r"leaf holds 3\n +accepted +module classes, module paths, patterns"),
        ({"pins": "fc.wieght"}, r"pins='fc.wieght' matches nothing.*\n +remedy +did you mean 'fc.weight'"),
        ({"pins": "zzz*"}, r"pins='zzz\*' matches nothing.*\n +remedy +model.named_modules\(\) lists the paths"),
        ({"pins": [nn.ReLU]}, r"pins holds <class .*ReLU.*\n +accepted +module paths, parameter names, patterns"),
    ],
)
def test_what_matches_nothing_is_refused(choice, message):
    with pytest.raises(OptionError, match=message):
        surgery.find_groups(Residual(), images(2), **choice)


def test_leaf_of_a_traced_model_is_refused():
    graph = surgery.trace(Residual(), images(2))
    with pytest.raises(OptionError, match=r"leaf= came too late.*\n +remedy +surgery.trace\(\.\.\., leaf="):
        surgery.find_groups(graph, leaf="block1")


def test_a_printed_table_says_what_to_do_about_unknown_ops():
    text = str(surgery.find_groups(net(RunningMax(8)), X))
    assert "cummax at node" in text
    assert text.endswith(
        "register a rule with @surgery.rule, see docs/write_a_rule.md; leaf= and pins= are other ways out"
    )
