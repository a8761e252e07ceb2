"""Forward hooks: what computes is in graph and statistics, what looks on is left alone, the rest is refused."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery.verification import randomize
from vfsurgery.errors import HookError, TraceError

X = torch.randn(4, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
DATA = torch.randn(60, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU())
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.out(self.block(F.relu(self.bn(self.a(x) * scale))).mean((2, 3)))


def net(hooked: Callable[[Net], object] = lambda model: None, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net().double().eval()
    randomize(model, torch.Generator().manual_seed(seed))
    hooked(model)
    return model


def by_channel(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output * torch.arange(1.0, 7, dtype=output.dtype).view(1, 6, 1, 1)


class Shift:
    def __init__(self) -> None:
        self.by, self.seen = torch.tensor(0.5, dtype=torch.float64), list[Tensor]()

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] - self.by, *args[1:])

    def look(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.seen.append(output)


def twice(module: nn.Module, args: object, output: Tensor) -> None:
    output.mul_(2)


def replace_forward(module: nn.Module, function: Callable[..., Tensor]) -> None:
    module.forward = types.MethodType(function, module)  # type: ignore[method-assign]


COMPUTING: dict[str, Callable[[Net], object]] = {
    "before the model": lambda m: m.register_forward_pre_hook(Shift()),
    "before the model, with keywords": lambda m: m.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {"scale": 3.0}), with_kwargs=True
    ),
    "behind the model": lambda m: m.register_forward_hook(lambda _, args, output: output.softmax(1)),
    "before a layer": lambda m: m.bn.register_forward_pre_hook(lambda _, args: args[0] * 2),
    "behind a layer": lambda m: m.a.register_forward_hook(by_channel),
    "behind a layer, with keywords": lambda m: m.a.register_forward_hook(
        lambda _, args, kwargs, output: output + 1, with_kwargs=True, always_call=True
    ),
    "behind a container": lambda m: m.block.register_forward_hook(by_channel),
    "in place": lambda m: m.a.register_forward_hook(twice),
    "a forward of its own": lambda m: replace_forward(m.a, lambda conv, x: F.conv2d(2 * x, conv.weight)),
    "a forward of the model's own": lambda m: replace_forward(m, lambda own, x: Net.forward(own, x - 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPUTING)
def test_hooks_that_compute_are_in_graph_groups_and_statistics(name: str) -> None:
    model, plain = net(COMPUTING[name]), net()
    assert not torch.allclose(model(X), plain(X), rtol=1e-3)  # the hook matters
    graph_module = surgery.trace(model, X)
    assert torch.equal(graph_module(X), model(X))
    groups = surgery.find_groups(model, X)
    assert groups.groups and surgery.verify(model, groups, X)
    merged = surgery.merge(model, net(COMPUTING[name], 1), data=DATA, renormalize="reset", progress=False)
    seen: list[Tensor] = []
    merged.bn.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    merged.eval()(DATA)
    torch.testing.assert_close(merged.bn.running_mean, seen[0].mean((0, 2, 3)))
    torch.testing.assert_close(merged.bn.running_var, seen[0].var((0, 2, 3)))


def test_groups_of_a_hook_by_channel_leave_its_layer_out() -> None:
    def groups_of(model: nn.Module) -> set[str]:
        return {member.parameter for group in surgery.find_groups(model, X) for member in group.members}

    assert "a.weight" in groups_of(net())
    assert "a.weight" not in groups_of(net(COMPUTING["behind a layer"]))
    wrong = surgery.find_groups(net(), X)  # of the network without the hook
    assert not surgery.verify(net(COMPUTING["behind a layer"]), wrong, X)


def test_a_container_that_stays_whole_is_looked_into_when_something_inside_has_a_hook() -> None:
    def hooked(model: Net) -> None:
        model.block = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).double().eval()  # type: ignore[assignment]
        model.block.linear2.register_forward_hook(lambda _, args, output: output * 3)
        model.forward = types.MethodType(  # type: ignore[method-assign]
            lambda own, x: own.out(own.block(F.relu(own.a(x)).flatten(2).mT).mean(1)), model
        )

    model = net(hooked)
    torch.testing.assert_close(surgery.trace(model, X)(X), model(X))


LOOKING: dict[str, Callable[[Net, Shift], object]] = {
    "on a layer": lambda m, keeper: m.a.register_forward_hook(keeper.look),
    "on a container": lambda m, keeper: m.block.register_forward_hook(keeper.look),
    "on the model": lambda m, keeper: m.register_forward_hook(keeper.look),
    "returns what it is given": lambda m, keeper: m.a.register_forward_hook(lambda _, args, output: output),
    "reads numbers": lambda m, keeper: m.a.register_forward_hook(
        lambda _, args, output: keeper.seen.append(torch.from_numpy(output.detach().numpy()))
    ),
    "for gradients": lambda m, keeper: m.block.register_full_backward_hook(lambda *args: None),
}


@pytest.mark.parametrize("name", LOOKING)
def test_hooks_that_look_on_change_nothing_and_see_tensors_alone(name: str) -> None:
    keeper = Shift()
    model = net(lambda m: LOOKING[name](m, keeper))
    model(X)  # what was collected with a history does not stop copies
    plain = surgery.trace(net(), X)
    assert [node.name for node in surgery.trace(model, X).graph.nodes] == [node.name for node in plain.graph.nodes]
    merged = surgery.merge(model, net(lambda m: LOOKING[name](m, Shift()), 1), data=DATA, progress=False)
    smaller = surgery.prune_units(model, 0.3, example_inputs=X)
    for result in (merged, smaller):
        hooks = [m for m in result.modules() if m._forward_hooks or m._backward_hooks]
        assert len(hooks) == 1
    assert {type(tensor) for tensor in keeper.seen} <= {Tensor}
    assert not any(tensor.is_meta for tensor in keeper.seen)


def test_traces_leave_hooks_and_tensors_of_the_model_alone() -> None:
    model = net(COMPUTING["behind a layer"])
    before = copy.deepcopy(model.state_dict())
    hooks, objects = dict(model.a._forward_hooks), [id(parameter) for parameter in model.parameters()]
    surgery.find_groups(model, X)
    assert model.a._forward_hooks == hooks and [id(parameter) for parameter in model.parameters()] == objects
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def clip(module: nn.Module, args: object) -> None:
    module.weight.data.clamp_(-0.01, 0.01)


def test_hooks_that_write_into_weights_are_refused_by_name() -> None:
    model = net(lambda m: m.a.register_forward_pre_hook(clip))
    before = model.a.weight.clone()
    with pytest.raises(HookError, match=r"(?s)into a.weight .*hook +forward pre-hook .*clip on module a\n.*remove"):
        surgery.merge(model, net(seed=1), example_inputs=X, progress=False)
    assert torch.equal(model.a.weight, before)


def test_functions_that_hold_a_module_of_the_model_are_refused() -> None:
    def closure(model: Net) -> None:
        model.a.register_forward_hook(lambda _, args, output: output + model.bn(output))

    def replaced(model: Net) -> None:
        inner = model.forward
        model.forward = lambda x: inner(x * 2)  # type: ignore[method-assign, assignment]

    for hooked in (closure, replaced):
        with pytest.raises(HookError, match=r"(?s)(BatchNorm2d|Net).*go on using the original's"):
            surgery.merge(net(hooked), net(hooked, 1), example_inputs=X, progress=False)
    model = net(lambda m: m.a.register_forward_hook(lambda *_: print(end=str(m.training)[:0])))
    surgery.trace(model, X)  # it only looks on


def test_hooks_inside_a_module_that_is_kept_whole_are_refused() -> None:
    model = net(lambda m: m.block[0].register_forward_hook(by_channel))
    with pytest.raises(HookError, match=r"(?s)inside block, which is kept as one node.*on module block\.0"):
        surgery.trace(model, X, leaf="block")


def test_hooks_on_all_modules_of_the_process() -> None:
    model, seen = net(), []
    looking = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
    try:
        assert torch.equal(surgery.trace(model, X)(X), model(X))
        assert seen
    finally:
        looking.remove()
    computing = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: 2 * output if isinstance(module, nn.Conv2d) else None
    )
    try:
        with pytest.raises(HookError, match="a hook on all modules of the process changes what they compute"):
            surgery.trace(model, X)
    finally:
        computing.remove()
    surgery.trace(model, X)


def test_a_hook_that_cannot_be_recorded_is_named_with_its_line() -> None:
    model = net(lambda m: m.block.register_forward_hook(lambda _, args, output: output * float(output.mean())))
    with pytest.raises(TraceError, match=r"(?s)module +block\n +line +File .*test_hooks.py.*float\(output.mean\(\)\)"):
        surgery.merge(model, net(seed=1), example_inputs=X, progress=False)


def test_weights_that_a_hook_of_the_users_computes_are_followed() -> None:
    def equalized(model: Net) -> None:
        weight = model.a.weight
        del model.a._parameters["weight"]
        model.a.weight_orig = nn.Parameter(weight.detach())
        model.a.weight = weight.detach().clone()  # type: ignore[assignment]
        model.a.register_forward_pre_hook(lambda conv, args: setattr(conv, "weight", conv.weight_orig * 0.3))

    model = net(equalized)
    groups = surgery.find_groups(model, X)
    assert "a.weight_orig" in {member.parameter for group in groups for member in group.members}
    assert surgery.verify(model, groups, X)
    with pytest.raises(
        surgery.SurgeryError, match=r"(?s)a.weight cannot be written.*a hook computes it: .*remove the hook"
    ):
        surgery.prune_units(model, 0.3, example_inputs=X)
