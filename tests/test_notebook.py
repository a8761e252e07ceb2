"""What notebooks show is whole, escaped, readable on dark ground, and fetches nothing."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
import tiny_nets
import torch
from test_page import OPTIONS, Reader
from torch import nn

import vfsurgery as surgery
from vfsurgery.groups import GroupSet
from vfsurgery.rendering import fragments
from vfsurgery.rendering.fragments import Html, bar, folded, fragment, table

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def shown() -> dict[str, object]:
    """One of every kind that notebooks show."""
    a, b = tiny_nets.net("residual", 0), tiny_nets.net("residual", 1)
    images = tiny_nets.images(120)
    merged = surgery.merge(a, b, data=images)
    pruned = surgery.prune(a, 0.5)
    reports = {
        "merge": merged,
        "prune": pruned,
        "renormalize": surgery.renormalize(pruned, reference=a, data=images),
        "prune_units": surgery.prune_units(a, 0.3, data=images),
        "soup": surgery.soup([a, b], greedy=False, calibration=images),
        "run_passes": surgery.run_passes(a, ["reset"], data=images),
    }
    found: dict[str, object] = {name: surgery.report_of(model) for name, model in reports.items()}
    found["groups"] = surgery.find_groups(a, images[:2])
    found["diagnosis"] = surgery.diagnose(merged, [a, b], images)
    found["barrier"], found["flips"] = OPTIONS["barrier"], OPTIONS["flips"]
    found["diff"] = surgery.diff(a, merged, images[:2])
    return found


KINDS = ("merge", "prune", "renormalize", "prune_units", "soup", "run_passes")
KINDS += ("groups", "diagnosis", "barrier", "flips", "diff")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_html_that_needs_nothing(shown, kind):
    text = shown[kind]._repr_html_()
    reader = Reader(text)
    assert {"script", "iframe", "link", "img"}.isdisjoint(tag for tag, _ in reader.tags)
    assert not re.search(r"""(src|href)=(?!["']?#)|url\((?!#)|@import""", text)
    assert len(text) < 120_000


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_line_of_the_text_is_there(shown, kind):
    first = {"flips": "flips", "barrier": "from source a to source b, 3 points"}
    expected = first.get(kind, str(shown[kind]).partition("\n")[0])
    assert expected in Reader(shown[kind]._repr_html_()).text


def test_merges_show_certificate_trials_matches_and_groups(shown):
    report = shown["merge"]
    text = " ".join(Reader(report._repr_html_()).text)
    assert f"{report.certificates[0].mark} {report.certificates[0]}" in text
    assert report.trials
    assert all(trial.way in text and f"{trial.agreement:.2%}" in text for trial in report.trials)
    assert all(match.label in text for match in report.matches)
    assert "the whole report" in text


def test_a_certificate_that_fails_looks_so(shown):
    report = shown["merge"]
    failed = dataclasses.replace(report.certificates[0], error=1.0, mapped=0)
    text = dataclasses.replace(report, certificates=(failed,))._repr_html_()
    assert f"✗ {failed}" in " ".join(Reader(text).text)


def test_groups_unfold_to_their_members(shown):
    groups = shown["groups"]
    reader = Reader(groups._repr_html_())
    assert [tag for tag, _ in reader.tags].count("details") >= len(groups) + 1
    members = [str(member) for group in groups for member in group.members]
    assert [member for member in members if member not in reader.text] == []
    assert all(pin.reason in reader.text for pin in groups.pinned)


def test_names_are_escaped(shown):
    groups = shown["groups"]
    members = tuple(dataclasses.replace(member, parameter=EVIL) for member in groups.groups[0].members)
    evil = GroupSet((dataclasses.replace(groups.groups[0], members=members),), unknown_ops=(EVIL,))
    text = evil._repr_html_()
    assert "<img" not in text
    assert text.count("&lt;img") >= 3
    report = dataclasses.replace(shown["merge"], model=EVIL, notes=(EVIL,), groups=evil)
    assert "<img" not in report._repr_html_()
    assert "<img" in fragment("t", Html(EVIL))  # negative control: what is marked as HTML goes through


def test_colours_are_those_of_the_page_around():
    outside = re.sub(r"\.vfsurgery figure\{[^}]*\}", "", fragments.STYLE)
    assert not re.search(r"(?<![-\w])color:(?!inherit)|background:(?!none)", outside)
    assert "background:#fff;color:#222" in fragments.STYLE  # figures have dark text
    assert all(rule.startswith(".vfsurgery") for rule in re.findall(r"[^{}]+(?=\{)", fragments.STYLE))


def test_many_rows_are_folded_away():
    assert "<details open>" in folded("12", unfolded=True)
    assert "<details>" in folded("13")
    layers = nn.Sequential(*(nn.Linear(2, 2) for _ in range(14)))
    assert "<details open>" not in surgery.report_of(surgery.prune(layers, 0.5))._repr_html_()
    assert "<details open>" in surgery.report_of(surgery.prune(layers[:2], 0.5))._repr_html_()


def test_numbers_stand_to_the_right():
    text = table(["a", "b", "c", "d"], [["x", 1.5, "-2.5%", bar(0.25)], ["1", float("nan"), "3%", bar(2.0)]])
    assert re.findall(r"<th( [^>]*|)>", text) == ["", *[' class="number"'] * 3]
    assert ">0.25<" in text
    assert "100%" in bar(2.0)
    assert " 0%" in bar(float("nan"))
    assert table(["a"], []) == ""


def test_empty_columns_are_left_out():
    assert table(["a", "b"], [["x", ""], ["y", ""]]) == table(["a"], [["x"], ["y"]])
    assert "<th>b</th>" in table(["a", "b"], [["x", ""], ["y", "z"]])


def test_figures_of_one_page_do_not_share_ids(shown):
    other = surgery.diagnose(*(nn.Sequential(nn.Linear(4, 2)),) * 2, torch.randn(8, 4))
    ids = [set(Reader(found._repr_html_()).ids) for found in (shown["diagnosis"], other, shown["barrier"])]
    assert all(ids)
    assert not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2])


def test_a_notebook_without_ipywidgets_is_not_warned():
    """The library is imported as in a kernel; the control shows that tqdm alone would warn."""
    kernel = "import sys, types; sys.modules['ipykernel.zmqshell'] = types.ModuleType('z')\n"
    kernel += "sys.modules['IPython'] = types.SimpleNamespace(get_ipython=lambda: None)\n"
    kernel += "sys.modules['ipywidgets'] = None\n"
    for module, warned in (("vfsurgery", False), ("tqdm.auto", True)):
        run = [sys.executable, "-W", "always::tqdm.TqdmWarning", "-c", f"{kernel}import {module}"]
        found = subprocess.run(run, capture_output=True, text=True, check=False)
        assert ("IProgress not found" in found.stderr) is warned, found.stderr
        assert found.returncode == 0, found.stderr
