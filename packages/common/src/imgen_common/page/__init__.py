"""Pages of HTML that need no other file: their frame, their look and the parts that both products' reports share.

A page holds no script and names no address: it can be read offline, archived and printed.  Its own policy forbids the
browser to run or fetch anything, should a page ever hold more than it was meant to.
"""

import html
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


TEMPLATES = Path(__file__).parent / "templates"
COLORS = (TEMPLATES / "colors.css").read_text(encoding="utf-8")
STYLE = (TEMPLATES / "page.css").read_text(encoding="utf-8")


@cache
def environment(templates: Path = TEMPLATES) -> jinja2.Environment:
    """Jinja with the templates of a folder, and after them those that both products share.

    Whatever a template shows is escaped, and characters that hide or reorder text are shown by number; only Markup
    passes as it is.  A name that a template lacks is an error.
    """
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([templates, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, values: dict[str, Any], templates: Path = TEMPLATES) -> str:
    """A whole page from `template`, a file of the folder `templates` that extends `page.html.jinja`."""
    return environment(templates).get_template(template).render(policy=POLICY, **values)


def _visible(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def visible(value: str) -> str:
    """`value` with control characters, lone surrogates and those that turn the direction of writing as ⟨U+202E⟩."""
    return _INVISIBLE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", value.replace("\r\n", "\n"))


def text(value: str) -> str:
    """`value` for use between tags and inside quoted attributes, where it can be nothing but text.

    Control characters, lone surrogates and those that turn the direction of writing are shown by number, as ⟨U+202E⟩,
    so that nothing is hidden or reordered; line breaks stay.
    """
    return html.escape(visible(value))


def document(title: str, style: str, body: Iterable[str]) -> str:
    """A whole page.  title: plain text; style: rules after the common ones; body: HTML."""
    inside = "\n".join(filter(None, body))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{text(title)}</title>\n'
        f"<style>{COLORS}{STYLE}{style}</style>\n</head>\n<body>\n<main>\n{inside}\n</main>\n"
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
