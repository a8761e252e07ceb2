"""Networks that compute another graph in training: groups, merges and smaller networks hold in both modes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery.verification import without_chance
from vfsurgery.errors import CertificateError, IncompatibleModelsError
from vfsurgery.groups import GroupSet, PermutationGroup, permute_tensor, random_permutations
from vfsurgery.merging import prepared as merging
from vfsurgery.tracing.sources import canonical_state

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OPTIONS = {"matching": "weights", "renormalize": None, "progress": False}


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.two, self.head = nn.Conv2d(8, 10, 3, padding=1), nn.Linear(10, 4)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.norm(self.one(x)).relu()
        return first, self.two(first).relu()


class Auxiliary(Body):
    """A head with units of its own that reads hidden units, with norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        first, second = self.features(x)
        y = self.head(second.mean((2, 3)))
        return (y, self.aux(first.mean((2, 3)))) if self.training else y


class Supervised(Body):
    """Deep supervision of two layers, returned by name, with noise and functional dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(8, 4), nn.Linear(10, 4)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        layers = self.features(x)
        found = {"out": self.head(layers[1].mean((2, 3)))}
        if self.training:
            for number, (layer, head) in enumerate(zip(layers, self.heads, strict=True)):
                noisy = layer + 0.1 * torch.randn_like(layer)
                found[f"layer{number}"] = head(F.dropout(noisy.mean((2, 3)), 0.3, self.training))
        return found


class Skips(nn.Module):
    """Training adds two streams up that eval mode keeps apart, so their units have one order."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 7, 1), nn.Conv2d(3, 7, 1)
        self.heads = nn.ModuleList([nn.Linear(7, 4), nn.Linear(7, 4)])

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x).relu().mean((2, 3)), self.right(x).tanh().mean((2, 3))
        if self.training:
            return self.heads[0](left + right) + self.heads[1](right)
        return self.heads[0](left) - self.heads[1](right)


NETS = [Auxiliary, Supervised, Skips]


def lively(net: type[nn.Module], seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    model = net().double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim <= 1:
                drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(0.5 + drawn if "var" in name or "norm.weight" in name else drawn - 0.5)
    return model.eval()


def flat(out: object) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [tensor for part in (out.values() if isinstance(out, dict) else out) for tensor in flat(part)]  # type: ignore[attr-defined]


def outputs(model: nn.Module, training: bool, x: Tensor = X) -> list[Tensor]:
    with torch.no_grad(), without_chance():
        return flat(copy.deepcopy(model).train(training)(x))


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for training in (False, True):
        for mine, theirs in zip(outputs(a, training), outputs(b, training), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9)


def planted(model: nn.Module, groups: GroupSet, seed: int = 2) -> nn.Module:
    """A copy whose units stand in another order."""
    orders = random_permutations(groups, torch.Generator().manual_seed(seed))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in canonical_state(other).items():
            tensor.copy_(permute_tensor(name, tensor.clone(), groups, orders))
    return other


@pytest.mark.parametrize("net", NETS)
def test_groups_are_proven_in_both_modes(net: type[nn.Module]) -> None:
    model = lively(net)
    groups = surgery.find_groups(model, X, strict=True)
    assert groups.in_training
    proof = surgery.verify(model, groups, X)
    assert proof and proof.training and proof.passes <= 10 and "in training too" in str(proof)
    assert_same(planted(model, groups), model)


class EvalAlone(nn.Module):
    """What a network computes in eval mode, whatever mode it is in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)

    def forward(self, x: Tensor) -> object:
        return self.model(x)


@pytest.mark.parametrize("net", NETS)
def test_groups_of_eval_mode_alone_are_refuted_in_training(net: type[nn.Module]) -> None:
    model = lively(net)
    found = surgery.find_groups(EvalAlone(copy.deepcopy(model)), X).groups
    groups = GroupSet(tuple(map(_outside, found)))
    proof = surgery.verify(model, groups, X)
    assert not proof and not proof.undecided and "in training" in proof.worst_group
    with pytest.raises(AssertionError):
        assert_same(planted(model, groups), model)


def _outside(group: PermutationGroup) -> PermutationGroup:
    """A group of :class:`EvalAlone` as one of what is in it."""
    members = (replace(member, parameter=member.parameter.removeprefix("model.")) for member in group.members)
    return replace(group, members=tuple(members))


@pytest.mark.parametrize("net", NETS)
def test_a_reordered_copy_is_found_again_in_both_modes(net: type[nn.Module]) -> None:
    a = lively(net)
    b = planted(a, surgery.find_groups(a, X))
    before = copy.deepcopy(b.state_dict())
    merged = surgery.merge(a, b, example_inputs=X, **OPTIONS)
    assert_same(merged, a)
    (certificate,) = surgery.report_of(merged).certificates
    assert certificate and certificate.training and "in training too" in str(certificate)
    assert all(torch.equal(tensor, before[name]) for name, tensor in b.state_dict().items())
    unmatched = surgery.merge(a, b, example_inputs=X, **{**OPTIONS, "matching": "identity"})
    with pytest.raises(AssertionError):
        assert_same(unmatched, a)


def test_units_that_only_training_shows_are_matched_by_weights() -> None:
    a = lively(Auxiliary)
    b = planted(a, surgery.find_groups(a, X))
    images = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    merged = surgery.merge(a, b, data=images, matching="activations", renormalize=None, progress=False)
    assert_same(merged, a)


def test_a_wrong_order_in_training_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = lively(Auxiliary, 1), lively(Auxiliary, 2)
    discover = merging.discover

    def without_the_head(*args: object, **options: object) -> GroupSet:
        found = discover(*args, **options)  # type: ignore[arg-type]
        kept = lambda group: tuple(m for m in group.members if not m.parameter.startswith("aux.0"))  # noqa: E731
        return replace(found, groups=tuple(replace(group, members=kept(group)) for group in found if kept(group)))

    monkeypatch.setattr(merging, "discover", without_the_head)
    with pytest.raises(CertificateError, match="does not compute in training what source 1 computes"):
        surgery.merge(a, b, example_inputs=X, **OPTIONS)


@pytest.mark.parametrize("removed", ["drop", "fold"])
@pytest.mark.parametrize("net", NETS)
def test_a_smaller_network_trains(net: type[nn.Module], removed: str) -> None:
    model = lively(net)
    options = {"data": X.repeat(4, 1, 1, 1)} if removed == "fold" else {"example_inputs": X}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    smaller = surgery.prune_units(model, 0.3, renormalize=None, removed=removed, progress=False, **options)
    report = surgery.report_of(smaller)
    assert report.units[1] < report.units[0]
    assert report.certificate and report.certificate.training and "holds, in training too" in str(report)
    state = smaller.state_dict()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert int(state.get("norm.num_batches_tracked", torch.tensor(0))) == 0
    assert all(parameter.grad is None for parameter in (*smaller.parameters(), *model.parameters()))
    torch.stack([out.sum() for out in flat(smaller.train()(X))]).sum().backward()
    assert all(parameter.grad is not None for parameter in smaller.parameters())


def test_a_single_image_serves_both_modes() -> None:
    model, x = lively(Auxiliary), X[:1]
    groups = surgery.find_groups(model, x)
    assert groups.in_training and surgery.verify(model, groups, x)
    surgery.merge(model, lively(Auxiliary, 2), example_inputs=x, **OPTIONS)
    surgery.prune_units(model, 0.3, example_inputs=x, progress=False).train()(X)


class NeedsTargets(Auxiliary):
    """Computes its loss itself in training, of targets that no example has."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if not self.training:
            return super().forward(x)  # type: ignore[return-value]
        assert targets is not None, "give me targets"
        return sum(F.cross_entropy(y, targets) for y in super().forward(x))  # type: ignore[misc]


def test_what_cannot_be_followed_is_pinned_and_named() -> None:
    a, b = lively(NeedsTargets, 1), lively(NeedsTargets, 2)
    groups = surgery.find_groups(a, X)
    pinned = {pin.parameter for pin in groups.pinned if "training is not followed" in pin.reason}
    assert pinned == {name for name, tensor in a.state_dict().items() if name.startswith("aux.") and tensor.ndim}
    assert groups.in_training is False and surgery.verify(a, groups, X)
    reports = [
        groups,
        surgery.report_of(surgery.merge(a, b, example_inputs=X, **OPTIONS)),
        surgery.report_of(surgery.prune_units(a, 0.3, example_inputs=X, progress=False)),
    ]
    for report in reports:
        assert "training is not followed (cannot trace NeedsTargets: give me targets)" in str(report)
        assert "not followed: aux.0.weight" in str(report)
    guards = surgery.trace(a, X).meta["guards"]
    assert guards == ("training is not followed: cannot trace NeedsTargets: give me targets",)


class Decides(Auxiliary):
    """Looks at values in training, which no recording follows; but it runs."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        if self.training and float(x.sum()) > 1e9:
            return x
        return super().forward(x)


def test_a_smaller_network_trains_also_where_training_is_not_followed() -> None:
    smaller = surgery.prune_units(lively(Decides), 0.3, example_inputs=X, renormalize=None, progress=False)
    report = surgery.report_of(smaller)
    assert any("in training" in group.reason for group in report.left_whole) and report.groups
    smaller.train()(X)


def test_a_graph_module_says_what_it_does_not_do_in_training() -> None:
    a, b = lively(Auxiliary, 1), lively(Auxiliary, 2)
    (said,) = surgery.trace(a, X).meta["guards"]
    assert said.startswith("training computes something else than this graph of eval mode (training alone: ")
    assert "aux.0, aux.1" in said
    kept = surgery.merge(a, b, preserve=2, example_inputs=X, **OPTIONS)
    assert said in "".join(surgery.report_of(kept).notes)
    assert said not in "".join(surgery.report_of(surgery.merge(a, b, example_inputs=X, **OPTIONS)).notes)


class Doubled(Auxiliary):
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        out = super().forward(x)
        return (out[0], 2 * out[1]) if isinstance(out, tuple) else out


def test_sources_that_differ_in_training_alone_are_refused() -> None:
    with pytest.raises(IncompatibleModelsError, match="compute different things in training"):
        surgery.merge(lively(Auxiliary), lively(Doubled), example_inputs=X, **OPTIONS)


def test_torchvisions_auxiliary_heads_lie_in_groups() -> None:
    with torch.device("meta"):
        model = torchvision.models.googlenet(weights=None, num_classes=10, aux_logits=True, init_weights=False)
    groups = surgery.find_groups(model, torch.empty(2, 3, 224, 224, device="meta"))
    members = {member.parameter for group in groups for member in group.members}
    assert {"aux1.conv.conv.weight", "aux2.fc1.bias", "aux2.fc2.weight"} <= members
    assert groups.in_training and groups.coverage > 0.999
