"""The smallest networks that show what a test is about, and planted permutations of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vfsurgery as surgery
from vfsurgery.discovery.verification import keep_signals_alive, randomize
from vfsurgery.groups import GroupSet, Permutation, permute_tensor, random_permutations
from vfsurgery.tracing.sources import canonical_state

SIDE, CLASSES = 12, 5


def images(count: int = 96, seed: int = 1, dtype: torch.dtype = torch.float32, channels: int = 3) -> Tensor:
    """Random images with a brightness of their own, so that units are correlated with each other."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, channels, SIDE, SIDE, generator=generator)
    return (noise + torch.randn(count, channels, 1, 1, generator=generator)).to(dtype)


class Chain(nn.Sequential):
    """Three convolutions, a flattened map, two linear layers; no normalization; activations in place."""

    def __init__(self, width: int = 8, classes: int = CLASSES, stride: int = 2, bias: bool = True) -> None:
        super().__init__(
            *(nn.Conv2d(3, width, 3, padding=1, bias=bias), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width, 10, 3, stride, padding=1, bias=bias), nn.ReLU(inplace=True)),
            *(nn.Conv2d(10, 6, 3, padding=1, bias=bias), nn.ReLU(inplace=True), nn.AdaptiveMaxPool2d(3), nn.Flatten()),
            *(nn.Linear(54, 12), nn.ReLU(inplace=True), nn.Linear(12, classes)),
        )


class Block(nn.Module):
    """Two convolutions with BatchNorm around a shortcut, which projects where the stride is 2."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down = nn.Sequential()
        if stride > 1:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(inner + self.down(x))


class Residual(nn.Module):
    """A stem, a block, a block with a projection, a classifier."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.block1, self.block2 = Block(6, 6, 1), Block(6, 10, 2)
        self.fc = nn.Linear(10, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(torch.relu(self.norm(self.stem(x)))))
        return self.fc(x.mean((2, 3)))


class Grouped(nn.Module):
    """A grouped and a depthwise convolution between plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.point = nn.Conv2d(12, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.last = nn.Conv2d(8, 9, 1)
        self.fc = nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(torch.relu(self.grouped(torch.relu(self.conv(x)))))
        x = torch.relu(self.last(torch.relu(self.depthwise(torch.relu(x)))))
        return self.fc(x.mean((2, 3)))


class Dense(nn.Module):
    """Each layer reads all maps before it, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1 = nn.Conv2d(6, 5, 3, padding=1)
        self.conv2 = nn.Conv2d(11, 7, 3, padding=1)
        self.norm = nn.BatchNorm2d(18)
        self.fc = nn.Linear(18, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv0(x))
        x = torch.cat([x, torch.relu(self.conv1(x))], 1)
        x = torch.cat([x, torch.relu(self.conv2(x))], 1)
        return self.fc(torch.relu(self.norm(x)).mean((2, 3)))


class LayerNormed(nn.Module):
    """Linear layers with LayerNorm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3 * SIDE * SIDE, 10), nn.LayerNorm(10)
        self.last = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x.flatten(1)))))


NETS = {"chain": Chain, "residual": Residual, "grouped": Grouped, "dense": Dense}


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode, all of its weights and buffers random, its running statistics near its activations'."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(parameter[0].numel(), 1)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2 / fan_in) ** 0.5)
        randomize(model, generator)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
                layer.bias.abs_()  # no unit is dead: one that is constant corresponds to any other such unit
    model.eval()
    keep_signals_alive(model, (images(32, seed),), generator)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum, norm.num_batches_tracked = 0.1, torch.tensor(100 + seed)
    return model


def net(name: str, seed: int = 0, **options: int | bool) -> nn.Module:
    """A lively network of :data:`NETS`."""
    return lively(NETS[name](**options), seed)


def groups_of(model: nn.Module) -> GroupSet:
    return surgery.find_groups(model, images(2))


def permuted(model: nn.Module, groups: GroupSet, orders: Mapping[str, Permutation]) -> nn.Module:
    """A copy of the model with the units of all groups reordered."""
    state = {name: permute_tensor(name, tensor, groups, orders) for name, tensor in canonical_state(model).items()}
    result = copy.deepcopy(model)
    result.load_state_dict(state)
    return result


def planted(model: nn.Module, groups: GroupSet, seed: int = 5) -> nn.Module:
    """A copy of the model in a random order of units."""
    return permuted(model, groups, random_permutations(groups, torch.Generator().manual_seed(seed)))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether two states are equal bit by bit."""
    return list(found) == list(expected) and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


class Outputs(TorchDispatchMode):
    """Notes how many numbers each tensor holds that an op makes while the mode is on; views make nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        made = (tensor for tensor in _tensors(result) if tensor.untyped_storage().data_ptr() not in given)
        self.sizes += [tensor.numel() for tensor in made]
        return result


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
