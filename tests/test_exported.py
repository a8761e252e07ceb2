"""What fx cannot record goes through torch.export: same groups, same values, merges of the model's class."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from tiny_nets import NETS, Residual, images, lively, planted, same_state, state_of
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery import discover
from vfsurgery.discovery.recording import hidden_norms
from vfsurgery.errors import OptionError, TraceError
from vfsurgery.tracing.exported import EXPORTED, export_module
from vfsurgery.tracing.modes import trace_module

MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{name: (build, 12) for name, build in NETS.items()},
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 64),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(num_classes=10), 64),
    "shufflenet": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10), 64),
    "densenet": (
        lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10, memory_efficient=False),
        64,
    ),
    "vit": (lambda: timm.create_model("test_vit"), 160),
    "convnext": (lambda: timm.create_model("test_convnext"), 160),
}


class Picky(Residual):
    """Asks what no proxy can answer."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError("tensors only, please")
        return super().forward(self.prepare(x))

    def prepare(self, x: Tensor) -> Tensor:
        return x


class PickyRules(Picky):
    """Everything that is spelled another way in an exported graph."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 6)
        self.pre = nn.Conv2d(3, 8, 1)
        self.post = nn.Conv2d(8, 3, 1)

    def prepare(self, x: Tensor) -> Tensor:
        y = self.pre(x)
        y = torch.cat([y[:, 4:], y[:, :4].relu()], 1)
        y = nn.functional.interpolate(y, scale_factor=2, mode="bilinear")[:, :, ::2, ::2]
        y = nn.functional.pad(y, (1, 1))[..., 1:-1]
        z = y.clone()
        z[:, :, 0] = 0
        z[:, :, :, 0] = y[:, :, :, 1]
        return self.post(z) + self.table(torch.arange(3)).mean()


class Conditional(Residual):
    """A branch that depends on values, in the one form that can be exported."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.cond(x.sum() > 0, lambda y: y * 2.0, lambda y: y - 1.0, (x,))
        return self.fc(self.block2(self.block1(x)).mean((2, 3)))


class Hidden(Picky):
    """Its BatchNorm is no module of torch's in an exported graph."""

    def prepare(self, x: Tensor) -> Tensor:
        norm = self.norm
        return nn.functional.batch_norm(x, norm.running_mean[:3], norm.running_var[:3])


def members(groups: surgery.GroupSet) -> list[tuple[str, ...]]:
    return [tuple(map(str, group.members)) for group in groups]


@pytest.mark.parametrize("name", MODELS)
def test_groups_and_values_are_those_of_the_fx_trace(name):
    build, side = MODELS[name]
    model, x = build().eval(), torch.randn(3, 3, side, side)
    inputs = (x[:2],)
    graph = export_module(model, inputs, "a test")
    assert members(discover(graph, strict=True)) == members(discover(trace_module(model, inputs)))
    assert list(graph.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(graph.eval()(x)[0], model(x))


@pytest.mark.parametrize("cls", [Picky, PickyRules, Conditional])
def test_a_model_that_only_exports_is_grouped_and_proven(cls):
    model = lively(cls())
    with pytest.raises(TraceError, match=rf"cannot trace {cls.__name__}"):
        surgery.trace(model, images(2))
    before = state_of(model)
    groups = surgery.find_groups(model, images(2), strict=cls is not Conditional)
    assert surgery.verify(model, groups, images(2))
    assert same_state(model.state_dict(), before)
    assert len(groups) >= 3
    assert groups.unknown_ops == () or [op.partition(" at")[0] for op in groups.unknown_ops] == ["cond"]


@pytest.mark.parametrize(("data", "steps"), [(None, None), (images(32), "auto"), (images(33), ["reset", "repair"])])
def test_a_model_that_only_exports_is_merged(data, steps):
    a = lively(Picky())
    b = planted(a, surgery.find_groups(a, images(2)))
    merged = surgery.merge(a, b, data=data, renormalize=steps, example_inputs=images(2))
    assert type(merged) is Picky
    assert list(merged.state_dict()) == list(a.state_dict())
    report = str(surgery.report_of(merged))
    assert "recorded through torch.export, since fx cannot: cannot trace Picky: tensors only, please" in report
    if steps is None:
        for name, tensor in merged.state_dict().items():
            torch.testing.assert_close(tensor, a.state_dict()[name], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert merged.eval()(images(3)).isfinite().all()


def test_one_image_as_example_leaves_the_batch_free():
    graph = export_module(Picky(), (images(1),), "a test")
    assert graph(images(5))[0].shape == (5, 5)


def test_training_modes_survive_and_the_merged_model_trains():
    a, b = Picky().train(), Picky()
    a.norm.eval()
    modes = [module.training for module in a.modules()]
    merged = surgery.merge(a, b, example_inputs=images(2), renormalize=None)
    assert [module.training for module in a.modules()] == modes == [module.training for module in merged.modules()]
    before = merged.block1.bn1.running_mean.clone()
    merged(images(4))
    assert not torch.equal(merged.block1.bn1.running_mean, before)


def test_passes_that_need_an_fx_trace_say_why_there_is_none():
    a, b = Hidden(), Hidden()
    graph = export_module(a, (images(2),), "a reason")
    assert graph.meta[EXPORTED] == "a reason"
    assert len(hidden_norms(graph)) == 1
    message = r"(?s)needs an fx trace.*layers.*fx +cannot trace Hidden: tensors only.*remedy +pass renormalize=None"
    with pytest.raises(OptionError, match=message):
        surgery.merge(a, b, data=images(8), renormalize="reset")
    merged = surgery.merge(a, b, data=images(8))
    assert "not renormalized: BatchNorm layers are hidden in" in str(surgery.report_of(merged))


class Neither(Picky):
    """Branches on values in plain Python."""

    def prepare(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_both_reasons_are_told_where_neither_works():
    message = r"(?s)cannot trace Neither: tensors only.*leaf=.*torch\.export fails too: \S+"
    with pytest.raises(TraceError, match=message):
        surgery.find_groups(Neither(), images(2), strict=True)


def test_with_leaf_there_is_no_fall_back():
    with pytest.raises(TraceError, match="cannot trace Picky") as error:
        surgery.find_groups(Picky(), images(2), leaf="block1")
    assert "torch.export" not in str(error.value)


def test_sizes_that_depend_on_values_are_refused():
    class Nonzero(Picky):
        def prepare(self, x: Tensor) -> Tensor:
            return x + x[x > 0].sum() * x.nonzero().sum()

    with pytest.raises(TraceError, match=re.escape("the size of a tensor depends on values")):
        export_module(Nonzero(), (images(2),), "a test")


def test_the_model_is_left_alone_when_export_fails(capfd):
    model = Neither().train()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    state = torch.get_rng_state()
    with pytest.raises(TraceError):
        export_module(model, (images(2),), "a test")
    assert same_state(model.state_dict(), before)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr().err == ""
