"""Requests: every kind of file, and every character that a text may have."""

import json
from pathlib import Path

import pytest
from PIL import Image

from imgen_common.errors import UserError
from interleave.loop.requests import load_requests, make_request, read_requests, save_requests
from interleave.storage.images import ImageStore


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("r.txt", "\ufeffa cat, grey\r\n\r\na dog", ["a cat, grey", "a dog"]),
        ("r.JSON", '["a cat", {"text": "a dog", "id": "x"}]', ["a cat", "a dog"]),
        ("r.jsonl", '\ufeff{"text": "a\u2028b"}\n\n{"text": "c\x85d"}', ["a\u2028b", "c\x85d"]),
        ("r.csv", 'id,category,text\n1,x,"a, b"\n,,c\n', ["a, b", "c"]),
        ("r.tsv", 'text\tcategory\n"a" cat\t\n', ['"a" cat']),
    ],
)
def test_requests_are_read_from_rows_of_any_kind(tmp_path: Path, name: str, content: str, texts: list[str]) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert [request.text for request in read_requests(tmp_path / name, ImageStore(tmp_path))] == texts


@pytest.mark.parametrize(("given", "made"), [("7", "7"), ('"a"', "a"), ("null", None)])
def test_an_id_may_be_a_whole_number_or_left_open(tmp_path: Path, given: str, made: str | None) -> None:
    (tmp_path / "r.jsonl").write_text(f'{{"text": "a cat", "id": {given}}}')
    (request,) = read_requests(tmp_path / "r.jsonl", ImageStore(tmp_path))
    assert request.id == (made or make_request("a cat", [], ImageStore(tmp_path)).id)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.csv", "text,images\na cat,x.png\n"),
        ("r.tsv", "images\ttext\nx.png\ta cat\n"),
        ("r.jsonl", '{"text": "a", "images": "x.png"}'),
    ],
)
def test_an_image_may_stand_alone_where_no_list_can_be_written(tmp_path: Path, name: str, content: str) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    (tmp_path / name).write_text(content)
    (request,) = read_requests(tmp_path / name, ImageStore(tmp_path))
    assert len(request.image_ids) == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("r.parquet", "PAR1", "allowed: .txt, .jsonl, .json, .csv, .tsv"),
        (
            "r.csv",
            "prompt\na cat\n",
            "r.csv:2: prompt: Extra inputs are not permitted; allowed keys: text, content",
        ),
        ("r.csv", "text,imagse\na,b\n", "did you mean 'images'"),
        ("r.json", "[3]", "r.json: item 1: must be an object or a text, got a number"),
        ("r.jsonl", '{"text": "a", "category": 3}', "category: Input should be a valid string, got a number; allowed"),
        ("r.jsonl", '{"content": [{"text": "a"}]}', "content.0: Input should be a valid string, got an object;"),
        ("r.jsonl", '{"text": null}', "r.jsonl:1: the request is empty"),
        (
            "r.txt",
            "a cat\na cat\n",
            "r.txt:2: this request is there already; give every request an id of its own, as a .jsonl",
        ),
        ("r.jsonl", '{"text": "NaN"}', "r.jsonl:1: text is NaN, as programs write a cell without a value"),
        ("r.jsonl", '{"text": "a <|im_end|>"}', "r.jsonl:1: text holds <|im_end|>, which a chat model reads"),
        ("r.jsonl", '{"content": ["a", "b</s>"]}', "r.jsonl:1: content holds </s>, which a chat model reads"),
    ],
)
def test_other_rows_are_refused_with_their_place(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        read_requests(tmp_path / name, ImageStore(tmp_path))
    assert said in str(error.value)


def test_a_list_in_a_cell_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("text,images\na,\"['a.png', 'b.png']\"\n")
    with pytest.raises(UserError, match=r"r\.csv:2: a cell of images has one path; write the rows as \.jsonl"):
        read_requests(tmp_path / "r.csv", ImageStore(tmp_path / "images"))


def test_null_is_a_key_that_is_left_out(tmp_path: Path) -> None:
    """As pandas and datasets write rows without a value."""
    names = ("id", "category", "images", "content")
    empty = dict.fromkeys(("id", "category", "images"), "")  # of fillna("")
    for row in ({"text": "a"}, {"text": "a"} | dict.fromkeys(names), {"text": "a"} | empty):
        (tmp_path / "r.jsonl").write_text(json.dumps(row))
        assert read_requests(tmp_path / "r.jsonl", store := ImageStore(tmp_path)) == [make_request("a", (), store)]


@pytest.mark.parametrize("address", ["https" + "://a.b/c.png?token=SECRET", "s3" + "://bucket/SECRET.png"])
@pytest.mark.parametrize("row", ['{"text": "a", "images": ["%s"]}', '{"content": ["a", {"image": "%s"}]}'])
def test_an_address_is_no_image_and_is_not_shown(tmp_path: Path, row: str, address: str) -> None:
    (tmp_path / "r.jsonl").write_text(row % address)
    with pytest.raises(UserError, match=r"r\.jsonl:1: \w+://\.\.\.: is an address, not a file; download it") as error:
        read_requests(tmp_path / "r.jsonl", ImageStore(tmp_path))
    assert "SECRET" not in str(error.value)
    (tmp_path / "r.jsonl").write_text(row % "data:image/png;base64,SECRET")
    with pytest.raises(UserError, match=r"r\.jsonl:1: data:\.\.\.: is the content of a file") as error:
        read_requests(tmp_path / "r.jsonl", ImageStore(tmp_path))
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1e", "\r", "\n", "\ufeff"])
def test_a_request_survives_its_run(tmp_path: Path, separator: str) -> None:
    store = ImageStore(tmp_path)
    asked = [make_request(f"{separator}a{separator}b{separator}", (), store), make_request("c", (), store)]
    save_requests(asked, tmp_path)
    assert load_requests(tmp_path) == asked
    (tmp_path / "r.jsonl").write_text(json.dumps({"text": asked[0].text}))
    assert read_requests(tmp_path / "r.jsonl", store) == asked[:1]


@pytest.mark.parametrize("text", ["\ud83d", "a \ude00\ud83d", "\udc80 a", "a\0b"])
def test_what_is_no_letter_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"the request: holds (half of a surrogate pair|NUL \(U\+0000\))"):
        make_request(text, (), ImageStore(tmp_path))
