"""A merge as a chain of values: work can begin in the middle, and no step changes what an earlier one returned."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from prefix_nets import made
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.matching import ActivationMatching
from vfsurgery.merging.aligned import Certified, certify_sources, match_sources
from vfsurgery.merging.combined import Terms, combine
from vfsurgery.merging.finished import finish
from vfsurgery.merging.prepared import Grouped, group_units, trace_sources
from vfsurgery.merging.shares import Shares
from vfsurgery.merging.surveyed import Surveyed, Way, plan_survey
from vfsurgery.passes import Pass, Repair, Reset

BATCHES = list(torch.randn(48, 3, 12, 12, generator=torch.Generator().manual_seed(5)).double().split(16))


class Counted:
    """Batches that say how often they were read."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        return iter(BATCHES)


def pair() -> list[nn.Module]:
    return [made("residual", seed).eval() for seed in (1, 2)]


def up_to_certified(models: list[nn.Module], passes: tuple[Pass, ...]) -> tuple[Grouped, Surveyed, Certified]:
    grouped, matcher = group_units(trace_sources(models, BATCHES, progress=False)), ActivationMatching()
    surveyed = plan_survey(grouped, [Way(matcher, passes)])
    with grouped.running():
        return grouped, surveyed, certify_sources(surveyed, match_sources(surveyed, matcher))


@pytest.mark.parametrize("step", [Reset(), Repair()], ids=lambda step: step.name)
def test_many_results_come_of_one_survey_and_one_matching(step: Pass) -> None:
    grouped, surveyed, certified = up_to_certified(pair(), (step,))
    for share in (0.5, 0.25):
        with grouped.running():
            combined = combine(surveyed, certified, (step,), Terms(Shares((1 - share, share), {})))
            found = finish(grouped, combined, inplace=False, preserved=False)
        expected = surgery.merge(
            *pair(), data=BATCHES, alpha=share, matching="activations", renormalize=step, progress=False
        )
        values, expected_values = found.state_dict(), expected.state_dict()
        assert list(values) == list(expected_values)
        assert all(torch.equal(values[name], expected_values[name]) for name in values)
    other = surgery.merge(*pair(), data=BATCHES, alpha=0.1, matching="activations", renormalize=step, progress=False)
    assert any(not torch.equal(values[name], tensor) for name, tensor in other.state_dict().items())


def test_correlations_can_go_before_models_are_combined() -> None:
    grouped, surveyed, certified = up_to_certified(pair(), (Repair(),))
    light = surveyed.without_correlations()
    assert surveyed.statistics.crossed and not light.statistics.crossed
    with grouped.running():
        both = [
            combine(each, certified, (Repair(),), Terms(Shares((0.5, 0.5), {}))).model.state_dict()
            for each in (surveyed, light)
        ]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


def test_data_is_read_once_for_what_all_ways_ask_and_not_where_none_does() -> None:
    data = Counted()
    grouped = group_units(trace_sources(pair(), data, progress=False))
    before, matcher = data.passes, ActivationMatching()
    surveyed = plan_survey(grouped, [Way(matcher, (Repair(),)), Way(matcher, (Repair(reference=0),))])
    assert surveyed.taken is None
    with grouped.running():
        match_sources(surveyed, matcher)
        match_sources(surveyed, matcher)
        surveyed.moments()
    assert data.passes == before + 1
    assert surveyed.taken is not None and surveyed.taken.images == 48
    unasked = plan_survey(grouped, [Way(surgery.Given({}), ())])
    assert unasked.moments().images == 0 and data.passes == before + 1


def test_phases_are_frozen() -> None:
    grouped, surveyed, certified = up_to_certified(pair(), ())
    for value, name in ((grouped, "groups"), (surveyed, "data"), (certified, "each")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, None)
