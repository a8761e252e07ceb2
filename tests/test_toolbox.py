"""Tools of pass authors: nodes are found, graphs stay valid, statistics are torch's, differences are readable."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from tiny_nets import Chain, LayerNormed, images, lively, net, same_state, state_of
from torch import Tensor, fx, nn

import vfsurgery as surgery
from vfsurgery.discovery.verification import TOLERANCE, relative_error
from vfsurgery.errors import OptionError, SurgeryError
from vfsurgery.stats.moments import Moments
from vfsurgery.tracing.shapes import renew_values
from vfsurgery.tracing.values import VALUE

EXACT = TOLERANCE[torch.float32]


def traced(name: str, seed: int = 0) -> fx.GraphModule:
    return surgery.trace(net(name, seed), images(2))


def names(nodes: list[fx.Node]) -> list[str]:
    return [node.name for node in nodes]


# select


@pytest.mark.parametrize("spelling", [torch.relu, torch.relu_, torch.nn.functional.relu, "relu"])
def test_an_op_is_found_in_any_spelling(spelling):
    assert len(surgery.select(traced("residual"), op=spelling)) == 5
    assert surgery.select(traced("residual"), op="gelu") == []


def test_a_module_class_finds_its_subclasses_and_a_name_the_class():
    graph_module = traced("residual")
    norms = surgery.select(graph_module, op=nn.modules.batchnorm._BatchNorm)
    assert len(norms) == 6 and norms == surgery.select(graph_module, op="BatchNorm2d")
    assert len(surgery.select(traced("chain"), op="relu")) == 4  # modules here
    assert surgery.select(graph_module, op=[nn.Linear, nn.Conv2d])[-1].name == "fc"


def test_a_module_path_finds_what_is_inside_functions_too():
    graph_module = traced("residual")
    inside = surgery.select(graph_module, module="block1")
    assert {"block1_conv1", "block1_bn2", "add"} <= set(names(inside))
    assert all(not name.startswith(("block2", "stem", "fc")) for name in names(inside))
    assert names(surgery.select(graph_module, module="*.conv1")) == ["block1_conv1", "block2_conv1"]
    assert surgery.select(graph_module, module="block1", op=nn.Linear) == []
    assert names(surgery.select(graph_module, module="block1", where=lambda node: node.name == "add")) == ["add"]


def test_a_pattern_that_matches_no_module_is_refused():
    with pytest.raises(OptionError, match=r"(?s)module='blok1' matches no module.*did you mean 'block1'"):
        surgery.select(traced("residual"), module="blok1")


def test_a_group_finds_the_nodes_that_carry_its_units():
    graph_module = traced("residual")
    groups = surgery.find_groups(graph_module)
    inner = next(
        group for group in groups if any(m.parameter == "block1.conv1.weight" and m.dim == 0 for m in group.members)
    )
    found = names(surgery.select(graph_module, group=inner))
    assert found == ["block1_conv1", "block1_bn1", "relu_1", "block1_conv2"]


# edit


def test_what_is_inserted_is_computed_and_shaped():
    model = net("residual")
    graph_module = surgery.trace(model, images(2))
    expected = model(images(3))
    with surgery.edit(graph_module) as graph:
        out = graph.graph.output_node()
        half = graph.insert_before(out, torch.mul, 0.5)
        graph.insert_after(half, nn.Unflatten(1, (1, 5)))
    found = graph_module(images(3))
    assert torch.allclose(found, 0.5 * expected[:, None]) and found.shape == (3, 1, 5)
    assert graph_module.graph.output_node().args[0].meta[VALUE].shape == (2, 1, 5)
    assert half.meta[VALUE].shape == (2, 5)


def test_insert_after_moves_all_readers_and_insert_before_one():
    graph_module = traced("residual")
    with surgery.edit(graph_module) as graph:
        relu = graph.select(op="relu")[0]  # read by the block's convolution and by its shortcut
        readers = set(relu.users)
        after = graph.insert_after(relu, torch.neg)
        before = graph.insert_before(graph.select(module="block1.conv1")[0], torch.neg)
    assert set(after.users) == (
        readers - {graph_module.graph.find_nodes(op="call_module", target="block1.conv1")[0]}
    ) | {before}
    assert len(readers) == 2 and list(relu.users) == [after]


def test_a_replaced_module_takes_path_and_name_and_the_source_keeps_its_own():
    model = net("chain")
    graph_module = surgery.trace(model, images(2))
    with surgery.edit(graph_module) as graph:
        for node in graph.select(op=nn.ReLU):
            graph.replace(node, nn.Tanh())
    assert [type(graph_module.get_submodule(path)) for path in ("1", "3", "5")] == [nn.Tanh] * 3
    assert isinstance(model[1], nn.ReLU)
    expected = copy.deepcopy(model)
    for place in (1, 3, 5, 9):
        expected[place] = nn.Tanh()
    assert torch.equal(graph_module(images(3)), expected(images(3)))


def test_a_removed_node_is_bypassed_and_its_module_gone():
    graph_module = traced("residual")
    with surgery.edit(graph_module) as graph:
        graph.remove(graph.select(module="norm")[0])
    assert not any(name.startswith("norm.") for name in graph_module.state_dict())
    assert graph_module(images(2)).shape == (2, 5)


def test_an_edit_that_does_not_fit_is_refused_at_its_node():
    graph_module = traced("chain")
    with (
        pytest.raises(SurgeryError, match=r"node _8 does not fit to what it reads") as caught,
        surgery.edit(graph_module) as graph,
    ):
        graph.insert_after(graph.select(op=nn.Flatten)[0], nn.Linear(54, 7))
    assert "_7_linear (2, 7)" in caught.value.__notes__[0] and "> _8 = 8(" in caught.value.__notes__[0]


def test_an_edit_that_reads_what_comes_later_is_refused():
    graph_module = traced("chain")
    with (
        pytest.raises(SurgeryError, match=r"(?s)edited graph is invalid.*before it has been defined"),
        surgery.edit(graph_module) as graph,
    ):
        nodes = list(graph.graph.nodes)
        nodes[1].append(nodes[0])


def test_a_node_without_input_cannot_be_bypassed():
    graph_module = traced("chain")
    with pytest.raises(OptionError, match="reads no other node"), surgery.edit(graph_module) as graph:
        graph.remove(next(iter(graph.graph.nodes)))


def test_shapes_are_renewed_without_touching_state_or_modes():
    graph_module = traced("residual").train()
    before = state_of(graph_module)
    values = {
        node.name: node.meta.pop(VALUE) for node in graph_module.graph.nodes if node.op not in ("placeholder", "output")
    }
    assert renew_values(graph_module) is None
    assert {node.name: node.meta[VALUE] for node in graph_module.graph.nodes if node.name in values} == values
    assert same_state(state_of(graph_module), before) and graph_module.norm.training


# measure


@pytest.mark.parametrize("name", ["chain", "residual"])
def test_moments_of_nodes_are_those_of_the_whole_tensor(name):
    graph_module = traced(name).train()
    chosen = surgery.select(graph_module, op=(nn.Conv2d, nn.Linear, "relu"))
    data = images(60)
    found = surgery.measure(graph_module, chosen, [data[:40], data[40:]], progress=False)
    values: dict[str, Tensor] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node):
            result = super().run_node(n)
            values[n.name] = result.clone() if isinstance(result, Tensor) else result
            return result

    assert graph_module.training
    with torch.no_grad():
        Keep(copy.deepcopy(graph_module).eval()).run(data.clone())
    assert set(found) == set(names(chosen))
    for node in chosen:
        whole = Moments.of(values[node.name].double(), dim=1)
        assert found[node.name].count == whole.count
        assert relative_error((found[node.name].mean, found[node.name].std), (whole.mean, whole.std)) < EXACT


def test_units_of_tokens_lie_on_the_last_dim():
    graph_module = surgery.trace(nn.Sequential(nn.Linear(6, 10), nn.GELU()), torch.randn(2, 7, 6))
    found = surgery.measure(
        graph_module, surgery.select(graph_module, op=nn.GELU), torch.randn(8, 7, 6), progress=False
    )
    assert found["_1"].mean.shape == (10,) and found["_1"].count == 56


def test_a_node_that_hides_its_units_asks_for_the_dim():
    graph_module = surgery.trace(lively(LayerNormed()), images(2))
    flat = surgery.select(graph_module, op="flatten")
    with pytest.raises(OptionError, match=r"(?s)node flatten does not tell on which dim.*dim=1"):
        surgery.measure(graph_module, flat, images(8), progress=False)
    assert surgery.measure(graph_module, flat, images(8), dim=1, progress=False)["flatten"].mean.shape == (432,)


# diff


def test_a_difference_reads_like_this(golden):
    before = traced("residual")
    after = copy.deepcopy(before)
    with surgery.edit(after) as graph:
        graph.remove(graph.select(module="norm")[0])
        graph.replace(graph.select(op="relu")[0], nn.GELU())
        graph.insert_after(graph.select(module="block2")[-1], torch.mul, 0.5)
        graph.replace(graph.select(op=nn.Linear)[0], nn.Linear(10, 5, bias=False))
    with torch.no_grad():
        after.stem.weight.mul_(1.25)
        after.get_parameter("block1.bn1.bias").zero_()
        after.block2.conv2.half()
        after.fc.weight.copy_(before.fc.weight)
    found = surgery.diff(before, after)
    golden("diff.txt", f"{found}\n")
    assert found and found.to_dict()["nodes"][0]["sign"] == "-"


def test_equal_models_do_not_differ():
    found = surgery.diff(net("chain"), net("chain"), images(2))
    assert not found and str(found) == "graph: no difference\nparameters: no difference"
    assert surgery.diff(net("chain"), net("chain", 1), images(2))


def test_settings_count_as_a_change_of_the_node():
    found = surgery.diff(Chain(), Chain(stride=1), images(2))
    assert [(change.sign, change.name) for change in found.nodes] == [("~", "_2")]


@pytest.mark.parametrize(
    ("terminal", "no_colour", "coloured"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_colours_are_for_terminals(terminal, no_colour, coloured, monkeypatch):
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    monkeypatch.setenv("NO_COLOR", no_colour)
    screen = Screen()
    found = surgery.diff(net("chain"), net("chain", 1), images(2))
    found.show(screen)
    assert ("\033[" in screen.getvalue()) == coloured
    assert coloured or screen.getvalue() == f"{found}\n"
