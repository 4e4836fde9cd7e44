"""Tables: rows of objects or texts, from files of lines, of JSON and of cells."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from imgen_common.errors import UserError, check_text, one_line
from imgen_common.files import MAX_LINE_BYTES, numbered_lines, opened, read_text, text_lines

TABLE_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv")
"""What `read_table` reads."""
NO_VALUE = frozenset(
    {"nan", "null", "none", "na", "n/a", "#n/a", "<na>", "\\n", "#name?", "#ref!", "#value!", "#div/0!"}
)
"""What pandas, R, SQL and spreadsheets write, in any case, into a cell that has no value."""
NO_ROW = re.compile(r"--+|\(\d+ rows?(?: affected)?\)", re.IGNORECASE)
"""The line under the names, and the count at the end, that clients of databases (sqlcmd, psql) print with the rows."""
PROTECTED = re.compile('="([^"]*)"')
"""A cell that Excel is to take for text, whatever it looks like."""
FIRST_LINE = re.compile(r"(?:sep=([,;\t|])|#TYPE [^\n]*)\n")
"""The first line of a .csv in which Excel keeps what divides its cells, or PowerShell the type of its rows."""

OTHER_FILES = {
    "```": "text with a fence of Markdown; remove the lines of ```",
    "version https://git-lfs": "a pointer of Git LFS; run `git lfs pull` there",
    **dict.fromkeys(("<!doctype", "<html", "<?xml"), "a web page; download the file itself"),
    "{\\rtf": "rich text (RTF); save it as plain text",
    **dict.fromkeys(('{"', '[{"', '["'), "JSON; name it .jsonl, or .json where it is one list"),
    "['": "a list of a program; write each text on a line without quotes, or save the list as .json",
}
"""What a file of lines is instead that begins so."""
COLUMNS = ("prompt", "prompts", "caption", "captions", "text", "texts", "instruction")
"""One of the names in the first line of a table."""
COMMENT = re.compile("#{1,6} ")
"""How a comment or a heading begins."""
MARKS = (
    "ar|aspect|c|cfg_scale|chaos|cref|cw|d|h|height|iw|l|n|neg|negative_prompt|niji|no|prompt|q|quality|s|sampler_name|"
    "seed|sref|steps|stop|style|stylize|sw|tile|v|version|w|weird|width"
)
OPTION = re.compile(rf"(?:^|\s)--(?:{MARKS})(?:\s|$)|^Negative prompt:|^Steps: \d+,|^/imagine ")
"""An option in a text, or on a line of its own, as sd-scripts, AUTOMATIC1111 and Midjourney write them."""
HOLDER = re.compile(r"""\[(["'].*)?\]|\{(["'].*)?\}""", re.DOTALL)
"""A list or an object, as JSON and Python write them into a cell."""
RULE = frozenset("-+|:= \t─━┌┬┐╭╮┏┓├┼┤╞═╪╡")
"""Signs of the line above or under the names of a table that a program printed, or of one in Markdown."""
QUOTES = ('""', "''", "“”", "„“", "„”", "«»", "‘’")
"""What may stand around a text, before and after it."""
csv.field_size_limit(MAX_LINE_BYTES)  # images in base64, which stand beside texts in some tables
ITEM = re.compile(r"([-*•·–]|\d+[.):])\s")
"""What stands before an item of a list."""


def read_table(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with its place for messages; the suffix, whatever its case, says how they are written.

    .txt: a line each.  .jsonl: a JSON value in each line.  .json: an array.  .csv, whose cells commas, semicolons or
    tabs divide, and .tsv: the first line names the columns; cells that are empty are left out of a row, but for that of
    `key`, as is a first column without a name; ="a text", as Excel protects one, is that text.  A row that is text
    alone, as in .txt, is {key: text}.

    Raises UserError for another suffix, and naming the line or item that cannot be read.
    """
    rows: Iterator[tuple[str, Any]]
    match path.suffix.lower():
        case ".txt":
            lines = numbered_lines(path)
            _check_lines([line for _, line in lines], path)
            rows = ((f"{path}:{number}", line) for number, line in lines)
        case ".jsonl":
            rows = ((f"{path}:{number}", parse_json(line, f"{path}:{number}")) for number, line in numbered_lines(path))
        case ".json":
            rows = _json_items(path)
        case ".csv":
            rows = _with_columns(path, _csv_cells(path), key)
        case ".tsv":
            rows = _with_columns(path, _tsv_cells(path), key)
        case suffix:
            with opened(path):  # a missing file is said to be missing
                pass
            raise UserError(
                f"{path}: cannot read rows of {suffix or 'a file without suffix'}; allowed: {', '.join(TABLE_SUFFIXES)}"
            )
    return ((where, _object(row, key, where)) for where, row in rows)


def _check_lines(lines: Sequence[str], path: Path) -> None:
    """Raises UserError where the lines of a file, most often the first, say that they are no texts to be used one by
    one."""
    first = lines[0] if lines else ""
    if any(len(line) > 2 and RULE.issuperset(line) for line in lines[:2]):
        raise UserError(f"{path}: is a table with lines around its names; write each text on a line, or name a .csv")
    closed = re.sub(r"^([\[{])\s+", r"\1", first.lower())
    if what := next((what for start, what in OTHER_FILES.items() if closed.startswith(start)), None):
        raise UserError(f"{path}: is {what}")
    if comment := next(filter(COMMENT.match, lines), None):
        raise UserError(
            f"{path}: has comments or headings ({one_line(comment, 40)}); remove the lines that begin with #"
        )
    if any("\x1b[" in line for line in lines):
        raise UserError(f"{path}: has the colors of a terminal in it; write it again without (--color=never)")
    if option := next(filter(None, map(OPTION.search, lines)), None):
        what = f"options of another program ({option[0].strip()})"
        raise UserError(f"{path}: has {what}, which would be read as words; write the texts alone")
    if first.rstrip().endswith(("[", "{")):
        what = f"begins a list of a program or of JSON ({one_line(first, 40)})"
        raise UserError(f"{path}: {what}; write each text on a line without quotes, or save the list as .json")
    cells = [cell.strip(' "').lower() for cell in re.split("[,;|]", first)]
    if any(cell in COLUMNS for cell in cells) and not any(" " in cell for cell in cells):
        raise UserError(f"{path}: its first line, {first.strip()}, names a column, as that of a table; name it .csv")
    items = list(filter(ITEM.match, lines))
    if len(items) > max(1, len(lines) / 2):  # the others are headings, or what a chat model says of its list
        what = f"a list whose items begin with a number or a mark ({one_line(items[0], 40)})"
        raise UserError(f"{path}: is {what}; write each text on a line without it")
    if "\t" in first:
        raise UserError(f"{path}: has tabs, as a table has; name it .tsv, whose first line names the columns")
    ends = {line[0] + line.rstrip(" ,")[-1:] if len(line) > 1 else "" for line in lines}
    if len(ends) == 1 and ends <= set(QUOTES):
        raise UserError(f"{path}: has each text in quotes, as jq writes them without -r; remove the quotes")


def check_cell(text: str, what: str, remedy: str) -> None:
    """Raises UserError for what programs write into a cell without a value, or around the rows, which is no text."""
    if text.strip().lower() in NO_VALUE:
        raise UserError(f"{what} is {text.strip()}, as programs write a cell without a value; {remedy}")
    if NO_ROW.fullmatch(text.strip()):
        raise UserError(f"{what} is {text.strip()}, as a client of a database prints with its rows; {remedy}")


def describe_type(value: object) -> str:
    """What JSON, or Python, calls a value: `null`, `a list`, `a number`."""
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", bytes: "binary data"}
    names[dict] = "an object"
    return names.get(type(value), f"a {type(value).__name__}")


def _object(row: object, key: str, where: str) -> dict[str, Any]:
    if not isinstance(row, str | dict):
        raise UserError(f"{where}: must be an object or a text, got {describe_type(row)}")
    return {key: row} if isinstance(row, str) else row


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text.  Raises UserError naming `where` for no JSON, a key that occurs twice, and for half a
    surrogate pair."""
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
        if "\\ud" in text.lower():
            check_text(json.dumps(value, ensure_ascii=False), where)
    except (ValueError, RecursionError) as error:
        is_split = text.strip() in ("{", "[") or (isinstance(error, json.JSONDecodeError) and error.msg == "Extra data")
        remedy = "; write each object on one line of a .jsonl, or a list of them in a .json" if is_split else ""
        remedy = "; take away the comma at its end" if is_split and text.rstrip().endswith(",") else remedy
        raise UserError(f"{where}: not JSON ({error}){remedy}") from None
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a key that occurs twice, of which json would keep the last."""
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value:
            raise ValueError(f"the key {one_line(name, 60)!r} occurs twice")
        value[name] = item
    return value


def _json_items(path: Path) -> Iterator[tuple[str, Any]]:
    items = parse_json(read_text(path), str(path))
    if not isinstance(items, list):
        raise UserError(
            f"{path}: must be a JSON array of rows, got {describe_type(items)}; write one object a line in a .jsonl"
        )
    yield from ((f"{path}: item {number}", item) for number, item in enumerate(items, 1))


def _csv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    text = read_text(path).replace("\n\ufeff", "\n")  # of the second of two files that were joined
    named = FIRST_LINE.match(text)  # a program's word to itself, no row
    columns = re.sub('"[^"]*"', "", text[named.end() if named else 0 :].partition("\n")[0])
    # spreadsheets write semicolons where numbers have commas, and tabs as "text"
    guessed = next((mark for mark in ";\t" if mark in columns and "," not in columns), ",")
    separator = named[1] if named and named[1] else guessed
    reader = csv.reader(io.StringIO(text), delimiter=separator, strict=True, skipinitialspace=True)
    begun = 1
    try:
        for cells in reader:
            begun = reader.line_num + 1
            if not (named and reader.line_num == 1):
                yield reader.line_num, cells
    except csv.Error as error:
        raise UserError(
            f"{path}:{begun}: not CSV ({error}, in line {reader.line_num}); put a cell with quotes in double quotes, "
            "and write each quote inside it twice"
        ) from None


def _tsv_cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Tabs divide cells, and quotes are as in a .csv where all of them can be; else they are part of the text, but for
    those around a whole cell.  A cell of several lines with tabs between two quotes is none."""
    lines = list(text_lines(path))
    reader = csv.reader((line + "\n" for _, line in lines), delimiter="\t", strict=True)
    try:
        rows = [(lines[reader.line_num - 1][0], cells) for cells in reader]
        is_quoted = not any("\n" in cell and "\t" in cell for _, cells in rows for cell in cells)
    except csv.Error:
        is_quoted = False
    yield from rows if is_quoted else ((n, [_unquote(cell) for cell in line.split("\t")]) for n, line in lines)


def _unquote(cell: str) -> str:
    inside = cell[1:-1].replace('""', "")
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inside else cell


def _with_columns(path: Path, lines: Iterable[tuple[int, list[str]]], key: str) -> Iterator[tuple[str, dict[str, str]]]:
    header, columns = list[str](), list[str]()
    for number, cells in lines:
        if not any(cell.strip() for cell in cells):
            continue
        if not columns:
            header = [cell.strip() for cell in cells]
            columns = [name or f"column {place} without a name" for place, name in enumerate(header, 1)]
            if twice := sorted({name for name in columns if columns.count(name) > 1}):
                raise UserError(f"{path}:{number}: names a column twice ({', '.join(map(repr, twice))}); rename one")
            continue
        if [cell.strip() for cell in cells] == header:
            raise UserError(f"{path}:{number}: names the columns again, as where two files were joined; remove the row")
        if len(cells) != len(columns):
            quoted = "put a text with separators in double quotes, or write one text a line in a .txt"
            remedy = quoted if len(cells) > len(columns) else "give the row all its cells, also empty ones"
            what = f"{len(cells)} cells, but the first line names {len(columns)} columns"
            raise UserError(f"{path}:{number}: {what}; {remedy}")
        values = (protected[1] if (protected := PROTECTED.fullmatch(cell)) else cell for cell in cells)
        row = {name: cell for name, cell in zip(columns, values, strict=True) if cell or name == key}
        if not header[0]:
            row.pop(columns[0], None)  # numbers of rows, as pandas writes them
        remedy = "remove the row, or write the texts one a line in a .txt if it is one"
        check_cell(row.get(key, ""), f"{path}:{number}: {key}", remedy)
        if HOLDER.fullmatch(row.get(key, "").strip()):
            what = f"a list or an object ({one_line(row[key], 40)}), not a text"
            raise UserError(f"{path}:{number}: {key} holds {what}; write a row for each text")
        yield f"{path}:{number}", row
