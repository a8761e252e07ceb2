"""Layers whose module goes on after their own output: found, read, replaced and corrected inside."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from timm.layers.norm_act import FrozenBatchNormAct2d, GroupNormAct, LayerNormAct2d, convert_sync_batchnorm
from tiny_nets import images, planted
from torch import Tensor, nn
from torch.nn import functional

import vfsurgery as surgery
from vfsurgery.discovery.verification import randomize, relative_error
from vfsurgery.errors import OptionError, SurgeryError
from vfsurgery.passes import Context, Fold, Pipeline, Repair, Rescale, Reshift
from vfsurgery.passes.affine import Affine, insert_affine
from vfsurgery.passes.producers import find_producers
from vfsurgery.passes.renormalize import Renormalize
from vfsurgery.stats.own_outputs import OwnCall, own_extent

X = images(96, dtype=torch.float64)


class Activated(nn.BatchNorm2d):
    """A norm and a smooth activation, which no scale goes through."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(super().forward(x))


class ByHand(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight / (self.running_var + self.eps).sqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class Twice(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class WeightAgain(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.weight[:, None, None]


class LooksAtValues(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if float(y.mean()) > 0 else -y


class Casts(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight.to(x), self.bias.to(x), False, 0.0, self.eps
        ).to(x.dtype)


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, output: output.relu())
    return layer


@pytest.mark.parametrize(
    ("layer", "extent"),
    [
        (nn.BatchNorm2d(8), "whole"),
        (nn.SyncBatchNorm(8), "whole"),
        (nn.GroupNorm(2, 8), "whole"),
        (nn.Conv2d(8, 8, 1), "whole"),
        (BatchNormAct2d(8), "inside"),
        (BatchNormAct2d(8, apply_act=False), "whole"),
        (convert_sync_batchnorm(BatchNormAct2d(8)), "inside"),
        (GroupNormAct(8, 4), "inside"),
        (LayerNormAct2d(8), "inside"),
        (Activated(8), "inside"),
        (Casts(8), "inside"),
        (hooked(nn.BatchNorm2d(8)), "inside"),
        (hooked(nn.Conv2d(8, 8, 1)), "inside"),
        (ByHand(8), None),
        (Twice(8), None),
        (WeightAgain(8), None),
        (LooksAtValues(8), None),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, nn.Module) else str(given),
)
@pytest.mark.parametrize("training", [False, True])
def test_what_a_module_adds_to_its_layer(layer, extent, training):
    layer.train(training)
    before = copy.deepcopy(layer.state_dict())
    assert own_extent(layer, (2, 8, 6, 6)) == extent
    assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in before.items()), "it has run for real"


@pytest.mark.parametrize(
    ("layer", "dim"), [(BatchNormAct2d(3), 1), (Activated(3), 1), (GroupNormAct(3, 1), 1), (LayerNormAct2d(3), -1)]
)
def test_a_scale_of_the_own_output_is_a_scale_of_weight_and_bias(layer, dim):
    layer = layer.double().eval()
    randomize(layer, torch.Generator().manual_seed(0))
    scale, shift = 0.5 + torch.rand(2, 3, dtype=torch.float64)
    with torch.no_grad():
        plain = layer(X)
        with OwnCall(layer, Affine(scale, shift, dim)):
            replaced = layer(X)
        layer.weight.mul_(scale)
        layer.bias.mul_(scale).add_(shift)
        assert torch.allclose(layer(X), replaced)
    assert not torch.allclose(plain, replaced)


class Keeps(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = super().forward(x)
        return self.kept.relu()


def test_what_a_forward_keeps_is_not_left_behind():
    layer = Keeps(4)
    assert own_extent(layer, (2, 4, 3, 3)) == "inside" and not hasattr(layer, "kept")


def network(seed: int, norm: type[nn.Module] = Activated) -> nn.Module:
    torch.manual_seed(seed)
    body = [nn.Conv2d(3, 8, 3), norm(8), nn.Conv2d(8, 6, 3, stride=2), norm(6), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(6, 4)).double()
    randomize(model, torch.Generator().manual_seed(seed))
    return model.eval()


def synchronized(width: int) -> nn.Module:
    return convert_sync_batchnorm(BatchNormAct2d(width))


def own_outputs(model: nn.Module) -> dict[str, Tensor]:
    """What the norms of a network compute before their activation, by hand; units first."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, name=name: seen.update(
                {name: functional.batch_norm(args[0], m.running_mean, m.running_var, m.weight, m.bias, eps=m.eps)}
            )
        )
        for name in ("1", "3")
    ]
    with torch.no_grad():
        model(X)
    for hook in hooks:
        hook.remove()
    return {name: value.movedim(1, 0).flatten(1) for name, value in seen.items()}


@pytest.mark.parametrize("norm", [Activated, BatchNormAct2d, synchronized])
def test_repair_gives_the_own_outputs_the_statistics_of_the_sources(norm):
    a, b = network(0, norm), network(1, norm)
    step = Repair(sequential=True)
    merged = surgery.merge(a, b, data=[X], matching="identity", renormalize=step, progress=False)
    plain = surgery.merge(a, b, data=[X], matching="identity", renormalize=None, progress=False)
    found, naive, *sources = map(own_outputs, (merged, plain, a, b))
    for name, value in found.items():
        mean = sum(source[name].mean(1) for source in sources) / 2
        std = sum(source[name].std(1, correction=0) for source in sources) / 2
        assert torch.allclose(value.mean(1), mean) and torch.allclose(value.std(1, correction=0), std)
        assert not torch.allclose(naive[name].std(1, correction=0), std, rtol=0.05)


@pytest.mark.parametrize("step", ["repair", "reshift", "rescale", "closed-form-repair", ["reset", "repair"]])
@pytest.mark.parametrize("matching", ["activations", "zipit"])
def test_every_renormalization_runs_and_gives_a_network_merged_with_itself_back(step, matching):
    a = network(0)
    b = planted(a, surgery.find_groups(a, X[:2])) if matching == "activations" else copy.deepcopy(a)
    a, b = (surgery.run_passes(model, ["reset"], data=[X]) for model in (a, b))
    merged = surgery.merge(a, b, data=[X], matching=matching, renormalize=step, progress=False)
    assert type(merged) is type(a) and list(merged.state_dict()) == list(a.state_dict())
    if matching == "activations":
        with torch.no_grad():
            assert relative_error((merged(X),), (a(X),)) < 1e-3


def test_an_affine_step_behind_the_activation_breaks_the_function(monkeypatch):
    """What was done before: the fold is caught by what it declares of itself."""
    monkeypatch.setattr("vfsurgery.passes.producers.own_extent", lambda module, shape: "whole")
    with pytest.raises(SurgeryError, match="pass 'fold' declares that it preserves the function, and does not"):
        surgery.merge(network(0), network(1), data=[X], matching="identity", renormalize="repair", progress=False)


def test_a_network_is_repaired_after_one_with_the_activation_apart():
    dense = network(0)
    apart = nn.Sequential(dense[0], nn.BatchNorm2d(8), nn.SiLU(), dense[2], nn.BatchNorm2d(6), nn.SiLU(), *dense[4:])
    for place, norm in ((1, dense[1]), (4, dense[3])):
        apart[place].double().load_state_dict(norm.state_dict())
    sparse = surgery.prune(dense, sparsity=0.5, method="magnitude")
    errors = []
    for reference in (dense, apart.eval()):
        repaired = surgery.renormalize(sparse, reference=reference, data=[X], renormalize="repair", progress=False)
        with torch.no_grad():
            errors.append(relative_error((repaired(X),), (dense(X),)))
    with torch.no_grad():
        assert errors[0] < relative_error((sparse(X),), (dense(X),))
    assert errors[1] == pytest.approx(errors[0])


@pytest.mark.parametrize("norm", [ByHand, Twice, WeightAgain, FrozenBatchNormAct2d])
def test_what_cannot_be_told_apart_is_no_producer(norm):
    model = network(0, norm)
    graph_module = surgery.trace(model, X[:2])
    producers = find_producers(graph_module, surgery.find_groups(graph_module))
    assert not [p for p in producers if p.is_norm]
    if norm is not FrozenBatchNormAct2d:  # whose convolutions are corrected
        with pytest.raises(OptionError, match="repair found no layer to correct"):
            surgery.merge(model, network(1, norm), data=[X], matching="identity", renormalize="repair", progress=False)


def test_an_affine_node_behind_the_activation_cannot_be_folded():
    graph_module = surgery.trace(network(0), X[:2])
    insert_affine(graph_module, "_1", Affine(torch.ones(8), torch.ones(8), 1))
    with pytest.raises(SurgeryError, match="does not follow a layer that can absorb it"):
        groups = surgery.find_groups(network(0), X[:2])
        Pipeline((Fold(),)).run(graph_module, Context(groups, [], (1.0,), [{}], lambda: None))


def test_all_steps_of_unit_statistics_know_layers_inside():
    groups = surgery.find_groups(network(0), X[:2])
    graph_module = surgery.trace(network(0), X[:2])
    for step in (Repair(), Rescale(), Reshift()):
        assert isinstance(step, Renormalize)
        assert [site.key for site in step.reads(graph_module, groups).values()] == ["_1.inside", "_3.inside"]
