"""What mkdocs does beside its own work: pages of the documentation that lie outside docs/ become part of the site."""

import os.path
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "benchmarks/README.md",
    "benchmarks/results/*",
)
BLOCK = re.compile(r'<div class="highlight">(<pre>.*?</pre>)</div>', re.DOTALL)
CODE = re.compile(r"<code[^>]*>.*?</code>", re.DOTALL)
HYPHENED = re.compile(r"(?<=[\s>])(?=[^\s<>]*-)[^\s<>]{2,30}(?=[\s<])(?![^<>]*>)")
"""Words such as `--set` or `1e-4` in the text of HTML, which browsers break at their hyphens."""
TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
SENTENCES = 160
"""Characters of the longest cell of a table that a narrow screen can show side by side (`extra.css`)."""
COMMANDS = ("accelerate", "curl", "flowbp", "hf", "interleave", "pip", "torchrun", "uv")
LINK = re.compile(r"(!?)\[([^\]\n]*)\]\(([^)#:\s]*)(#[^)\s]*)?\)")


def site_place(path: Path) -> str | None:
    """Where a file of the repository lies in the site; None: nowhere."""
    inside = path.relative_to(ROOT)
    if inside.parts[0] == "docs":
        return Path(*inside.parts[1:]).as_posix()
    is_page = (
        any(inside.match(pattern) for pattern in OUTSIDE) and path.suffix in (".md", ".svg", ".json") and path.is_file()
    )
    return f"repository/{inside.as_posix()}" if is_page else None


def on_files(files: Files, config: Any) -> Files:
    """Adds the files that lie outside docs/."""
    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        if place := site_place(path):
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Points links to the places of their files in the site; a link to a file that is not in it becomes its words."""
    source, own = Path(page.file.abs_src_path), page.file.src_uri

    def relink(found: re.Match[str]) -> str:
        sign, words, target, anchor = found.groups(default="")
        path = (source.parent / target).resolve()
        if not target or not path.is_relative_to(ROOT):
            return found[0]
        place = site_place(path)
        if place is None:
            return words
        return f"{sign}[{words}]({os.path.relpath(place, os.path.dirname(own) or '.')}{anchor})"

    return LINK.sub(relink, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Commands, and the messages on the page of errors, are wrapped, so that all of them is seen (`extra.css`), but not
    within an option or a number."""
    html = CODE.sub(lambda found: HYPHENED.sub(r'<span class="whole">\g<0></span>', found[0]), html)

    html = TABLE.sub(_name_columns, html)

    def wrap(found: re.Match[str]) -> str:
        words = [line.split()[0] for line in re.sub("<[^>]*>", "", found[1]).splitlines() if re.match(r"[^\s#]", line)]
        if page.file.src_uri == "errors.md" or set(words) <= set(COMMANDS):
            return f'<div class="highlight wrapped">{found[1]}</div>'
        return found[0]

    return BLOCK.sub(wrap, html)


def _name_columns(table: re.Match[str]) -> str:
    """A table of sentences, each cell with the name of its column."""
    if max(map(len, re.findall(r"<td[^>]*>(.*?)</td>", table[0])), default=0) < SENTENCES:
        return table[0]
    names = [
        re.sub("<[^>]*>", "", head).replace('"', "&quot;") for head in re.findall(r"<th[^>]*>(.*?)</th>", table[0])
    ]

    def name_cells(row: re.Match[str]) -> str:
        left = iter(names)
        return re.sub("<td", lambda _: f'<td data-column="{next(left)}"', row[0])

    rows = re.sub(r"<tr>.*?</tr>", name_cells, table[0], flags=re.DOTALL)
    return rows.replace("<table>", "<table data-sentences>", 1)
