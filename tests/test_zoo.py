"""The survey of model libraries: what it finds, how it goes on, and what it says of models that fail."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import ClassVar

import pytest
import timm
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import vfsurgery as surgery
from vfsurgery.__main__ import main
from vfsurgery.discovery.verification import Verification
from vfsurgery.errors import OptionError
from vfsurgery.testing.zoo import Survey, model_names, page, read_table, survey_model, survey_zoo, twins
from vfsurgery.testing.zoo import survey as zoo

HERE = "tests.test_zoo"


class Tiny(nn.Module):
    """A network that says what images it takes."""

    default_cfg: ClassVar = {"input_size": (3, 8, 8)}

    def __init__(self, img_size: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class Rotated(Tiny):
    """Its four channels are written and read by linear layers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))


class Failing(Tiny):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("nothing works today")


class Hungry(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2**29)


class Slow(Tiny):
    def __init__(self) -> None:
        super().__init__()
        time.sleep(60)


class Crashing(Tiny):
    def __init__(self) -> None:
        os._exit(7)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "table.csv"


def test_a_survey_goes_on_where_it_stopped(table: Path) -> None:
    seen: list[str] = []
    first = survey_zoo([f"{HERE}:Tiny"], table, done=lambda survey: seen.append(survey.model))
    assert [survey.verified for survey in first] == [True]
    tiny = first[0]
    assert (tiny.groups, tiny.parameters, tiny.failure, tiny.subject) == (1, 34, "", "own size")
    assert tiny.coverage == round(32 / 34, 6) and tiny.error < 1e-9 < tiny.control_error
    names = ["timm:test_resnet", f"{HERE}:Tiny", f"{HERE}:Failing"]
    found = survey_zoo(names, table, jobs=2, done=lambda survey: seen.append(survey.model))
    assert [survey.model for survey in found] == names and found[1] == tiny
    assert sorted(seen) == sorted(names), "each model once"
    assert found[0].verified and found[0].subject == "96x96 images"
    assert not found[2].verified and "nothing works today" in found[2].failure
    again = survey_zoo(names, table, done=lambda survey: pytest.fail(f"{survey.model} ran again"))
    assert [survey.model for survey in again] == names
    assert read_table(table)[0] == tiny


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("Slow", "took longer than 2 s"),
        ("Crashing", "its process crashed (7)"),
        ("Hungry", "needs more than its 6 GiB of memory"),
        ("Nothing", "OptionError: tests.test_zoo has no model factory 'Nothing'"),
    ],
)
def test_a_model_that_fails_is_listed_with_its_reason(model: str, reason: str, table: Path) -> None:
    name = f"{HERE}:{model}"
    survey = survey_zoo([name], table, memory=6, limit=2 if model == "Slow" else 100)[0]
    assert not survey.verified and survey.failure.startswith(reason)
    assert f"| {name} | {reason}" in page([survey])


def test_the_page_has_totals_failures_shortfalls_and_every_model() -> None:
    text = page(
        [
            Survey("timm:a", groups=3, coverage=0.99, seconds=1.5, verified=True, subject="own size"),
            Survey("timm:b", groups=1, coverage=0.4, seconds=0.5, verified=True, reasons="roll (8)", unknown_ops="erf"),
            Survey("timm:c", groups=1, failure="not verified: all groups together"),
            Survey("torchvision:d", failure="took longer | than 5 s"),
            Survey("torchvision:e", failure=zoo._failure(proven(1e-6))),
            Survey(
                "timm:f",
                2,
                0.98,
                verified=True,
                subject="twin",
                continuous=0.5,
                symmetries="1 general linear",
                mapped=1,
            ),
            Survey("timm:g", 1, 0.97, verified=True, subject="own size", continuous=0.0),
        ]
    )
    whole = {source: len(model_names([source])) for source in zoo.SOURCES}
    assert f"| timm | 5 of {whole['timm']} | 4 | 1 | 3 | 0.50 |" in text
    assert f"| torchvision | 2 of {whole['torchvision']} | 0 | 0 | 0 |  |" in text
    assert "| timm:b | 40.0% | roll (8) erf |" in text
    assert "| torchvision:d | took longer \\| than 5 s |" in text
    assert (
        "| torchvision:e | undecided: error 1e-05, and a change of the weights in their last place makes 1e-06 |"
        in text
    )
    assert zoo._failure(proven(1e-12)) == "not verified: g0"
    assert "| timm:a | 3 | 99.00% |  | 0 | 1.50 | nan | own size |" in text
    assert "| timm:f | 2 | 98.00% | 50.0% | 0 | 0.00 | nan | twin |" in text
    assert "In 1 of 2 models that were looked at" in text and "1 are proven, 0 are not" in text
    assert "| timm:f | 50.0% | 1 general linear | 1 on twin | yes |" in text
    assert "Symmetries beyond orders" not in page([Survey("timm:a", verified=True)])


def proven(rounding: float) -> zoo.Proven:
    """A proof that fails, but for rounding of that size."""
    return zoo.Proven("own size", Verification(1e-5, "g0", 0.1, 1e-9, 1, rounding=rounding))


def test_symmetries_that_are_claimed_have_to_be_mapped_in_the_proof(table: Path) -> None:
    survey = survey_zoo([f"{HERE}:Rotated"], table)[0]
    assert survey.verified and (survey.symmetries, survey.mapped) == ("1 general linear", 1)
    assert survey.continuous == round(24 / 26, 6)  # all but the bias of the head
    assert read_table(table)[0] == survey
    untried = zoo.Proven("own size", Verification(0.0, "", 0.1, 1e-9, 2, continuous=1), claimed=2, mapped=1)
    assert zoo._failure(untried) == "not proven: 1 groups were not mapped by members of their symmetry"


def test_a_table_of_fewer_columns_goes_on_with_all(table: Path) -> None:
    table.write_text("model,groups,coverage,error,verified\ntimm:old,3,0.5,nan,True\n")
    survey_zoo([f"{HERE}:Tiny"], table)
    old, new = read_table(table)
    assert (old.model, old.groups, old.verified, old.continuous) == ("timm:old", 3, True, None)
    assert (new.model, new.continuous, new.mapped) == (f"{HERE}:Tiny", 0.0, 0)


def test_names_are_listed_by_library_and_pattern() -> None:
    assert model_names(["timm"], "test_vit") == ["timm:test_vit"]
    assert "torchvision:resnet18" in model_names(zoo.SOURCES, "resnet18*")
    with pytest.raises(OptionError, match="no model of timm matches 'nonsense'"):
        model_names(["timm"], "nonsense")


def test_the_command_writes_table_and_page(tmp_path: Path) -> None:
    table, report = tmp_path / "t.csv", tmp_path / "page.md"
    arguments = ["zoo", "--source", "timm", "--filter", "test_resnet", "-o", str(table), "--page", str(report)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "timm:test_resnet: " in result.output and "1 of 1 verified" in result.output
    assert read_table(table)[0].verified and "| timm | 1 of " in report.read_text()


def test_weights_are_drawn_cheaply_but_drawn() -> None:
    model = twins.build_quickly("timm:test_vit")
    state = model.state_dict()
    again = twins.build_quickly("timm:test_vit").state_dict()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all() and torch.equal(parameter, again[name])
        assert parameter.ndim < 2 or len(parameter.unique()) > 2, name
    bound = state["blocks.0.attn.qkv.weight"].shape[1] ** -0.5
    assert 0.9 * bound < state["blocks.0.attn.qkv.weight"].max() <= bound


def test_a_twin_serves_where_images_cannot_be_smaller() -> None:
    model = twins.build_quickly("timm:deit_tiny_patch16_224")
    groups = surgery.find_groups(model)
    first, last = list(twins.subjects("timm:deit_tiny_patch16_224", model, groups))[::3]
    assert first.name == "img_size=96 twin" and first.inputs[0].shape == (2, 3, 96, 96)
    assert last.name == "own size" and last.model is model
    assert [group.size for group in first.groups] == [group.size for group in groups]


def test_what_is_too_large_is_traced_without_weights_and_a_shallow_twin_verified() -> None:
    survey = survey_model("timm:vit_tiny_patch16_224", memory=0.1)
    assert survey.verified and survey.subject == "depth=2 twin" and survey.parameters == 5_717_416
    assert (
        survey_model("timm:vgg11", memory=0.1).failure == "too large to verify, and its library makes no smaller twin"
    )


NETWORKS = [
    *("alexnet", "squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5"),
    *("efficientnet_b0", "regnet_y_400mf", "resnet18", "densenet121", "swin_t", "lraspp_mobilenet_v3_large"),
    "quantized_mobilenet_v2",
]
IN_CI = ["test_vit", "test_convnext", "shufflenet_v2_x0_5", "mobilenet_v3_small", "lraspp_mobilenet_v3_large"]


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("library", "name"),
    [
        pytest.param(library, name, marks=[] if name in IN_CI else pytest.mark.thorough)
        for library, names in (("timm", timm.list_models("test_*")), ("torchvision", NETWORKS))
        for name in names
    ],
)
def test_small_models_are_proven_and_covered(library: str, name: str) -> None:
    torch.set_num_threads(1)
    survey = survey_model(f"{library}:{name}")
    assert survey.verified, survey
    assert survey.coverage > 0.95 and survey.unknown_ops == "", survey
