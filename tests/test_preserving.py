"""``surgery.preserve_curve``: cost and quality at several boundaries, matched once."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_nets import images, net, same_state, state_of

import vfsurgery as surgery
from vfsurgery.errors import OptionError
from vfsurgery.scoring import preserving

CALIBRATION = images(48, 3)
TEST = (images(64, 8), torch.arange(64) % 5)


def curve(**options) -> surgery.PreserveCurve:
    options = {"calibration": CALIBRATION, "boundaries": [0, 3, "block2", 6], "progress": False, **options}
    return surgery.preserve_curve(net("residual", 1), net("residual", 2), options.pop("data", TEST), **options)


def test_every_point_is_the_merge_with_that_boundary() -> None:
    a, b = net("residual", 1), net("residual", 2)
    found = curve()
    assert [point.boundary for point in found.points] == [0, 3, "block2", 6] and found.depth == 6
    for point in found.points:
        merged = surgery.merge(a, b, data=CALIBRATION, preserve=point.boundary, progress=False)
        assert point.accuracy == pytest.approx(surgery.evaluate(merged, TEST, progress=False).accuracy)
        told = surgery.report_of(merged).preserved
        costs = (0, 1.0, 1.0) if told is None else (told.layers, told.flops, told.parameters)
        assert (point.layers, point.flops, point.parameters) == costs
    assert len({point.accuracy for point in found.points}) > 1


def test_agreement_is_with_the_ensemble_and_complete_where_all_is_preserved() -> None:
    a, b = net("residual", 1), net("residual", 2)
    found = curve()
    with torch.no_grad():
        expected = (a(TEST[0]) + b(TEST[0])).argmax(1)
        merged = surgery.merge(a, b, data=CALIBRATION, preserve=3, progress=False)(TEST[0]).argmax(1)
    assert found.points[1].agreement == pytest.approx(float((merged == expected).float().mean()))
    assert found.points[-1].agreement == 1 > found.points[0].agreement
    assert found.accuracy[2] == pytest.approx(float((expected == TEST[1]).float().mean()))
    assert found.points[-1].accuracy == pytest.approx(found.accuracy[2])


def test_without_labels_there_is_agreement_alone() -> None:
    found = curve(data=TEST[0])
    assert found.accuracy is None and {point.accuracy for point in found.points} == {None}
    assert "accuracy" not in str(found)
    assert [point.agreement for point in found.points] == [point.agreement for point in curve().points]


def test_the_sources_are_matched_once_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    real = surgery.match
    monkeypatch.setattr(preserving, "match", lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs))
    a, b = net("residual", 1).train(), net("residual", 2)
    before = [state_of(model) for model in (a, b)]
    surgery.preserve_curve(a, b, TEST, calibration=CALIBRATION, boundaries=[0, 2], progress=False)
    assert len(calls) == 1
    assert all(same_state(model.state_dict(), state) for model, state in zip((a, b), before, strict=True))
    assert a.training and not b.training


def test_all_boundaries_but_the_first_layer_are_the_default() -> None:
    found = curve(boundaries=None, renormalize=None, matching="identity")
    assert [point.boundary for point in found.points] == [0, 2, 3, 4, 5, 6]
    assert [point.flops for point in found.points] == sorted(point.flops for point in found.points)


def test_a_curve_is_printed_and_written_as_json() -> None:
    found = curve()
    lines = str(found).splitlines()
    assert lines[0].split() == ["preserved", "layers", "flops", "params", "agreement", "accuracy"]
    assert lines[3].split()[:2] == ["block2", "5/6"] and lines[-1].startswith("sources ")
    read = json.loads(found.to_json())
    assert read["points"][2]["boundary"] == "block2" and read["accuracy"] == pytest.approx(found.accuracy)


def test_no_boundaries_are_refused() -> None:
    with pytest.raises(OptionError, match=r"(?s)boundaries= is empty.*remedy +leave it out"):
        curve(boundaries=[])
