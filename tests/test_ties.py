"""Units that activations do not tell apart are paired by their weights: a permuted copy is found whatever the data."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from test_nested import build
from tiny_nets import images, net, permuted, planted, same_state
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery.verification import randomize
from vfsurgery.matching import activations


def dead_units() -> tuple[nn.Module, Tensor]:
    """Some units of each layer never rise above the activation."""
    model = net("chain").double()
    with torch.no_grad():
        for place, units in ((0, [1, 4, 6]), (2, [2, 5]), (4, [0, 3]), (8, [1, 7, 9])):
            model[place].bias[units] = -1e3
    return model, images(48).double()


def flat(*sizes: int) -> nn.Module:
    layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.Tanh())]
    return randomized(nn.Sequential(*layers[:-1]))


def randomized(model: nn.Module) -> nn.Module:
    randomize(model.double().eval(), torch.Generator().manual_seed(0))
    return model


class Decoder(nn.Module):
    """Learned queries look at what a linear layer makes of the input; before they do, nothing depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.embed = nn.Parameter(torch.randn(1, 4, 8)), nn.Linear(6, 8)
        layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.decoder, self.head = nn.TransformerDecoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(self.queries.expand(x.shape[0], -1, -1), self.embed(x)))


def heads_over_one_token() -> tuple[nn.Module, Tensor]:
    """Nested groups; all samples are the same, so all units are constant."""
    model, x, _ = build("unbind")
    return model.double(), x[:1].double().expand(4, -1, -1)


UNTOLD: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "dead units": dead_units,
    "all constant": lambda: (flat(6, 10, 9, 4), torch.ones(8, 6, dtype=torch.float64)),
    "two samples": lambda: (flat(6, 10, 9, 4), torch.randn(2, 6, dtype=torch.float64)),
    "copies of one number": lambda: (
        nn.Sequential(nn.Linear(1, 10), flat(10, 9, 4)).double(),
        torch.randn(50, 1).double(),
    ),
    "learned queries": lambda: (randomized(Decoder()), torch.randn(40, 5, 6, dtype=torch.float64)),
    "nested, all constant": heads_over_one_token,
}  # fmt: skip


@pytest.mark.parametrize("name", UNTOLD)
def test_a_permuted_copy_is_found_though_activations_do_not_tell_its_units_apart(name: str) -> None:
    torch.manual_seed(0)
    model, data = UNTOLD[name]()
    groups = surgery.find_groups(model, data[:2])
    first, second = planted(model, groups, 1), planted(model, groups, 2)
    orders = surgery.match(
        model,
        first,
        data=data,
        matching="activations",
        symmetries="permutations",
        example_inputs=data[:2],
        progress=False,
    )
    assert same_state(permuted(first, groups, orders).state_dict(), model.state_dict())
    assert not same_state(first.state_dict(), model.state_dict())
    merged = surgery.merge(
        [model, first, second],
        data=data, matching="activations", symmetries="permutations", renormalize=None, progress=False,
    )  # fmt: skip
    for key, tensor in model.state_dict().items():
        assert torch.allclose(merged.state_dict()[key], tensor, rtol=0, atol=1e-9), key


@pytest.mark.parametrize("name", ["dead units", "all constant"])
def test_without_the_weights_the_copy_is_not_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, data = UNTOLD[name]()
    groups = surgery.find_groups(model, data[:2])
    copy = planted(model, groups, 2)
    monkeypatch.setattr(activations.Ties, "of", lambda *_: None)
    orders = surgery.match(
        model,
        copy,
        data=data,
        matching="activations",
        symmetries="permutations",
        example_inputs=data[:2],
        progress=False,
    )
    assert not same_state(permuted(copy, groups, orders).state_dict(), model.state_dict())


def test_correlations_come_first() -> None:
    """Of two strangers, the units that vary are paired as without ties; only those tied may be paired otherwise."""
    a, data = dead_units()
    b = net("chain", 3).double()
    with torch.no_grad():
        b[0].bias[[0, 2, 5]] = -1e3
    found = surgery.match(
        a, b, data=data, matching="activations", symmetries="permutations", example_inputs=data[:2], progress=False
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations.Ties, "of", lambda *_: None)
        plain = surgery.match(
            a, b, data=data, matching="activations", symmetries="permutations", example_inputs=data[:2], progress=False
        )
    first = next(iter(found))
    dead, cut = {1, 4, 6}, {0, 2, 5}
    pairs = {(unit, own) for unit, own in enumerate(plain[first].order) if unit not in dead and own not in cut}
    assert pairs and pairs <= set(enumerate(found[first].order))


def test_no_weights_are_looked_at_where_there_are_no_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("nothing is open")

    monkeypatch.setattr(activations, "break_ties", never)
    model = net("residual")
    surgery.match(model, net("residual", 1), data=images(48), matching="activations", progress=False)
    (dead, data), (other, _) = dead_units(), dead_units()
    with pytest.raises(AssertionError, match="nothing is open"):
        surgery.match(dead, other, data=data, matching="activations", progress=False)
