"""Pages of HTML that need no other file: their frame, their look and the parts that both products' reports share.

A page holds no script and names no address: it can be read offline, archived and printed.  Its own policy forbids the
browser to run or fetch anything, should a page ever hold more than it was meant to.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

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
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, values: dict[str, Any], templates: Path = TEMPLATES) -> str:
    """A whole page from `template`, a file of the folder `templates` that extends `page.html.jinja`."""
    return environment(templates).get_template(template).render(policy=Markup(POLICY), **values)


def visible(value: str) -> str:
    """`value` with control characters, lone surrogates and those that turn the direction of writing as ⟨U+202E⟩."""
    return _INVISIBLE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", value.replace("\r\n", "\n"))


def text(value: str) -> str:
    """`visible(value)` for use between tags and inside quoted attributes, where it can be nothing but text."""
    return str(escape(visible(value)))
