"""BatchNorm layers: several calls share one set of statistics; subclasses need no training mode for theirs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from timm.layers import BatchNormAct2d
from timm.layers.norm_act import convert_sync_batchnorm
from tiny_nets import images, net, planted
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.optim.swa_utils import update_bn

import vfsurgery as surgery
from vfsurgery.discovery.verification import randomize, relative_error
from vfsurgery.errors import DataError
from vfsurgery.passes import Reset
from vfsurgery.stats import batch_norms
from vfsurgery.stats.batch_norms import OnBatches, batch_norm_nodes, calls_of, set_running
from vfsurgery.stats.moments import Moments

X = images(160, dtype=torch.float64)


class Pyramid(nn.Module):
    """A head of convolution and norm that serves three levels of unlike size and brightness."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.head, self.norm = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.out = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        levels = [x, functional.avg_pool2d(x, 2) + 1, functional.max_pool2d(x, 4) - 0.5]
        heads = [functional.relu(self.norm(self.head(level))) for level in levels]
        return self.out(torch.cat([head.mean((2, 3)) for head in heads], 1))


class Recurrent(nn.Module):
    """One residual step with two norms, four times, each on what the one before has made."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.step, self.norm, self.end = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(4):
            x = x + self.end(functional.relu(self.norm(self.step(x))))
        return self.out(functional.relu(x).mean((2, 3)))


class Siamese(nn.Module):
    """Both halves of an image through one encoder, whose norm is of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(216, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 8))
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.encoder(x[..., :6]), self.encoder(2 * x[..., 6:])
        return self.out((left - right).abs())


class Volumes(nn.Module):
    """A norm of volumes, called on an image and on its mirror image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(3, 6, (1, 3, 3)), nn.BatchNorm3d(6)
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.unflatten(3, (2, 6)).movedim(3, 2))
        return self.out((functional.relu(self.norm(x)) + functional.relu(self.norm(1 - x))).mean((2, 3, 4)))


NETS = (Pyramid, Recurrent, Siamese, Volumes)


def randomized(model: nn.Module, seed: int) -> nn.Module:
    """The model in eval mode, scales, shifts and statistics of its norms random."""
    randomize(model, torch.Generator().manual_seed(seed))
    return model.eval()


def trained(make: Callable[[], nn.Module], momentum: float | None = None, seed: int = 0) -> nn.Module:
    """A network with random weights and the statistics that torch leaves after many batches of all images."""
    torch.manual_seed(seed)
    model = randomized(make().double(), seed)
    for norm in norms_of(model):
        norm.momentum = momentum
    with torch.no_grad():
        if momentum is None:
            update_bn([X], model)
        else:
            model.train()
            for _ in range(300 if momentum < 1 else 1):
                model(X)
    return model.eval()


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if batch_norms.is_batch_norm(module)]


def error(found: nn.Module, expected: nn.Module, x: Tensor = X[:32]) -> float:
    with torch.no_grad():
        return relative_error((found(x),), (expected(x),))


@pytest.mark.parametrize("momentum", [None, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("make", NETS)
def test_reset_gives_the_statistics_of_all_calls_that_training_leaves(make, momentum):
    model = trained(make, momentum)
    spoiled = copy.deepcopy(model)
    for norm in norms_of(spoiled):
        norm.running_mean.add_(1)
        norm.running_var.mul_(3)
    mended = surgery.run_passes(spoiled, [Reset()], data=[X])
    assert error(mended, model) < 1e-9 < 1e-2 < error(spoiled, model)


@pytest.mark.parametrize("how", ["reset", "regress", "auto"])
@pytest.mark.parametrize("make", NETS)
def test_a_network_merged_with_its_permuted_copy_stays_what_it_is(make, how):
    a = trained(make)
    merged = surgery.merge(
        a,
        planted(a, surgery.find_groups(a, X[:2])),
        data=[X],
        matching="weights",
        renormalize=how,
        progress=False,
    )
    sampling = 0.05 if how == "auto" else 0.01  # which holds images out
    assert error(merged, a) < sampling
    with torch.no_grad():
        assert relative_error((copy.deepcopy(merged).train()(X),), (copy.deepcopy(a).train()(X),)) < sampling


@pytest.mark.parametrize("how", ["reset", "regress"])
def test_the_last_call_alone_is_not_enough(how, monkeypatch):
    last_alone = lambda norm, calls: set_running(norm, calls[-1:])  # noqa: E731
    for module in ("recalibrate", "regress"):
        monkeypatch.setattr(f"vfsurgery.passes.{module}.set_running", last_alone)
    a = trained(Pyramid)
    b = planted(a, surgery.find_groups(a, X[:2]))
    merged = surgery.merge(a, b, data=[X], matching="weights", renormalize=how, progress=False)
    assert not torch.allclose(merged.norm.running_mean, a.norm.running_mean, atol=0.05)
    assert how == "regress" or error(merged, a) > 0.05  # its last layer makes up for some of it


class Preceded(Pyramid):
    """The head behind a norm of its own, and two layers more behind the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(self.stem, nn.BatchNorm2d(6))
        self.out = nn.Sequential(nn.Linear(24, 6), nn.ReLU(), nn.Linear(6, 4))


def settled(model: nn.Module) -> nn.Module:
    """The model with the statistics of what its eval mode gives its norms, which stand in the order of their calls."""
    with torch.no_grad():
        for norm in (model.stem[1], model.norm):
            norm.momentum = None
            norm.reset_running_stats()
            norm.train()
            model(X)
            norm.eval()
    return model


@pytest.mark.parametrize("stale_alone", [True, False])
def test_regress_looks_ahead_from_the_statistics_that_it_has_set(stale_alone, monkeypatch):
    """Norms before the repeated one have theirs by then; those of the few images of a batch are others."""
    if not stale_alone:
        monkeypatch.setattr(
            "vfsurgery.passes.regress.OnBatches", lambda graph, norms: OnBatches(graph, batch_norm_nodes(graph))
        )
    a = settled(trained(Preceded))
    b = planted(a, surgery.find_groups(a, X[:2]))
    data = [part.contiguous() for part in X.split(8)]
    merged = surgery.merge(a, b, data=data, matching="weights", renormalize="regress", progress=False)
    assert (error(merged, a) < 1e-9) == stale_alone
    assert torch.allclose(merged.norm.running_var.sort()[0], a.norm.running_var.sort()[0], rtol=1e-6) == stale_alone


def test_calls_weigh_the_same_however_much_they_see():
    """Pooled, the calls of the large level would count sixteen times and the distance of the means would be spread."""
    model = trained(Pyramid)
    graph_module = surgery.trace(model, X[:2])
    norms = batch_norm_nodes(graph_module)
    work = OnBatches(graph_module, norms)
    with torch.no_grad():
        work.run(X)
    ((norm, calls),) = calls_of(norms).items()
    assert len(calls) == 3 and [work.moments[call].count for call in calls] == [160 * 144, 160 * 36, 160 * 9]
    pooled: Moments = work.moments[calls[0]].merge(work.moments[calls[1]]).merge(work.moments[calls[2]])
    assert torch.allclose(torch.stack([work.moments[call].mean for call in calls]).mean(0), norm.running_mean)
    assert not torch.allclose(pooled.mean, norm.running_mean, rtol=0.1)
    assert not torch.allclose(pooled.var, norm.running_var, rtol=0.1)


def test_a_norm_under_two_names_is_one_layer():
    class Aliased(Pyramid):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.norm

        def forward(self, x: Tensor) -> Tensor:
            x = self.head(functional.relu(self.stem(x)))
            both = functional.relu(self.norm(x)), functional.relu(self.again(2 * x + 1))
            return self.out(torch.cat([*both, both[0]], 1).mean((2, 3)))

    model = trained(Aliased)
    spoiled = copy.deepcopy(model)
    spoiled.norm.running_var.mul_(3)
    mended = surgery.run_passes(spoiled, [Reset()], data=[X])
    assert error(mended, model) < 1e-9 < 1e-2 < error(spoiled, model)


class ByHand(nn.BatchNorm2d):
    """A norm that calls no function of torch's."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * x[:, 0].numel() / (x[:, 0].numel() - 1), self.momentum)
        scale = self.weight / (var + self.eps).sqrt()
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


class Counting(nn.BatchNorm2d):
    """A norm that must not run in training mode, as ``nn.SyncBatchNorm`` on a CPU in a group of processes."""

    runs: ClassVar[int] = 0

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        Counting.runs += 1
        return super().forward(x).clamp_min(0)


def like_resnet(norm: Callable[[int], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3), norm(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    return randomized(model.double(), seed)


@pytest.mark.parametrize("how", ["reset", "regress", "repair", ["reset", "repair"], "auto"])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
def test_synchronized_norms_give_what_plain_ones_give_on_one_process(how, options):
    if how in ("reset", ["reset", "repair"]) and options.get("track_running_stats") is False:
        how = "regress"  # there is nothing to reset
    if how in ("repair", ["reset", "repair"]) and options.get("affine") is False:
        how = "reset"  # there is nothing to scale
    plain = [like_resnet(lambda width: nn.BatchNorm2d(width, **options), seed) for seed in (0, 1)]
    synced = [nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)) for model in plain]
    found = [surgery.merge(*pair, data=X, renormalize=how, seed=1, progress=False) for pair in (plain, synced)]
    assert isinstance(found[1][1], nn.SyncBatchNorm)
    assert error(found[1], found[0]) < 1e-9
    for model in found:
        model.train()
    assert error(found[1], found[0]) < 1e-9


def test_all_else_runs_on_synchronized_norms_too():
    plain = like_resnet(nn.BatchNorm2d)
    dense = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    groups = surgery.find_groups(dense, X[:2])
    assert groups.listing() == surgery.find_groups(plain, X[:2]).listing()
    assert surgery.verify(dense, groups, X[:2])
    sparse = surgery.prune(dense, sparsity=0.5, method="magnitude")
    repaired = surgery.renormalize(sparse, reference=dense, data=[X], progress=False)
    assert error(repaired, dense) < error(sparse, dense)
    assert len(surgery.diagnose(sparse, dense, [X], progress=False).layers) == 5
    smaller = surgery.prune_units(dense, 0.3, data=[X], progress=False)
    assert smaller.train()(X).shape == (160, 3)


@pytest.mark.parametrize(
    "norm",
    [ByHand, BatchNormAct2d, lambda width: convert_sync_batchnorm(BatchNormAct2d(width, act_layer=nn.SiLU)), Counting],
    ids=["by hand", "with activation", "synchronized with activation", "not in training"],
)
def test_subclasses_are_reset_to_the_statistics_of_what_they_are_given(norm):
    model = like_resnet(norm)
    reset = surgery.run_passes(model, [Reset()], data=[X])
    seen: dict[str, Tensor] = {}
    for name in ("1", "4"):
        reset.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0].clone()})
        )
    with torch.no_grad():
        reset(X)
    for name, value in seen.items():
        var, mean = torch.var_mean(value, (0, 2, 3))
        assert torch.allclose(reset.get_submodule(name).running_mean, mean, rtol=1e-3, atol=1e-3)
        assert torch.allclose(reset.get_submodule(name).running_var, var, rtol=1e-3)
        assert not torch.allclose(model.get_submodule(name).running_var, var, rtol=0.1)


def test_a_failure_on_the_way_leaves_buffers_modes_and_counters():
    model = net("residual").double()
    graph_module = surgery.trace(model, X[:2])
    norms = batch_norm_nodes(graph_module)
    before = {
        name: (norm.running_mean, norm.running_var.clone(), norm.num_batches_tracked) for name, norm in norms.items()
    }
    work = OnBatches(graph_module, norms)
    with pytest.raises(RuntimeError), torch.no_grad():
        work.run(X[:, :2])
    with torch.no_grad():
        work.run(X)
    for name, norm in norms.items():
        mean, var, counter = before[name]
        assert norm.running_mean is mean and torch.equal(norm.running_var, var)
        assert norm.num_batches_tracked is counter and not norm.training


def test_a_batch_of_one_value_per_channel_is_refused_with_the_layer():
    model = trained(Siamese)
    with pytest.raises(DataError, match=r"(?s)a batch is too small for BatchNorm.*layer +encoder.2.*input +\(1, 10\)"):
        surgery.run_passes(model, [Reset()], data=[X[:8], X[:1]])


def test_variances_of_a_shared_head_shrink_without_data_too():
    a, b = trained(Pyramid), trained(Pyramid, seed=1)
    options = {"matching": "identity", "example_inputs": X[:2], "progress": False}
    merged = surgery.merge(a, b, renormalize="closed-form-reset", **options)
    rows = [model.head.weight.detach().flatten(1) for model in (a, b)]
    ratio = ((rows[0] + rows[1]) / 2).square().sum(1) / ((rows[0].square() + rows[1].square()) / 2).sum(1)
    assert torch.allclose(merged.norm.running_var, (a.norm.running_var + b.norm.running_var) / 2 * ratio)
    assert bool((ratio < 0.9).any())


class Positive(nn.Module):
    """A scale that is never negative."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()

    def right_inverse(self, x: Tensor) -> Tensor:
        return x.abs().clamp_min(1e-3).log()


def computed_scales(seed: int) -> nn.Module:
    """A residual net whose norm layers compute their weights; a trace shows the call of ``batch_norm`` inside them."""
    model = net("residual", seed).double()
    for layer in [*model.modules()]:
        if isinstance(layer, nn.BatchNorm2d):
            parametrize.register_parametrization(layer, "weight", Positive())
    return model.eval()


@pytest.mark.parametrize("renormalize", ["reset", "regress"])
def test_norms_with_computed_weights_get_the_statistics_of_the_data(renormalize: str) -> None:
    sources = [computed_scales(0), computed_scales(1)]
    off: dict[str, list[float]] = {}
    for chosen in (renormalize, None):
        merged = surgery.merge(sources, data=[X], matching="weights", renormalize=chosen, progress=False)
        expected = copy.deepcopy(merged)
        update_bn([X], expected)
        states = merged.state_dict(), expected.state_dict()
        names = [name for name in states[0] if "running" in name]
        assert len(names) == 12
        off[str(chosen)] = [relative_error(*(state[name] for state in states)) for name in names]
    assert max(off[renormalize]) < (1e-9 if renormalize == "reset" else 1e-3)  # which cuts the images in two
    assert min(off["None"]) > 0.01


def test_a_layer_with_computed_weights_keeps_the_momentum_and_the_calls_it_has() -> None:
    model = Pyramid().double().eval()
    plain = copy.deepcopy(model)
    for layer in (model.norm, plain.norm):
        layer.momentum = 0.3
    parametrize.register_parametrization(model.norm, "weight", Positive())
    found = []
    for each in (model, plain):
        graph_module = surgery.trace(each, X[:2])
        ((norm, calls),) = calls_of(norms := batch_norm_nodes(graph_module)).items()
        work = OnBatches(graph_module, norms)
        with torch.no_grad():
            work.run(X)
            set_running(norm, [work.moments[call] for call in calls])
        assert len(calls) == 3
        found.append((norm.momentum, norm.running_mean, norm.running_var))
    assert found[0][0] == found[1][0] == 0.3
    assert all(torch.allclose(x, y, rtol=1e-9) for x, y in zip(found[0][1:], found[1][1:], strict=True))


def test_large_convolutions_are_computed_image_by_image_to_the_same_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net("residual").double()
    found, sizes = [], []
    whole = batch_norms._image_by_image
    monkeypatch.setattr(batch_norms, "_image_by_image", lambda layer, x: sizes.append(len(x)) or whole(layer, x))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for large in (1, batch_norms.LARGE):
        monkeypatch.setattr(batch_norms, "LARGE", large)
        graph_module = surgery.trace(model, X[:2])
        work = OnBatches(graph_module, batch_norm_nodes(graph_module))
        with torch.no_grad():
            work.run(X)
        found.append(work.moments)
    assert sizes == [len(X)] * 6  # none of these is large
    for name, moments in found[0].items():
        assert torch.allclose(moments.mean, found[1][name].mean, rtol=1e-12)
        assert torch.allclose(moments.squares, found[1][name].squares, rtol=1e-12)
