"""What ``"auto"`` does where there are many images: ways are compared on some, and sources asked once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_nets import images, net
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.data.batches import Batches
from vfsurgery.data.holdout import first
from vfsurgery.merging import choosing, surveyed
from vfsurgery.passes.agreement import Known, judge
from vfsurgery.stats.collect import Site, group_sites, survey
from vfsurgery.stats.correlation import Centred

DATA = [part.contiguous() for part in images(600).split(100)]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some hundred images are many."""
    monkeypatch.setattr(choosing, "SCREENED", 100)
    monkeypatch.setattr(choosing, "JUDGED_ON", 60)
    monkeypatch.setattr(surveyed, "SURVEYED", 200)


def merged_by_auto() -> nn.Module:
    return surgery.merge(net("chain", 1), net("chain", 2), data=DATA, matching="identity", progress=False)


@pytest.mark.usefixtures("few")
def test_the_way_that_is_kept_is_made_anew_with_all_images():
    report = surgery.report_of(merged := merged_by_auto())
    assert any("ways compared with statistics of 100 images" in note for note in report.notes)
    assert any("made again with all images" in note for note in report.notes)
    assert report.renormalize == ("regress",)
    assert any("on 600 images" in note for note in report.notes)
    assert alike(merged, regressed(DATA))
    assert not alike(merged, regressed(held_in()))


def regressed(data: list[Tensor]) -> nn.Module:
    """What auto keeps, asked for by name."""
    sources = net("chain", 1), net("chain", 2)
    return surgery.merge(*sources, data=data, matching="identity", renormalize="regress", progress=False)


def alike(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4) for mine, theirs in pairs)


def held_in() -> list[Tensor]:
    """The images that ways are not judged on, every third one being held out, in the batches that auto sees."""
    places = torch.arange(600).split(100)
    return [part[place % 3 != 2] for part, place in zip(DATA, places, strict=True)]


@pytest.mark.usefixtures("few")
def test_the_figures_of_a_way_are_those_of_the_model_that_was_compared():
    """It has not seen the images that it is judged on; the model returned has."""
    (kept,) = [trial for trial in surgery.report_of(merged_by_auto()).trials if trial.kept]
    compared = regressed([torch.cat(held_in())[:100]])
    held_out = torch.cat(DATA)[2::3][:60]
    with torch.no_grad():
        ensemble = (net("chain", 1)(held_out) + net("chain", 2)(held_out)) / 2
        agreed = (compared(held_out).argmax(1) == ensemble.argmax(1)).double().mean()
    assert kept.images == 60 and kept.agreement == pytest.approx(float(agreed))


@pytest.mark.usefixtures("few")
def test_passes_see_few_images_until_one_way_is_kept(monkeypatch):
    seen: list[int] = []
    original: Callable[..., Any] = choosing.combine

    def counting(sources: Any, matched: Any, passes: Any, terms: Any, data: Any, *rest: Any) -> Any:
        seen.append(sum(len(x) for x, _ in data or sources.data))
        return original(sources, matched, passes, terms, data, *rest)

    monkeypatch.setattr(choosing, "combine", counting)
    merged_by_auto()
    assert seen == [100, 100, 100, 600]


def test_few_images_are_not_cut():
    assert first(Batches(images(99)), 50) is None
    assert [len(x) for x, _ in first(Batches(images(300)), 130)] == [128, 2]


def test_sources_are_asked_once_for_the_logits_of_a_batch():
    calls: list[int] = []

    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x.flatten(1))

    source, model, known = Counting(432, 5), nn.Sequential(nn.Flatten(), nn.Linear(432, 5)), Known()
    batches = [images(8, seed=1), images(8, seed=2)]
    alone = judge(model, [source], [1.0], batches)
    calls.clear()
    found = [judge(model, [source], [1.0], batches, known) for _ in range(3)]
    assert calls == [8, 8]
    judge(model, [source], [1.0], [batches[0].flip(0)], known)  # another order is another batch
    assert calls == [8, 8, 8]
    assert alone is not None
    assert all(torch.equal(one.crossed, alone.crossed) for one in found if one is not None)


def test_sources_run_image_by_image_where_batches_would_take_much_memory(monkeypatch):
    model = net("residual", 1)
    x = images(6)
    trace = surgery.trace(model, x[:2])
    sites = group_sites(trace, surgery.find_groups(model, x[:2]), torch.device("cpu"))
    units = {"stem": Site("stem", 1)}
    with torch.no_grad():
        whole = survey([trace, trace], [x], sites, units, joint=True)
        monkeypatch.setattr("vfsurgery.stats.collect.LEAST_WAITING", 1)
        sizes: list[int] = []
        original = Centred.of
        monkeypatch.setattr(Centred, "of", lambda v, *rest: (sizes.append(len(v)), original(v, *rest))[1])
        parts = survey([trace, trace], [x], sites, units, joint=True)
    assert set(sizes) == {1}
    assert parts.images == whole.images == 6
    for pair, found in whole.crossed.items():
        for name, readings in found.items():
            for one, other in zip(readings, parts.crossed[pair][name], strict=True):
                assert torch.allclose(one.correlation(), other.correlation(), atol=1e-5)
    assert torch.allclose(whole.moments[1]["stem"].mean, parts.moments[1]["stem"].mean, atol=1e-6)


class Frames(nn.Module):
    """Two frames of a batch make one output: batches may not be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)).reshape(-1, 8))


def test_batches_of_frames_are_not_cut(monkeypatch):
    monkeypatch.setattr("vfsurgery.stats.collect.LEAST_WAITING", 1)
    trace = surgery.trace(Frames().eval(), images(2))
    sizes: list[int] = []
    original = Centred.of
    monkeypatch.setattr(Centred, "of", lambda v, *rest: (sizes.append(len(v)), original(v, *rest))[1])
    with torch.no_grad():
        survey([trace, trace], [images(6)], {"conv": (Site("conv", 1),)}, {})
    assert sizes == [6, 6]
