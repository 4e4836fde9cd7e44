from pathlib import Path

import pytest

from imgen_common.errors import UserError
from interleave.agents.sources import (
    MAX_BYTES,
    constants,
    expect_places,
    find_file,
    functions,
    text_file,
)
from interleave.benchmarks.official.reading import fill

MODULE = '''
"""A module of prompts."""
import a_module_that_is_not_there
open("written", "w").write("it was run")

PLAIN = "one"
PLACES: str = """
Instruction: {instruct}
""".strip()
ADDED = "a" "b" + f"c {PLAIN}" + '\\d'
FIRST = SECOND = "both"
CHANGED = "old"
CHANGED = "new"
GONE = "text"
GONE = 5
NUMBER = 5
CALLED = "x".join(["a"])
PERCENT = "%s" % "x"
FORMATTED = f"{PLAIN!r}"
PLAIN.attribute = "no name"
DECLARED: str
if True:
    INSIDE = "not at the top level"


def prompt_a(instruct, reference):
    """What it is for."""
    inner = "not returned"
    return f"""A {instruct} with {{braces}} and {reference.text}."""


async def prompt_b(row):
    if row["x"]:
        return "first"
    return (f"second {row['key']}" " and more").lstrip()


def messages(row, image):
    content = [{"type": "text", "text": f"See {row['Prompt']}"}, {"type": "image", "url": f"data:{image}"}]
    return [{"role": "system", "content": "Be strict."}, {"role": "user", "content": content}]


def silent(x):
    return x + 1


def computed(x):
    return f"{x + 1}"
'''


@pytest.fixture
def module(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.py"
    file.write_text(MODULE)
    return file


def test_constants_of_a_module(module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert constants(module) == {
        "PLAIN": "one",
        "PLACES": "Instruction: {instruct}",
        "ADDED": "abc {PLAIN}\\d",
        "FIRST": "both",
        "SECOND": "both",
        "CHANGED": "new",
    }
    assert constants(module, "SECOND", "PLAIN") == {"SECOND": "both", "PLAIN": "one"}
    assert not Path("written").exists()  # nothing was run


@pytest.mark.parametrize(
    "name", ["GONE", "NUMBER", "CALLED", "PERCENT", "FORMATTED", "DECLARED", "INSIDE", "prompt_a", "MISSING"]
)
def test_constants_that_are_no_texts(module: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"prompts\.py: has no text named '{name}'"):
        constants(module, "PLAIN", name)


def test_texts_of_functions(module: Path) -> None:
    assert functions(module) == {
        "prompt_a": ("A {instruct} with {braces} and {text}.",),
        "prompt_b": ("first", "second {key} and more"),
        "messages": ("See {Prompt}", "Be strict."),  # in the order of the source
    }
    assert functions(module, "messages") == {"messages": ("See {Prompt}", "Be strict.")}


@pytest.mark.parametrize("name", ["silent", "computed", "PLAIN", "missing"])
def test_functions_without_texts(module: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"prompts\.py: has no function with texts named '{name}'"):
        functions(module, "prompt_a", name)


def test_the_nearest_name_is_named(module: Path) -> None:
    with pytest.raises(UserError, match="'PLAINS'; did you mean 'PLAIN'"):
        constants(module, "PLAINS")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"def f(:", "not Python that can be read"),
        (b"x = '" + b"a" * MAX_BYTES + b"'", f"more than the allowed {MAX_BYTES} bytes"),
        (b"x = " + b"(" * 50_000 + b")" * 50_000, "not Python that can be read"),
        (b"x = " + b"-" * 100_000 + b"1", "not Python that can be read"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_files_that_are_not_python(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "prompts.py"
    file.write_bytes(content)
    for read in (constants, functions):
        with pytest.raises(UserError, match=rf"prompts\.py:.*{message}"):
            read(file)


def test_sums_of_many_texts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.py"
    file.write_text("short = 'a'\nlong = " + " + ".join(["'a'"] * 100))
    assert constants(file) == {"short": "a", "long": "a" * 100}


@pytest.mark.parametrize("count", [2_000, 100_000])
def test_sums_of_too_many_texts(tmp_path: Path, count: int) -> None:
    file = tmp_path / "prompts.py"
    file.write_text("long = " + " + ".join(["'a'"] * count))
    with pytest.raises(UserError, match=r"prompts\.py: "):
        constants(file, "long")


def test_a_missing_file_names_its_neighbor(module: Path) -> None:
    for read in (constants, functions, text_file):
        with pytest.raises(UserError, match=r"prompt\.py: no such file; did you mean 'prompts\.py'"):
            read(module.with_name("prompt.py"))


def test_text_files_are_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "task.json"
    file.write_bytes(b'\n Judge {"this"}.\r\n')
    assert text_file(file) == '\n Judge {"this"}.\n'
    file.write_text(" \n")
    with pytest.raises(UserError, match=r"task\.json: is empty"):
        text_file(file)
    file.write_text("a" * (MAX_BYTES + 1))
    with pytest.raises(UserError, match="more than the allowed"):
        text_file(file)


def test_the_first_of_several_files(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text("")
    assert find_file(tmp_path, ("a.py", "b.py"), "x/y") == tmp_path / "b.py"
    with pytest.raises(UserError, match=r"has no a\.py or c\.py; give the folder of a copy of x/y"):
        find_file(tmp_path, ("a.py", "c.py"), "x/y")
    with pytest.raises(UserError, match=r"is not a folder, so it has no a\.py"):
        find_file(tmp_path / "none", ("a.py",), "x/y")


def test_places_are_expected() -> None:
    assert expect_places("{a} {b} {c}", "A", "a", "b") == "{a} {b} {c}"
    with pytest.raises(UserError, match=r"^A: has no place for 'c'"):
        expect_places("{a} c", "A", "a", "c")


def test_places_are_filled_once() -> None:
    assert fill("{a}{b}{c} {{a}} {a", a="{b}", b="{a}") == "{b}{a}{c} {{b}} {a"
