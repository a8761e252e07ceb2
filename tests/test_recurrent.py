"""Recurrent networks: groups with and without first states, cells, and units cut from all layers alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from proofs import EXACT, Apply, double, outputs, parameter, proven, sizes, vivid
from tiny_nets import planted
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.discovery.verification import relative_error
from vfsurgery.groups import Member, PermutationGroup
from vfsurgery.pruning.units.quota import Quota
from vfsurgery.pruning.units.teams import Teams

TOKENS = torch.randn(4, 5, 4)


def first(y: Any, state: Any) -> Tensor:
    return y


def net(layer: nn.Module, width: int, pick: Callable[[Any, Any], Tensor] = first, given: Any = None) -> nn.Module:
    """A linear layer, a recurrent one, a LayerNorm, a linear layer; ``given`` makes first states."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        states = () if given is None else (given(m, x),)
        return m.head(m.norm(pick(*m.layer(x, *states))))

    members = {"embed": nn.Linear(4, 6), "layer": layer, "norm": nn.LayerNorm(width), "head": nn.Linear(width, 3)}
    return Apply(forward, **members, start=parameter(2, 1, 8))


def zeros(m: Any, x: Tensor) -> Tensor:
    return torch.zeros(2, x.shape[0], m.layer.hidden_size, dtype=x.dtype).to(x.device).requires_grad_()


def zeros_for_cells_too(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return zeros(m, x), zeros(m, x)


def learned(m: Any, x: Tensor) -> Tensor:
    return m.start.expand(-1, x.shape[0], -1).contiguous()


def written(m: Any, x: Tensor) -> Tensor:
    state = torch.zeros(2, x.shape[0], 8, dtype=x.dtype)
    state[:, :, :4] = m.start[:, :, :4]
    return state


OPTIONS = [{"num_layers": 2}, {"bidirectional": True, "bias": False}, {"num_layers": 2, "bidirectional": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_units_are_cut_from_all_layers_and_directions_alike(kind: Any, options: dict[str, Any]) -> None:
    layers, directions = options.get("num_layers", 1), 1 + options.get("bidirectional", False)
    model = vivid(net(kind(6, 8, batch_first=True, **options), 8 * directions))
    (x,) = double((TOKENS,))
    groups = proven(model, x)
    assert sizes(groups) == [6, *[8] * (layers * directions)]
    for scope in ("group", "global"):
        smaller = surgery.prune_units(model, 0.3, scope=scope, example_inputs=x, renormalize=None, progress=False)
        report = surgery.report_of(smaller)
        assert not report.left_whole
        left = {cut.after for cut in report.groups if cut.before == 8}
        assert left == {smaller.layer.hidden_size} and smaller.layer.hidden_size < 8
        chosen = {cut.kept for cut in report.groups if cut.before == 8}
        assert len(chosen) > 1, "each layer and direction has a choice of its own"
        again = kind(*(smaller.layer.weight_ih_l0.shape[1], smaller.layer.hidden_size), batch_first=True, **options)
        again.double().load_state_dict(smaller.layer.state_dict())


def test_projections_are_cut_alike_too() -> None:
    model = vivid(net(nn.LSTM(6, 8, 2, batch_first=True, proj_size=5), 5))
    smaller = surgery.prune_units(model, 0.3, example_inputs=TOKENS.double(), renormalize=None, progress=False)
    assert (smaller.layer.hidden_size, smaller.layer.proj_size) == (6, 3)
    assert not surgery.report_of(smaller).left_whole


def test_a_layer_that_is_held_holds_the_others() -> None:
    shown = Apply(lambda m, x: m.layer(x)[0], layer=nn.GRU(4, 8, 2, batch_first=True))
    left = surgery.report_of(surgery.prune_units(shown, 0.5, example_inputs=TOKENS, renormalize=None)).left_whole
    assert [whole.reason for whole in left] == [
        "all layers and directions of layer have one hidden_size, and not all of them can lose units"
    ]
    model = net(nn.LSTM(6, 8, 2, batch_first=True), 8)
    pruned = surgery.prune_units(model, 0.5, example_inputs=TOKENS, renormalize=None, exclude="g2", progress=False)
    assert {whole.group: whole.reason for whole in surgery.report_of(pruned).left_whole} == {
        "g1": "excluded by the user (g2)",
        "g2": "excluded by the user (g2)",
    }


def test_a_ranking_of_all_groups_counts_a_team_as_one() -> None:
    groups = [PermutationGroup(name, 4, (Member(name, 0, 4),)) for name in "abc"]
    scores = {"a": torch.tensor([1.0, 2, 3, 4]), "b": torch.tensor([9.0, 1, 1, 9]), "c": torch.tensor([5.0, 5, 5, 5])}
    arrays = {name: each.numpy() for name, each in scores.items()}
    quota = Quota(0.25, scope="global")
    alone = quota.masks(groups, arrays)
    assert {name: int((~mask).sum()) for name, mask in alone.items()} == {"a": 1, "b": 2}
    teams = {"b": ("b", "c"), "c": ("b", "c")}
    together = quota.masks(groups, arrays, teams)
    assert {name: int((~mask).sum()) for name, mask in together.items()} == {"a": 1, "b": 1, "c": 1}


def test_teams_say_what_goes_together() -> None:
    teams = Teams({"g1": ("g1", "g3"), "g3": ("g1", "g3")}, {})
    assert teams.leaders(["g2", "g3", "g1"]) == ["g2", "g1"]
    assert teams.members(["g2", "g1"]) == ["g2", "g1", "g3"]
    assert teams.shared({"g3": "why"}) == {"g1": "why", "g3": "why"}


def test_first_states_that_are_the_same_everywhere_leave_layers_free() -> None:
    assert sizes(proven(net(nn.GRU(6, 8, 2, batch_first=True), 8, given=zeros), TOKENS)) == [6, 8, 8]
    lstm = net(nn.LSTM(6, 8, 2, batch_first=True), 8, given=zeros_for_cells_too)
    assert sizes(proven(lstm, TOKENS)) == [6, 8, 8]
    pruned = surgery.prune_units(lstm, 0.5, example_inputs=TOKENS, renormalize=None, progress=False)
    assert pruned.layer.hidden_size == 4


def test_other_first_states_give_all_layers_one_order() -> None:
    groups = proven(net(nn.GRU(6, 8, 2, batch_first=True), 8, given=learned), TOKENS)
    assert sizes(groups) == [6, 8]
    assert "start" in {member.parameter for group in groups for member in group.members}
    assert 8 not in sizes(proven(net(nn.GRU(6, 8, 2, batch_first=True), 8, given=written), TOKENS))


def test_an_encoder_hands_its_state_to_a_decoder() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        _, state = m.encoder(x)
        return m.head(m.decoder(x, state)[0])

    for kind in (nn.LSTM, nn.GRU):
        layers = {name: kind(4, 8, 2, batch_first=True) for name in ("encoder", "decoder")}
        model = Apply(forward, head=nn.Linear(8, 3), **layers)
        assert sizes(proven(model, TOKENS)) == [8]
        smaller = surgery.prune_units(model, 0.5, example_inputs=TOKENS, renormalize=None, progress=False)
        assert (smaller.encoder.hidden_size, smaller.decoder.hidden_size) == (4, 4)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_projection_back_to_the_stream_is_no_block_of_it() -> None:
    """Without biases the cell's units lie on weights alone, beside units of the stream on each of them."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        return m.head(x + m.layer(x)[0])

    lstm = nn.LSTM(6, 8, batch_first=True, proj_size=6, bias=False)
    groups = proven(Apply(forward, embed=nn.Linear(4, 6), layer=lstm, head=nn.Linear(6, 3)), TOKENS)
    assert sizes(groups) == [6, 8] and all(group.blocks == 1 for group in groups)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_in_a_loop(kind: Any, given: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x, state = m.embed(x), None
        if given:
            state = x.new_zeros(x.shape[0], m.cell.hidden_size)
            state = (state, state) if kind is nn.LSTMCell else state
        for step in range(x.shape[1]):
            state = m.cell(x[:, step], state)
        return m.head(state[0] if kind is nn.LSTMCell else state)

    model = Apply(forward, embed=nn.Linear(4, 6), cell=kind(6, 8, bias=given), head=nn.Linear(8, 3))
    assert sizes(proven(model, TOKENS)) == [6, 8]
    smaller = surgery.prune_units(model, 0.5, example_inputs=TOKENS, renormalize=None, progress=False)
    assert (smaller.cell.input_size, smaller.cell.hidden_size) == (3, 4)


def test_units_of_one_output_of_several_are_read_where_it_is_picked() -> None:
    model = vivid(net(nn.GRU(6, 8, batch_first=True), 8, lambda y, state: y.mean(1)))
    (x,) = double((torch.randn(64, 5, 4),))
    groups = surgery.find_groups(model, x)
    hidden = next(group for group in groups if group.size == 8)
    assert "getitem" in {member.parameter for member in hidden.activations}
    aligned = planted(model, groups)
    merged = surgery.merge(model, aligned, data=x, matching="activations", renormalize=None, progress=False)
    assert relative_error(outputs(merged, (x,)), outputs(model, (x,))) < EXACT
