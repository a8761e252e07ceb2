"""Shares of the sources by layer: which tensors get which, and that everything behind the average goes by them."""

import pytest
import torch
from torch import nn

import vfsurgery as surgery
from vfsurgery.errors import OptionError
from vfsurgery.merging.shares import plan_shares


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4))


@pytest.fixture
def pair():
    return net(0), net(1), torch.randn(64, 3, 7, 7, generator=torch.Generator().manual_seed(2))


def merged(pair, **options):
    a, b, images = pair
    return surgery.merge(a, b, data=images, matching="identity", progress=False, **{"renormalize": None, **options})


@pytest.mark.parametrize(
    "alpha", [{"*": 0.25}, [0.25], [0.25, 0.25], {"0": 0.25, "2": [0.25, 0.25, 0.25], "5": 0.25}], ids=str
)
def test_the_same_share_everywhere_is_one_share(pair, alpha):
    one = merged(pair, alpha=0.25, renormalize="repair").state_dict()
    other = merged(pair, alpha=alpha, renormalize="repair").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_each_layer_has_its_own_share(pair):
    a, b, _ = pair
    found = merged(pair, alpha={"0": 0.0, "2": 1.0}).state_dict()
    for name, share in (("0.weight", 0.0), ("0.bias", 0.0), ("2.weight", 1.0), ("5.weight", 0.5), ("5.bias", 0.5)):
        assert torch.allclose(found[name], torch.lerp(a.state_dict()[name], b.state_dict()[name], share))
    assert not torch.allclose(
        found["2.weight"], torch.lerp(a.state_dict()["2.weight"], b.state_dict()["2.weight"], 0.5)
    )


def test_the_first_pattern_that_fits_decides(pair):
    a, b, _ = pair
    found = merged(pair, alpha={"*.bias": 1.0, "*": 0.0}).state_dict()
    assert all(torch.equal(found[name], (b if "bias" in name else a).state_dict()[name]) for name in found)


def test_a_list_goes_along_the_depth(pair):
    a, b, _ = pair
    found = merged(pair, alpha=[0.0, 1.0]).state_dict()
    for name, share in (("0.weight", 0.0), ("2.weight", 0.5), ("5.weight", 1.0)):
        assert torch.allclose(found[name], torch.lerp(a.state_dict()[name], b.state_dict()[name], share))


def test_depth_is_the_order_in_which_layers_run():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.last(self.first(x).relu())

    a, b = Backwards(), Backwards()
    found = surgery.merge(
        a, b, alpha=[0.0, 1.0], matching="identity", renormalize=None, example_inputs=torch.randn(2, 4)
    )
    assert torch.equal(found.first.weight, a.first.weight) and torch.equal(found.last.weight, b.last.weight)


def test_weights_of_three_sources_by_layer(pair):
    a, b, images = pair
    c = net(3)
    options = {"matching": "identity", "renormalize": None, "progress": False, "data": images}
    found = surgery.merge([a, b, c], weights={"0": [0.0, 0.0, 1.0], "*": [[1.0, 0, 0], [0, 1.0, 0]]}, **options)
    state = found.state_dict()
    for name, source in (("0.weight", c), ("2.weight", a), ("5.weight", b)):
        assert torch.allclose(state[name], source.state_dict()[name])


def test_statistics_are_restored_to_those_of_the_same_shares(pair):
    a, b, images = pair
    found = merged(pair, alpha={"0": 0.2, "2": 0.8}, renormalize="repair")
    for layer, share in ((1, 0.2), (3, 0.8)):
        outputs = [model[:layer](images).transpose(0, 1).flatten(1) for model in (a, b, found)]
        deviations = [values.std(1, correction=0) for values in outputs]
        goal = torch.lerp(deviations[0], deviations[1], share)
        assert torch.allclose(deviations[2], goal, rtol=1e-3)
        assert not torch.allclose(deviations[2], torch.lerp(deviations[0], deviations[1], 1 - share), rtol=1e-3)


def test_preserved_layers_are_joined_by_the_shares_of_the_layer_behind_them(pair):
    a, b, images = pair
    found = merged(pair, alpha={"2": 1.0, "*": 0.0}, preserve=2)
    expected = a[5](a[4](a[3](b[2](b[1](b[0](images))))))
    assert torch.allclose(found(images), expected, atol=1e-5)
    assert not torch.allclose(merged(pair, preserve=2)(images), expected, atol=1e-2)


def test_the_report_says_them(pair):
    report = surgery.report_of(merged(pair, alpha={"0": 0.2, "2": [0.2, 0.8]}))
    assert "shares by layer: 0 0.8, 0.2; 2 0.8, 0.2 to 0.2, 0.8" in str(report)
    assert "shares by layer" not in str(surgery.report_of(merged(pair, alpha=0.2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": {"layer9": 0.2}}, "layer9"),
        ({"alpha": {}}, "alpha has no pattern"),
        ({"alpha": {3: 0.2}}, "alpha has no pattern 3"),
        ({"alpha": []}, "empty list"),
        ({"alpha": {"0": 1.5}}, r"alpha must lie in \[0, 1\] but is 1.5"),
        ({"weights": {"0": [0.5, 0.6]}}, "sum to 1"),
        ({"weights": {"0": [1.0]}}, "1 weights were given for 2 models"),
        ({"weights": {"0": [[0.5, 0.5], [1.0]]}}, "1 weights were given for 2 models"),
        ({"weights": {"0": [0.5, 0.5]}, "alpha": [0.5, 0.6]}, "both given"),
    ],
    ids=str,
)
def test_wrong_shares_are_refused(pair, options, message):
    with pytest.raises(OptionError, match=message):
        merged(pair, **options)


def test_alpha_is_for_two():
    with pytest.raises(OptionError, match="alpha is for two models, not 3"):
        plan_shares(3, [0.1, 0.9], None)
