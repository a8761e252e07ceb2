"""Who may import whom: each folder only those below it, and heavy packages only where they do their work."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vfsurgery"

FLOORS = (
    {"__main__"},
    {"__init__", "cli"},
    {"recipes/stages"},
    {"recipes"},
    {"hub", "rendering"},
    {"scoring/soups"},
    {"merging/multitask", "scoring", "testing", "testing/zoo"},
    {"merging", "pruning/renormalizing", "pruning/units"},
    {"passes", "training"},
    {"combining", "discovery/verification", "matching", "pruning"},
    {"stats/imagined"},
    {"checkpoints", "discovery"},
    {"discovery/rules", "records", "stats"},
    {"data", "tracing"},
    {"groups", "networks", "registry"},
    {"errors", "shown"},
)
"""From the top down: what stands on one floor imports only what stands on a lower one. A folder that is not named
belongs to the one around it; docs/contributing.md says what is in which."""

MOST_ENTRIES = 26
"""At the top of the package: more, and nobody finds the room from the list."""

ONLY_IN = {
    "scipy": ["matching/assignment.py"],
    "yaml": ["checkpoints/plain.py", "cli/run.py", "recipes/recipe.py", "recipes/text.py"],
    "networkx": [f"discovery/{name}.py" for name in ("components", "nesting", "roles")],
    "pydantic": [
        *(f"recipes/{name}.py" for name in ("bench", "recipe", "sections", "stage")),
        *(f"recipes/stages/{name}.py" for name in ("comparing", "looking", "surgery")),
        "recipes/text.py",
        "records/options.py",
    ],
    "click": [
        *(f"cli/{name}.py" for name in ("__init__", "cards", "combine", "compare", "diagnose", "groups", "jobs")),
        *(f"cli/{name}.py" for name in ("merge", "multitask", "options", "prune", "push", "replay", "run", "words")),
        "cli/zoo.py",
    ],
    "tqdm": ["data/progress.py"],
    "matplotlib": ["rendering/figures.py"],
    "jinja2": ["hub/cards.py", "rendering/page.py"],
}
NEVER_WHEN_IMPORTED = (
    *("timm", "torchvision", "sklearn", "matplotlib", "jinja2"),
    *("scipy.optimize", "torch.utils.flop_counter"),
)

FILES = sorted(PACKAGE.rglob("*.py"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of what any import statement below ``tree`` names, in functions and for type checkers too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(package: Path) -> nx.DiGraph:
    """Which file of a package imports which, as paths without their endings; an import of a folder is of its first."""
    files = {str(path.relative_to(package).with_suffix("")): path for path in package.rglob("*.py")}
    graph = nx.DiGraph()
    graph.add_nodes_from(files)
    for name, path in files.items():
        for dotted in imported(parsed(path)):
            parts = dotted.split(".")
            if parts[0] == package.name:
                tries = ["/".join(parts[1:length]) for length in range(len(parts), 0, -1)]
                found = (place for each in tries for place in (each, f"{each}/__init__".lstrip("/")) if place in files)
                graph.add_edge(name, next(found))
    return graph


def folder(file: str) -> str:
    """The folder of a file; of one at the top, its name."""
    return file.rpartition("/")[0] or file


def box(file: str) -> str:
    """What of the top a file belongs to."""
    return file.partition("/")[0]


def floor_of(file: str, floors: Sequence[Collection[str]]) -> tuple[int, str]:
    """The number of its floor, from the top, and the name by which that knows it; -1 where none does."""
    place = folder(file)
    while place:
        for number, floor in enumerate(floors):
            if place in floor:
                return number, place
        place = place.rpartition("/")[0]
    return -1, ""


def upward(graph: nx.DiGraph, floors: Sequence[Collection[str]]) -> list[str]:
    """Imports of what does not stand on a lower floor, but for files of the same folder."""
    found: list[str] = []
    for file, other in graph.edges:
        (own, name), (its, other_name) = floor_of(file, floors), floor_of(other, floors)
        if name != other_name and not own < its:
            found.append(f"{file} imports {other}")
    return found


def circles(graph: nx.DiGraph, part: Callable[[str], str]) -> list[set[str]]:
    """Parts of a package that import each other."""
    parts = nx.DiGraph((part(file), part(other)) for file, other in graph.edges if part(file) != part(other))
    return [found for found in nx.strongly_connected_components(parts) if len(found) > 1]


def entries(package: Path) -> list[str]:
    """What a list of the folder shows."""
    return sorted(path.name for path in package.iterdir() if path.name != "__pycache__")


@pytest.fixture(scope="module")
def graph() -> nx.DiGraph:
    return imports(PACKAGE)


def test_folders_import_only_what_stands_below_them(graph):
    assert upward(graph, FLOORS) == []


def test_every_folder_stands_on_a_floor(graph):
    assert [file for file in graph if floor_of(file, FLOORS)[0] < 0] == []
    places = {folder(file) for file in graph}
    assert [name for floor in FLOORS for name in floor if name not in places] == []


@pytest.mark.parametrize("part", [str, lambda file: floor_of(file, FLOORS)[1], box], ids=["files", "folders", "top"])
def test_nothing_imports_itself_in_a_circle(graph, part):
    assert circles(graph, part) == []


def test_the_list_of_the_top_is_short():
    assert len(entries(PACKAGE)) <= MOST_ENTRIES


SMALL = {"__init__": "", "low/__init__": "", "low/a": "", "low/b": "", "high/a": "from small.low import a"}
SMALL_FLOORS = ({"__init__"}, {"high"}, {"low"})

PLANTED = {
    "at the top": "from small.high import a",
    "by its whole name": "import small.high.a",
    "in a function": "def f():\n    from small.high.a import x",
    "for type checkers": "if TYPE_CHECKING:\n    from small.high.a import X",
    "of a nested folder": "import small.high.inner.a",
    "of the package itself": "import small",
}


def small(folder: Path, **changed: str) -> Path:
    """A package of two floors."""
    for name, text in {**SMALL, **changed}.items():
        path = folder / "small" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "small"


@pytest.mark.parametrize("planted", PLANTED)
def test_an_import_that_goes_up_is_found(tmp_path, planted):
    assert upward(imports(small(tmp_path / "good")), SMALL_FLOORS) == []
    found = upward(imports(small(tmp_path / "bad", **{"low/b": PLANTED[planted], "high/inner/a": ""})), SMALL_FLOORS)
    assert [line.split()[0] for line in found] == ["low/b"]


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        (str, {"low/a": "import small.low.b", "low/b": "def f():\n    import small.low.a"}),
        (folder, {"low/b": "import small.high.b", "high/b": ""}),
        (box, {"high/inner/a": "", "low/b": "import small.high.inner.a"}),
    ],
    ids=["files", "folders", "top"],
)
def test_a_circle_is_found(tmp_path, part, changed):
    assert circles(imports(small(tmp_path / "good")), part) == []
    graph = imports(small(tmp_path / "bad", **changed))
    assert len(circles(graph, part)) == 1
    if part is not str:  # only the larger parts are in a circle
        assert circles(graph, str) == []


def test_one_entry_too_many_is_found(tmp_path):
    names = {f"low{number}": "" for number in range(MOST_ENTRIES - 3)}
    assert len(entries(small(tmp_path / "good", **names))) == MOST_ENTRIES
    assert len(entries(small(tmp_path / "bad", **names, more=""))) > MOST_ENTRIES


@pytest.mark.parametrize("package", ONLY_IN)
def test_packages_are_used_in_one_place(package):
    users = [
        str(path.relative_to(PACKAGE))
        for path in FILES
        if any(name.split(".")[0] == package for name in imported(parsed(path)))
    ]
    assert users == ONLY_IN[package]


def test_importing_the_library_imports_no_model_zoo():
    code = f"import sys, vfsurgery.__main__; print([name for name in {NEVER_WHEN_IMPORTED} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout == "[]\n"


def test_readme_and_ci_run_the_same_test_command():
    commands = [line for line in (ROOT / "README.md").read_text().splitlines() if ".venv/bin/" in line]
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()
