"""Headings, paragraphs, tables and figures, written as Markdown and as one HTML page that needs nothing else. Standard library only."""

import html
import re
from pathlib import Path

from takd import files


class Document:
    """Blocks in their order, and the folder that `write` puts them into: report.md, report.html with the figures inside, and files."""

    def __init__(self, folder):
        self.folder, self.blocks, self.attached = Path(folder), [], {}

    def heading(self, text, level=2):
        self.blocks.append(("heading", text, level))

    def text(self, *sentences):
        if said := " ".join(sentence for sentence in sentences if sentence):
            self.blocks.append(("text", said))

    def table(self, header, rows, mark=None):
        """Rows of cells as text; numbers stand to the right. The row numbered `mark` is the one to look at."""
        if rows:  # without the columns that hold nothing
            kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
            self.blocks.append(("table", [header[i] for i in kept], [[row[i] for i in kept] for row in rows], mark))

    def figure(self, name, drawn, caption):
        """`drawn` is (SVG text, PNG bytes), kept as <name>.svg and <name>.png; a `name` already taken gets a number."""
        taken = [block[1] for block in self.blocks if block[0] == "figure"]
        name = next(free for free in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if free not in taken)
        self.blocks.append(("figure", name, caption, *drawn))

    def attach(self, name, text):
        """A further file of the folder."""
        self.attached[name] = text.encode()

    def markdown(self):
        parts = []
        for kind, *block in self.blocks:
            if kind == "heading":
                parts.append(f"{'#' * block[1]} {block[0]}")
            elif kind == "text":
                parts.append(block[0])
            elif kind == "table":
                header, rows, mark = block
                rows = [[f"**{cell}**" if cell and i == mark else cell for cell in row] for i, row in enumerate(rows)]
                sides = ["--:" if right else "---" for right in _numeric(header, rows)]
                parts.append(
                    "\n".join(
                        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in (header, sides, *rows)
                    )
                )
            else:
                parts.append(f"![{block[1]}]({block[0]}.png)\n\n*{block[1]}*")
        return "\n\n".join(parts) + "\n"

    def html(self):
        parts = []
        for kind, *block in self.blocks:
            if kind == "heading":
                parts.append(f"<h{block[1]}>{html.escape(block[0])}</h{block[1]}>")
            elif kind == "text":
                parts.append(f"<p>{html.escape(block[0])}</p>")
            elif kind == "table":
                parts.append(_html_table(*block))
            else:
                svg = block[2][block[2].index("<svg") :]
                # Two figures of one page may not share the names of their parts.
                svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>part{len(parts)}-", svg)
                caption = html.escape(block[1])
                parts.append(f'<figure role="img" aria-label="{caption}">{svg}<figcaption>{caption}</figcaption></figure>')
        title = html.escape(next(block[1] for block in self.blocks if block[0] == "heading"))
        return f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">\n' \
               f"<title>{title}</title>\n<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"  # fmt: skip

    def write(self):
        contents = {"report.md": self.markdown().encode(), "report.html": self.html().encode()} | self.attached
        for _, name, _, svg, png in (block for block in self.blocks if block[0] == "figure"):
            contents |= {f"{name}.svg": svg.encode(), f"{name}.png": png}
        for name, content in contents.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(self.folder / name) as temporary:
                temporary.write_bytes(content)


def _numeric(header, rows):
    return [i > 0 and all(re.fullmatch(r"\**[-+−]?[\d<(].*", row[i]) or not row[i] for row in rows) for i in range(len(header))]


def _html_table(header, rows, mark):
    right = _numeric(header, rows)

    def row(cells, tag, look=""):
        inner = "".join(f"<{tag}{' class=n' * right[i]}>{html.escape(cell)}</{tag}>" for i, cell in enumerate(cells))
        return f"<tr{look}>{inner}</tr>"

    body = "\n".join(row(cells, "td", " class=best" if i == mark else "") for i, cells in enumerate(rows))
    return f'<div class="table"><table><thead>{row(header, "th")}</thead>\n<tbody>{body}</tbody></table></div>'


STYLE = """
body { font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #1b2733; background: #fff;
       max-width: 66rem; margin: 2rem auto; padding: 0 1.2rem }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .6rem }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid #e6eaef; padding-bottom: .25rem }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem }
p { max-width: 52rem }
.table { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
th { text-align: left; color: #6b7785; font-weight: 600; border-bottom: 1.5px solid #b8c1cc }
th, td { padding: .32rem .75rem .32rem 0; vertical-align: top }
td { border-bottom: 1px solid #e6eaef }
.n { text-align: right; white-space: nowrap; padding-left: .7rem }
tr.best td { font-weight: 700; color: #b35900 }
figure { margin: 1.4rem 0 } figure svg { max-width: 100%; height: auto }
figcaption { color: #6b7785; font-size: .88rem }
@media print { body { margin: 0; max-width: none } }
"""
