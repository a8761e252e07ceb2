"""HTML for notebooks: fragments that bring their style along, without scripts and with nothing to fetch.

All text is escaped. Colours are those of the page around, so that dark pages stay readable.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence

LONG = 12
"""More rows than that are folded away at first."""

STYLE = (
    ".vfsurgery{overflow-x:auto;max-width:100%}"
    ".vfsurgery p{margin:.3em 0;max-width:75em}"
    # named twice, for more weight than the tables of notebooks have
    ".vfsurgery.vfsurgery table{border-collapse:collapse;margin:.4em 0;font-size:.92em}"
    ".vfsurgery.vfsurgery th,.vfsurgery.vfsurgery td{padding:.15em .7em;text-align:left;vertical-align:top;"
    "color:inherit;background:none;border:0;border-bottom:1px solid rgba(128,128,128,.35)}"
    ".vfsurgery.vfsurgery .number{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}"
    ".vfsurgery details{margin:.3em 0}.vfsurgery td details{margin:0}"
    ".vfsurgery summary{cursor:pointer}"
    ".vfsurgery pre{font-size:.9em;overflow-x:auto}"
    ".vfsurgery .small{opacity:.7;font-size:.88em}"
    ".vfsurgery figure{display:inline-block;margin:.4em .6em .4em 0;padding:.4em;background:#fff;color:#222;"
    "width:min(28em,100%)}.vfsurgery figcaption{font-size:.92em;text-align:center}"
    ".vfsurgery figure svg{display:block;width:100%;height:auto}"
)


class Html(str):
    """Text that is HTML already, and is not escaped again."""


def fragment(title: str, *parts: Html) -> str:
    """A title and what belongs to it, with the style of all.

    >>> fragment("a < b", paragraph("c & d")).endswith("<p><strong>a &lt; b</strong></p><p>c &amp; d</p></div>")
    True
    """
    head = Html(f"<p><strong>{escaped(title)}</strong></p>")
    return f'<div class="vfsurgery"><style>{STYLE}</style>{"".join([head, *parts])}</div>'


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """A table; numbers, and texts that look like numbers, stand to the right.

    Columns of which all cells are empty are left out, and so is a table without rows.

    >>> table(["name", "share"], [["<a>", 0.25]]).partition("<tbody>")[2]
    '<tr><td>&lt;a&gt;</td><td class="number">0.25</td></tr></tbody></table>'
    """
    cells = [[escaped(value) for value in row] for row in rows]
    columns = [column for column in range(len(headers)) if any(row[column] for row in cells)]
    if not columns:
        return Html("")
    right = [all(_is_number(row[column]) for row in cells) for column in columns]
    body = "".join(_row("td", [row[column] for column in columns], right) for row in cells)
    head = _row("th", [escaped(headers[column]) for column in columns], right)
    return Html(f"<table><thead>{head}</thead><tbody>{body}</tbody></table>")


def folded(summary: str, *parts: Html, unfolded: bool = False) -> Html:
    """What is seen only after a click on its summary."""
    opened = " open" if unfolded else ""
    return Html(f"<details{opened}><summary>{escaped(summary)}</summary>{''.join(parts)}</details>")


def paragraph(text: str, small: bool = False) -> Html:
    """One paragraph; nothing without text."""
    kind = ' class="small"' if small else ""
    return Html(f"<p{kind}>{escaped(text)}</p>" if text else "")


def paragraphs(lines: Iterable[object]) -> Html:
    """One for each line."""
    return Html("".join(paragraph(str(line)) for line in lines))


def verbatim(text: str) -> Html:
    """Lines as they are."""
    return Html(f"<pre>{escaped(text)}</pre>")


def figure(title: str, svg: str) -> Html:
    """A drawing under its title, on white ground: it has dark text."""
    return Html(f"<figure><figcaption>{escaped(title)}</figcaption>{svg}</figure>")


def bar(value: float) -> Html:
    """A number in front of a bar that is full at 1."""
    share = 0 if math.isnan(value) else 100 * min(max(value, 0), 1)
    shade = f"linear-gradient(90deg,rgba(86,180,233,.4) {share:.0f}%,transparent {share:.0f}%)"
    return Html(f'<div style="min-width:5em;background:{shade}">{escaped(value)}</div>')


def escaped(value: object) -> str:
    """A value as HTML: numbers with four digits, text escaped.

    >>> escaped(1234567), escaped(0.123456), escaped(float("nan")), escaped(None), escaped("<i>")
    ('1,234,567', '0.1235', '–', '–', '&lt;i&gt;')
    """
    if isinstance(value, Html):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else html.escape(str(value))


def _row(tag: str, cells: Sequence[str], right: Sequence[bool]) -> str:
    columns = zip(cells, right, strict=True)
    kinds = {True: ' class="number"', False: ""}
    return f"<tr>{''.join(f'<{tag}{kinds[numeric]}>{cell}</{tag}>' for cell, numeric in columns)}</tr>"


def _is_number(cell: str) -> bool:
    bare = re.sub(r"</?div[^>]*>", "", cell)
    return re.fullmatch(r"[-+x×]?\d[\d.,]*(e[-+]\d+)?%?|–|[-+]?(nan|inf)%?|", bare) is not None
