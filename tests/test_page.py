"""The page is one file that fetches nothing, shows what it was given, and escapes all of it."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny_nets
import torch
from torch import nn

import vfsurgery as surgery
from vfsurgery.errors import CheckpointError, OptionError
from vfsurgery.rendering.page import wiring
from vfsurgery.scoring.barriers import Barrier, Curve
from vfsurgery.scoring.diagnosis import Diagnosis
from vfsurgery.scoring.evaluation import Score
from vfsurgery.scoring.flip_rates import FlipRates, Flips

VOID = {"meta", "link", "br", "img", "path", "use", "rect", "line"}


class Reader(HTMLParser):
    """Text, ids, headings and attributes of a page; fails on a tag that is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.headings: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and self.open[-1] in ("h2", "h1"):
            self.headings.append(data)


@pytest.fixture(scope="module")
def merged() -> tuple[nn.Module, Diagnosis, Diagnosis]:
    """A merged network, its diagnosis, and that of the average before renormalization."""
    a, b = tiny_nets.net("residual", 0), tiny_nets.net("residual", 1)
    images = tiny_nets.images(32)
    raw = surgery.merge(a, b, data=images, renormalize=None)
    result = surgery.merge(a, b, data=images)
    return result, *(surgery.diagnose(model, [a, b], images) for model in (result, raw))


def curve(accuracy: float, loss: float) -> Curve:
    return Curve((0.0, 0.5, 1.0), (0.9, accuracy, 0.8), (0.5, loss, 0.7))


ENDS = Score(0.9, 0.5, 100), Score(0.8, 0.7, 100), Score(0.95, 0.4, 100)
OPTIONS = {
    "scores": {"source a": ENDS[0], "<b>&": Score(0.1234, 2.5, 100)},
    "barrier": Barrier(*ENDS, curve(0.1, 3.0), curve(0.5, 1.0), None),
    "flips": Flips((FlipRates("<i>a", 100, 10, 20, 1, 11),), FlipRates("all", 90, 0, 11, 0, 11)),
    "cost_curve": [(0, 1.0, 1.0, 0.4), (3, 1.4, 1.1, 0.85)],
}
SECTIONS = {"scores": "Accuracy", "barrier": "Barrier", "flips": "Flips", "cost_curve": "Cost of preserved layers"}


def test_the_page_shows_all_it_is_given(merged, tmp_path):
    model, found, before = merged
    path = found.page(tmp_path / "deep" / "page.html", report=surgery.report_of(model), before=before, **OPTIONS)
    assert list(path.parent.iterdir()) == [path]
    page = Reader(path.read_text())
    assert page.headings == [
        "Diagnosis of Residual", "Certificate", "Accuracy", "Flips", "Features by depth", "Barrier",
        "Cost of preserved layers", "Layers", "Permutation groups",
    ]  # fmt: skip
    text = " ".join(page.text)
    for shown in (found.verdict, before.verdict, "12.34%", "11.00%", "85.00%", "block2.down.1", "aligned source 1"):
        assert shown in text, shown
    assert sum(tag == "svg" for tag, _ in page.tags) == 3 + 2 + 1


def test_the_accuracy_of_the_network_itself_is_not_scrolled_out_of_sight(merged, tmp_path):
    _, found, _ = merged
    scores = {f"way {number}": Score(0.5, 1.0, 100) for number in range(40)}
    plain, html = (found.page(tmp_path / "page.html", scores=scores, own=own).read_text() for own in (None, "way 39"))
    rows = re.findall(r"<tr( class=\"own\")?><td class=\"text\">(way \d+)( \(this network\))?</td>", html)
    assert rows == [(' class="own"', "way 39", " (this network)"), *(("", f"way {number}", "") for number in range(39))]
    assert re.findall(r"<td class=\"text\">(way \d+)", plain) == [*scores] and 'class="own"' not in plain
    with pytest.raises(OptionError, match="own='way 40' is no name in scores"):
        found.page(tmp_path / "page.html", scores=scores, own="way 40")
    assert re.search(r"<h2>Accuracy</h2>\s*<div class=\"scroll narrow whole\">", html)
    assert html.index(".whole { max-height: none; }") > html.index(".scroll { overflow: auto; max-height")  # so it wins


@pytest.mark.parametrize("option", OPTIONS)
def test_a_section_without_input_is_left_out(merged, tmp_path, option):
    _, found, _ = merged
    whole, without = (
        Reader(found.page(tmp_path / f"{name}.html", **options).read_text()).headings
        for name, options in (("whole", OPTIONS), ("part", {k: v for k, v in OPTIONS.items() if k != option}))
    )
    assert [heading for heading in whole if heading not in without] == [SECTIONS[option]]


def test_the_page_fetches_nothing_and_its_ids_are_unique(merged, tmp_path):
    model, found, before = merged
    html = found.page(tmp_path / "p.html", report=surgery.report_of(model), before=before, **OPTIONS).read_text()
    page = Reader(html)
    assert {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "image"} == set()
    references = [value for _, attributes in page.tags for name, value in attributes.items() if name.endswith("href")]
    assert references
    assert [reference for reference in references if not (reference or "").startswith("#")] == []
    assert all((reference or "")[1:] in page.ids for reference in references)
    assert re.findall(r"url\((?!#)", html) == []
    assert set(re.findall(r"url\(#([^)]*)\)", html)) <= set(page.ids)
    assert "@import" not in html
    assert len(page.ids) == len(set(page.ids))


def test_what_is_given_is_escaped(tmp_path):
    model = nn.Sequential()
    model.add_module("<script>alert(1)</script>", nn.Linear(4, 2))
    source = copy.deepcopy(model)
    source.add_module('"><img src=x>', nn.Identity())
    found = surgery.diagnose(model, source, torch.randn(8, 4))
    html = found.page(tmp_path / "page.html", **OPTIONS).read_text()
    page = Reader(html)
    assert {tag for tag, _ in page.tags} & {"script", "img", "i", "b"} == set()
    assert "<script>alert(1)</script>" in " ".join(page.text)
    assert "<b>&" in page.text
    assert "<i>a" in page.text


def test_a_page_is_the_same_each_time(merged, tmp_path):
    _, found, before = merged
    pages = [found.page(tmp_path / name, before=before, **OPTIONS).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


def test_a_page_that_cannot_be_written_leaves_what_was_there(merged, tmp_path):
    (tmp_path / "page.html").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*page\.html"):
        merged[1].page(tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_cost_curve_has_four_numbers_a_row(merged, tmp_path):
    with pytest.raises(OptionError, match=r"row 1 of cost_curve is \(3, 1\.4\)\n  expected  \(layers preserved"):
        merged[1].page(tmp_path / "page.html", cost_curve=[(0, 1.0, 1.0, 0.4), (3, 1.4)])
    assert list(tmp_path.iterdir()) == []


def test_the_wiring_says_which_groups_a_layer_reads_and_writes(merged):
    model, found, _ = merged
    report = surgery.report_of(model)
    rows = {row.path: (set(row.reads), set(row.writes)) for row in wiring(report, found)}
    assert list(rows) == [layer.name for layer in found.layers]
    stream = next(group.name for group in report.groups if group.label == "stem")
    inner = next(group.name for group in report.groups if group.label == "block1.conv1")
    assert rows["block1.conv1"] == ({stream}, {inner})
    assert rows["block1.bn1"] == ({inner}, {inner})
    assert rows["block1.conv2"] == ({inner}, {stream})
    assert rows["fc"][1] == {"fixed"}


def test_a_transposed_convolution_reads_along_its_first_dim(tmp_path):
    def net() -> nn.Module:
        return nn.Sequential(nn.ConvTranspose2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3)).eval()

    a, b, images = net(), net(), torch.randn(8, 3, 6, 6)
    model = surgery.merge(a, b, data=images)
    rows = wiring(surgery.report_of(model), surgery.diagnose(model, [a, b], images))
    assert rows[0].kind == "transposed conv"
    assert set(rows[0].writes) == set(rows[1].reads) == {"g0"}


def test_the_template_goes_along_with_the_package():
    assert (Path(surgery.__file__).parent / "rendering" / "page.html.j2").is_file()
