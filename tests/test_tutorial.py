"""The tutorial runs from top to bottom, and says what it says in the repository."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.ipynb"

POINTS = 10
"""Percentage points by which accuracies of 500 images may differ from machine to machine; the story needs far more."""


@pytest.fixture(scope="module")
def stored() -> NotebookNode:
    found = nbformat.read(TUTORIAL, as_version=4)
    nbformat.validate(found)
    return found


@pytest.fixture(scope="module")
def executed(stored) -> NotebookNode:
    found = copy.deepcopy(stored)
    for cell in code_cells(found):
        cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(TUTORIAL.parent)}}
    return NotebookClient(found, timeout=300, kernel_name="python3", resources=resources).execute()


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def accuracies(cell: NotebookNode) -> dict[str, float]:
    return {name: float(share) for name, share in re.findall(r"^(\w+) +([\d.]+)%$", printed(cell), re.MULTILINE)}


def kinds(cell: NotebookNode) -> list[str]:
    """Of results: those that are HTML are tables."""
    return [kind for output in cell.outputs if "data" in output for kind in sorted(output.data)]


def agree(one: NotebookNode, other: NotebookNode) -> bool:
    """Whether two cells gave the same kinds of results, and accuracies that are near."""
    numbers = accuracies(one), accuracies(other)
    same = kinds(one) == kinds(other) and numbers[0].keys() == numbers[1].keys()
    return same and all(abs(share - numbers[1][name]) <= POINTS for name, share in numbers[0].items())


@pytest.mark.slow
def test_it_runs_and_says_what_it_says(stored, executed):
    pairs = list(zip(code_cells(stored), code_cells(executed), strict=True))
    assert [agree(*pair) for pair in pairs] == [True] * len(pairs)
    changed = copy.deepcopy(pairs[1][0])
    changed.outputs[0].text = changed.outputs[0].text.replace("9", "1")
    assert not agree(changed, pairs[1][1])  # negative control


@pytest.mark.slow
def test_the_story_holds(executed):
    found = {name: share for cell in code_cells(executed) for name, share in accuracies(cell).items()}
    assert found["naive"] + 30 < found["aligned"] < found["merged"]
    assert found["merged"] > min(found["a"], found["b"]) - 5
    assert found["pruned"] + 20 < found["repaired"]


def test_it_is_stored_as_executed(stored):
    cells = code_cells(stored)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("text/html" in output.get("data", {}) for output in outputs) >= 6
    assert [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
    assert TUTORIAL.stat().st_size < 400_000
