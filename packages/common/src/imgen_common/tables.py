"""Tables: rows of objects or texts, from files of lines, of JSON and of cells."""

import contextlib
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from imgen_common.errors import UserError, check_text, one_line
from imgen_common.files import MAX_LINE_BYTES, check_no_address, numbered_lines, opened, read_text, text_lines

TABLE_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv")
"""What `read_table` reads."""
NO_TEXT = re.compile(
    r"nan|null|none|n/?a|#n/a|<na>|\\n|#name\?|#ref!|#value!|#div/0!|--+|\(\d+ rows?(?: affected)?\)", re.IGNORECASE
)
"""What pandas, R, SQL and spreadsheets write into a cell that has no value; and the line under the names, and the count
at the end, that clients of databases (sqlcmd, psql) print with the rows."""
PROTECTED = re.compile('="([^"]*)"')
"""A cell that Excel is to take for text, whatever it looks like."""
FIRST_LINE = re.compile(r"(?:sep=([,;\t|])|#TYPE [^\n]*)\n")
"""The first line of a .csv in which Excel keeps what divides its cells, or PowerShell the type of its rows."""

FIRST_LINES = {
    "```": "is text with a fence of Markdown; remove the lines of ```",
    r"<!doctype|<html|<\?xml": "is a web page; download the file itself",
    r"\{\\rtf": "is rich text (RTF); save it as plain text",
    r"\[?\s*\{\s*\"|\[\s*\"": "is JSON; name it .jsonl, or .json where it is one list",
    r"\[\s*'|.*[\[{]$": "begins a list of a program or of JSON; write each text on a line, or save the list as .json",
}
"""What a file of lines is instead whose first line begins so."""
COLUMNS = ("prompt", "prompts", "caption", "captions", "text", "texts", "instruction")
"""One of the names in the first line of a table."""
MARKS = (
    "ar|aspect|c|cfg_scale|chaos|cref|cw|d|h|height|iw|l|n|neg|negative_prompt|niji|no|prompt|q|quality|s|sampler_name|"
    "seed|sref|steps|stop|style|stylize|sw|tile|v|version|w|weird|width"
)
LINES = {
    r"^[-+|:= \t─━┌┬┐╭╮┏┓├┼┤╞═╪╡]{3,}$": "is a rule ({}), as around the names of a table; remove it, or name it .csv",
    "^#{1,6} .*": "has comments or headings ({}); remove the lines that begin with #",
    r"\x1b\[": "has the colors of a terminal in it; write it again without (--color=never)",
    rf"(?:^|\s)--(?:{MARKS})(?=\s|$)|^Negative prompt:|^Steps: \d+,|^/imagine ": "has options of another program ({}), "
    "which would be read as words; write the texts alone",
}
"""What is wrong with a line of texts in which one of these is found; options are those of sd-scripts, AUTOMATIC1111 and
Midjourney."""
HOLDER = re.compile(r"""\[(["'].*)?\]|\{('.*)?\}""", re.DOTALL)
"""A list, as JSON and Python write it into a cell, or an object of Python; one of JSON may be a structured prompt."""
QUOTES = ('""', "''", "“”", "„“", "„”", "«»", "‘’")
"""What may stand around a text, before and after it."""
QUOTE_ENDS = re.compile(r"""(?<=[^\s\\"])["'”“»’](?=[\s,.;:!?])""")
"""The end of a quotation inside a text, as in `"Open" above "Closed"`; jq writes a backslash before it, others two."""
csv.field_size_limit(MAX_LINE_BYTES)  # images in base64, which stand beside texts in some tables
ITEM = re.compile(r"\*{0,2}([-*•·–]|\(?\d+[.):])\*{0,2}\s")
"""What stands before an item of a list."""
LABEL = re.compile(
    r"[*_]{0,3}([^\W\d_]{1,30}(?: [^\W\d_]{1,30}){0,2}) ?(?:#|no\. ?)?(\d{1,4})[*_]{0,3}(?: ?\([^)]*\))? ?"
    r"(?:：|:(?!\d)|[.)](?=[\s*_]|$)|[-–—](?=\s|$))[*_]{0,3}",
    re.IGNORECASE,
)
"""A numbered label, as chat models write it: `Prompt 1:`, `**Image prompt #2** -`."""
COMMENTED = re.compile(r"#(?![0-9a-f]{3,8}\b)[^\W\d_]\S*\s+[^\s#]", re.IGNORECASE)
"""How a text that was commented out begins, unless it begins with a color."""
HASHTAG = re.compile(r"#[^\W\d_]")
CONTROL_TOKEN = re.compile(
    r"<image>|<\|[^\s<>|]{1,64}\|>|<\uff5c[^\s<>\uff5c]{1,64}\uff5c>"
    r"|</s>|<(?:bos|eos|pad)>|<(?:start|end)_of_turn>|\[/?INST\]"
)
"""What a reader of rows takes for an image, or a tokenizer for an image or the end of a turn, wherever it occurs."""


def read_table(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with its place for messages; the suffix, whatever its case, says how they are written.

    .txt: a line each.  .jsonl: a JSON value in each line.  .json: an array.  .csv, whose cells commas, semicolons,
    tabs or | divide, and .tsv: the first line names the columns; cells that are empty are left out of a row, but for
    that of `key`, as is a first column without a name; ="a text", as Excel protects one, is that text.  A row that is
    text alone, as in .txt, is {key: text}.

    Raises UserError for another suffix, and naming the line or item that cannot be read, or whose text `check_texts`
    refuses; a line of a .txt may be what stands elsewhere for no value.
    """
    rows: Iterator[tuple[str, Any]]
    match path.suffix.lower():
        case ".txt":
            lines = numbered_lines(path)
            _check_lines(lines, path)
            return ((f"{path}:{number}", {key: line}) for number, line in lines)
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
    return check_texts(((where, _object(row, key, where)) for where, row in rows), key)


def check_texts(rows: Iterable[tuple[str, dict[str, Any]]], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows.  Raises UserError naming the one whose text under `key` is none to be used: what programs write for no
    value or for several, or a control token of a chat model."""
    for where, row in rows:
        if isinstance(text := row.get(key), str):
            what = f"{where}: {key}"
            check_text(text, what)
            check_cell(text, what, "remove the row, or write the texts one a line in a .txt if it is one")
            if HOLDER.fullmatch(text.strip()):
                holds = f"a list or an object ({one_line(text, 40)}), not a text"
                raise UserError(f"{what} holds {holds}; write a row for each text")
            check_no_token(text, what)
        yield where, row


def check_no_table(text: str, remedy: str) -> None:
    """Raises UserError where a text is the name of a file of rows, which stands there for what it holds."""
    with contextlib.suppress(OSError, ValueError):  # no name of a file
        if text.lower().endswith(TABLE_SUFFIXES) and Path(text).is_file():
            raise UserError(f"{one_line(text)}: is a file, and only its name would be read; {remedy}")


def check_no_token(text: str, what: str) -> None:
    """Raises UserError for a control token of a chat model, which a tokenizer would not read as words."""
    if token := CONTROL_TOKEN.search(text):
        means = "which a chat model reads as an image or the end of a turn"
        raise UserError(f"{what} holds {token[0]}, {means}; remove it from the texts")


def _check_lines(numbered: Sequence[tuple[int, str]], path: Path) -> None:
    """Raises UserError where the lines of a file, most often the first, say that they are no texts to be used one by
    one."""
    lines = [line for _, line in numbered]
    first = lines[0] if lines else ""
    if what := next((what for start, what in FIRST_LINES.items() if re.match(start, first, re.IGNORECASE)), None):
        raise UserError(f"{path}: {what}")
    for number, line in numbered:
        for mark, what in LINES.items():
            if found := re.search(mark, line):
                raise UserError(f"{path}:{number}: {what.format(one_line(found[0], 40))}")
    cells = [cell.strip(' "').lower() for cell in re.split("[,;|]", first)]
    is_table = len(lines) > 1 and not any(" " in cell for cell in cells) and not _are_tags(lines)
    if is_table and any(cell in COLUMNS for cell in cells):
        what = f"its first line, {first.strip()}, names a column, as that of a table"
        raise UserError(f"{path}: {what}; name it .csv, or put another line first if it is a text")
    _check_marks(numbered, path)


def _check_marks(numbered: Sequence[tuple[int, str]], path: Path) -> None:
    """Raises UserError where something stands before, between, around or in the texts that is no part of them."""
    lines = [line for _, line in numbered]
    if item := _item(lines):
        what = f"a list whose items are numbered or begin with a mark ({one_line(item, 40)})"
        remedy = "write each text on a line without it, or the texts as .jsonl if it is a part of them"
        raise UserError(f"{path}: is {what}; {remedy}")
    if lines and "\t" in lines[0] and any("\t" in line for line in lines[1:]):
        raise UserError(f"{path}: has tabs, as a table has; name it .tsv, whose first line names the columns")
    texts = [line.rstrip(" ,") for line in lines]
    ends = {text[0] + text[-1] if len(text) > 1 else "" for text in texts}
    if len(ends) == 1 and ends <= set(QUOTES) and not all(QUOTE_ENDS.search(text, 1, len(text) - 1) for text in texts):
        raise UserError(f"{path}: has each text in quotes, as jq writes them without -r; remove the quotes")
    commented = [(number, line) for number, line in numbered if COMMENTED.match(line)]
    if 0 < 2 * len(commented) < len(lines) and sum(len(HASHTAG.findall(line)) for line in lines) == len(commented):
        number, line = commented[0]
        remedy = "remove the line, or write the texts as .jsonl if it is one"
        raise UserError(f"{path}:{number}: is commented out with # ({one_line(line, 40)}); {remedy}")
    for number, line in numbered:
        check_no_token(line, f"{path}:{number}:")


def _are_tags(lines: Sequence[str]) -> bool:
    """Whether lines are tags as boorus write them, `1girl,solo,text`: words alone, in some lines fewer than in the
    first, or some of the first again.  The lines of a table have as many cells as its first, or more, unquoted."""
    first, *others = [[cell.strip() for cell in line.strip(" ,").split(",")] for line in lines]
    if any(len(row) == 1 or any(re.search(r"\s", cell) for cell in row) for row in (first, *others)):
        return False
    again = set(first).difference(COLUMNS)
    return any(len(row) < len(first) or again.intersection(row) for row in others)


def _item(lines: Sequence[str]) -> str | None:
    """The first item where most lines are those of a list; the others are headings, or what a chat model says of it.

    The numbers of labels follow each other, and a label alone on its line stands for the text below it too.
    """
    items = list(filter(ITEM.match, lines))
    if len(items) > max(1, len(lines) / 2):
        return items[0]
    found = list(filter(None, map(LABEL.match, lines)))
    ((word, _),) = Counter(label[1].lower() for label in found).most_common(1) or [("", 0)]
    labels = [label for label in found if label[1].lower() == word]
    numbers = {int(label[2]) for label in labels}
    alone = sum(label.end() == len(label.string) for label in labels)
    if len(numbers) < 2 or max(numbers) - min(numbers) >= 2 * len(numbers):
        return None
    return labels[0].string if 2 * (len(labels) + alone) >= len(lines) else None


def check_cell(text: str, what: str, remedy: str) -> None:
    """Raises UserError for what programs write into a cell without a value, or around the rows, which is no text."""
    if NO_TEXT.fullmatch(text.strip()):
        raise UserError(f"{what} is {text.strip()}, as programs write a cell without a value or around rows; {remedy}")


def image_path(folder: Path, name: str) -> Path:
    """The path of a row's image.  Raises UserError for a list in a cell, and as `check_no_address`."""
    check_no_address(name)
    if name.startswith(("['", '["')):
        raise UserError("a cell of images has one path; write the rows as .jsonl, where a list of them may stand")
    return folder / name


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
    # spreadsheets write semicolons where numbers have commas, and tabs as "text"; Flickr30k has |
    guessed = next((mark for mark in ";\t|" if mark in columns and "," not in columns), ",")
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
        yield f"{path}:{number}", row
