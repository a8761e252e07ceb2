"""A recipe may expect something of the features that a merge keeps: measured where asked, and 1 where preserved."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import vfsurgery as surgery
from vfsurgery.data import digits
from vfsurgery.errors import RecipeError
from vfsurgery.networks.demo import TinyConvNet
from vfsurgery.recipes.recipe import Recipe
from vfsurgery.recipes.stages import comparing
from vfsurgery.scoring.expectations import Expectation, RatioRow
from vfsurgery.training import from_seed

TEXT = """\
name: tiny
threads: 1
data: {name: digits}
sources: [{model: "vfsurgery.networks.demo:TinyConvNet", options: {width: 4}}, {}]
stages:
  - train: {epochs: 1}
  - compare:
      ways:
        - kept at 0.5: {merge: {matching: identity, renormalize: none, preserve: 3}}
        - unasked: {merge: {matching: identity, renormalize: none}}
        - direct: {merge: {matching: identity, renormalize: none}}
      published: {a: 90, ratio direct: 0.5, ratio unasked: 0.25}
      expect:
        - ratio direct < ratio kept at 0.5 at 0% < 1.5
        - ratio direct within 0.5 of published
"""


def row(label: str, *merges: str) -> RatioRow:
    found = RatioRow.parse(label, merges)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The recipe's run, and the labels of the merges that were diagnosed, in order."""
    folder = tmp_path_factory.mktemp("ratios")
    diagnosed = []

    def counted(model, *arguments, **options):
        diagnosed.append(model)
        return surgery.diagnose(model, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "diagnose", counted)
        run = Recipe.from_yaml(TEXT).run(folder, progress=False)
    return run, diagnosed


@pytest.fixture(scope="module")
def chain():
    """Four linear layers, each twice the identity, and inputs."""
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
    for layer in model:
        layer.weight.data = 2 * torch.eye(4)
    return model, torch.randn(16, 4)


@pytest.mark.parametrize(
    ("label", "merges", "expected"),
    [
        ("ratio direct", ["direct"], ("direct", 1.0)),
        ("ratio direct at 5%", ["direct"], ("direct", 0.05)),
        ("ratio direct at 100%", ["direct"], ("direct", 1.0)),
        ("ratio WM at 0.1", ["WM at 0.1"], ("WM at 0.1", 1.0)),
        ("ratio WM at 0.1 at 50%", ["WM at 0.1"], ("WM at 0.1", 0.5)),
        ("ratio x at 50%", ["x", "x at 50%"], ("x at 50%", 1.0)),  # a label is a label, whatever it looks like
    ],
)
def test_row_names_a_merge_and_a_depth(label, merges, expected):
    found = row(label, *merges)
    assert (found.label, found.merge, found.depth) == (label, *expected)


@pytest.mark.parametrize("label", ["direct", "ratio dirct", "ratio direct at 101%", "ratio direct at 50", "ratio "])
def test_what_is_no_row_is_none(label):
    assert RatioRow.parse(label, ["direct"]) is None


def test_bound_at_a_depth_is_the_largest_ratio_from_there_on(chain):
    model, images = chain
    pruned = copy.deepcopy(model)
    pruned[1].weight.data /= 4  # ratios 1, 1/4, 1/4, 1
    pruned[3].weight.data *= 2  # ... and 1/2 at the end
    found = surgery.diagnose(pruned, model, images, progress=False)
    assert found.ratios == pytest.approx((1, 0.25, 0.25, 0.5))
    depths = {0: 1.0, 33: 0.505, 34: 0.5, 66: 0.5, 100: 0.5}  # layers lie at thirds; 0.33 is just before the second
    for percent, bound in depths.items():
        assert found.bound_at(percent / 100) == pytest.approx(bound, abs=1e-6)
    assert found.bound_at(1.0) == pytest.approx(0.5)


def test_preserved_layers_have_ratio_one_and_merged_ones_have_not():
    a, b = (from_seed(lambda: TinyConvNet(4), seed) for seed in (0, 1))
    images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"data": images, "matching": "identity", "renormalize": None, "progress": False}
    bounds = {}
    for preserve in (0, 4):
        merged = surgery.merge(a, b, preserve=preserve, **options)
        found = surgery.diagnose(merged, [a, b], images, progress=False)
        bounds[preserve] = [found.bound_at(depth) for depth in (0.0, 0.2, 1.0)]
    assert bounds[4][:2] == [1, 1]
    assert max(bounds[0]) < 0.95 and bounds[4][2] < 0.95
    assert bounds[0][2] < bounds[4][2]  # what is preserved reaches the last layer


def test_no_ratio_anywhere_is_nan_and_meets_no_expectation(chain):
    model, images = chain
    found = surgery.diagnose(model, model, torch.zeros_like(images), progress=False)
    bound = found.bound_at(1.0)
    assert not Expectation.parse("ratio x < 9").check({"ratio x": bound}).holds


def test_numbers_stand_for_themselves_between_rows():
    chain = Expectation.parse("ratio x < 0.2 < ratio y")
    assert chain.check({"ratio x": 0.1, "ratio y": 0.3}).found == (0.1, 0.2, 0.3)
    assert chain.check({"ratio x": 0.1, "ratio y": 0.3}).holds
    assert not chain.check({"ratio x": 0.2, "ratio y": 0.3}).holds
    assert not chain.check({"ratio x": 0.1, "ratio y": 0.1}).holds


def test_numbers_alone_expect_nothing():
    with pytest.raises(ValueError, match=r"'1 < 2' expects nothing: write LABEL < LABEL"):
        Expectation.parse("1 < 2")


def test_only_what_is_asked_for_is_diagnosed(ran):
    run, diagnosed = ran
    assert len(diagnosed) == 2
    found = run.findings[0].said("compare")
    assert list(found.values["diagnoses"]) == ["kept at 0.5", "direct"]
    assert diagnosed[-1] is run.findings[0].bench.networks["merged"].model


def test_ratios_are_those_of_the_diagnosis(ran):
    run, diagnosed = ran
    images = digits().calibration
    sources = run.findings[0].bench.networks["merged"].origins
    found = surgery.diagnose(diagnosed[-1], sources, images, progress=False)
    (chain, band) = run.outcomes()[0]
    assert chain.holds and chain.found[1:] == (1.0, 1.5)
    assert chain.found[0] == band.found[0] == found.bound[-1] == found.ratios[-1]
    assert band.published == 0.5


def test_ratios_stand_in_the_table_and_the_report(ran):
    run, _ = ran
    ratio = run.outcomes()[0][0].found[0]
    lines = [line.split() for line in str(run).splitlines()]
    assert ["ratio", "direct", f"{ratio:.3g}", "0.5"] in lines
    assert ["ratio", "kept", "at", "0.5", "at", "0%", "1"] in lines
    assert not any(line[:2] == ["ratio", "unasked"] for line in lines)
    steps = json.loads((run.output / "report.json").read_text())["runs"][0]["steps"]
    found = next(step["result"] for step in steps if "compare" in step["stage"])
    assert found["ratios"] == {"ratio direct": ratio, "ratio kept at 0.5 at 0%": 1.0}
    assert list(found["diagnoses"]) == ["kept at 0.5", "direct"]
    assert found["diagnoses"]["direct"]["curves"]["bound"][-1] == ratio


WRONG = [
    ("- ratio direct <", "- ratio dirct <", "unknown way 'dirct'; did you mean 'direct'? accepted: direct, kept"),
    ("at 0% <", "at 110% <", "unknown way 'kept at 0.5 at 110%'; did you mean 'kept at 0.5'?"),
    ("- ratio direct <", "- ratio ensemble <", "unknown way 'ensemble'; accepted: direct, kept at 0.5, unasked"),
    ("ratio direct within", "ratio kept at 0.5 within", "nothing is published for 'ratio kept at 0.5', so it can be"),
    ("ratio unasked: 0.25", "ratio unaskd: 0.25", "unknown way 'unaskd'; did you mean 'unasked'? accepted"),
]


@pytest.mark.parametrize(("old", "new", "message"), WRONG, ids=[new for _, new, _ in WRONG])
def test_wrong_row_is_explained(old, new, message):
    assert old in TEXT
    with pytest.raises(RecipeError, match=r"^the recipe:") as caught:
        Recipe.from_yaml(TEXT.replace(old, new))
    assert message in " ".join(str(caught.value).split())
