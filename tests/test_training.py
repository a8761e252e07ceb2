"""Training is decided by its seed, and the demonstration networks learn."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from vfsurgery.data import digits
from vfsurgery.errors import DataError
from vfsurgery.networks.demo import TinyConvNet, TinyResNet
from vfsurgery.training import from_seed, train


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def trained(seed: int, *, net=TinyResNet, width: int = 4, epochs: int = 1, **options) -> nn.Module:
    model = from_seed(lambda: net(width=width), seed)
    return train(model, digits().train, epochs=epochs, lr=0.05, seed=seed, progress=False, **options)


def test_initialization_depends_on_the_seed_alone():
    first = from_seed(TinyConvNet, 1)
    torch.manual_seed(99)
    again, other = from_seed(TinyConvNet, 1), from_seed(TinyConvNet, 2)
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


def test_random_state_is_left_alone():
    before = torch.get_rng_state()
    trained(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_same_seed_same_weights():
    assert torch.equal(weights(trained(0)), weights(trained(0)))


def test_order_of_images_depends_on_the_seed():
    model_a, model_b = (from_seed(lambda: TinyConvNet(width=4), 0) for _ in range(2))
    for seed, model in enumerate((model_a, model_b)):
        train(model, digits().train, epochs=1, lr=0.01, seed=seed, progress=False)
    assert not torch.equal(weights(model_a), weights(model_b))


@pytest.mark.parametrize("net", [TinyConvNet, TinyResNet])
def test_networks_learn(net):
    images, labels = digits().test.tensors
    model = trained(0, net=net, width=16, epochs=6)
    assert not model.training
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).float().mean()
    assert accuracy > 0.7


OPTIONS = [{"lr": 0.2}, {"momentum": 0.5}, {"weight_decay": 0.5}, {"batch_size": 32}, {"optimizer": "adamw"}]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_counts(option):
    options = {"lr": 0.05, **option}
    model = from_seed(lambda: TinyConvNet(width=4), 0)
    train(model, digits().train, epochs=1, seed=0, progress=False, **options)
    assert not torch.equal(weights(model), weights(trained(0, net=TinyConvNet)))


def test_steps_of_adamw_do_not_depend_on_the_size_of_gradients():
    images = TensorDataset(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64))
    moved = []
    for scale in (1.0, 0.01):
        model = nn.Sequential(nn.Linear(1, 2, bias=False))
        nn.init.zeros_(model[0].weight)
        model[0].register_full_backward_pre_hook(lambda _, grads, scale=scale: (scale * grads[0],))
        train(model, images, epochs=1, lr=0.1, seed=0, optimizer="adamw", milestones=(), progress=False)
        moved.append(model[0].weight.abs())
    assert torch.allclose(moved[0], torch.full((2, 1), 0.1), rtol=1e-3)  # the first step is as long as lr
    assert torch.allclose(moved[0], moved[1], rtol=1e-3)


@pytest.mark.parametrize("shown", [True, False])
def test_progress_can_be_switched_off(shown, monkeypatch):
    seen = []

    def record(batches, label, total, enabled):
        seen.append((label, total, enabled))
        return batches

    monkeypatch.setattr("vfsurgery.training.loop.progress_bar", record)
    dataset = TensorDataset(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))
    train(TinyConvNet(width=2), dataset, epochs=2, lr=0.1, seed=0, label="seed 0", progress=shown)
    assert seen == [("seed 0", 2, shown)]


def test_nothing_to_train_on():
    with pytest.raises(DataError, match="the training data is empty"):
        train(TinyConvNet(), TensorDataset(torch.zeros(0, 1, 8, 8)), epochs=1, lr=0.1, seed=0)


@pytest.mark.parametrize("labels", [torch.tensor([0, 3]), torch.tensor([-1, 0]), torch.tensor([0.0, 1.0])])
def test_labels_that_are_no_class_of_the_model(labels):
    model = TinyConvNet(width=2, num_classes=3)
    with pytest.raises(DataError, match=r"(?s)labels .*expected +integers of shape \(2,\), 0 to 2"):
        train(model, TensorDataset(torch.zeros(2, 1, 8, 8), labels), epochs=1, lr=0.1, seed=0, progress=False)


@pytest.mark.parametrize("net", [TinyConvNet, TinyResNet])
@pytest.mark.parametrize("size", [8, 12])
def test_demonstration_networks_take_any_size_and_class_count(net, size):
    assert net(num_classes=3)(torch.zeros(2, 1, size, size)).shape == (2, 3)


def test_plain_network_has_biases_and_no_norm_layer():
    modules = [type(module) for module in TinyConvNet().modules()]
    assert modules.count(nn.Conv2d) == 6 and nn.BatchNorm2d not in modules
    assert all(conv.bias is not None for conv in TinyConvNet().convs)
