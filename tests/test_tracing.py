"""A trace computes what the model computes, in either mode and for any batch size, and leaves the model alone."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn
from torchvision.ops import StochasticDepth

import vfsurgery as surgery
from vfsurgery.errors import ExampleInputError, TraceError
from vfsurgery.tracing.examples import example_inputs_of

MAP = (2, 3, 9, 9)


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    """Tensors of a few numbers: a second thread only waits."""
    torch.set_num_threads(1)


class Stem(nn.Module):
    """A convolution and a linear layer around a forward under test."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.middle(self.norm(self.conv(x))).mean((2, 3)))


class Dropouts(Stem):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)

    def middle(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        x = F.dropout(x, p=0.4, training=self.training)
        return F.dropout2d(x, 0.2, self.training)


class Depth(Stem):
    def __init__(self) -> None:
        super().__init__()
        self.depth = StochasticDepth(0.5, "row")

    def middle(self, x: Tensor) -> Tensor:
        return x + self.depth(x.relu())


class Parity(Stem):
    def middle(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 1, 0, 1)) if x.shape[-1] % 2 else x.neg()


class Numbers(Stem):
    def middle(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        assert len(x) == n and isinstance(c, int) and x.ndim == 4 and 4 in x.shape
        x = x * int(h * w // 2) + float(c) / len(x.shape)
        return x.view(n, c, h * w)[:, :, : h * (w - 1)].reshape(x.shape[0], c, h, w - 1)


class Assignment(Stem):
    def middle(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, 1:] = x[:, :-1]
        y[:, 0] += 1
        return y


class Defaults(Stem):
    def forward(self, x: Tensor, scale: float = 3.0, flip: bool = True) -> Tensor:  # type: ignore[override]
        x = super().forward(x)
        return scale * x.flip(1) if flip else x


class Pieces(Stem):
    def middle(self, x: Tensor) -> Tensor:
        first, *rest = x.chunk(4, dim=1)
        largest, _ = torch.cat(rest, 1).max(dim=1, keepdim=True)
        return torch.cat([first, largest, *x.split(2, 1)[:1]], 1)


class Structures(Stem):
    def forward(self, x: Tensor) -> dict[str, object]:  # type: ignore[override]
        y = super().forward(x)
        return {"out": y, "pair": (y + 1, [y * 2])}


class Constant(Stem):
    def middle(self, x: Tensor) -> Tensor:
        return x * torch.linspace(0, 1, 4)[:, None, None]


FORWARDS = [Stem, Dropouts, Depth, Parity, Numbers, Assignment, Defaults, Pieces, Structures, Constant]


def run(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    return torch.utils._pytree.tree_leaves(model(*inputs))


def warmed(model: nn.Module) -> nn.Module:
    """Running statistics that are not the ones of a new model."""
    model.train()
    with torch.no_grad():
        model(torch.randn(8, 3, 9, 9) * 2 + 1)
    return model


@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("forward", FORWARDS)
def test_a_trace_computes_what_its_model_computes(forward: type[nn.Module], train: bool, batch: int) -> None:
    model = warmed(forward())
    graph = surgery.trace(model, torch.randn(MAP))
    x = torch.randn(batch, *MAP[1:])
    model.train(train)
    graph.train(train)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = run(model, x)
    after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(before)
    found = run(graph, x)
    assert len(expected) == len(found)
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected, strict=True))
    assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items())
    assert bool((after["norm.running_mean"] != before["norm.running_mean"]).any()) == train


@pytest.mark.parametrize("forward", [Dropouts, Depth])
def test_training_mode_matters_to_a_trace(forward: type[nn.Module]) -> None:
    graph = surgery.trace(forward().eval(), torch.randn(MAP))
    x = torch.randn(MAP)
    quiet = run(graph.eval(), x)[0]
    assert torch.equal(quiet, run(graph.eval(), x)[0])
    graph.norm.eval()
    for module in graph.children():
        if not isinstance(module, nn.BatchNorm2d):
            module.train()
    assert not torch.equal(run(graph, x)[0], quiet)


def test_stochastic_depth_stays_a_node() -> None:
    graph = surgery.trace(Depth(), torch.randn(MAP))
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"].count("depth") == 1


def test_functional_dropout_becomes_a_module_with_its_rate() -> None:
    graph = surgery.trace(Dropouts().eval(), torch.randn(MAP))
    assert not any(node.target in (F.dropout, F.dropout2d) for node in graph.graph.nodes)
    rates = [(type(m), m.p) for m in graph.modules() if isinstance(m, nn.Dropout | nn.Dropout2d)]
    assert rates == [(nn.Dropout, 0.3), (nn.Dropout, 0.4), (nn.Dropout2d, 0.2)]


@pytest.mark.parametrize(("forward", "decision"), [(Parity, r"bool\(\w+\) == True"), (Numbers, r"int\(\w+\) == 40")])
def test_what_the_example_decided_is_recorded(forward: type[nn.Module], decision: str) -> None:
    graph = surgery.trace(forward(), torch.randn(MAP))
    guards = "\n".join(graph.meta["guards"])
    assert re.search(decision, guards), guards


def test_without_decisions_there_are_no_guards() -> None:
    assert surgery.trace(Stem(), torch.randn(MAP)).meta["guards"] == ()


def test_the_other_branch_is_taken_for_the_other_example() -> None:
    model, x = Parity().eval(), torch.randn(2, 3, 8, 8)
    assert torch.equal(surgery.trace(model, x)(x), model(x))
    assert not torch.equal(surgery.trace(model, torch.randn(MAP))(x), model(x))


class Heads(nn.Module):
    """A head for training that the forward in eval mode does not use, registered first, and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
        self.unused = nn.Parameter(torch.randn(3))
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 2))
        self.spare = nn.Linear(2, 2)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.randn(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.table


def test_keys_and_their_order_are_kept_and_tensors_are_shared() -> None:
    model = Heads()
    graph = surgery.trace(model, torch.randn(2, 4))
    assert list(graph.state_dict()) == list(model.state_dict())
    mine, theirs = graph.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    assert all(mine[name] is theirs[name] for name in theirs)
    assert dict(graph.named_buffers())["table"] is model.table
    assert [name for name, _ in graph.named_parameters()] == [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        model.body[2].bias.add_(1.0)
    x = torch.randn(3, 4)
    assert torch.equal(graph.eval()(x), model.eval()(x))


def test_what_the_forward_does_not_use_is_pinned() -> None:
    groups = surgery.find_groups(Heads(), torch.randn(2, 4))
    pinned = {pin.parameter: pin.reason for pin in groups.pinned}
    assert pinned["aux.0.weight"] == pinned["unused"] == pinned["spare.bias"] == "not used in the forward"
    assert pinned["body.2.weight"] != "not used in the forward"
    assert [group.size for group in groups] == [6]


def test_mixed_modes_are_kept() -> None:
    model = Heads().train()
    model.body.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    graph = surgery.trace(model, torch.randn(2, 4))
    assert {name: graph.get_submodule(name).training for name in modes} == modes
    assert {name: module.training for name, module in model.named_modules()} == modes


def fails(m: nn.Module, x: Tensor) -> Tensor:
    raise RuntimeError("no way")


class Failing(Stem):
    middle = fails


@pytest.mark.parametrize("forward", [Dropouts, Depth, Assignment, Failing])
def test_the_model_and_the_random_state_are_left_alone(forward: type[nn.Module]) -> None:
    model = forward().train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    x = torch.randn(MAP)
    copy = x.clone()
    rng = torch.get_rng_state()
    try:
        surgery.find_groups(model, x)
        assert forward is not Failing
    except TraceError:
        assert forward is Failing
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(x, copy)
    assert all(module.training for module in model.modules())
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == ids
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_forward_that_fails_says_where() -> None:
    message = (
        r"(?s)^cannot trace Failing: no way\n +module +the model itself.*\n +line +File .*, in fails: raise .*\n"
        r" +inputs +\(2, 3, 9, 9\)\n +remedy .*example_inputs="
    )
    with pytest.raises(TraceError, match=message) as caught:
        surgery.trace(Failing(), torch.randn(MAP))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_inputs_of_a_wrong_shape_are_named() -> None:
    with pytest.raises(
        TraceError, match=r"(?s)cannot trace Stem.*module +conv\n +line +File .*\n +inputs +\(2, 5, 9, 9\)"
    ):
        surgery.trace(Stem(), torch.randn(2, 5, 9, 9))


def test_branching_on_data_is_refused() -> None:
    class Branching(Stem):
        def middle(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match=r"cannot trace Branching"):
        surgery.trace(Branching(), torch.randn(MAP))


def test_a_model_that_says_nothing_needs_an_example() -> None:
    message = r"(?s)^Stem does not say what input it takes\n +remedy +pass example_inputs=.*or data="
    for entry in (surgery.trace, surgery.find_groups):
        with pytest.raises(ExampleInputError, match=message):
            entry(Stem())


def test_given_examples_are_taken_as_they_are() -> None:
    x, y = torch.randn(2), torch.randn(3)
    (found,) = example_inputs_of(Stem(), x)
    assert found is x
    assert [tensor is other for tensor, other in zip(example_inputs_of(Stem(), [x, y]), (x, y), strict=True)] == [
        True,
        True,
    ]


def test_several_inputs() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(5, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x) * self.b(y)

    model, inputs = Sum(), (torch.randn(2, 3), torch.randn(2, 5))
    graph = surgery.trace(model, inputs)
    assert torch.equal(graph(*inputs), model(*inputs))
    assert [node.name for node in graph.graph.nodes if node.op == "placeholder"] == ["x", "y"]


def meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: torchvision.models.squeezenet1_1(), (2, 3, 224, 224)),
        (lambda: torchvision.models.efficientnet_b1(), (2, 3, 240, 240)),
        (lambda: torchvision.models.inception_v3(init_weights=False), (2, 3, 299, 299)),
        (lambda: timm.create_model("test_resnet", pretrained=False), (2, 3, 160, 160)),
        (lambda: timm.create_model("resnet10t", pretrained=False), (2, 3, 176, 176)),
    ],
    ids=["squeezenet1_1", "efficientnet_b1", "inception_v3", "test_resnet", "resnet10t"],
)
def test_default_examples_have_the_configured_size(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    (x,) = example_inputs_of(meta(build))
    assert tuple(x.shape) == shape and x.device.type == "meta"


def test_default_examples_are_repeatable_and_leave_the_random_state() -> None:
    model = timm.create_model("test_resnet", pretrained=False).double()
    rng = torch.get_rng_state()
    (first,), (second,) = example_inputs_of(model), example_inputs_of(model)
    assert torch.equal(first, second) and first.dtype == torch.float64
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize(
    "build",
    [lambda: torchvision.models.squeezenet1_1(), lambda: timm.create_model("test_resnet", pretrained=False)],
    ids=["torchvision", "timm"],
)
def test_a_published_model_is_traced_by_default(build: Callable[[], nn.Module]) -> None:
    model = build().eval()
    graph = surgery.trace(model)
    assert isinstance(graph, fx.GraphModule)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(graph(x), model(x))


class Sizes(Stem):
    """Makes tensors from sizes and mixes constants with the input where torch looks for tensors first."""

    def middle(self, x: Tensor) -> Tensor:
        first = torch.where(torch.arange(x.shape[-1]) < 2, x, 0.0)
        second = torch.where(torch.arange(3)[:, None, None, None].sum() > 0, x, 0.0)
        return first + second + torch.arange(x.shape[0]).view(-1, 1, 1, 1) + torch.zeros(x.shape[0], 1, 1, 1)


@pytest.mark.parametrize("batch", [2, 5])
def test_tensors_made_from_sizes_follow_the_input(batch: int) -> None:
    model = Sizes().eval()
    traced = surgery.trace(model, torch.randn(2, 3, 9, 9))
    x = torch.randn(batch, 3, 9, 9)
    assert torch.equal(traced(x), model(x))
    assert list(traced.state_dict()) == list(model.state_dict())
    assert traced.meta["guards"] == ()


def test_a_module_made_in_the_forward_is_traced_through() -> None:
    class Makes(Stem):
        def middle(self, x: Tensor) -> Tensor:
            return nn.AvgPool2d(3)(x)

    model, x = Makes().eval(), torch.randn(2, 3, 9, 9)
    assert torch.equal(surgery.trace(model, x)(x), model(x))
