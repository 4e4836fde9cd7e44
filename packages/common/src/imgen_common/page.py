"""Pages of HTML that need no other file: their frame, their look and the parts that both products' reports share.

A page holds no script and names no address: it can be read offline, archived and printed.  Its own policy forbids the
browser to run or fetch anything, should a page ever hold more than it was meant to.
"""

import html
import re
from collections.abc import Iterable, Sequence

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def text(value: str) -> str:
    """`value` for use between tags and inside quoted attributes, where it can be nothing but text.

    Control characters, lone surrogates and those that turn the direction of writing are shown by number, as ⟨U+202E⟩,
    so that nothing is hidden or reordered; line breaks stay.
    """
    shown = _INVISIBLE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", value.replace("\r\n", "\n"))
    return html.escape(shown)


def document(title: str, style: str, body: Iterable[str]) -> str:
    """A whole page.  title: plain text; style: rules after the common ones; body: HTML."""
    inside = "\n".join(filter(None, body))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{text(title)}</title>\n'
        f"<style>{COLOURS}{STYLE}{style}</style>\n</head>\n<body>\n<main>\n{inside}\n</main>\n"
        "</body>\n</html>\n"
    )


def section(title: str, note: str, *parts: str) -> str:
    """A part of the page under a heading.  title: plain text; note and parts: HTML."""
    told = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{text(title)}</h2>{told}{''.join(parts)}</section>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """Cells are HTML; `numeric`: columns set flush right.  Without any words in `head` there is no heading row."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=num' if place in numeric else ''}>{cell}</{tag}>" for place, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    top = f"<thead><tr>{cells('th', head)}</tr></thead>" if any(head) else ""
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def fold(summary: str, *parts: str) -> str:
    """What is unfolded by a click.  summary: plain text; parts: HTML."""
    return f"<details><summary>{text(summary)}</summary>{''.join(parts)}</details>"


COLOURS = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --muted: #5c6470;
  --line: #d9dde3; --blue: #2464eb; --orange: #b45d04; --green: #047a55; --red: #be123c; --violet: #7c3aed; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1d2127; --ink: #e8eaed; --muted: #a1a9b5;
  --line: #343a43; --blue: #6c9bff; --orange: #f0a44b; --green: #42c797; --red: #ff7a90; --violet: #b794f6; } }
"""
"""The colours that all rules name, light and dark."""

STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.15; margin: 0 0 .25rem; letter-spacing: -.015em; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 0 0 .35rem; letter-spacing: -.01em; }
h3 { font-size: .95rem; margin: 0; font-weight: 600; }
section { margin-top: 3rem; }
p { margin: .4rem 0; }
.facts, .note, .what, small { color: var(--muted); }
.facts { margin: 0 0 1.5rem; } .note { max-width: 46rem; font-size: .92rem; margin: 0 0 .9rem; }
.chip { display: inline-block; border: 1px solid var(--line); border-radius: 99px; padding: 0 .6rem; font-size: .82rem;
  color: var(--muted); white-space: nowrap; }
.chip.up { color: var(--green); border-color: currentColor; }
.chip.down { color: var(--red); border-color: currentColor; }
.warn, .empty { border-left: 3px solid var(--orange); background: var(--card); padding: .7rem 1rem; max-width: 46rem;
  border-radius: 0 8px 8px 0; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; min-width: 50%; }
th { text-align: left; font-weight: 600; color: var(--muted); white-space: nowrap; }
th, td { padding: .32rem 1.1rem .32rem 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
.num { text-align: right; white-space: nowrap; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--blue); font-size: .92rem; }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1rem;
  font-size: .82rem; line-height: 1.45; }
code { font-size: .88em; overflow-wrap: anywhere; }
"""
