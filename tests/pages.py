"""What stands in Markdown pages, and whether it would work: fenced blocks by kind, and links."""

from __future__ import annotations

import doctest
import json
import re
import shlex
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import yaml
from click.exceptions import Exit

from vfsurgery.__main__ import main
from vfsurgery.errors import RecipeError
from vfsurgery.recipes.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>\S*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
UNCHECKED = re.compile(r"<!-- not checked: \S.* -->\n+\Z")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
WRITTEN = (".safetensors", ".pt", ".json", ".yaml", ".txt")
"""Endings of files that a page's commands read, as if its reader had them."""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page; ``excused`` if a comment above it says why it is not checked."""

    page: str
    line: int
    kind: str
    text: str
    excused: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, text: str) -> Iterator[Block]:
    """The fenced blocks of a page."""
    for found in FENCE.finditer(text):
        line, excused = text.count("\n", 0, found.start()) + 1, UNCHECKED.search(text, 0, found.start())
        yield Block(page, line, found["kind"], textwrap.dedent(found["text"]), excused is not None)


def check_block(block: Block, folder: Path) -> None:
    """Check a block in the way of its kind, its commands as if they were given in ``folder``.

    Raises:
        AssertionError: it would not work, or nobody knows how to check such a block.
    """
    assert block.kind in CHECKS, f"{block}: no check for {block.kind!r}; say <!-- not checked: why --> above it"
    if not block.excused:
        try:
            CHECKS[block.kind](block.text, folder)
        except Exception as error:
            raise AssertionError(f"{block}: {error}") from error


def check_python(text: str, folder: Path) -> None:
    """Whether it is a doctest, which ``tox -e docs`` runs, and says why it skips what it skips."""
    examples = doctest.DocTestParser().get_examples(text)
    assert text.startswith(">>> ") and examples, "write it as a doctest, so that it runs"
    for example in examples:
        skipped = example.options.get(doctest.SKIP)
        assert not skipped or re.search(r"# \w.*# doctest", example.source), f"say why it skips {example.source!r}"


def check_bash(text: str, folder: Path) -> None:
    """Whether each command is one that its program knows; none is run."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        for command in " ".join(shlex.split(line, comments=True)).split(" && "):
            words = [word for word in command.split() if not re.match(r"[A-Z_]+=", word)]
            if words:
                program = words[0].removeprefix(".venv/bin/")
                assert program in PROGRAMS, f"no check for the program {words[0]!r}"
                PROGRAMS[program](words[1:], folder)


def check_vfsurgery(arguments: list[str], folder: Path) -> None:
    """Whether the command's own parser takes the arguments."""
    for before, word in pairwise(["", *arguments]):
        if word.endswith(WRITTEN) and before not in ("-o", "--output"):
            (folder / word).parent.mkdir(parents=True, exist_ok=True)
            (folder / word).touch()
    if arguments[0] == "--help":
        return
    assert arguments[0] in main.commands, f"there is no command {arguments[0]!r}"
    try:
        main.commands[arguments[0]].make_context(arguments[0], arguments[1:])
    except Exit as end:  # --help is the end of parsing
        assert end.exit_code == 0


def check_python_script(arguments: list[str], folder: Path) -> None:
    """Whether there is such a script, and its text has the options."""
    if arguments[:2] == ["-m", "venv"]:
        return
    path = ROOT / arguments[0]
    assert path.is_file(), f"there is no {arguments[0]}"
    script = "\n".join(other.read_text(encoding="utf-8") for other in path.parent.glob("*.py"))
    for option in [word for word in arguments if word.startswith("--")]:
        assert f'"{option}"' in script, f"{arguments[0]} has no option {option}"


def check_pip(arguments: list[str], folder: Path) -> None:
    """Whether there are the extras."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for extra in re.findall(r"\.\[([\w,]+)\]", " ".join(arguments)):
        assert set(extra.split(",")) <= set(extras), f"there is no extra {extra}"


def check_tox(arguments: list[str], folder: Path) -> None:
    """Whether there are the environments."""
    tox = ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    for before, name in pairwise(arguments):
        assert before != "-e" or tox.has_section(f"testenv:{name}"), f"there is no environment {name}"


def check_pytest(arguments: list[str], folder: Path) -> None:
    """Whether there are the files."""
    for name in [word for word in arguments if not word.startswith("-")]:
        assert (ROOT / name).exists(), f"there is no {name}"


def take(arguments: list[str], folder: Path) -> None:
    """Take a program of the system as it is."""


def check_yaml(text: str, folder: Path) -> None:
    """Whether it is a recipe, or part of one: some of its keys, a stage, or a list of stages."""
    part = yaml.safe_load(text)
    frame = {"name": "part", "data": {}, "sources": ["vfsurgery.networks.demo:TinyResNet", {}], "stages": ["merge"]}
    one = {**frame, "sources": frame["sources"][:1]}
    stages = part if isinstance(part, list) else [part]
    wholes = [{**one, "stages": stages}, {**frame, "stages": stages}, {**frame, "stages": ["merge", *stages]}]
    if isinstance(part, dict) and "name" in part:
        wholes = [part]
    elif isinstance(part, dict) and set(part) & set(Recipe.model_fields):
        known = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("recipes/**/*.yaml"))]
        wholes = [{**recipe, **part} for recipe in (frame, *known)]
    refusals = []
    for whole in wholes:
        try:
            Recipe.from_yaml(yaml.safe_dump(whole, sort_keys=False))
        except RecipeError as error:
            refusals.append(str(error))
        else:
            return
    raise AssertionError("\n".join(refusals[:3]))


CHECKS: dict[str, Callable[[str, Path], object]] = {
    "python": check_python,
    "bash": check_bash,
    "yaml": check_yaml,
    "toml": lambda text, folder: tomllib.loads(text),
    "json": lambda text, folder: json.loads(text),
}
"""How to check a block of each kind."""

PROGRAMS: dict[str, Callable[[list[str], Path], object]] = {
    "vfsurgery": check_vfsurgery,
    **dict.fromkeys(("python", "python3"), check_python_script),
    "hf": take,
    "pip": check_pip,
    "tox": check_tox,
    "pytest": check_pytest,
    **dict.fromkeys(("mkdir", "tar"), take),
}
"""How to check the arguments of each program."""


def broken_links(path: Path) -> list[str]:
    """Links to files that are not there, or to headings that those files have not; the gallery is made by the site."""
    text, broken = FENCE.sub("", path.read_text(encoding="utf-8")), []
    for target, heading in LINK.findall(text):
        other = (path.parent / target).resolve() if target else path
        if other == ROOT / "docs" / "gallery.md":
            continue
        if not other.exists() or (heading and heading not in anchors(other.read_text(encoding="utf-8"))):
            broken.append(f"{target}#{heading}" if heading else target)
    return broken


def anchors(text: str) -> set[str]:
    """The headings of a page as the ends of links, as GitHub and the site make them."""
    titles = re.findall(r"^#+ +(.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}
