"""Files of lines and of rows: what is read, and what is refused with its line."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from imgen_common import files
from imgen_common.errors import UserError, run_cli
from imgen_common.files import files_below, numbered_lines, read_text
from imgen_common.tables import read_table

SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"]
"""What `str.splitlines` splits at, and files of lines do not."""


def written(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def rows(folder: Path, name: str, content: str | bytes, key: str = "prompt") -> list[Any]:
    return [row for _, row in read_table(written(folder, name, content), key)]


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.txt", "a cat, grey\n\n  a dog  \n", ["a cat, grey", "a dog"]),
        ("p.txt", "1. a cat\n", ["1. a cat"]),
        ("p.txt", "- a cat\na dog\n“a” sign\n", ["- a cat", "a dog", "“a” sign"]),
        ("P.TXT", "\ufeffa cat\r\n\r\n   \r\na dog", ["a cat", "a dog"]),
        ("p.txt", "text, caption and title\nls --all\n-- a # b\n", ["text, caption and title", "ls --all", "-- a # b"]),
        ("wildcards.txt", "{a|the} cat\n[a:b:0.5] <lora:x:1> dog\n", ["{a|the} cat", "[a:b:0.5] <lora:x:1> dog"]),
        ("joined.txt", "\ufeffa cat\n\ufeffa dog\n", ["a cat", "a dog"]),
        ("tags.txt", "1girl,solo,text\n1boy,hat\n", ["1girl,solo,text", "1boy,hat"]),
        ("tags.txt", "1girl, text,\n1girl, hat, rain,\n", ["1girl, text,", "1girl, hat, rain,"]),
        ("label.txt", "Prompt: a cat\n", ["Prompt: a cat"]),
        ("label.txt", "Prompt 1: a cat\na dog\na hat\n", ["Prompt 1: a cat", "a dog", "a hat"]),
        ("same.txt", "Route 66: rain\nRoute 66: sun\n", ["Route 66: rain", "Route 66: sun"]),
        ("far.txt", "Boeing 737: rain\nBoeing 777: sun\n", ["Boeing 737: rain", "Boeing 777: sun"]),
        ("fan.txt", "#1 fan\na cat\na dog\n", ["#1 fan", "a cat", "a dog"]),
        ("color.txt", "#ff0000 sky\n#fed sea\n" + "a cat\n" * 4, ["#ff0000 sky", "#fed sea"] + ["a cat"] * 4),
        ("hashtags.txt", "#a cat\na dog #b\na hat\n", ["#a cat", "a dog #b", "a hat"]),
        ("hashtag.txt", "#sunset\na dog\na hat\n", ["#sunset", "a dog", "a hat"]),
        ("no_value.txt", "none\nnan\n", ["none", "nan"]),
        ("signs.txt", '"Open" above "Closed"\n"Rome", not "Paris"\n', ['"Open" above "Closed"', '"Rome", not "Paris"']),
        ("said.txt", "“Hi”, says the cat, “bye”\n", ["“Hi”, says the cat, “bye”"]),
        ("tab.txt", "a\tcat\na dog\n", ["a\tcat", "a dog"]),
        ("tag.txt", "1girl,solo,text\n", ["1girl,solo,text"]),
        ("structured.jsonl", '{"prompt": "{\\"scene\\": [\\"a\\"]}"}\n', ['{"scene": ["a"]}']),
        ("structured.csv", 'prompt\n"{""scene"": ""a""}"\n', ['{"scene": "a"}']),
        ("near.jsonl", '"a <lora:x:0.8> <s0> cat"\n"nan bread"\n', ["a <lora:x:0.8> <s0> cat", "nan bread"]),
        ("flickr30k.csv", "name| n| prompt\n1.jpg| 0| a cat , grey .\n", ["a cat , grey ."]),
        ("p.jsonl", '{"prompt": "a"}\n\n"b"\n', ["a", "b"]),
        ("p.JSONL", '\ufeff{"prompt": "a\\ud83d\\ude00"}\r\n{"id": 1, "prompt": "b"}', ["a\U0001f600", "b"]),
        ("p.json", '["a, b", {"prompt": "c"}]', ["a, b", "c"]),
        ("p.JsoN", '\ufeff[\n {"prompt": "a\\u2028b"}\n]', ["a\u2028b"]),
        ("p.csv", 'id,prompt\n1,"a red circle, big"\n2,a blue square\n', ["a red circle, big", "a blue square"]),
        ("p.CSV", '\ufeffprompt, note\r\n"a ""b""\r\nc", x\r\n,\r\n\r\nd, "e, f"\r\n', ['a "b"\nc', "d"]),
        ("semicolons.csv", '\ufeffid;prompt\r\n1;a, b\r\n2;"c; d"\r\n', ["a, b", "c; d"]),
        ("excel.csv", "\ufeffsep=;\r\nprompt;n\r\na, b;1\r\n", ["a, b"]),
        ("tabs.csv", "prompt\tn\na, b\t1\n", ["a, b"]),
        ("tabs.csv", 'n\tprompt\n1\t"a; ""b"""\n', ['a; "b"']),
        ("pandas.csv", ",prompt\n0,a cat\n1,a dog\n", ["a cat", "a dog"]),
        ("excel.csv", "sep=,\nn,prompt\n1;2,a\n", ["a"]),
        ("bars.csv", "sep=|\nn|prompt\n1|a, b; c\n", ["a, b; c"]),
        ("excel.csv", 'prompt,seed\n="a red circle",="001"\n"=""a, cat""",1\n', ["a red circle", "a, cat"]),
        ("no_value.csv", "prompt,seed\nnan bread,NaN\nnone of them,NULL\n", ["nan bread", "none of them"]),
        ("no_line.csv", "prompt,sep=\nsep=;,b\n", ["sep=;"]),
        ("blank.csv", "id,prompt\n1,\n2,b", ["", "b"]),
        (
            "parti.tsv",
            'prompt\tCategory\tNote\n"G I G" painted\tArts\t\nThe words "Fly"\tX\ty\n"a ""b"""\t"Z"\t\n"\t1\t2\n',
            ['"G I G" painted', 'The words "Fly"', 'a "b"', '"'],
        ),
    ],
)
def test_rows_are_read_as_their_suffix_says(tmp_path: Path, name: str, content: str, prompts: list[str]) -> None:
    assert [row["prompt"] for row in rows(tmp_path, name, content)] == prompts


def test_an_index_and_images_beside_texts_are_no_hindrance(tmp_path: Path) -> None:
    assert rows(tmp_path, "r.csv", ",text,id\n0,a,x\n", "text") == [{"text": "a", "id": "x"}]
    for name, mark in (("r.csv", ","), ("r.tsv", "\t")):
        image = "A" * 200_000
        assert rows(tmp_path, name, f"text{mark}image\na{mark}{image}\n", "text") == [{"text": "a", "image": image}]


def test_empty_cells_are_left_out_but_for_the_texts(tmp_path: Path) -> None:
    assert rows(tmp_path, "r.csv", "id,text\n,a\n7,\n", "text") == [{"text": "a"}, {"id": "7", "text": ""}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.parquet", "PAR1", "p.parquet: cannot read rows of .parquet; allowed: .txt, .jsonl, .json, .csv, .tsv"),
        ("prompts", "a cat", "cannot read rows of a file without suffix"),
        ("p.txt.gz", b"\x1f\x8b", "cannot read rows of .gz"),
        ("p.csv", "id,prompt\n1,a red circle, big\n", "names 2 columns; put a text with separators in double quotes"),
        ("p.csv", "id,prompt,size\n1,a red circle\n", "p.csv:2: 2 cells, but the first line names 3 columns; give the"),
        ("p.csv", 'prompt\n"a" b\n', "p.csv:2: not CSV"),
        ("p.csv", 'prompt\n"never closed\n\n', "not CSV"),
        ("p.csv", "prompt,prompt\na,b\n", "p.csv:1: names a column twice ('prompt')"),
        ("p.tsv", "prompt\tid\na\n", "p.tsv:2: 1 cells"),
        ("p.txt", 'prompt\n"a cat, big"\n', "p.txt: its first line, prompt, names a column, as that of a table; name"),
        ("p.txt", '\ufeff"Caption"\r\n"a cat"\r\n', 'first line, "Caption", names a column'),
        ("p.json", '{"prompt": "a"}', "must be a JSON array of rows, got an object"),
        ("p.json", '{"prompt": "a"}\n{"prompt": "b"}', "p.json: not JSON"),
        ("p.json", "[" * 100_000, "not JSON"),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}', "p.jsonl:1: not JSON (the key 'prompt' occurs twice)"),
        ("p.json", '[{"prompt": "a", "images": {"a": 1, "a": 1}}]', "the key 'a' occurs twice"),
        (
            "p.jsonl",
            '{"prompt": "a"},\n{"prompt": "b"}\n',
            "p.jsonl:1: not JSON (Extra data: line 1 column 16 (char 15)); tak",
        ),
        ("p.json", '["a", null]', "p.json: item 2: must be an object or a text, got null"),
        ("p.jsonl", "3", "p.jsonl:1: must be an object or a text, got a number"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"\n', "p.jsonl:2: not JSON"),
        ("p.jsonl", r'{"prompt": "a \ud83d"}', "p.jsonl:1: holds half of a surrogate pair (U+D83D)"),
        ("p.jsonl", '"a"\n' + r'{"a": [{"\uDE00\uD83D": 1}]}', "p.jsonl:2: holds half of a surrogate pair (U+DE00)"),
        ("p.json", r'["\udc80"]', "p.json: holds half of a surrogate pair (U+DC80)"),
        ("p.txt", b"a\n\xed\xa0\xbd\n", "p.txt:2: not UTF-8 at byte 0"),
        ("p.txt", "\ufeffa\ncaf".encode() + b"\xe9", "p.txt:2: not UTF-8 at byte 3; save it as UTF-8"),
        ("p.csv", b"\xef\xbb\xbfprompt\na\ncaf\xe9\n", "p.csv:3: not UTF-8 at byte 3"),
        ("p.txt", "a cat\na dog".encode("utf-16"), "p.txt:1: not UTF-8 at byte 0"),
        (
            "p.csv",
            b"PK\x03\x04\x14\0\x06\0\n",
            "p.csv: is a .zip or a spreadsheet (.xlsx, .ods); unpack it, or save the table as .csv",
        ),
        ("p.jsonl", b"\x1f\x8b\x08\0\n", "p.jsonl: is compressed; unpack it"),
        ("p.txt", b"%PDF-1.7\n%\xe2\xe3\n", "p.txt: is a PDF; save its text as .txt"),
        ("p.csv", "prompt\na cat".encode("utf-16-le"), "p.csv:1: holds a zero byte"),
        ("p.txt", "a cat\ra dog\r", "p.txt:1: has carriage returns inside"),
        ("mac.tsv", "prompt\tid\ra cat\t1\ra dog\t2\r", "mac.tsv:1: has carriage returns inside"),
        ("mixed.tsv", "prompt\tid\na cat\t1\ra dog\t2\n", "mixed.tsv:2: has carriage returns inside"),
        (
            "p.txt",
            "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n",
            "p.txt: is a pointer of Git LFS",
        ),
        ("p.txt", "\ufeff\n<!DOCTYPE html>\n<html>\n", "p.txt: is a web page; download the file itself"),
        ("p.TXT", "<HTML lang=en>\n", "is a web page"),
        ("p.txt", "<?xml version='1.0'?>\n<Error><Code>AccessDenied</Code></Error>\n", "is a web page"),
        ("p.txt", '{"prompt": "a"}\n{"prompt": "b"}\n', "p.txt: is JSON; name it .jsonl"),
        ("p.txt", '["a", "b"]\n', "p.txt: is JSON"),
        ("p.txt", "['a red circle', 'b']\n", "p.txt: begins a list of a program or of JSON; write each text"),
        ("p.txt", "[\n'a red circle',\n]\n", "p.txt: begins a list of a program or of JSON; write each text"),
        ("p.txt", "\nPROMPTS = [ \n  'a',\n]\n", "p.txt: begins a list of a program or of JSON"),
        ("p.txt", '{\n "prompts": ["a"]\n}\n', "p.txt: begins a list of a program or of JSON"),
        *(
            (name, f"id{mark}prompt\n1{mark}a\n2{mark}{cell}\n", f"{name}:3: prompt is {cell}, as programs write")
            for name, mark in (("p.csv", ","), ("p.tsv", "\t"))
            for cell in ("NaN", "nan", "NULL", "None", "#N/A", "<NA>", "#NAME?", "\\N", "NA")
        ),
        (
            "p.jsonl",
            '"a"\n{"prompt": "nan"}\n',
            "p.jsonl:2: prompt is nan, as programs write a cell without a value or",
        ),
        ("p.json", '["a", {"prompt": "None"}]', "p.json: item 2: prompt is None, as programs write"),
        ("p.jsonl", """{"prompt": "['a cat']"}""", "p.jsonl:1: prompt holds a list or an object (['a cat'])"),
        *(
            (name, f"{before}a<|im_end|>{after}", f"{place} holds <|im_end|>, which a chat model reads as")
            for name, before, after, place in (
                ("p.txt", "a cat\n", "\na", "p.txt:2:"),
                ("p.jsonl", '"a"\n"', '"', "p.jsonl:2: prompt"),
                ("p.json", '["a", "', '"]', "p.json: item 2: prompt"),
                ("p.csv", "id,prompt\n1,", "\n", "p.csv:2: prompt"),
                ("p.tsv", "id\tprompt\n1\t", "\n", "p.tsv:2: prompt"),
            )
        ),
        *(
            ("p.txt", f"a cat {token}\n", f"p.txt:1: holds {token}, which")
            for token in ("<\uff5cend\uff5c>", "</s>", "<eos>", "[/INST]", "<image>", "<end_of_turn>")
        ),
        ("p.txt", "a cat\na hat\n#a dog\n", "p.txt:3: is commented out with # (#a dog); remove the line, or write"),
        *(
            ("p.txt", lines, "p.txt: is a list whose items are numbered or begin with a mark")
            for lines in (
                "Prompt 1: a cat\nPrompt 2: a dog\n",
                "Here they are:\n**Image prompt 11 (wide):** a\n**Image prompt 12:** b\nSCENE 13: c\n",
                "Prompt 1:\na cat\nPrompt 2:\na dog\nEnjoy!\n",
                "提示词1：a\n提示词2：b\n",
                "Prompt #1 - a\nPrompt #3 - b\n",
                "**1.** a cat\n**2.** a dog\n",
                "(1) a cat\n(2) a dog\n",
            )
        ),
        *(
            ("p.txt", lines, "names a column, as that of a table; name it .csv, or put another line first")
            for lines in ("image,text\na.png,cat\n", "image,text\na.png,1girl,solo\n", "image,text\na,a cat, b\nc\n")
        ),
        *(
            ("p.csv", f"prompt\na cat\n{cell}\n", f"p.csv:3: prompt is {cell}, as programs write")
            for cell in ("--------", "(3 rows affected)", "(1 row)")
        ),
        ("p.txt", '"a cat"\n"a sign that says \\"open\\""\n', "p.txt: has each text in quotes, as jq writes them"),
        *(
            ("p.txt", f"{before}a cat{after}\n{before}a dog{after}\n", "p.txt: has each text in quotes")
            for before, after in ("“”", "«»", "''")
        ),
        *(
            ("p.txt", lines, "p.txt: is a list whose items are numbered or begin with a mark")
            for lines in ("1. a cat\n2. a dog\n", "1) a cat\n2) a dog\n", "- a cat\n- a dog\n", "•\ta cat\n•\ta dog\n")
        ),
        *(
            ("p.txt", f"{before}1. a cat\n2. a dog\n{after}3. a hat\n", "is a list whose items are numbered")
            for before, after in (("Here are 3 prompts:\n", ""), ("Animals\n", "\nThings\n"))
        ),
        ("p.txt", "## Animals\n- a cat\n", "p.txt:1: has comments or headings (## Animals); remove the lines"),
        ("p.txt", "# prompt 1\na cat --n low quality --w 768\n", "p.txt:1: has comments or headings (# prompt 1)"),
        ("p.txt", "a cat\na dog --n low quality --w 768\n", "p.txt:2: has options of another program (--n)"),
        ("p.txt", '--prompt "a cat" --width 1024\n', "p.txt:1: has options of another program (--prompt)"),
        (
            "p.txt",
            "a cat\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a\n",
            "another program (Negative prompt:)",
        ),
        ("p.txt", "a cat\nSteps: 20, Sampler: Euler a, Seed: 1\n", "another program (Steps: 20,)"),
        ("p.txt", "a cat\na dog, oil --ar 16:9 --v 6\n", "p.txt:2: has options of another program (--ar)"),
        ("p.txt", "a cat --style raw\n", "p.txt:1: has options of another program (--style)"),
        ("p.txt", "a cat\na dog --niji\n", "p.txt:2: has options of another program (--niji)"),
        ("p.txt", "a cat --steps 20 --cfg_scale 7\n", "p.txt:1: has options of another program (--steps)"),
        ("p.txt", "/imagine prompt: a cat\n", "p.txt:1: has options of another program (/imagine)"),
        ("p.txt", "a cat\n### dogs\na dog\n", "p.txt:2: has comments or headings (### dogs); remove the lines"),
        ("p.txt", "a \x1b[01;31mcat\x1b[m\n", "p.txt:1: has the colors of a terminal in it"),
        ("p.csv", "\ufeffprompt,n\na cat,1\n\ufeffprompt,n\na dog,2\n", "p.csv:3: names the columns again"),
        ("p.csv", ",prompt\n0,a cat\n,prompt\n0,a dog\n", "p.csv:3: names the columns again"),
        *(
            ("p.txt", f"{names}\na cat{names[5:]}\n", f"p.txt: its first line, {names}, names a column")
            for names in ("image,caption", "prompt;category", '"prompt","id"', "text|n")
        ),
        ("p.txt", '"a cat",\n"a dog",\n"a bird"\n', "p.txt: has each text in quotes"),
        ("p.txt", '{ "prompt": "a cat" }\n', "p.txt: is JSON"),
        *(
            ("p.csv", f"prompt;id\n{cell};1\n", "p.csv:2: prompt holds a list or an object (")
            for cell in ('"[""a cat"", ""a dog""]"', "['a cat', 'a dog']", "{'en': 'a cat'}", "[]")
        ),
        ("p.csv", "prompt,id\na cat,1\nprompt,id\na dog,1\n", "p.csv:3: names the columns again, as where two files"),
        ("p.txt", "```\na cat\n```\n", "p.txt: is text with a fence of Markdown; remove the lines of ```"),
        ("p.txt", "{\\rtf1\\ansi\na cat\\par\n}\n", "p.txt: is rich text (RTF); save it as plain text"),
        *(
            ("p.txt", table, f"p.txt:{line}: is a rule ({rule}), as around the names of a table; remove it, or name")
            for table, line, rule in (
                ("+---------+\n| prompt  |\n+---------+\n| a cat   |\n+---------+\n", 1, "+---------+"),
                ("     prompt      \n-----------------\n a cat\n(1 row)\n", 2, "-----------------"),
                ("┌────────┐\n│ prompt │\n├────────┤\n│ a cat  │\n└────────┘\n", 1, "┌────────┐"),
                ("| prompt | id |\n|:---|---:|\n| a cat | 1 |\n", 2, "|:---|---:|"),
                ("a cat,\nin oil\n---\na dog\n", 3, "---"),
            )
        ),
        ("p.txt", "Prompt\tCategory\na cat\tAnimals\n", "p.txt: has tabs, as a table has; name it .tsv"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    with pytest.raises(UserError) as error:
        rows(tmp_path, name, content)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        '#TYPE System.Management.Automation.PSCustomObject\r\n"prompt","category"\r\n"a cat, big","x"\r\n',
        'prompt;"note, optional"\na cat, big;x\n',
        'sep=;\nprompt;"note, optional"\na cat, big;x\n',
    ],
)
def test_first_lines_and_names_of_columns_as_programs_write_them(tmp_path: Path, content: str) -> None:
    assert [row["prompt"] for row in rows(tmp_path, "p.csv", content)] == ["a cat, big"]


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        ('prompt\na cat\n"a\nhat"\n"a ""b"" c"\n', ["a cat", "a\nhat", 'a "b" c']),
        ('prompt\tid\r\n"a\r\nhat"\t1\r\na dog\t2\r\n', ["a\nhat", "a dog"]),
        ('prompt\n"a" cat\n"a ""b"""\n', ['"a" cat', 'a "b"']),
        ('prompt\n"never closed\na dog\n', ['"never closed', "a dog"]),
        ('prompt\tid\n"never\t1\na dog\t2\na TV of 27"\t3\n', ['"never', "a dog", 'a TV of 27"']),
        ('prompt\tid\n"a\thap"\t1\na dog\t2\n', ["a\thap", "a dog"]),
        ('prompt\n6" nails\n"\n', ['6" nails', '"']),
    ],
)
def test_quotes_in_a_tsv(tmp_path: Path, content: str, prompts: list[str]) -> None:
    assert [row["prompt"] for row in rows(tmp_path, "p.tsv", content)] == prompts


@pytest.mark.parametrize("name", ["none.jsonl", "none", "none/p.csv", "n" * 300 + ".txt", "a\0b.txt"])
def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"no such file|cannot be read"):
        list(read_table(tmp_path / name, "prompt"))


@pytest.mark.parametrize("separator", SEPARATORS)
def test_only_a_line_feed_ends_a_line(tmp_path: Path, separator: str) -> None:
    text = f"a{separator}b"
    lines = json.dumps({"prompt": text}, ensure_ascii=False)
    assert numbered_lines(written(tmp_path, "f", f"{text}\n\n{text}")) == [(1, text), (3, text)]
    assert rows(tmp_path, "f.tsv", f"id\tprompt\n1\t{text}\n") == [{"id": "1", "prompt": text}]
    if separator not in "\x0b\x0c\x1c\x1e":  # which JSON escapes
        assert rows(tmp_path, "f.jsonl", lines) == [{"prompt": text}]


def test_a_line_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 2**20)
    assert numbered_lines(written(tmp_path, "f", "x" * (2**20 - 1) + "\ny")) == [(1, "x" * (2**20 - 1)), (2, "y")]
    with pytest.raises(UserError, match="f:2: the line is longer than 1 MiB"):
        numbered_lines(written(tmp_path, "f", "x\n" + "y" * (2**20 + 1)))


def test_text_has_no_byte_order_mark_and_line_feeds_only(tmp_path: Path) -> None:
    assert read_text(written(tmp_path, "f", "\ufeffa\r\nb\rc\u2028d\n")) == "a\nb\nc\u2028d\n"


@pytest.mark.parametrize("word", ["a red \udcff", "--set=name=\ud83d", "\udcc3\udc28"])
def test_an_argument_that_is_not_utf8_is_refused(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer()
    app.command()(lambda: pytest.fail("was run"))
    monkeypatch.setattr(sys, "argv", ["flowbp", "sample", word])
    with pytest.raises(SystemExit) as done:
        run_cli(app, "flowbp")
    assert done.value.code == 2
    assert "argument 2" in (said := capsys.readouterr().err)
    assert "half of a surrogate pair" in said
    assert said.count("\n") == 1


SEEDS = {
    ".txt": "a cat\r\n\ufeffa dog, \U0001f436\n",
    ".jsonl": '{"prompt": "a \\ud83d\\ude00", "id": [1, null]}\n"b"\n',
    ".json": '[{"prompt": "a"}, "b\\u2028", {"x": 1e9}]',
    ".csv": 'id;prompt\n1;"a, ""b"""\n',
    ".CSV": 'id,prompt\n1,"a, ""b""\nc"\n,x\n',
    ".tsv": 'prompt\tid\n"G I" x\t1\n"a ""b"""\t\n',
}
PIECES = [
    b"\n",
    b"\r",
    b"\0",
    b'"',
    b",",
    b";",
    b"\t",
    b"\\ud800",
    b"\xff",
    b"\xef\xbb\xbf",
    b"[" * 3000,
    b"{",
    b"]",
    b"\\",
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("suffix", SEEDS)
def test_no_bytes_are_read_otherwise_than_as_rows_or_refused(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(suffix)
    messages: list[str] = []
    for _ in range(3_000):
        content = bytearray(SEEDS[suffix].encode() * rng.randint(1, 3))
        for _ in range(rng.randint(0, 4)):
            place = rng.randrange(len(content) + 1)
            content[place : place + rng.randint(0, 3)] = rng.choice([*PIECES, rng.randbytes(2), b""])
        file = written(tmp_path, f"f{suffix}", bytes(content))
        try:
            found = list(read_table(file, "prompt"))
        except UserError as error:
            messages.append(str(error))
        else:
            assert all(isinstance(row, dict) and where.startswith(str(file)) for where, row in found)
            json.dumps([row for _, row in found], ensure_ascii=False).encode()
    assert 100 < len(messages) < 2_900
    assert not any("\n" in message for message in messages)


def test_an_address_in_the_place_of_a_file_is_not_shown() -> None:
    with pytest.raises(UserError, match=r"^https://\.\.\.: is an address, not a file; download it") as refused:
        read_text(Path("https://someone:secret@host/prompts.txt?token=secret"))
    assert "secret" not in str(refused.value)


def test_files_of_linked_folders_are_found_and_circles_end(tmp_path: Path) -> None:
    other = tmp_path / "other"
    for folder in (tmp_path / "set" / "a", other / "b"):
        folder.mkdir(parents=True)
        (folder / "x.json").write_text("{}")
    (tmp_path / "set" / "linked").symlink_to(other)
    (other / "b" / "back").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "gone").symlink_to(tmp_path / "nowhere")
    found = [path.relative_to(tmp_path / "set").as_posix() for path in files_below(tmp_path / "set", "*.json")]
    assert found == ["a/x.json", "linked/b/x.json"]


def test_a_quote_that_does_not_end_is_said_where_it_begins(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"p\.csv:3: not CSV .*in line 5\); put a cell with quotes in double quotes"):
        rows(tmp_path, "p.csv", 'prompt\na cat\n"Untitled, 1960\na dog\na bird\n')
