"""Who may import whom: each module only those below it, and heavy packages only where they do their work."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vfsurgery"

LADDER = [
    *("errors", "threads", "registry", "fragments", "groups", "report"),
    *("tracing", "results", "excerpts", "rules", "discovery", "maps", "computed"),
    *("batches", "holdout", "stats", "matching", "sources", "shares", "checkpoints", "verification"),
    *("passes", "costs", "budget", "pruning", "sparse", "toolbox", "differences", "running"),
    *("merging", "choosing", "renormalizing", "api", "shrinking"),
    *("architectures", "data", "demo", "paper_networks", "training"),
    *("figures", "notebook", "evaluation", "soups", "preserving", "flip_rates", "verdict", "page", "diagnosis"),
    *("hub", "recipes", "zoo", "testing", "cli", "__main__"),
]
"""From the bottom up; a package's own modules may import each other."""

ONLY_IN = {
    "scipy": ["matching/assignment.py"],
    "yaml": ["recipes/recipe.py", "recipes/text.py"],
    "networkx": [f"discovery/{name}.py" for name in ("nesting", "roles", "unification")],
    "pydantic": [
        "passes/options.py",
        *(f"recipes/{name}.py" for name in ("pruning_sections", "recipe", "sections")),
        *(f"recipes/stages/{name}.py" for name in ("entries", "sections", "store")),
        "recipes/wording.py",
    ],
    "click": [
        *(f"cli/{name}.py" for name in ("__init__", "cards", "diagnose", "groups", "merge", "options")),
        *(f"cli/{name}.py" for name in ("prune", "push", "replay", "run", "words", "zoo")),
    ],
    "tqdm": ["batches.py"],
    "matplotlib": ["figures.py"],
    "jinja2": ["hub/cards.py", "page.py"],
}
NEVER_WHEN_IMPORTED = (
    *("timm", "torchvision", "sklearn", "matplotlib", "jinja2"),
    *("scipy.optimize", "torch.utils.flop_counter"),
)

FILES = sorted(PACKAGE.rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of the modules that any import statement below ``tree`` names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rung(dotted: str) -> str:
    """The step of the ladder that ``vfsurgery.x.y`` stands on."""
    return dotted.split(".")[1]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_the_ladder(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not is_type_checking(node)]
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    below = LADDER if own == "__init__" else LADDER[: LADDER.index(own) + 1]
    for name in imported(tree):
        if name.split(".")[0] == "vfsurgery":
            assert rung(name) in below, f"{own} imports {name}, which stands above it"


def test_every_module_stands_on_the_ladder():
    modules = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES} - {"__init__"}
    assert modules == set(LADDER)


@pytest.mark.parametrize("package", ONLY_IN)
def test_packages_are_used_in_one_place(package):
    users = [
        str(path.relative_to(PACKAGE))
        for path in FILES
        if any(name.split(".")[0] == package for name in imported(ast.parse(path.read_text(encoding="utf-8"))))
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
