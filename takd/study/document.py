"""Headings, paragraphs, tables and figures, written as Markdown and as one self-contained HTML page."""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from takd import files
from takd.files import printable

Rows = Sequence[Sequence[str]]
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
{style}</style></head>
<body>
{body}
</body></html>
"""


class Document:
    """Blocks in their order, and the folder that `write` puts them into: report.md, report.html, and files."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.blocks: list[tuple[Any, ...]] = []
        self.attached: dict[str, bytes] = {}

    def heading(self, text: str, level: int = 2) -> None:
        self.blocks.append(("heading", printable(text), level))

    def text(self, *sentences: str) -> None:
        if paragraph := " ".join(sentence for sentence in sentences if sentence):
            self.blocks.append(("text", printable(paragraph)))

    def code(self, line: str) -> None:
        self.blocks.append(("code", printable(line)))

    def table(self, header: Sequence[str], rows: Rows, mark: int | None = None) -> None:
        """Rows of cells as text; numbers are right-aligned. The row numbered `mark` is highlighted."""
        if rows:  # empty columns are dropped
            kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
            heading, *lines = ([printable(row[i]) for i in kept] for row in (header, *rows))
            self.blocks.append(("table", heading, lines, mark))

    def figure(self, name: str, drawn: tuple[str, bytes, str | None], caption: str) -> None:
        """`drawn` is a figures.Drawn, kept as <name>.svg and <name>.png; a `name` already taken gets a number.

        On a narrow screen the page shows its third part, where there is one.
        """
        taken = [block[1] for block in self.blocks if block[0] == "figure"]
        name = next(free for free in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if free not in taken)
        self.blocks.append(("figure", name, printable(caption), *drawn))

    def attach(self, name: str, text: str) -> None:
        """A further file of the folder."""
        self.attached[name] = text.encode(errors="backslashreplace")

    def markdown(self) -> str:
        parts = []
        for block in self.blocks:
            match block:
                case "heading", text, level:
                    parts.append(f"{'#' * level} {_plain(text)}")
                case "text", text:
                    parts.append(_plain(text))
                case "code", line:
                    parts.append(f"    {line}")
                case "table", header, rows, mark:
                    cells = [[_plain(cell) for cell in row] for row in rows]
                    shown = [[f"**{c}**" if c and i == mark else c for c in row] for i, row in enumerate(cells)]
                    sides = ["--:" if right else "---" for right in _numeric(header, rows)]
                    lines = [map(_plain, header), sides, *shown]
                    parts.append("\n".join(f"| {' | '.join(row)} |" for row in lines))
                case "figure", name, caption, *_:
                    parts.append(f"![{_plain(caption)}]({name}.png)\n\n*{_plain(caption)}*")
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        parts = []
        for block in self.blocks:
            match block:
                case "heading", text, level:
                    parts.append(f"<h{level}>{html.escape(text)}</h{level}>")
                case "text", text:
                    parts.append(f"<p>{html.escape(text)}</p>")
                case "code", line:
                    parts.append(f"<pre>{html.escape(line)}</pre>")
                case "table", header, rows, mark:
                    parts.append(_html_table(header, rows, mark))
                case "figure", _, caption, svg, _, narrow:
                    label, number = html.escape(caption), len(parts)
                    shown = _inline(svg, f"part{number}-")
                    if narrow:
                        stacked = _inline(narrow, f"narrow{number}-")
                        shown = f"<div class=wide>{shown}</div><div class=narrow>{stacked}</div>"
                    parts.append(
                        f'<figure role="img" aria-label="{label}">{shown}<figcaption>{label}</figcaption></figure>'
                    )
        title = html.escape(next(block[1] for block in self.blocks if block[0] == "heading"))
        style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
        return PAGE.format(title=title, style=style, body="\n".join(parts))

    def write(self) -> None:
        contents = {"report.md": self.markdown().encode(), "report.html": self.html().encode()} | self.attached
        for _, name, _, svg, png, _ in (block for block in self.blocks if block[0] == "figure"):
            contents |= {f"{name}.svg": svg.encode(), f"{name}.png": png}
        for name, content in contents.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(self.folder / name) as temporary:
                temporary.write_bytes(content)


def _plain(text):
    """Text for Markdown as it is to be read: names of the user's are no markup."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", re.sub(r"([\\`*|~$\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", text))
    return re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", text)


def _inline(svg: str, prefix: str) -> str:
    """An SVG file's text for a page, where two figures must not share ids."""
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}", svg[svg.index("<svg") :])


def _numeric(header, rows):
    number = re.compile(r"\**[-+−]?[\d<(].*")
    return [i > 0 and all(number.fullmatch(row[i]) or not row[i] for row in rows) for i in range(len(header))]


def _html_table(header, rows, mark):
    right = _numeric(header, rows)

    def row(cells, tag, look=""):
        inner = "".join(f"<{tag}{' class=n' * right[i]}>{html.escape(cell)}</{tag}>" for i, cell in enumerate(cells))
        return f"<tr{look}>{inner}</tr>"

    body = "\n".join(row(cells, "td", " class=best" if i == mark else "") for i, cells in enumerate(rows))
    return f'<div class="table"><table><thead>{row(header, "th")}</thead>\n<tbody>{body}</tbody></table></div>'
