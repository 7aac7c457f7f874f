"""One HTML page that needs nothing but itself: pictures, style and text in a single file."""

import base64
import html
import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from pyro_aevb.errors import FileError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Section", "code", "facts", "paragraph", "picture", "png", "render", "table", "write"]

Section = tuple[str, Sequence[str]]
"""A heading and the blocks below it; a block is HTML that one of the functions here made."""

STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #5c6b7a; --line: #e3e8ee; --blue: #0072b2; --wash: #f5f8fb; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 17px/1.6 system-ui, -apple-system, "Segoe UI", sans-serif; }
header { background: linear-gradient(135deg, #06283d, #0b5c8a); color: #fff; padding: 3.5rem 1.5rem 3rem; }
header > div, main { max-width: 52rem; margin: 0 auto; }
h1 { font-size: 2.3rem; line-height: 1.15; margin: 0 0 .8rem; letter-spacing: -.02em; }
header p { font-size: 1.1rem; margin: 0; color: #d9e8f2; }
main { padding: 0 0 4rem; }
@media (max-width: 54rem) { main { padding: 0 1.2rem 4rem } }
h2 { font-size: 1.4rem; margin: 3rem 0 .6rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
p { margin: .6rem 0; }
.facts { display: flex; flex-wrap: wrap; gap: .9rem; margin: -1.6rem 0 0; padding: 0; list-style: none; }
.facts li { flex: 1 1 11rem; background: #fff; border: 1px solid var(--line); border-radius: .7rem; padding: .9rem 1.1rem;
  box-shadow: 0 4px 14px rgb(6 40 61 / 8%); }
.facts b { display: block; font-size: 1.5rem; line-height: 1.2; color: var(--blue); font-variant-numeric: tabular-nums; }
.facts span { color: var(--soft); font-size: .86rem; line-height: 1.3; display: block; margin-top: .25rem; }
figure { margin: 1.2rem 0; }
figure img { display: block; width: 100%; height: auto; border: 1px solid var(--line); border-radius: .5rem;
  padding: .7rem; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .95rem; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .5rem .8rem; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; font-weight: 500; }
thead th { border-bottom: 2px solid var(--ink); font-weight: 700; }
tbody tr:nth-child(odd) { background: var(--wash); }
pre { background: var(--wash); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; overflow-x: auto;
  font: .82rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media print { header { background: none; color: inherit; padding: 0 } header p { color: inherit } }
"""


def paragraph(text: str) -> str:
    """Return plain text as a paragraph."""
    return f"<p>{html.escape(text)}</p>"


def code(text: str) -> str:
    """Return source code, set as it is."""
    return f"<pre><code>{html.escape(text)}</code></pre>"


def facts(entries: Mapping[str, str]) -> str:
    """Return a row of tiles, a short value above what it means."""
    tiles = (f"<li><b>{html.escape(value)}</b><span>{html.escape(name)}</span></li>" for name, value in entries.items())
    return f'<ul class="facts">{"".join(tiles)}</ul>'


def table(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """Return a table with a name in front of each row."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in ("", *columns))
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>{"".join(f"<td>{html.escape(cell)}</td>" for cell in cells)}</tr>'
        for name, cells in rows.items()
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(content: bytes, caption: str) -> str:
    """Return a PNG, inside the page, with a caption that also serves those who can't see it."""
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    caption = html.escape(caption)
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def png(figure: "Figure") -> bytes:
    """Return a matplotlib figure as the bytes of a PNG file."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight", pad_inches=0.06, metadata={"Software": None})
    return buffer.getvalue()


def render(title: str, lead: str, tiles: str, sections: Sequence[Section]) -> str:
    """Return the page.

    Args:
        title: Plain text.
        lead: What was done, in a few plain sentences.
        tiles: The :func:`facts` below it.
        sections: The rest.
    """
    parts = (f"<section><h2>{html.escape(heading)}</h2>{''.join(blocks)}</section>" for heading, blocks in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><header><div><h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p></div></header>\n"
        f"<main>{tiles}\n" + "\n".join(parts) + "</main></body></html>\n"
    )


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        FileError: If it can't be written; an old file is left as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise FileError(f"Could not write {path}: {error}. Choose another folder.") from error
