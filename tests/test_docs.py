"""Every fenced block of the README and of docs/ is checked, links hold, and what pages list is what there is."""

from __future__ import annotations

import csv
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import test_layout
import yaml
from pages import FENCE, ROOT, Block, blocks, broken_links, check_block
from test_api_golden import public

import vfsurgery

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [block for path in PAGES for block in blocks(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))]
SITE = ROOT / "docs" / "site"
MADE = ("gallery.md", "tutorial.md")
"""Pages that the site makes, of the recipes and of the notebook."""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder with the recipes and the benchmarks' lists, in which commands are parsed."""
    for name in ("recipes", "docs/benchmarks"):
        (tmp_path / name).mkdir(parents=True)
        for path in (ROOT / name).iterdir():
            (tmp_path / name / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_fenced_block_is_checked(block, folder):
    check_block(block, folder)


def test_no_fence_is_overlooked():
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(FENCE.findall(text)), path


MISREAD = re.compile(r"\n\n {1,3}\S.*|\n(?: {4}\S|[^\s*|-]).*\n[*-] .*")
"""Lists as GitHub reads them and the site does not: a block inside that has less than four spaces, no line between."""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lists_are_lists_on_the_site_too(path):
    assert MISREAD.findall(FENCE.sub("", path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("text", ["- item\n\n  more", "- item\n\n    more\n- next", "\ntext\n- item"])
def test_a_misread_list_is_found(text):
    assert MISREAD.findall(text)
    assert not MISREAD.findall("\ntext\n\n- item\n  and on\n- next\n\n    more\n\n- last\n")


def test_doctests_of_all_pages_run_in_tox():
    assert "pytest --doctest-modules --doctest-glob=*.md --numprocesses 2 {posargs:vfsurgery docs README.md}" in (
        ROOT / "tox.ini"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("", "text\n", "no check for ''"),
        ("ini", "[a]\n", "no check for 'ini'"),
        ("python", "print(1)\n", "write it as a doctest"),
        ("python", ">>> train()  # doctest: +SKIP\n", "say why it skips"),
        ("bash", "curl example.org\n", "no check for the program 'curl'"),
        ("bash", "vfsurgery mrege a.pt b.pt\n", "there is no command 'mrege'"),
        ("bash", "vfsurgery run recipes/digits.yaml --quite\n", "No such option"),
        ("bash", "vfsurgery run\n", "Missing parameter"),
        ("bash", "vfsurgery merge a.pt b.pt --model m:n --input-size 3,4 -o c.pt\n", "is no shape"),
        ("bash", "python docs/benchmarks/nothing.py\n", "there is no docs/benchmarks/nothing.py"),
        ("bash", "python docs/benchmarks/pairs.py --outptu x\n", "has no option --outptu"),
        ("bash", "pip install -e '.[dcos]'\n", "there is no extra dcos"),
        ("bash", "mkdir a && tox -e nothing\n", "there is no environment nothing"),
        ("bash", "pytest tests/test_nothing.py\n", "there is no tests/test_nothing.py"),
        ("yaml", "name: tiny\nsources: [{modle: timm:resnet18}]\nstages: [fold]\n", "modle"),
        ("yaml", "name: tiny\n", "nothing to do"),
        ("yaml", "trainig: {epochs: 3}\n", "trainig"),
        ("toml", "a = \n", "Invalid value"),
        ("json", "{", "Expecting"),
    ],
)
def test_a_wrong_block_is_found(kind, text, message, folder):
    with pytest.raises(AssertionError, match=re.escape(message)):
        check_block(Block("page.md", 1, kind, text, excused=False), folder)


def test_a_block_is_excused_by_a_reason_alone(folder):
    fence = "```python\nbroken(\n```\n"
    reason, none, bare = (
        next(blocks("p", text + fence)) for text in ("<!-- not checked: why -->\n\n", "", "<!-- x -->\n")
    )
    check_block(reason, folder)
    assert (reason.excused, none.excused, bare.excused) == (True, False, False)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_hold(path):
    assert broken_links(path) == []


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "b.md").write_text("# One two\n")
    page = tmp_path / "a.md"
    page.write_text("[x](b.md) [x](b.md#one-two) [x](b.md#three) [x](c.md) [x](https://example.org/c.md)\n")
    assert broken_links(page) == ["b.md#three", "c.md"]


def test_every_page_is_in_the_sites_navigation():
    listed = re.findall(r"[\w/]+\.md", (SITE / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2])
    assert sorted(listed) == sorted([*(str(path.relative_to(ROOT / "docs")) for path in PAGES[1:]), *MADE])


def test_every_public_name_is_in_the_reference_once():
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "api").glob("*.md")))
    names = public(name for name, value in vars(vfsurgery).items() if not inspect.ismodule(value))
    listed = re.findall(r"^::: vfsurgery\.(\w+|groups\.axes)$", text, re.MULTILINE)
    assert sorted(listed) == sorted([*names, "groups.axes"])


def test_contributing_has_a_row_for_each_folder_from_the_bottom_up():
    text = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8").partition("## Where things are")[2]
    rows = re.findall(r"^\| `([\w/]+?)(?:/|\.py)` \|", text, re.MULTILINE)
    files = (str(path.relative_to(test_layout.PACKAGE).with_suffix("")) for path in test_layout.FILES)
    assert sorted(rows) == sorted({test_layout.folder(file) for file in files} - {"__init__", "__main__"})
    floors = [test_layout.floor_of(f"{row}/file", test_layout.FLOORS)[0] for row in rows]
    assert floors == sorted(floors, reverse=True)


def test_what_pages_say_of_coverage_is_what_was_surveyed():
    with (ROOT / "docs" / "coverage.csv").open(encoding="utf-8", newline="") as file:
        surveyed = list(csv.DictReader(file))
    verified = [row for row in surveyed if row["verified"] == "True"]
    low = [row for row in verified if float(row["coverage"]) <= 0.95]
    index, limits = (
        " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split()) for page in ("index.md", "limits.md")
    )
    assert f"all {len(surveyed):,} models of torchvision and timm: {len(verified):,} are proven" in index
    assert (
        f"{len(surveyed) - len(verified)} of {len(surveyed):,} models of torchvision and timm are not verified"
        in limits
    )
    assert f"{len(low)} of the verified ones have 95 %" in limits


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_picture_is_described_by_the_figures_that_are_drawn_in_it(page):
    (described,) = re.findall(r"!\[([^]]*)\]\([\w/]*overview\.svg\)", (ROOT / page).read_text(encoding="utf-8"))
    drawn = re.findall(r"<!-- (\d+) -->", (ROOT / "docs/images/overview.svg").read_text(encoding="utf-8"))
    bars = drawn[-6:]  # for each of two pairs: averaged, matched, matched and renormalized
    assert set(bars) == set(re.findall(r"\d+", described))


def figures(text: str) -> list[str]:
    """Accuracies, seconds and ratios: numbers with a decimal point."""
    return re.findall(r"(?<![\d.])\d+\.\d+", text)


def test_headline_figures_stand_on_the_pages_that_they_are_from():
    headline = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \|([^|]+\|[^|]*)\| \[[^]]+\]\(([\w/]+\.md)", headline, re.MULTILINE)
    pages = {page: (ROOT / "docs" / page).read_text(encoding="utf-8") for _, page in rows}
    assert len(rows) >= 15 and {*pages} >= {"benchmarks/pairs.md", "benchmarks/speed.md"}
    assert [figure for row, page in rows for figure in figures(row) if figure not in figures(pages[page])] == []
    results = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Results")[2].partition("\n## ")[0]
    shown = figures("".join(re.findall(r"^\|.*$", results, re.MULTILINE)))
    assert len(shown) >= 15 and [figure for figure in shown if figure not in figures("".join(pages.values()))] == []


def hooks():
    """The site's hooks, which need MkDocs."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("hooks", SITE / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gallery_has_every_recipe_its_comment_and_its_text():
    text = hooks().gallery(ROOT)
    recipes = sorted((ROOT / "recipes").rglob("*.yaml"))
    assert text.count("\n## ") == len(recipes) > 0
    for path in recipes:
        assert f"`{path.relative_to(ROOT)}`" in text and f"vfsurgery run {path.relative_to(ROOT)}" in text
        shown = re.search(
            rf'note "{path.name}"\n\n    ```yaml\n(.*?)\n    ```',
            text[text.index(f"`{path.relative_to(ROOT)}`") :],
            re.DOTALL,
        )
        assert shown is not None
        assert yaml.safe_load(shown[1]) == yaml.safe_load(path.read_text(encoding="utf-8"))
    for picture in re.findall(r"\((images/recipes/.*?)\)", text):
        assert (ROOT / "docs" / picture).is_file()


def test_the_tutorial_is_a_page_with_all_that_the_notebook_holds():
    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))
    text, place = hooks().tutorial(ROOT / "docs" / "tutorial.ipynb"), 0
    for cell in notebook["cells"]:
        kinds = [output.get("data", {"text": output.get("text")}) for output in cell.get("outputs", [])]
        shown = [kind.get("text/html", kind.get("text", kind.get("text/plain"))) for kind in kinds]
        for part in (cell["source"], *shown):
            place = text.index("".join(part).rstrip(), place)  # in this order


def test_links_to_the_notebook_lead_to_its_page():
    assert (
        hooks().on_page_markdown("[x](tutorial.ipynb) [y](../tutorial.ipynb)") == "[x](tutorial.md) [y](../tutorial.md)"
    )


def test_the_site_shows_doctests_without_what_only_tests_read():
    page = "```python\n>>> f()  # doctest: +SKIP\n\n```\n"
    assert hooks().on_page_markdown(page) == "```pycon\n>>> f()\n```\n"


FETCHED = re.compile(r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=[\"']?https?://[^\"'> ]*")


def test_the_site_builds_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    options = ["--config-file", str(SITE / "mkdocs.yml"), "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        [*build, *options], capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert (done.returncode, done.stderr) == (0, "")
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert {page: FETCHED.findall(page.read_text(encoding="utf-8")) for page in pages} == {page: [] for page in pages}
    assert len(pages) > len(PAGES)
    assert (tmp_path / "site" / "search" / "search_index.js").is_file()  # what searches without a server read


def test_something_fetched_is_found():
    assert FETCHED.search('<script async src="https://example.org/x.js">')
    assert not FETCHED.search('<a href="https://example.org"> <script src="assets/x.js">')
