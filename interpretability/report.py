"""One self-contained HTML page: text, tables, and pictures embedded in it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { margin: 0; background: #f6f5f2; color: #22252a; font: 17px/1.6 system-ui, "Segoe UI", sans-serif; }
main { max-width: 60rem; margin: 2rem auto; padding: 1.5rem 3rem 3rem; background: #fff; border-radius: 8px; }
h1 { font-size: 2rem; line-height: 1.2; margin: 1rem 0 .5rem; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .4rem; }
p { max-width: 46rem; }
img { max-width: 100%; display: block; margin: 1rem auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem 1.2rem .35rem 0; border-bottom: 1px solid #e2e0da; vertical-align: top; }
td.number { text-align: right; }
pre { background: #f1efea; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; border-radius: 6px; }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page, shown in this order: heading, paragraphs (plain text), table, picture, commands."""

    heading: str
    paragraphs: Sequence[str] = ()
    table: Sequence[tuple[str, str]] = ()
    picture: Figure | None = None
    caption: str = ""
    commands: Sequence[str] = ()


def html_page(title: str, introduction: str, sections: Sequence[Section]) -> str:
    """The page as text. All texts are escaped; pictures are embedded as PNG, so that the page is one file."""
    body = [f"<h1>{escape(title)}</h1>", f"<p>{escape(introduction)}</p>"]
    for section in sections:
        body.append(f"<h2>{escape(section.heading)}</h2>")
        body += [f"<p>{escape(text)}</p>" for text in section.paragraphs]
        if section.table:
            body.append(html_table(section.table))
        if section.picture is not None:
            data = base64.b64encode(png(section.picture)).decode()
            body.append(f'<img alt="{escape(section.caption, quote=True)}" src="data:image/png;base64,{data}">')
        if section.commands:
            body.append(f"<pre>{escape(chr(10).join(section.commands))}</pre>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def html_table(rows: Sequence[tuple[str, str]]) -> str:
    """A table of names and values; values that are figures are aligned to the right."""
    cells = [f"<tr><td>{escape(name)}</td><td{_alignment(value)}>{escape(value)}</td></tr>" for name, value in rows]
    return "<table>\n" + "\n".join(cells) + "\n</table>"


def text_table(title: str, rows: Mapping[str, str] | Sequence[tuple[str, str]]) -> str:
    """The same table for the terminal."""
    pairs = list(rows.items()) if isinstance(rows, Mapping) else list(rows)
    left = max(len(name) for name, _ in pairs)
    right = max(len(value) for _, value in pairs)
    line = "-" * max(left + right + 2, len(title))
    return "\n".join([title, line, *(f"{name:<{left}}  {value:>{right}}" for name, value in pairs), line])


def png(figure: Figure, dpi: int = 110) -> bytes:
    """``figure`` as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def _alignment(value: str) -> str:
    return ' class="number"' if value[:1].isdigit() else ""
