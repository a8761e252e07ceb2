"""Passes of users: registered, built from mappings, held to what they declare, and run on a model."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass
from typing import ClassVar, Literal

import pytest
import torch
from tiny_nets import Chain, images, net, same_state, state_of
from torch import Tensor, fx, nn

import vfsurgery as surgery
from vfsurgery.discovery.verification import TOLERANCE, relative_error
from vfsurgery.errors import CertificateError, DataError, OptionError, SurgeryError
from vfsurgery.passes import PASSES, Context, Pass, Pipeline, Repair, contract
from vfsurgery.passes.contract import check_order
from vfsurgery.testing import make_net

EXACT = TOLERANCE[torch.float32]


@pytest.fixture(autouse=True)
def _own_names() -> Iterator[None]:
    """Forget what a test registers."""
    before = dict(PASSES._entries)
    yield
    PASSES._entries.clear()
    PASSES._entries.update(before)


def scaled(graph_module: fx.GraphModule, context: Context, *, factor: float = 0.5, path: str = "fc") -> None:
    """Scale one layer."""
    graph_module.get_submodule(path).weight.mul_(factor)
    context.notes.append(f"scaled by {factor}")


@dataclass(frozen=True, kw_only=True)
class Scaled(Pass):
    """The same as a class, with more options."""

    name: ClassVar[str] = "scaled-class"
    factor: float
    sizes: tuple[int, ...] = (1, 2)
    form: Literal["a", "b"] = "a"
    limit: int | None = None

    def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        scaled(graph_module, context, factor=self.factor)
        return graph_module


def without_norm(graph_module: fx.GraphModule, context: Context, *, broken: bool = False) -> None:
    """Take the stem's BatchNorm out of the residual net: folded into the convolution, unless ``broken``."""
    conv, norm = graph_module.stem, graph_module.norm
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    if not broken:
        conv.weight.mul_(scale.view(-1, 1, 1, 1))
        conv.bias = nn.Parameter(norm.bias - norm.running_mean * scale)
    node = next(node for node in graph_module.graph.nodes if node.target == "norm")
    node.replace_all_uses_with(node.args[0])
    graph_module.graph.erase_node(node)


def outputs(model: nn.Module, count: int = 7) -> Tensor:
    with torch.no_grad():
        return model(images(count))


# registering


def test_a_function_becomes_a_pass_whose_keywords_are_its_options():
    made = surgery.register_pass(scaled)
    assert PASSES["scaled"] is made and made.function is scaled and made.__doc__ == "Scale one layer."
    assert [str(option) for option in surgery.pass_options("scaled")] == ["factor: float = 0.5", "path: str = 'fc'"]
    assert made(factor=0.1) == made(factor=0.1) != made()
    with pytest.raises(FrozenInstanceError):
        made().factor = 2.0


def test_the_decorator_sets_name_and_declarations():
    made = surgery.register_pass(name="mine", needs_data=True, after=("repair",))(scaled)
    assert (made.name, made.needs_data, made.after, made.preserves_function) == ("mine", True, ("repair",), False)
    assert "scaled" not in PASSES


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: surgery.register_pass(lambda graph_module: None), r"wrong signature: \(graph_module\)"),
        (lambda: surgery.register_pass(_untyped), r"(?s)option _untyped.x has no type.*annotate it"),
        (lambda: surgery.register_pass(_changeable), r"(?s)default of option _changeable.x can be changed.*tuple"),
        (lambda: surgery.register_pass(_unresolved), r"(?s)type of option _unresolved.x cannot be resolved: Nowhere"),
        (lambda: surgery.register_pass(_reserved), r"option _reserved.after has a name that passes use themselves"),
        (lambda: surgery.register_pass(int), r"int is no pass"),
        (lambda: surgery.register_pass(lambda graph_module, context: None), r"'<lambda>' cannot be the name of a pass"),
        (lambda: surgery.register_pass(type("Loose", (Pass,), {})), r"(?s)Loose is no frozen dataclass.*frozen=True"),
        (lambda: surgery.register_pass(needs_dada=True)(scaled), r"declares no 'needs_dada'"),
        (lambda: surgery.register_pass(after="repair")(scaled), r"(?s)after= of pass 'scaled' is 'repair'.*a tuple"),
        (lambda: surgery.register_pass(name="repair")(scaled), r"two entries claim the pass name 'repair'"),
    ],
)
def test_what_cannot_be_a_pass_is_refused(make, message):
    with pytest.raises(OptionError, match=message):
        make()


def _untyped(graph_module, context, *, x=1): ...
def _changeable(graph_module, context, *, x: list[int] = []): ...  # noqa: B006
def _unresolved(graph_module, context, *, x: Nowhere = 1): ...  # type: ignore[name-defined]  # noqa: F821
def _reserved(graph_module, context, *, after: int = 1): ...


@pytest.mark.parametrize("step", [Scaled(factor=2.0), Scaled(factor=0.25, sizes=(), form="b", limit=3)])
def test_options_go_through_a_mapping_and_back(step):
    surgery.register_pass(Scaled)
    mapping = surgery.pass_as_mapping(step)
    assert surgery.build_pass("scaled-class", mapping) == step
    assert type(mapping["sizes"]) is list


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"pass 'scaled-class' needs factor: float"),
        ({"factor": 1.0, "fromm": "b"}, r"(?s)has no option 'fromm'.*did you mean 'form'"),
        ({"factor": "1"}, r"(?s)pass 'scaled-class': factor must be float but is '1'.*valid number"),
        ({"factor": True}, r"factor must be float but is True"),
        ({"factor": 1, "sizes": [1, 2.5]}, r"sizes must be tuple\[int, ...\] but is \[1, 2.5\]"),
        ({"factor": 1, "form": "c"}, r"form must be Literal\['a', 'b'\] but is 'c'"),
        ({"factor": 1, "limit": "none"}, r"limit must be int \| None but is 'none'"),
        ({"factor": object()}, r"factor must be float but is <object"),
    ],
)
def test_a_mapping_is_read_strictly(options, message):
    surgery.register_pass(Scaled)
    with pytest.raises(OptionError, match=message):
        surgery.build_pass("scaled-class", options)


def test_an_option_has_a_json_schema():
    surgery.register_pass(Scaled)
    schemas = {option.name: option.schema() for option in surgery.pass_options("scaled-class")}
    assert schemas["factor"] == {"type": "number"}
    assert schemas["sizes"] == {"type": "array", "items": {"type": "integer"}, "default": [1, 2]}


def test_a_type_that_no_recipe_can_hold_is_named():
    @surgery.register_pass
    def holding(graph_module, context, *, model: nn.Module | None = None): ...

    assert surgery.build_pass("holding") == holding()
    with pytest.raises(OptionError, match=r"(?s)option model has a type that cannot be written in a recipe"):
        surgery.build_pass("holding", {"model": None})


def test_passes_from_functions_pickle():
    code = (
        "import pickle, vfsurgery as surgery\n"
        "@surgery.register_pass\n"
        "def mine(graph_module, context, *, factor: float = 1.0): ...\n"
        "assert pickle.loads(pickle.dumps(mine(factor=2.0))) == mine(factor=2.0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# running


def test_a_pass_that_changes_tensors_gives_a_model_of_the_same_class_and_leaves_the_source():
    model = net("residual").train()
    model.block1.eval()
    before = state_of(model)
    surgery.register_pass(scaled)
    result = surgery.run_passes(model, ["scaled"], example_inputs=images(2))
    assert type(result) is type(model) and same_state(state_of(model), before)
    assert [m.training for m in result.modules()] == [m.training for m in model.modules()]
    assert torch.equal(result.fc.weight, 0.5 * model.fc.weight)
    report = surgery.report_of(result)
    assert isinstance(report, surgery.PassReport) and not report.restructured
    assert [(run.name, run.notes) for run in report.passes] == [("scaled", ("scaled by 0.5",))]
    assert report.to_dict()["passes"][0]["options"] == [["factor", 0.5], ["path", "fc"]]


def test_a_pass_that_changes_the_graph_gives_a_graph_module_of_the_same_function():
    model = net("residual")
    fold = surgery.register_pass(preserves_function=True)(without_norm)
    result = surgery.run_passes(model, fold(), example_inputs=images(2))
    assert isinstance(result, fx.GraphModule)
    assert relative_error((outputs(result),), (outputs(model),)) < EXACT
    report = surgery.report_of(result)
    assert report.restructured and report.passes[0].removed == ("norm",)
    assert report.passes[0].error < EXACT
    assert "1 removed; function preserved" in str(report)
    again = pickle.loads(pickle.dumps(result))
    assert torch.equal(outputs(again), outputs(result))
    assert torch.equal(outputs(copy.deepcopy(result)), outputs(result))


def put_another_shift(graph_module: fx.GraphModule, context: Context) -> None:
    graph_module.shift = nn.Parameter(torch.ones(10))


def double_the_flattened(graph_module: fx.GraphModule, context: Context) -> None:
    node = graph_module.graph.find_nodes(op="call_method", target="flatten")[0]
    node.target, node.args = "mul", (node.args[0], 0.0)
    with graph_module.graph.inserting_after(node):
        flat = graph_module.graph.call_method("flatten", (node, 1))
    node.replace_all_uses_with(flat, delete_user_cb=lambda user: user is not flat)


@pytest.mark.parametrize("act", [put_another_shift, double_the_flattened])
def test_what_the_models_own_forward_would_not_see_comes_back_as_a_graph_module(act):
    model = make_net("layer-norm")
    result = surgery.run_passes(model, surgery.register_pass(act)(), example_inputs=images(2))
    assert isinstance(result, fx.GraphModule) and surgery.report_of(result).restructured
    with torch.no_grad():
        if act is put_another_shift:
            model.shift.copy_(torch.ones(10))
            assert torch.equal(outputs(result), outputs(model))
        else:
            assert torch.equal(outputs(result), model(torch.zeros_like(images(7))))


def test_a_graph_module_runs_without_this_library(tmp_path):
    fold = surgery.register_pass(preserves_function=True)(without_norm)
    result = surgery.run_passes(net("residual"), fold(), example_inputs=images(2))
    buffer = io.BytesIO()
    torch.save(result.state_dict(), buffer)
    torch.save(result, tmp_path / "model.pt")
    expected = outputs(result, 1)
    torch.save((images(1), expected), tmp_path / "example.pt")
    (tmp_path / "tiny_nets.py").write_text("from torch import nn\nclass Block(nn.Module): ...\n")
    code = (
        "import sys, torch\n"
        "model = torch.load('model.pt', weights_only=False)\n"
        "x, y = torch.load('example.pt')\n"
        "torch.testing.assert_close(model(x), y)\n"
        "assert not any(name.split('.')[0] == 'vfsurgery' for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={"OMP_NUM_THREADS": "1"})


def test_in_place_the_model_itself_changes_and_its_tensors_stay_where_they_are():
    model = net("residual")
    expected = 0.5 * model.fc.weight.detach().clone()
    place = model.fc.weight.data_ptr()
    made = surgery.register_pass(scaled)
    assert surgery.run_passes(model, made(), example_inputs=images(2), inplace=True) is model
    assert torch.equal(model.fc.weight, expected) and model.fc.weight.data_ptr() == place


def test_in_place_a_graph_that_does_not_fit_is_refused_and_nothing_written():
    model = net("residual")
    before = state_of(model)
    fold = surgery.register_pass(without_norm)
    with pytest.raises(OptionError, match=r"(?s)does not fit into the model, a Residual.*changed the graph"):
        surgery.run_passes(model, fold(), example_inputs=images(2), inplace=True)
    assert same_state(state_of(model), before)


def test_a_failing_pass_leaves_the_model_as_it_was_even_in_place():
    @surgery.register_pass
    def fails(graph_module, context):
        graph_module.fc.weight.zero_()
        raise ValueError("enough")

    model = net("residual")
    before = state_of(model)
    with pytest.raises(ValueError, match="enough"):
        surgery.run_passes(model, "fails", example_inputs=images(2), inplace=True)
    assert same_state(state_of(model), before)


def test_renormalization_from_sources_ends_in_the_weights():
    model, dense = net("chain"), net("chain")
    with torch.no_grad():
        model[0].weight[3:].zero_()
    fixed = surgery.run_passes(model, ["rescale"], sources=[dense], data=images(64), progress=False)
    assert type(fixed) is Chain and list(fixed.state_dict()) == list(model.state_dict())
    report = surgery.report_of(fixed)
    assert [run.name for run in report.passes] == ["rescale", "fold"] and report.passes[1].error < EXACT
    assert relative_error((outputs(fixed),), (outputs(dense),)) < relative_error((outputs(model),), (outputs(dense),))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"passes": "reset"}, DataError, r"(?s)pass 'reset' needs calibration data.*pass data="),
        ({"passes": "repair", "data": images(64)}, OptionError, r"(?s)pass 'repair' needs sources.*sources="),
        ({"passes": "resett"}, OptionError, r"(?s)unknown pass 'resett'.*did you mean 'reset'"),
        ({"passes": "preserve"}, OptionError, r"pass 'preserve' needs boundary: int \| str"),
        ({"passes": [Repair]}, OptionError, r"(?s)holds no pass but <class.*make one of the class: Repair\(\)"),
        ({"passes": "bias-removal", "data": images(64)}, OptionError, r"ensemble, and there are no sources"),
        ({"passes": [], "weights": [1.0]}, OptionError, r"weights are \[1.0\] for 0 sources"),
    ],
)
def test_what_passes_need_is_asked_for(arguments, error, message):
    with pytest.raises(error, match=message):
        surgery.run_passes(net("residual"), **{"example_inputs": images(2), "progress": False, **arguments})


# what passes declare


def test_a_pass_that_breaks_its_promise_is_refused_with_its_name_and_the_first_node():
    fold = surgery.register_pass(preserves_function=True)(without_norm)
    model = net("residual")
    before = state_of(model)
    with pytest.raises(
        CertificateError, match=r"(?s)pass 'without-norm' declares.*relative, tolerance 1e-04"
    ) as caught:
        surgery.run_passes(model, fold(broken=True), example_inputs=images(2))
    assert "relu is the first whose value differs" in str(caught.value)
    assert same_state(state_of(model), before)


def test_a_layer_that_took_over_from_a_removed_norm_is_not_the_one_that_is_named():
    @surgery.register_pass(preserves_function=True)
    def half_right(graph_module, context):
        without_norm(graph_module, context)
        graph_module.block2.conv1.weight[0].mul_(1.1)

    with pytest.raises(CertificateError, match=r"block2_conv1 is the first whose value differs") as caught:
        surgery.run_passes(net("residual"), half_right(), example_inputs=images(2))
    assert any("> block2_conv1" in note for note in caught.value.__notes__)


def test_a_pass_that_promises_nothing_is_not_compared():
    made = surgery.register_pass(without_norm)
    surgery.run_passes(net("residual"), made(broken=True), example_inputs=images(2))


def test_half_precision_may_round_but_not_lie():
    model = net("residual").bfloat16()

    @surgery.register_pass(preserves_function=True)
    def nearly(graph_module, context, *, factor: float = 1.0):
        graph_module.fc.weight.mul_(factor)

    x = images(2, dtype=torch.bfloat16)
    surgery.run_passes(model, nearly(factor=1 + 2**-7), example_inputs=x)
    with pytest.raises(CertificateError, match="in bfloat16"):
        surgery.run_passes(model, nearly(factor=2.0), example_inputs=x)


class Drowned(nn.Module):
    """What its first layer gives is nearly lost in float32: the sum rounds it to hundredths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) + 1e5 - 1e5)


def test_what_arithmetic_rounds_is_not_put_down_to_a_pass(monkeypatch):
    @surgery.register_pass(preserves_function=True)
    def moved(graph_module, context, *, back: float = 1 / 3):
        graph_module.first.weight.mul_(3.0)
        graph_module.first.bias.mul_(3.0)
        graph_module.last.weight.mul_(back)

    monkeypatch.setattr(contract, "ROUNDING_FACTOR", 0)
    model, x = Drowned().eval(), torch.randn(3, 4)
    found = surgery.run_passes(model, moved(), example_inputs=x)
    assert relative_error((found(x),), (model(x),)) > EXACT  # as float32 has it
    with pytest.raises(CertificateError, match="does not"):
        surgery.run_passes(model, moved(back=0.334), example_inputs=x)


def test_an_output_of_another_shape_is_no_preserved_function():
    @surgery.register_pass(preserves_function=True)
    def cut(graph_module, context):
        out = graph_module.graph.output_node()
        with graph_module.graph.inserting_before(out):
            out.args = (graph_module.graph.call_method("sum", (out.args[0],)),)

    with pytest.raises(CertificateError, match=r"shapes \[\(\)\] instead of \[\(2, 5\)\]"):
        surgery.run_passes(net("chain"), cut(), example_inputs=images(2))


def named(name: str, **declared) -> Pass:
    return type(name, (Pass,), {"name": name, **declared})()


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("ab", None),
        ("ba", r"(?s)pass 'b' must run after 'a'.*order +b, a.*move 'b' behind 'a'"),
        ("b", None),
        ("aba", None),
        ("cb", r"(?s)pass 'c' must run after 'b'"),
        ("bc", None),
        ("db", None),
        ("bd", r"(?s)pass 'd' must run before 'b'.*in front of 'b'"),
    ],
)
def test_order_is_enforced_and_never_changed(order, message):
    known = {
        "a": named("a"),
        "b": named("b", after=("a",)),
        "c": named("c", after=("b",)),
        "d": named("d", before=("b",)),
    }
    steps = tuple(known[letter] for letter in order)
    if message is None:
        check_order(steps)
        assert Pipeline(steps).passes == steps
    else:
        with pytest.raises(OptionError, match=message):
            Pipeline(steps)


def test_a_pass_must_return_a_graph_module():
    made = surgery.register_pass(returns_text)
    with pytest.raises(SurgeryError, match=r"pass 'returns-text' returned str and no graph module"):
        surgery.run_passes(net("chain"), made(), example_inputs=images(2))


def returns_text(graph_module, context):
    return "done"


def test_later_passes_find_layers_behind_nodes_that_a_pass_inserted_by_hand():
    @surgery.register_pass
    def shrinks(graph_module, context):
        node = graph_module.graph.find_nodes(op="call_module", target="0")[0]
        with graph_module.graph.inserting_after(node):
            made = graph_module.graph.call_function(torch.mul, (node, 0.1))
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)

    fixed = surgery.run_passes(
        net("chain"), [shrinks(), "rescale"], sources=[net("chain")], data=images(64), progress=False
    )
    assert relative_error((outputs(fixed),), (outputs(net("chain")),)) < 1


def test_a_pass_may_measure_the_model_it_works_on():
    @surgery.register_pass(needs_data=True)
    def whiten(graph_module, context):
        layers = surgery.select(graph_module, module="stem")
        found = surgery.measure(graph_module, layers, context.data, progress=False)["stem"]
        graph_module.stem.weight.div_(found.std.to(torch.float32).view(-1, 1, 1, 1))

    result = surgery.run_passes(net("residual"), whiten(), data=images(64), progress=False)
    with torch.no_grad():
        spread = result.stem(images(64)).std((0, 2, 3), correction=0)
    assert relative_error((spread,), (torch.ones(6),)) < EXACT


def test_the_report_takes_options_that_json_does_not_know():
    @dataclass(frozen=True, kw_only=True)
    class Holding(Pass):
        name: ClassVar[str] = "holding"
        kind: type = int
        sizes: tuple[int, ...] = (1,)

        def run(self, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
            return graph_module

    result = surgery.run_passes(net("chain"), Holding(), example_inputs=images(2))
    assert surgery.report_of(result).to_dict()["passes"][0]["options"] == [["kind", repr(int)], ["sizes", [1]]]


# in a merge


def test_a_merge_takes_registered_passes_by_name():
    surgery.register_pass(scaled)
    a, b = net("residual"), net("residual", 1)
    plain = surgery.merge(a, b, renormalize=None, example_inputs=images(2))
    merged = surgery.merge(a, b, renormalize="scaled", example_inputs=images(2))
    assert torch.equal(merged.fc.weight, 0.5 * plain.fc.weight)
    assert surgery.report_of(merged).renormalize == ("scaled",)


def test_a_merge_whose_pass_changes_the_graph_returns_a_graph_module():
    fold = surgery.register_pass(preserves_function=True)(without_norm)
    a, b = net("residual"), net("residual", 1)
    plain = surgery.merge(a, b, renormalize=None, example_inputs=images(2))
    merged = surgery.merge(a, b, renormalize=[fold()], example_inputs=images(2))
    assert isinstance(merged, fx.GraphModule) and not isinstance(plain, fx.GraphModule)
    assert relative_error((outputs(merged),), (outputs(plain),)) < EXACT
    with pytest.raises(OptionError, match=r"(?s)does not fit into model a, a Residual.*not tensors alone"):
        surgery.merge(a, b, renormalize=[fold()], example_inputs=images(2), inplace=True)


def test_a_merge_checks_the_order_before_it_works():
    made = surgery.register_pass(before=("reset",))(scaled)
    with pytest.raises(OptionError, match="'scaled' must run before 'reset'"):
        surgery.merge(net("residual"), net("residual", 1), renormalize=["reset", made()], data=images(64))


def test_a_merge_does_not_take_its_own_parts_as_normalization():
    with pytest.raises(OptionError, match="unknown renormalization 'average'"):
        surgery.merge(net("residual"), net("residual", 1), renormalize="average", example_inputs=images(2))


# errors say where


def test_an_error_in_a_pass_shows_the_pass_the_node_and_the_line_of_the_forward():
    @surgery.register_pass
    def walks(graph_module, context):
        for node in graph_module.graph.nodes:
            if node.target == "block1.conv2":
                raise KeyError("nothing here")

    with pytest.raises(KeyError) as caught:
        surgery.run_passes(net("residual"), [surgery.build_pass("walks")], example_inputs=images(2))
    where, which = caught.value.__notes__
    assert which == "in pass 'walks', the first one"
    assert where.startswith("while at node block1_conv2\n")
    assert "module  block1.conv2, Conv2d(6, 6" in where
    assert "tiny_nets.py" in where and "self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))" in where
    assert "> block1_conv2 = block1.conv2(relu" in where and where.count("\n  ") >= 7


def test_an_error_while_a_graph_runs_shows_the_node_once():
    def bad_data(graph_module, context):
        graph_module.block2.conv2.weight = nn.Parameter(torch.zeros(3, 4, 1, 1))

    made = surgery.register_pass(preserves_function=True)(bad_data)
    with pytest.raises(RuntimeError, match="Given groups=1") as caught:
        surgery.run_passes(net("residual"), made(), example_inputs=images(2))
    where, which = caught.value.__notes__
    assert where.startswith("while at node block2_conv2\n") and "inputs  relu_3 (2, 10, 6, 6)" in where
    assert which == "in pass 'bad-data', the first one"


class MixesTypes(nn.Module):
    """Makes a tensor of float32 by itself, which a float64 weight cannot be multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) @ torch.full((4, 4), 0.5, dtype=torch.float32))


@pytest.mark.parametrize(("change", "kept"), [(0.0, True), (0.1, False)])
def test_a_graph_that_does_not_run_in_float64_is_held_to_its_promise_as_it_is(change: float, kept: bool) -> None:
    @surgery.register_pass(name=f"mixes-{change}", preserves_function=True)
    def promises(graph_module, context):
        graph_module.last.weight.data.add_(change)

    try:
        with contextlib.nullcontext() if kept else pytest.raises(CertificateError, match="declares that it preserves"):
            surgery.run_passes(MixesTypes(), [promises()], example_inputs=torch.randn(3, 4))
    finally:
        PASSES._entries.pop(f"mixes-{change}")
