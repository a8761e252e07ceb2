"""The table of all matchers and normalizations: cells that run, are refused, or fail; how it goes on; its page."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from click.testing import CliRunner
from torch import Tensor, nn

from vfsurgery.__main__ import main
from vfsurgery.matching import MATCHERS
from vfsurgery.testing.zoo import Cell, merge_pair, merge_zoo, page, read_cells
from vfsurgery.testing.zoo.matrix import ways

HERE = "tests.test_matrix"
MANY = len(list(MATCHERS)) * len(ways())
REFUSED = {
    "test_efficientnet": {"bias-calibration"},
    "test_vit": {"bias-calibration", "reset", "closed-form-reset"},
    "test_nfnet": {"reset", "closed-form-reset"},
}


class Tiny(nn.Module):
    """A network that says what images it takes."""

    default_cfg: ClassVar = {"input_size": (3, 8, 8)}

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def test_every_cell_of_a_pair_runs_or_has_its_reason():
    cells = merge_pair(f"{HERE}:Tiny")
    assert [(cell.matcher, cell.normalization) for cell in cells] == [(m, w) for m in MATCHERS for w in ways()]
    refused = {(cell.normalization, cell.reason) for cell in cells if cell.outcome != "runs"}
    assert refused == {("bias-calibration", "bias calibration is defined for networks without normalization layers")}
    assert {cell.subject for cell in cells} == {"own size"}


def test_what_is_wrong_is_called_a_failure(monkeypatch):
    monkeypatch.setattr("vfsurgery.passes.average.write_mean", lambda target, *rest: target.fill_(float("nan")))
    cells = merge_pair(f"{HERE}:Tiny")
    failed = [cell for cell in cells if cell.outcome == "fails"]
    assert any(cell.reason.endswith("the merged network gives outputs that are not finite") for cell in failed)


def test_a_matrix_goes_on_where_it_stopped(tmp_path: Path):
    table, seen = tmp_path / "table.csv", list[str]()
    names = [f"{HERE}:Tiny", f"{HERE}:Nothing"]
    merge_zoo(names[:1], table, done=lambda name, cells: seen.append(name))
    cells = merge_zoo(names, table, done=lambda name, cells: seen.append(name))
    assert seen == names and len(cells) == MANY + 1
    assert cells[-1].outcome == "fails" and "no model factory 'Nothing'" in cells[-1].reason
    assert merge_zoo(names, table, done=lambda name, cells: pytest.fail(f"{name} ran again")) == cells
    assert read_cells(table) == cells


def test_the_page_names_what_is_refused_and_why():
    rows = {"weights": ("runs", ""), "cca": ("refused", "no | data"), "zipit": ("refused", "no | data")}
    cells = [Cell("b", "64x64 images", name, "repair", *cell) for name, cell in rows.items()]
    cells += [Cell("b", "64x64 images", name, "reset", "refused", "none of them") for name in rows]
    cells += [Cell("a", "own size", name, way, "runs") for name in rows for way in ("repair", "reset")]
    text = page([], cells)
    assert "Of 12 merges 7 ran, 5 were refused for the reasons below, and 0 failed." in text
    assert "| a | no / data |" in text and "| b | none of them |" in text
    assert "| b | 64x64 images | 1 of 6 | **a** repair after cca, zipit; **b** reset |" in text
    assert text.index("| a | own size | 6 of 6 |  |") < text.index("| b | 64x64 images")


def test_the_command_writes_the_table_and_the_page(tmp_path: Path):
    names, table, report = tmp_path / "names.txt", tmp_path / "merges.csv", tmp_path / "page.md"
    names.write_text(f"{HERE}:Tiny\n")
    arguments = ["zoo", "--names", str(names), "--matrix", str(table), "--page", str(report)]
    result = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "zoo.csv")], catch_exceptions=False)
    assert result.exit_code == 0 and f"{MANY} merges, 0 failed" in result.output
    assert len(read_cells(table)) == MANY and "Every matcher with every normalization" in report.read_text()
    folder = CliRunner().invoke(main, ["zoo", "--names", str(names), "--matrix", str(tmp_path)])
    assert folder.exit_code == 2 and "name a CSV file with --matrix" in folder.output


@pytest.mark.zoo
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["test_efficientnet", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("test_vit", "test_nfnet"))],
)
def test_a_slice_of_the_zoo(name):
    cells = merge_pair(f"timm:{name}")
    assert len(cells) == MANY and not [cell for cell in cells if cell.outcome == "fails"]
    ran = {cell.normalization for cell in cells if cell.outcome == "runs"}
    refused = {cell.normalization for cell in cells if cell.outcome == "refused"}
    assert not ran & refused, "a matcher makes a difference"
    assert refused == REFUSED[name]
