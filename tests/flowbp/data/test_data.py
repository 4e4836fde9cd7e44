"""Prompts: every source, every mistake in one, and the order in which they are used."""

import json
from pathlib import Path

import pytest

from flowbp.config import DataConfig, ModelConfig
from flowbp.data.edits import Edit
from flowbp.data.prompts import describe_unread_prompts, load_prompts, prompt_indices
from flowbp.rewards import RewardConfig
from imgen_common.errors import UserError
from imgen_common.hub import WEIGHTS
from imgen_common.shapes.scene import parse_caption


def load(source: object, key: str = "prompt", limit: int | None = None) -> list[str]:
    return load_prompts(str(source), DataConfig(key=key), limit)


def test_a_text_file_gives_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  a dog, 犬  \nthree birds", encoding="utf-8")
    assert load(file) == ["a cat", "a dog, 犬", "three birds"]
    assert load(file, limit=2) == ["a cat", "a dog, 犬"]


def test_json_lines_give_their_column(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"text": t, "id": 1}) + "\n" for t in ("a cat", "a dog")))
    assert load(file, key="text") == ["a cat", "a dog"]


def test_a_dataset_folder_gives_its_column(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"caption": ["a cat", " ", "a dog"]}).save_to_disk(str(tmp_path / "data"))
    assert load(tmp_path / "data", key="caption") == ["a cat", "a dog"]
    with pytest.raises(UserError, match=r"no column 'captoin'; did you mean 'caption'\?"):
        load(tmp_path / "data", key="captoin")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["a cat", None], "row 2: no text under 'prompt' (there is: null)"),
        ([["a cat"]], "row 1: no text under 'prompt' (there is: a list)"),
        ([{"en": "a cat"}], "row 1: no text under 'prompt' (there is: an object, whose keys are not read)"),
        ([0.5], "row 1: no text under 'prompt' (there is: a number)"),
        ([True], "row 1: no text under 'prompt' (there is: true or false)"),
        (["a cat", "nan"], "row 2: prompt is nan, as programs write a cell without a value"),
        (["a cat<|endoftext|>"], "row 1: prompt holds <|endoftext|>, which a chat model reads"),
        ([b"a cat"], "row 1: no text under 'prompt' (there is: binary data)"),
    ],
)
def test_a_dataset_folder_with_other_values_than_text(tmp_path: Path, values: list[object], said: str) -> None:
    from datasets import Dataset

    Dataset.from_dict({"prompt": values}).save_to_disk(str(tmp_path / "data"))
    with pytest.raises(UserError) as error:
        load(tmp_path / "data")
    assert said in str(error.value)


@pytest.mark.parametrize(("key", "said"), [("prompt", "set data.key"), ("text", "set data.key, which counts for all")])
def test_one_key_counts_for_all_files(tmp_path: Path, key: str, said: str) -> None:
    from datasets import Dataset

    Dataset.from_dict({"caption": ["a cat"]}).save_to_disk(str(tmp_path / "data"))
    (tmp_path / "p.csv").write_text("caption\na cat\n")
    for name in ("data", "p.csv"):
        with pytest.raises(UserError) as error:
            load(tmp_path / name, key)
        assert said in str(error.value)
        assert ("all files" in str(error.value)) == (key == "text")


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.txt").write_text("a cat\n")
    assert load_prompts("~/p.txt") == ["a cat"]
    with pytest.raises(UserError, match="no such prompt file"):
        load_prompts("~/q.txt")


@pytest.mark.parametrize("bad", [b"\xff\xfe", b"\xc3("])
def test_a_column_that_is_no_text_is_refused(bad: bytes, tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"prompt": ["x" * len(bad) + " cat"]}).save_to_disk(str(tmp_path / "data"))
    (file,) = (tmp_path / "data").glob("*.arrow")
    file.write_bytes(file.read_bytes().replace(b"x" * len(bad) + b" cat", bad + b" cat"))
    with pytest.raises(UserError, match="damaged column 'prompt'"):
        load(tmp_path / "data")


@pytest.mark.parametrize("content", [b"{", b"[]", b"3", b'"a"'])
@pytest.mark.parametrize("broken", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
def test_a_damaged_dataset_folder(tmp_path: Path, broken: str, content: bytes) -> None:
    from datasets import Dataset

    Dataset.from_dict({"prompt": ["a cat"]}).save_to_disk(str(tmp_path / "data"))
    (tmp_path / "data" / broken).write_bytes(content)
    with pytest.raises(UserError, match="dataset folder"):
        load(tmp_path / "data")


@pytest.mark.parametrize("split", ["train", "tune", "test"])
def test_built_in_prompts_are_captions_with_the_categories_in_turn(split: str) -> None:
    prompts = load(f"builtin:shapes/{split}", limit=24)
    categories = [parse_caption(p).category for p in prompts]
    assert categories == categories[:6] * 4
    assert len(set(categories)) == 6
    assert prompts == load(f"builtin:shapes/{split}", limit=24)


def test_built_in_splits_are_disjoint() -> None:
    splits = [set(load(f"builtin:shapes/{name}", limit=600)) for name in ("train", "tune", "test")]
    assert not splits[0] & splits[1]
    assert not splits[0] & splits[2]
    assert not splits[1] & splits[2]


def test_a_dataset_that_was_saved_with_a_format_has_all_its_columns(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = Dataset.from_dict({"prompt": ["a cat", "a dog"], "label": [1, 2]})
    rows.set_format("numpy", columns=["label"])
    rows.save_to_disk(str(tmp_path / "data"))
    assert load(tmp_path / "data") == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", "holds no prompt"),
        ("blank.txt", b"\n  \n", "holds no prompt"),
        ("invisible.txt", "\u200b\n\u2060 \u00ad\n".encode(), "holds no prompt"),
        ("latin.txt", "a caf\u00e9".encode("latin-1"), "not UTF-8 at byte 5; save it as UTF-8"),
        ("broken.jsonl", b'{"prompt": "a cat"}\n{"prompt": \n', "broken.jsonl:2: not JSON"),
        ("other.jsonl", b'{"text": "a cat"}\n', "other.jsonl:1: no text under 'prompt' (there is: text); set data.key"),
        (
            "spread.jsonl",
            b'{\n "prompt": "a cat"\n}\n',
            "write each object on one line of a .jsonl, or a list of them in a .json",
        ),
        (
            "lines.json",
            b'{"prompt": "a cat"}\n{"prompt": "a hat"}\n',
            "write each object on one line of a .jsonl, or a",
        ),
        ("pair.jsonl", b'{"prompt": "a cat"} {"prompt": "a hat"}\n', "write each object on one line of a .jsonl, or a"),
        ("index.csv", b",text\n0,a cat\n", "(there is: text); set data.key"),
        ("last.csv", b"text,\na cat,0\n", "(there is: text, column 2 without a name); set data.key"),
        ("list.jsonl", b"[1]\n", "list.jsonl:1: must be an object or a text, got a list"),
        ("number.jsonl", b'{"prompt": 3}\n', "no text under 'prompt' (there is: a number)"),
        (
            "null.jsonl",
            b'"a"\n{"prompt": null}\n',
            "null.jsonl:2: no text under 'prompt' (there is: null); write",
        ),
        (
            "dict.json",
            b'[{"prompt": {"en": "a"}}]',
            "dict.json: item 1: no text under 'prompt' (there is: an object, whose",
        ),
        ("parti.tsv", b"Prompt\tNote\na cat\t\n", "(there is: Prompt); did you mean 'Prompt'?; set data.key"),
        (
            "prompts.csv",
            b"a cat, grey\na dog, brown\n",
            "csv:2: no text under 'prompt' (there is: a cat, grey); set data.key; the first line of the file must name",
        ),
        (
            "nul.jsonl",
            b'{"prompt": "a \\u0000"}',
            "nul.jsonl:1: prompt: holds NUL (U+0000), which is no letter; remove it",
        ),
        ("half.jsonl", b'{"prompt": "a \\ud83d"}', "half.jsonl:1: holds half of a surrogate pair (U+D83D)"),
        ("prompts.parquet", b"PAR1", "allowed: .txt, .jsonl, .json, .csv, .tsv"),
    ],
)
def test_bad_files_are_reported_in_one_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        load(file)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("missing.txt", "no such prompt file or dataset folder"),
        ("a red circle " * 40, "no such prompt file or dataset folder"),
        ("a\0b.txt", "no such prompt file or dataset folder"),
        ("builtin:shapes/tset", "did you mean 'builtin:shapes/test'?"),
        ("builtin:shape/test", "allowed: builtin:shapes/train, builtin:shapes/tune, builtin:shapes/test"),
    ],
)
def test_bad_sources_are_reported_in_one_line(source: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        load(source)
    assert said in str(error.value)


def test_a_folder_that_is_no_dataset_or_lacks_a_part(tmp_path: Path) -> None:
    from datasets import Dataset

    with pytest.raises(UserError, match="not a dataset folder"):
        load(tmp_path)
    Dataset.from_dict({"prompt": ["a cat"] * 3}).save_to_disk(str(tmp_path / "parts"), num_shards=3)
    (tmp_path / "parts" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(UserError, match=r"damaged dataset folder: data-00001-of-00003\.arrow is missing; copy it"):
        load(tmp_path / "parts")


@pytest.mark.parametrize(("num_long", "verb"), [(1, "is"), (2, "are")])
def test_what_no_reader_reads_is_counted_once_per_reader(num_long: int, verb: str) -> None:
    long = ["a red circle " * 9, "ein Käse " * 9][:num_long]
    rewards = {"held": RewardConfig(ref="builtin:shapes/heldout")}
    said = describe_unread_prompts(["a red circle", *long, *long, "blau"], ModelConfig(), rewards)
    total = 2 + num_long
    expected = [
        f"{num_long} of {total} prompts {verb} longer than the {limit} tokens that {reader} reads; the rest of each is "
        "ignored"
        for reader, limit in (("text_encoder", 12), ("reward held", 11))
    ]
    assert said[:-1] == expected
    words = ("word 'blau'", "3 words 'ein', 'Käse', 'blau'")[num_long - 1]
    assert said[-1].endswith(f"it does not know the {words}; images of such prompts mean nothing")


def test_entities_of_html_are_counted() -> None:
    said = describe_unread_prompts(
        ["a red circle", "a &quot;red&quot; circle", "blue & red; &#39;a&#39;"], ModelConfig(), {}
    )
    assert "2 of 3 prompts hold entities of HTML, such as &quot;; decode them (html.unescape of Python)" in said


@pytest.mark.parametrize(("score", "counted"), [("clip", "2 of 3"), ("edit_clip", "3 of 6")])
def test_rewards_read_the_captions_of_edits(score: str, counted: str) -> None:
    long = "a red circle " * 9
    edits = [Edit("a blue circle", (), caption=f"{long}{n}", source_caption=f"{n}") for n in (1, 2)]
    edits += [Edit("a blue circle", (), caption="a red circle", source_caption=f"{long}3")]
    rewards = {"r": RewardConfig.model_validate({"score": score, "ref": "builtin:shapes/heldout"})}
    said = describe_unread_prompts(edits, ModelConfig(), rewards)
    what = "prompts" if score == "clip" else "captions and source captions"
    assert said == [f"{counted} {what} are longer than the 11 tokens that reward r reads; the rest of each is ignored"]


def test_prompts_of_its_world_are_read_whole_by_the_miniature() -> None:
    assert describe_unread_prompts(load_prompts("builtin:shapes/test", limit=50), ModelConfig(), {}) == []


@pytest.mark.parametrize(("prompt", "count"), [("a red circle", 0), ("a cat", 1)])
def test_rewards_of_the_miniature_say_that_they_do_not_know_what_they_score(
    prompt: str, count: int, tmp_path: Path
) -> None:
    (tmp_path / "other").symlink_to(WEIGHTS / "generator")
    rewards = {"r": RewardConfig(ref="builtin:shapes/heldout")}
    said = describe_unread_prompts([prompt], ModelConfig(ref=str(tmp_path / "other")), rewards)
    start = "reward r: builtin:shapes/heldout knows nothing but circles"
    assert len(said) == count
    assert all(one.startswith(start) and one.endswith("'cat'; its scores mean nothing") for one in said)


@pytest.mark.parametrize("count", [1, 7, 16])
def test_every_epoch_uses_every_prompt_once_in_another_order(count: int) -> None:
    drawn = prompt_indices(count, seed=3, first=0, number=3 * count)
    epochs = [drawn[k * count : (k + 1) * count] for k in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert count < 7 or len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_does_not_depend_on_how_it_is_asked_for() -> None:
    whole = prompt_indices(7, seed=1, first=0, number=30)
    assert [prompt_indices(7, seed=1, first=i, number=1)[0] for i in range(30)] == whole
    assert prompt_indices(7, seed=1, first=11, number=5) == whole[11:16]


def test_an_address_in_the_place_of_prompts_is_not_shown() -> None:
    with pytest.raises(UserError, match=r"^hf://\.\.\.: is an address, not a file; download it"):
        load("hf://datasets/someone/secret")


@pytest.mark.parametrize("end", ["\x1a", "\x07 \x1b\n"])
def test_control_characters_alone_are_no_prompt(end: str, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("a cat\n" + end)
    assert load(file) == ["a cat"]
