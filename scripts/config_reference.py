"""Writes docs/configuration.md from the descriptions in the configuration classes.

python scripts/config_reference.py            write it
python scripts/config_reference.py --check    exit 1 if the file is out of date
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flowbp.config import TrainConfig
from imgen_common.config import FieldRow, fields_table

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration of `flowbp train`

Written by `scripts/config_reference.py` from the descriptions in the code; change those.

A configuration is what the defaults below, then YAML files from left to right, then `--set key=value` say:

    flowbp train my.yaml --set optim.learning_rate=3e-5 --set method=flowbp_bridge --set method.coupling.alpha=0.3

- `a(leap).b` is the key `a.b` where `a.kind` is `leap`. Setting `kind` to another value, or
  over a default, begins its section anew.
- `method` also takes a name (`flowbp methods` lists them), or a name and changes: `{preset: refl, tail: 0.5}`.
- Defaults below `method` are those of the default method, where it has the key.
- A file with `extends: other.yaml` lies over that file; lists are replaced whole, `rewards.0.weight` reaches into one.
- `flowbp train --dry-run` prints the resolved configuration and what it costs.
"""


def escape_cell(text: str) -> str:
    """Text with the characters escaped that end a table cell."""
    return text.replace("|", "\\|")


def format_table(rows: Sequence[FieldRow]) -> str:
    """The rows as a Markdown table."""
    lines = ["| key | type | default | |", "| --- | --- | --- | --- |"]
    lines += [f"| `{row.path}` | {escape_cell(row.type)} | `{row.default}` | {escape_cell(row.doc)} |" for row in rows]
    return "\n".join(lines)


def format_page() -> str:
    """The whole page: first the keys without inner keys, then a section for each of the others."""
    rows = fields_table(TrainConfig)
    sections: dict[str, list[FieldRow]] = {}
    for row in rows:
        sections.setdefault(row.path.replace("(", ".").replace("[]", "").split(".")[0], []).append(row)
    single = [group[0] for group in sections.values() if len(group) == 1]
    parts = [HEAD, f"## Run\n\n{format_table(single)}\n"]
    for name, (own, *inner) in sections.items():
        if inner:
            default = f" Default: `{own.default}`." if own.default != "..." else ""
            parts.append(f"## `{name}`\n\n{own.doc}{default}\n\n{format_table(inner)}\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/configuration.md.")
    parser.add_argument("--check", action="store_true", help="only check whether the file is up to date")
    options = parser.parse_args()
    text = format_page()
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/configuration.md is out of date; run `python scripts/config_reference.py`")


if __name__ == "__main__":
    main()
