"""What the site does to pages before it renders them, and the pages that it makes itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK, TUTORIAL = "tutorial.ipynb", "tutorial.md"
GALLERY = "gallery.md"
INTRODUCTION = """# Gallery of recipes

Each file of `recipes/`, with the comment that it begins with. [Recipes](recipes.md) explains the keys. Pictures are
of the reduced form where a recipe has one: `python docs/figures/recipes.py` runs these and draws them.
"""


def on_files(files: Files, config: Any) -> None:
    """Add the tutorial and the gallery to the pages."""
    files.append(File.generated(config, TUTORIAL, content=tutorial(ROOT / "docs" / NOTEBOOK)))
    files.append(File.generated(config, GALLERY, content=gallery(ROOT)))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Highlight doctests as input and output, without the directives that only tests read; link the tutorial's page."""
    markdown = re.sub(rf"\]\(((?:\.\./)*){re.escape(NOTEBOOK)}\)", rf"](\1{TUTORIAL})", markdown)
    markdown = re.sub(r"^( *)```python\n(?=\1>>>)", r"\1```pycon\n", markdown, flags=re.MULTILINE)
    markdown = re.sub(r" +# doctest: .*$", "", markdown, flags=re.MULTILINE)
    return re.sub(r"\n\n( *```\n)", r"\n\1", markdown)


def tutorial(path: Path) -> str:
    """A notebook as Markdown: its text, its code, and the outputs that are stored in it.

    A result that has HTML, which vfsurgery's are, is shown as HTML, any other as text.
    """
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n".join(block for cell in cells for block in _cell(cell))


def _cell(cell: dict[str, Any]) -> Iterator[str]:
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield f"{text}\n"
        return
    yield f"```python\n{text}\n```\n"
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "text/html" in data:
            yield f"{''.join(data['text/html'])}\n"
        else:
            printed = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
            yield f"```{{.text .printed}}\n{printed}\n```\n"


def gallery(root: Path) -> str:
    """Markdown with a section for each recipe below ``root / "recipes"``: title, comment, picture and text."""
    return INTRODUCTION + "\n".join(entry(path, root) for path in sorted((root / "recipes").rglob("*.yaml")))


def entry(path: Path, root: Path) -> str:
    """The section of one recipe."""
    name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
    picture = f"images/recipes/{'_'.join(path.relative_to(root / 'recipes').with_suffix('').parts)}.png"
    drawn = f"\n![What {name} draws]({picture})\n" if (root / "docs" / picture).exists() else ""
    folded = "\n".join(f"    {line}".rstrip() for line in body(text).splitlines())
    return (
        f"\n## {yaml.safe_load(text)['name']}\n\n`{name}`\n\n{comment(text)}\n{drawn}\n"
        f'??? note "{path.name}"\n\n    ```yaml\n{folded}\n    ```\n'
    )


def comment(text: str) -> str:
    """The comment that a recipe begins with, as Markdown: indented lines are commands, pages are links.

    >>> print(comment("# What it is, and docs/recipes.md.\\n#\\n#   vfsurgery run it.yaml\\nname: it\\n"))
    What it is, and [recipes](recipes.md).
    <BLANKLINE>
    ```bash
    vfsurgery run it.yaml
    ```
    """
    lines = [line[1:].removeprefix(" ") for line in text.splitlines()[: _comment_lines(text)]]
    prose = re.sub(r"docs/(\w+)\.md", r"[\1](\1.md)", "\n".join(lines))
    return re.sub(
        r"(?:^  +.*(?:\n|\Z))+",
        lambda found: "```bash\n" + "\n".join(line.strip() for line in found[0].splitlines()) + "\n```\n",
        prose,
        flags=re.MULTILINE,
    ).strip()


def body(text: str) -> str:
    """A recipe without the comment that it begins with."""
    return "\n".join(text.splitlines()[_comment_lines(text) :])


def _comment_lines(text: str) -> int:
    lines = text.splitlines()
    return next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
