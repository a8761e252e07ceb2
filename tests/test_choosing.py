"""``"auto"`` with data: what is tried, what is kept, and when nothing is tried."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_nets import LayerNormed, groups_of, images, lively, net, planted, same_state, state_of
from torch import Tensor, fx, nn

import vfsurgery as surgery
from vfsurgery.matching import Identity
from vfsurgery.merging import surveyed
from vfsurgery.merging.choosing import sensible
from vfsurgery.passes import Context, Regress, Repair, Rescale, Reset

DATA = [part.contiguous() for part in images(300).split(100)]
NOT_HELD_OUT = [part[::2] for part in DATA]


def tried(merged: nn.Module) -> dict[str, float]:
    report = surgery.report_of(merged)
    return {" + ".join([trial.matching, *trial.renormalize]): trial.agreement for trial in report.trials}


def merge(*models: nn.Module, **options: Any) -> nn.Module:
    return surgery.merge(list(models), **{"data": DATA, "progress": False, **options})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chain", "activations + rescale; activations + repair; cca + repair; zipit + rescale"),
        ("residual", "activations + reset; cca + reset; zipit + reset"),
    ],
)
def test_the_ways_that_suit_the_architecture_are_tried_and_the_best_is_kept(name, expected):
    merged = merge(net(name, 1), net(name, 2))
    found, report = tried(merged), surgery.report_of(merged)
    *cheap, dear = found
    assert "; ".join(cheap) == expected
    assert dear in ("activations + regress", "cca + regress")
    kept = " + ".join([report.matching, *report.renormalize])
    assert [trial.way for trial in report.trials if trial.kept] == [kept]
    assert found[kept] >= max(found.values()) - 0.02
    assert report.to_dict()["trials"][0]["matching"] == "activations"


@pytest.mark.parametrize("name", ["chain", "residual"])
def test_what_is_kept_is_what_asking_for_it_gives_on_all_images(name):
    models = net(name, 1), net(name, 2)
    auto = merge(*models)
    chosen = surgery.report_of(auto)
    asked = {"matching": chosen.matching, "renormalize": list(chosen.renormalize)}
    direct, fewer = merge(*models, **asked), merge(*models, data=NOT_HELD_OUT, **asked)
    assert same_state(state_of(direct), state_of(auto))
    assert not same_state(state_of(fewer), state_of(auto))
    assert not surgery.report_of(direct).trials
    assert "made again with all images" in str(chosen)


def test_of_many_images_units_stay_matched_on_those_that_are_enough(monkeypatch):
    """What is built again sees all images all the same."""
    monkeypatch.setattr(surveyed, "SURVEYED", 40)
    seen, run = list[int](), Reset.run

    def running(self: Reset, graph_module: fx.GraphModule, context: Context) -> fx.GraphModule:
        assert context.data is not None
        seen.append(sum(len(images) for images, _ in context.data))
        return run(self, graph_module, context)

    monkeypatch.setattr(Reset, "run", running)
    merged = merge(net("residual", 1), net("residual", 2), renormalize="reset")
    assert seen == [150, 150, 150, 300]
    assert "statistics of 40 images" in str(surgery.report_of(merged))


def test_a_step_that_holds_images_out_itself_does_so_again():
    merged = merge(net("chain", 1), net("chain", 2), renormalize="bias-removal")
    report = surgery.report_of(merged)
    direct = merge(net("chain", 1), net("chain", 2), matching=report.matching, renormalize="bias-removal")
    assert len(report.trials) > 1 and same_state(state_of(direct), state_of(merged))


def test_agreement_is_with_the_weighted_ensemble_on_held_out_images():
    models = net("chain", 1), net("chain", 2)
    chosen = surgery.report_of(merge(*models, weights=(0.8, 0.2)))
    asked = {"matching": chosen.matching, "renormalize": list(chosen.renormalize)}
    judged = merge(*models, weights=(0.8, 0.2), data=NOT_HELD_OUT, **asked)
    held_out = torch.cat(DATA)[1::2]
    with torch.no_grad():
        ensemble, logits = 0.8 * models[0](held_out) + 0.2 * models[1](held_out), judged(held_out)
        agreed = (logits.argmax(1) == ensemble.argmax(1)).double().mean()
        crossed = torch.nn.functional.cross_entropy(logits, ensemble.softmax(1))
    (kept,) = [trial for trial in chosen.trials if trial.kept]
    assert kept.images == len(held_out) == 150
    assert kept.agreement == pytest.approx(float(agreed))
    assert kept.cross_entropy == pytest.approx(float(crossed), rel=1e-5)


def test_what_is_asked_for_is_not_varied():
    a, b = net("chain", 1), net("chain", 2)
    assert list(tried(merge(a, b, matching="identity"))) == [
        "identity + rescale",
        "identity + repair",
        "identity + regress",
    ]
    assert list(tried(merge(a, b, renormalize="repair"))) == ["activations + repair", "cca + repair", "zipit + repair"]
    assert not tried(merge(a, b, matching="activations", renormalize="repair"))


def test_few_images_and_no_images_leave_the_choice_to_the_architecture():
    a, b = net("residual", 1), net("residual", 2)
    assert not tried(merge(a, b, data=[images(99)]))
    assert tried(merge(a, b, data=[images(100)]))
    with pytest.warns(surgery.SurgeryWarning, match="BatchNorm"):
        assert not tried(merge(a, b, data=None, imagine=False, example_inputs=images(2)))


def test_a_net_in_which_maps_may_hardly_go_anywhere_is_tried_with_permutations_only():
    merged = merge(lively(LayerNormed(), 1), lively(LayerNormed(), 2))
    assert list(tried(merged)) == ["activations + repair", "activations + regress"]


class Silent(nn.Sequential):
    """One number per image: no classes."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(432, 6), nn.ReLU(), nn.Linear(6, 1))


def test_without_logits_the_first_way_is_kept_and_the_report_says_why():
    merged = merge(lively(Silent(), 1), lively(Silent(), 2))
    report = surgery.report_of(merged)
    assert report.renormalize == ("rescale",)
    assert any("without logits" in note for note in report.notes)


class Refusing:
    """A matcher that fails."""

    name, needs_data = "refusing", False

    def match(self, problem: object) -> list[Any]:
        raise surgery.SurgeryError("no matching today")


def test_a_way_that_fails_is_reported_and_if_all_do_the_first_error_is_raised(monkeypatch):
    a, b = net("residual", 1), net("residual", 2)
    monkeypatch.setattr(
        surgery.CCAMatching, "maps", lambda self, joint: (_ for _ in ()).throw(surgery.SurgeryError("singular"))
    )
    notes = surgery.report_of(merge(a, b)).notes
    assert "failed, cca + reset: singular" in notes
    with pytest.raises(surgery.SurgeryError, match="no matching today"):
        merge(a, b, matching=Refusing())


def test_in_place_the_best_one_is_written_and_nothing_before_it():
    a, b = net("chain", 1), net("chain", 2)
    expected = merge(a, b)
    storage = {name: tensor.data_ptr() for name, tensor in a.state_dict().items()}
    result = merge(a, b, inplace=True)
    assert result is a
    assert {name: tensor.data_ptr() for name, tensor in a.state_dict().items()} == storage
    assert same_state(state_of(a), state_of(expected))


def test_a_prefix_can_be_preserved_while_ways_are_tried():
    merged = merge(net("residual", 1), net("residual", 2), preserve=2)
    assert len(tried(merged)) == 4
    assert surgery.report_of(merged).preserved.layers == 2


def test_a_source_and_its_permuted_copy_agree_with_themselves():
    a = net("chain")
    found = tried(merge(a, planted(a, groups_of(a))))
    assert found["activations + rescale"] == 1.0
    assert min(tried(merge(a, net("chain", 1), matching="identity", renormalize="auto")).values()) < 1.0


def test_the_regression_is_left_out_where_it_would_take_too_long(monkeypatch):
    from vfsurgery.merging import choosing

    model = net("residual")
    graph = surgery.trace(model, images(2))
    ways = [str(way) for way in sensible(graph, groups_of(model), Identity(), (Reset(),), fixed=False)]
    assert ways == ["identity + reset", "identity + regress"]
    monkeypatch.setattr(choosing, "affordable_flops", lambda device: 1.0)
    ways = [str(way) for way in sensible(graph, groups_of(model), Identity(), (Reset(),), fixed=False)]
    assert ways == ["identity + reset"]


def test_the_regression_follows_the_matcher_that_did_best_before_it():
    for seed in range(2, 6):
        trials = surgery.report_of(merge(net("residual", 1), net("residual", seed))).trials
        cheap = {
            trial.matching: (trial.agreement, -trial.cross_entropy)
            for trial in trials
            if trial.renormalize == ("reset",) and trial.matching != "zipit"  # which no regression follows
        }
        (dear,) = (trial for trial in trials if trial.renormalize == ("regress",))
        other = next(matching for matching in cheap if matching != dear.matching)
        by_luck = 2 / trials[0].images ** 0.5  # what chance may have made is decided by the cross-entropy
        assert cheap[dear.matching][0] >= cheap[other][0] - by_luck
        if cheap[dear.matching][0] < cheap[other][0]:
            assert cheap[dear.matching][1] > cheap[other][1]


def test_after_cca_goals_come_from_the_first_source_alone():
    model = net("chain")
    ways = sensible(surgery.trace(model, images(2)), groups_of(model), None, (Rescale(),), fixed=False)
    passes = [way.passes for way in ways if way.matcher.name == "cca"]
    assert passes == [(Repair(reference=0),), (Regress(),)]


def test_a_batch_of_no_use_is_no_image(tmp_path):
    empty: list[Tensor] = []
    with pytest.raises(surgery.SurgeryError):
        merge(net("chain", 1), net("chain", 2), data=empty)
