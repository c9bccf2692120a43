"""Reports: one HTML file that needs nothing else, and the same tables as plain text for the terminal.

The page has no script, no web font and no external resource: it can be mailed, archived and opened offline.
Colours follow the preference of the reader, light or dark. Long cells of a table wrap; what is still too wide scrolls
inside its own box, with a shadow at the edge where more is hidden, so the page fits a phone. All text is escaped; only
the SVG of a Plot is inserted as it is.
"""

import html
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logitstore_trainer.plots import (
    DARK_SERIES,
    LIGHT_SERIES,
    Series,
    bar_plot,
    figure_svg,
    line_plot,
    scatter_plot,
)

__all__ = [
    "Paragraph",
    "Plot",
    "Preformatted",
    "Section",
    "Series",
    "Table",
    "bar_plot",
    "cell_text",
    "figure_svg",
    "format_table",
    "line_plot",
    "render_html",
    "scatter_plot",
    "write_report",
]


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of plain text."""

    text: str


@dataclass(frozen=True)
class Preformatted:
    """Text whose line breaks and spaces are kept: commands, terminal output."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells (str, int, float or None; see cell_text) under headers that name quantity and unit."""

    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    def __post_init__(self) -> None:
        _check_widths(self.headers, self.rows)


@dataclass(frozen=True)
class Plot:
    """An <svg> element, as figure_svg and the *_plot functions return it."""

    svg: str
    caption: str = ""

    def __post_init__(self) -> None:
        if not self.svg.startswith("<svg"):
            raise ValueError(f"a plot must be an <svg> element, got text that starts with {self.svg[:20]!r}")


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    body: Sequence[Paragraph | Table | Plot | Preformatted] = field(default_factory=list)


def cell_text(value: Any) -> str:
    """The text of a table cell: "-" for None, thousands separated, four significant digits for a float.

    Zeros at the end are left out where the value is exactly that: 5.0 is "5", 5.0001 is "5.000".
    """
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    short = f"{value:.4g}"
    return short if float(short) == value or not math.isfinite(value) else f"{value:#.4g}".rstrip(".")


def format_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The table as aligned plain text: numbers to the right, text to the left, a rule under the headers."""
    _check_widths(headers, rows)
    texts = [[cell_text(cell) for cell in row] for row in rows]
    widths = [max([len(header), *(len(row[i]) for row in texts)]) for i, header in enumerate(headers)]
    numeric = [_is_numeric_column(rows, i) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(cells, widths, numeric, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), "  ".join("-" * width for width in widths), *(line(row) for row in texts)])


def render_html(title: str, sections: Sequence[Section], subtitle: str = "") -> str:
    """The whole page as text. It refers to nothing outside itself."""
    contents = "".join(
        f'<li><a href="#section-{i}">{html.escape(section.title)}</a></li>'
        for i, section in enumerate(sections, start=1)
    )
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{_style_sheet()}</style></head><body><main>",
        f"<header><h1>{html.escape(title)}</h1>",
        f'<p class="subtitle">{html.escape(subtitle)}</p>' if subtitle else "",
        f"<nav><ul>{contents}</ul></nav>" if len(sections) > 2 else "",
        "</header>",
    ]
    for i, section in enumerate(sections, start=1):
        body = "\n".join(_element(part) for part in section.body)
        parts.append(f'<section id="section-{i}"><h2>{html.escape(section.title)}</h2>\n{body}</section>')
    parts.append("</main></body></html>\n")
    return "\n".join(part for part in parts if part)


def write_report(path: str | Path, title: str, sections: Sequence[Section], subtitle: str = "") -> Path:
    """Writes the page in one step (folders are made, an older page is replaced) and returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(render_html(title, sections, subtitle), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _element(part: Paragraph | Table | Plot | Preformatted) -> str:
    if isinstance(part, Paragraph):
        return f"<p>{html.escape(part.text)}</p>"
    if isinstance(part, Preformatted):
        return f'<pre tabindex="0">{html.escape(part.text)}</pre>'
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Plot):
        label = html.escape(part.caption or "plot")
        svg = part.svg.replace("<svg ", f'<svg aria-label="{label}" ', 1)
        caption = f"<figcaption>{html.escape(part.caption)}</figcaption>" if part.caption else ""
        return f'<figure><div class="scroll" tabindex="0">{svg}</div>{caption}</figure>'
    raise TypeError(f"a section holds Paragraph, Table, Plot or Preformatted, got {type(part).__name__}")


def _table(table: Table) -> str:
    numeric = [_is_numeric_column(table.rows, i) for i in range(len(table.headers))]

    longest = [max((len(cell_text(row[i])) for row in table.rows), default=0) for i in range(len(table.headers))]
    marks = [
        ' class="num"' if is_numeric else ' class="long"' if length > _LONG_CELL else ""
        for is_numeric, length in zip(numeric, longest, strict=True)
    ]

    def cells(tag: str, texts: Sequence[str]) -> str:
        return "".join(f"<{tag}{mark}>{html.escape(t)}</{tag}>" for mark, t in zip(marks, texts, strict=True))

    head = f"<thead><tr>{cells('th', list(table.headers))}</tr></thead>"
    rows = "\n".join(f"<tr>{cells('td', [cell_text(cell) for cell in row])}</tr>" for row in table.rows)
    caption = f"<figcaption>{html.escape(table.caption)}</figcaption>" if table.caption else ""
    body = f"<table>{head}<tbody>{rows}</tbody></table>"
    return f'<figure><div class="scroll" tabindex="0">{body}</div>{caption}</figure>'


_LONG_CELL = 32  # characters
_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?( ?(%|ms|s|x|GB/s|MB|MiB|kB|B))?")


def _is_numeric_column(rows: Sequence[Sequence[Any]], column: int) -> bool:
    cells = [row[column] for row in rows if row[column] is not None]
    return bool(cells) and all(_NUMBER.fullmatch(cell_text(cell).strip()) for cell in cells)


def _check_widths(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    for i, row in enumerate(rows):
        if len(row) != len(headers):
            raise ValueError(f"table row {i} has {len(row)} cells, the header has {len(headers)}: {list(headers)}")


def _style_sheet() -> str:
    light = "".join(f"--series-{i}:{colour};" for i, colour in enumerate(LIGHT_SERIES, start=1))
    dark = "".join(f"--series-{i}:{colour};" for i, colour in enumerate(DARK_SERIES, start=1))
    return (
        f":root{{color-scheme:light dark;{_LIGHT_COLOURS}{light}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{_DARK_COLOURS}{dark}}}}}"
        f"{_STYLE_RULES}"
    )


_LIGHT_COLOURS = "--ink:#1b1f24;--soft:#57606a;--page:#fff;--panel:#f5f7f9;--grid:#d9dde2;--shade:#1b1f2440;"
_DARK_COLOURS = "--ink:#e6e9ec;--soft:#a4adb6;--page:#14171a;--panel:#1d2226;--grid:#394149;--shade:#00000099;"
_STYLE_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
main{max-width:76rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.25rem;margin:2.5rem 0 .6rem;padding-top:.6rem;border-top:1px solid var(--grid)}
p{margin:.6rem 0;max-width:46rem;overflow-wrap:anywhere}
.subtitle,figcaption,nav{color:var(--soft)}
nav ul{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;list-style:none;padding:0;margin:.8rem 0 0}
a{color:var(--series-1)}
figure{margin:1rem 0 1.4rem}
figcaption{font-size:.9rem;margin-top:.35rem;max-width:46rem}
.scroll,pre{overflow-x:auto;max-width:100%}
.scroll{background:linear-gradient(90deg,var(--page) 40%,transparent) local 0 0/3rem 100%,
linear-gradient(270deg,var(--page) 40%,transparent) local 100% 0/3rem 100%,
linear-gradient(90deg,var(--shade),transparent) 0 0/1rem 100%,
linear-gradient(270deg,var(--shade),transparent) 100% 0/1rem 100%;background-repeat:no-repeat}
svg{display:block;width:100%;min-width:34rem;max-width:50rem;height:auto;color:var(--ink)}
table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .8rem .35rem 0;text-align:left;white-space:nowrap;border-bottom:1px solid var(--grid)}
th{color:var(--soft);font-weight:600;vertical-align:bottom}
.num{text-align:right}
.long{white-space:normal;min-width:11rem;overflow-wrap:break-word}
tbody tr:hover{background:var(--panel)}
pre{background:var(--panel);padding:.8rem 1rem;border-radius:6px;font:.88rem/1.45 ui-monospace,monospace}
@media print{.scroll{overflow:visible}svg{min-width:0}}
"""
