"""What the site does to pages before it renders them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Doctests are highlighted as the sessions that they are, without the directives that only tests read."""
    markdown = re.sub(r"^( *)```python\n(?=\1>>>)", r"\1```pycon\n", markdown, flags=re.MULTILINE)
    markdown = re.sub(r" +# doctest: .*$", "", markdown, flags=re.MULTILINE)
    return re.sub(r"\n\n( *```\n)", r"\n\1", markdown)
