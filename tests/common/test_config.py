import math
import tempfile
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from imgen_common.config import Config, Presets, UserPath, fields_table, load, read_yaml, to_yaml
from imgen_common.config.secrets import mask_secrets
from imgen_common.errors import UserError


class Leap(Config):
    kind: Literal["leap"] = "leap"
    reach: float = 1.0
    """How far it leaps, in sigma."""


class Euler(Config):
    kind: Literal["euler"] = "euler"
    refill: Literal["none", "mass"] = "none"


Weights = Annotated[Leap | Euler, Field(discriminator="kind")]


class Method(Config):
    weights: Weights = Leap(reach=3.0)
    gap_floor: float | None = None
    coupling: Weights | None = None


METHODS = {"refl": Method(), "sparse": Method(weights=Euler(refill="mass"), gap_floor=0.1)}


class Optim(Config):
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """Step size,
    per update."""
    steps: int = Field(default=10, ge=1)


class Precision(Enum):
    FLOAT = "float32"
    BRAIN = "bfloat16"


class Train(Config):
    optim: Optim = Optim(learning_rate=0.5)
    method: Annotated[Method, Presets(METHODS)] = METHODS["sparse"]
    rewards: tuple[Weights, ...] = (Leap(), Euler())
    more: dict[str, Optim] = Field(default_factory=dict)
    name: str = "run"
    out: Path = Path("runs")
    precision: Precision = Precision.FLOAT
    last: int | None = None

    @model_validator(mode="after")
    def _check(self) -> "Train":
        if self.last is not None and self.last > self.optim.steps:
            raise ValueError(f"last: {self.last} given, must be <= optim.steps ({self.optim.steps})")
        return self


class Needy(Config):
    path: str
    optim: Optim


def load_text(tmp_path: Path, *texts: str, sets: tuple[str, ...] = ()) -> Train:
    files = [tmp_path / f"{index}.yaml" for index in range(len(texts))]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    return load(Train, files, sets)


def message(tmp_path: Path, *texts: str, sets: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as caught:
        load_text(tmp_path, *texts, sets=sets)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_configurations_are_frozen_and_closed() -> None:
    with pytest.raises(ValidationError):
        Optim().steps = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Optim(stesp=3)  # type: ignore[call-arg]


def test_a_home_folder_in_a_path_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell expands the `~` of a file or of `--set a=~/x`; a folder of that name would be made."""

    class Paths(Config):
        cache: UserPath | None = "cache"

    monkeypatch.setenv("HOME", str(tmp_path))
    for text, path in (("~/a", f"{tmp_path}/a"), ("a/~", "a/~"), ("./a/", "./a/"), ("", "")):
        assert Paths(cache=text).cache == path
    assert (Paths().cache, Paths(cache=None).cache) == ("cache", None)
    with pytest.raises(UserError, match="~nobody-here/a: there is no such home folder"):
        load(Paths, [], ["cache=~nobody-here/a"])


def test_from_python_files_may_be_texts_and_one_may_stand_alone(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("last: 3\n")
    for files in (str(tmp_path / "a.yaml"), [str(tmp_path / "a.yaml")], tmp_path / "a.yaml"):
        assert load(Train, files).last == 3
    assert load(Train, sets="last=4").last == 4
    with pytest.raises(UserError, match=r"missing\.yaml: no such file"):
        load(Train, "missing.yaml")


def test_nothing_given_is_the_class_default() -> None:
    assert load(Train) == Train()


def test_later_layers_win_and_merge_key_by_key(tmp_path: Path) -> None:
    config = load_text(
        tmp_path, "optim: {steps: 20}\nname: a", "optim: {learning_rate: 1e-4}\nname: b", sets=("name=c",)
    )
    assert config.optim == Optim(steps=20, learning_rate=1e-4)
    assert config.name == "c"


def test_a_default_given_as_a_value_is_merged_into() -> None:
    assert load(Train, (), ["optim.steps=3"]).optim == Optim(learning_rate=0.5, steps=3)
    assert load(Train, (), ["method.weights.refill=none"]).method == Method(weights=Euler(), gap_floor=0.1)


class Model(Config):
    kind: Literal["model"] = "model"
    model: Weights = Euler()


class Agents(Config):
    critic: Annotated[Model | Leap, Field(discriminator="kind")] = Model()


@pytest.mark.parametrize("value", ["a #b", "#b", "[1, 2] # two", "{a: 1, #b\n}"])
def test_no_part_of_an_option_is_a_comment(value: str) -> None:
    with pytest.raises(UserError, match="after a space begins a comment; put the value in quotes"):
        load(Train, [], [f"name={value}"])
    assert load(Train, [], ['name="a #b"']).name == "a #b"
    assert load(Train, [], ["name=a#b"]).name == "a#b"


def test_a_key_spelled_as_the_kind_before_it_is_named_in_full() -> None:
    with pytest.raises(UserError, match=r"^--set critic\.model\.reach=1: unknown key; it is one of kind: leap"):
        load(Agents, [], ["critic.model.reach=1"])


def test_setting_kind_replaces_its_subtree(tmp_path: Path) -> None:
    assert load(Train, (), ["method.weights.kind=leap"]).method.weights == Leap(reach=1.0)
    config = load_text(tmp_path, "method: {weights: {kind: leap, reach: 7}}", "method: {weights: {kind: euler}}")
    assert config.method.weights == Euler()
    same = load_text(tmp_path, "method: {weights: {kind: leap, reach: 7}}", "method: {weights: {kind: leap}}")
    assert same.method.weights == Leap(reach=7)


def test_over_a_default_any_kind_begins_anew(tmp_path: Path) -> None:
    """The default's own settings are not for a value that somebody describes from the start."""
    assert load_text(tmp_path, "method: {weights: {kind: euler}}").method.weights == Euler()
    assert load(Train, (), ["method.weights.kind=euler"]).method.weights == Euler()
    assert load(Train, (), ["method.weights={kind: euler}"]).method.weights == Euler()
    assert load_text(tmp_path, "method: {preset: refl, weights: {kind: leap}}").method.weights == Leap(reach=3.0)


@given(
    st.permutations(["method=refl", "method.weights.kind=euler", "method.weights.refill=mass", "method.gap_floor=1"])
)
def test_sets_do_not_depend_on_their_order(sets: list[str]) -> None:
    assert load(Train, (), sets).method == Method(weights=Euler(refill="mass"), gap_floor=1)


def test_the_last_of_two_sets_for_one_key_wins() -> None:
    assert load(Train, (), ["name=a", "name=b"]).name == "b"


def test_a_preset_stands_for_its_value_and_can_be_built_on(tmp_path: Path) -> None:
    assert load_text(tmp_path, "method: refl").method == METHODS["refl"]
    assert load_text(tmp_path, "method: {preset: refl, gap_floor: 2}").method == Method(gap_floor=2)
    assert load_text(tmp_path, "method: refl", sets=("method.weights.reach=2",)).method == Method(weights=Leap(reach=2))
    assert load_text(tmp_path, "method: {gap_floor: 2}", "method: refl").method == METHODS["refl"]


def test_lists_are_replaced_whole_and_reached_into_by_set(tmp_path: Path) -> None:
    assert load_text(tmp_path, "rewards: [{kind: euler}]").rewards == (Euler(),)
    assert load(Train, (), ["rewards.1.refill=mass"]).rewards == (Leap(), Euler(refill="mass"))
    assert load(Train, (), ["rewards=[]"]).rewards == ()
    assert "the list has 2" in message(tmp_path, sets=("rewards.2.reach=1",))


def test_mappings_of_configurations(tmp_path: Path) -> None:
    config = load_text(tmp_path, "more: {a: {steps: 2}}", "more: {b: {}}", sets=("more.a.learning_rate=0.1",))
    assert config.more == {"a": Optim(steps=2, learning_rate=0.1), "b": Optim()}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("+1.5e+3", 1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("0.1e1", 1.0),
        ("12", 12),
        ("010", 10),
        ("no", "no"),
        ("on", "on"),
        ("12:30", "12:30"),
        ("2026-01-01", "2026-01-01"),
        ("1e", "1e"),
        ("1_000", "1_000"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("'1e-4'", "1e-4"),
        (r'"\ud83d\ude00 \U0001f600"', "\U0001f600 \U0001f600"),  # as JSON escapes it, and as YAML does
    ],
)
def test_words_and_numbers_by_the_core_rules(text: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"a: {text}\n")
    read = read_yaml(tmp_path / "a.yaml")["a"]
    assert read == value
    assert type(read) is type(value)


def test_anchors_and_merge_keys_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}\n")
    assert read_yaml(tmp_path / "a.yaml")["d"] == {"b": 1, "c": 3}


def test_a_file_lies_over_those_it_extends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in (("base.yaml", "a: 1\nb: 1\nc: 1"), ("sub/mid.yaml", "extends: ../base.yaml\nb: 2\nc: 2")):
        (tmp_path / name).write_text(text)
    top = tmp_path / "sub" / "top.yaml"
    top.write_text("extends: mid.yaml\nc: 3")

    class Numbers(Config):
        a: int
        b: int
        c: int

    assert load(Numbers, [top]) == Numbers(a=1, b=2, c=3)
    monkeypatch.setenv("HOME", str(tmp_path))
    top.write_text("extends: ~/sub/mid.yaml\nc: 4")
    assert load(Numbers, [top]) == Numbers(a=1, b=2, c=4)
    top.write_text("extends: mid.yaml\nc: 3")
    (tmp_path / "base.yaml").write_text("extends: sub/top.yaml")
    with pytest.raises(UserError, match="extends itself"):
        load(Numbers, [top])
    top.write_text("extends: [mid.yaml]")
    with pytest.raises(UserError, match="extends: must be the path of a file"):
        load(Numbers, [top])
    top.write_text("extends: mis.yaml")
    with pytest.raises(UserError, match=r"no such file; did you mean 'mid\.yaml'"):
        load(Numbers, [top])


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_text(tmp_path, "# nothing\n") == Train()


MISTAKES = [
    ("optim: {learing_rate: 3}", "0.yaml: optim.learing_rate: unknown key; did you mean 'learning_rate'?"),
    ("optim: {zzz: 3}", "0.yaml: optim.zzz: unknown key; allowed: learning_rate, steps"),
    ("optim: {stepz: 3, zzz: 3}", "0.yaml: optim.stepz: unknown key; did you mean 'steps'? (and 1 more)"),
    ("optim: {steps: many}", "0.yaml: optim.steps: must be a valid integer, got 'many'"),
    ("optim: {steps: 1.5}", "optim.steps: must be a valid integer, got a number with a fractional part, got 1.5"),
    ("optim: {steps: true}", "0.yaml: optim.steps: must be a number, got true"),
    ("last: true", "0.yaml: last: must be a number, got true"),
    ("optim: {steps: 0}", "0.yaml: optim.steps: must be greater than or equal to 1, got 0"),
    ("optim: 3", "0.yaml: optim: must be a mapping with the keys learning_rate, steps, got 3"),
    ("optim:", "0.yaml: optim: must be a mapping with the keys learning_rate, steps, got null"),
    (
        "method: {weights: {kind: leep}}",
        "method.weights.kind: unknown kind 'leep'; did you mean 'leap'?; allowed: leap, euler",
    ),
    ("method: {coupling: {reach: 1}}", "0.yaml: method.coupling.kind: missing; allowed: leap, euler"),
    (
        "method: {weights: {kind: leap, refill: mass}}",
        "0.yaml: method.weights.refill: unknown key; it is one of kind: euler",
    ),
    (
        "method: {weights: {refill: mas}}",
        "method.weights.refill: must be 'none' or 'mass', got 'mas'; did you mean 'mass'?",
    ),
    ("method: rfl", "0.yaml: method: unknown method 'rfl'; did you mean 'refl'?; allowed: refl, sparse"),
    ("method: {preset: 3}", "0.yaml: method: unknown method 3; allowed: refl, sparse"),
    ("method: {preset: [1]}", "0.yaml: method: unknown method [1]; allowed: refl, sparse"),
    ("method: {preset: {a: 1}}", "0.yaml: method: unknown method {'a': 1}; allowed: refl, sparse"),
    ("rewards: [{kind: leap}, {kind: leap, reach: x}]", "0.yaml: rewards.1.reach: must be a valid number, got 'x'"),
    ("rewards: [{reach: 1}]", "0.yaml: rewards.0.kind: missing; allowed: leap, euler"),
    ("rewards[0]: {reach: 1}", "0.yaml: rewards[0]: unknown key; write rewards.0 for an element of a list"),
    ("more: {a: {stps: 1}}", "0.yaml: more.a.stps: unknown key; did you mean 'steps'?"),
    (
        "precision: float16",
        "0.yaml: precision: must be 'float32' or 'bfloat16', got 'float16'; did you mean 'bfloat16'?",
    ),
    ("last: 99", "0.yaml: last: 99 given, must be <= optim.steps (10)"),
    ("optim: {steps: 1}\noptim: {steps: 2}", "0.yaml:2:1: key 'optim' given twice"),
    ("optim: {steps: 1, steps: 2}", "0.yaml:1:19: key 'steps' given twice"),
    ("- 1", "0.yaml: must be a mapping of keys to values, got a list"),
    ("word", "0.yaml: must be a mapping of keys to values, got a string"),
    ("optim: [1\n", "0.yaml:2:1: expected ',' or ']', but got '<stream end>'"),
    ('lr: 1\nkey: "sk-open\nlast: 2\n', "0.yaml:2:6: a quote that is not closed"),
    ("optim:\n\u00a0\u00a0lr: 1\n", "0.yaml:2: indented with a no-break space (U+00A0), as web pages have; use plain"),
    ("a: b: c", "0.yaml:1:5: mapping values are not allowed here"),
    ("a: \x00", "0.yaml:1: holds a zero byte"),
    ("a: 1\n---\nb: 2", "0.yaml:2:1: but found another document"),
    ("? [a]\n: 1", "0.yaml:1:3: a key must be a single word"),
    ("a: &x [*x]", "0.yaml:1:4: a value that holds itself"),
    ("a: &x {b: [1, {<<: *x}]}", "0.yaml:1:4: a value that holds itself"),
    ("a: !!python/object/apply:os.system [ls]", "0.yaml:1:4: could not determine a constructor"),
]


def bomb(*, merged: bool) -> str:
    """A million values in a few lines: each line stands for ten times the one before."""
    first = "a0: &a0 {k: word}\n" if merged else "a0: &a0 [word]\n"
    each = "a{0}: &a{0} {{{{<<: [{1}]}}}}\n" if merged else "a{0}: &a{0} [{1}]\n"
    each = each.replace("{{{{", "{{").replace("}}}}", "}}")
    return first + "".join(each.format(i, ", ".join([f"*a{i - 1}"] * 10)) for i in range(1, 7))


HOSTILE = [
    (bomb(merged=False), "0.yaml:1:1: more than 262144 characters, its aliases replaced by what they stand for"),
    (bomb(merged=True), "0.yaml:1:1: more than 262144 characters, its aliases replaced by what they stand for"),
    ('a: &a "' + "x" * 1000 + '"\nb: [' + "*a, " * 300 + "]", "more than 262144 characters, its aliases replaced"),
    ("name: " + "x" * 600_000, "0.yaml: more than the allowed 524288 bytes"),
    ("a: " + "[" * 5000, "0.yaml:1:69: more than 64 values inside each other"),
    ("{a: " * 5000, "more than 64 values inside each other"),
    ("- " * 5000, "0.yaml:1:129: more than 64 values inside each other"),
    ("[\n" * 5000, "more than 64 values inside each other"),
    ('name: "\\ud800"', "0.yaml:1:7: a zero byte, or half of a surrogate pair"),
    ('name: "a\\0b"', "0.yaml:1:7: a zero byte, or half of a surrogate pair"),
    ('name: "\\ude00\\ud83d"', "0.yaml:1:7: a zero byte, or half of a surrogate pair"),
    ('more: {"\\udfff": {}}', "0.yaml:1:8: a zero byte, or half of a surrogate pair"),
    ('"a\\0b": 1', "0.yaml:1:1: a zero byte, or half of a surrogate pair"),
    ('name: "\\UFFFFFFFF"', "0.yaml: not YAML"),
    ("last: " + "9" * 5000, "0.yaml:1:7: a number of 5000 digits does not fit 64 bits"),
    ("last: 9223372036854775808", "0.yaml:1:7: a number of 19 digits does not fit 64 bits"),
    ("last: !!int ''", "0.yaml:1:7: '' is no int"),
    ("last: !!int 0x10", "0.yaml:1:7: '0x10' is no int"),
    ("last: !!float ''", "0.yaml:1:7: '' is no float"),
    ("last: !!bool maybe", "0.yaml:1:7: 'maybe' is no bool"),
    ("last: !!null x", "0.yaml:1:7: 'x' is no null"),
    ("last: !!map [1]", "0.yaml:1:7: a mapping is expected here"),
    ("last: !!seq {a: 1}", "0.yaml:1:7: a list is expected here"),
    ("last: !!str [1]", "0.yaml:1:7: a single word is expected here"),
    ("last: !!timestamp 9999-99-99", "0.yaml:1:7: could not determine a constructor"),
    ("last: !!timestamp 0001-01-01T00:00:00+23:59", "0.yaml:1:7: could not determine a constructor"),
    ("last: !!binary AAAA", "0.yaml:1:7: could not determine a constructor"),
    ("last: <<", "0.yaml:1:7: could not determine a constructor"),
    ("<<: 3", "0.yaml:1:5: expected a mapping or list of mappings for merging"),
    ("last: ~~", "0.yaml: last: must be a valid integer, got '~~'"),
    ("last: 9999-99-99", "0.yaml: last: must be a valid integer, got '9999-99-99'"),
    ("x" * 1000 + ": 1", "0.yaml: " + "x" * 200 + "...: unknown key"),
]


@pytest.mark.parametrize(("text", "expected"), HOSTILE)
def test_a_hostile_file_is_a_named_mistake(text: str, expected: str, tmp_path: Path) -> None:
    said = message(tmp_path, text)
    assert expected in said
    assert len(said) < 1000


@pytest.mark.parametrize(
    "given",
    [
        "a." * 1000 + "a=1",
        "name=" + "[" * 5000,
        "last=" + "9" * 5000,
        'name="\\ud800"',
        "name=\udcff",
        "x" * 10**5 + "=1",
    ],
)
def test_a_hostile_set_is_a_named_mistake(given: str, tmp_path: Path) -> None:
    said = message(tmp_path, "name: x", sets=(given,))
    assert said.startswith(f"--set {given[:5]}")
    assert len(said) < 1000


def test_files_without_an_end_are_not_read_whole(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="/dev/zero: more than the allowed 524288 bytes"):
        load(Train, [Path("/dev/zero")])
    with pytest.raises(UserError, match="cannot be read"):
        load(Train, [tmp_path / "a\0b.yaml"])
    for i in range(30):
        (tmp_path / f"{i}.yaml").write_text(f"extends: {i + 1}.yaml")
    with pytest.raises(UserError, match="more than 20 files that extend each other"):
        load(Train, [tmp_path / "0.yaml"])


class Inner(Config):
    kind: Literal["inner"] = "inner"
    size: int = 1


class Named(Config):
    kind: Literal["leap"] = "leap"
    leap: Annotated[Inner | Euler, Field(discriminator="kind")] = Inner()
    """A key whose name is that of the kind."""


class Outer(Config):
    agent: Annotated[Named | Euler, Field(discriminator="kind")] = Named()
    agents: tuple[Annotated[Named | Euler, Field(discriminator="kind")], ...] = ()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("agent.leap.sise=2", "sise=2: unknown key; did you mean 'size'?"),
        ("agent.leap.size=x", "size=x: must be a valid integer, got 'x'"),
        ("agent.leap={kind: euler, refill: x}", "agent.leap.refill: must be 'none' or 'mass', got 'x'"),
        ("agent.leap.kind=innr", "unknown kind 'innr'; did you mean 'inner'?"),
        ("agent.leaps=1", "unknown key; did you mean 'leap'?"),
        ("agents=[{kind: leap, leap: {kind: inner, sise: 2}}]", "agents.0.leap.sise: unknown key"),
    ],
)
def test_a_mistake_below_a_key_named_as_its_kind_is_named(given: str, expected: str) -> None:
    """As in `planner.model` of a planner whose kind is `model`."""
    with pytest.raises(UserError) as caught:
        load(Outer, (), [given])
    assert expected in str(caught.value)


@pytest.mark.parametrize(("text", "expected"), MISTAKES)
def test_a_mistake_in_a_file_is_named(text: str, expected: str, tmp_path: Path) -> None:
    said = message(tmp_path, text)
    assert expected in said
    assert said.startswith("0.yaml")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim.learing_rate=1", "--set optim.learing_rate=1: unknown key; did you mean 'learning_rate'?"),
        ("optim={stps: 1}", "--set optim={stps: 1}: optim.stps: unknown key; did you mean 'steps'?"),
        ("optim.steps=0", "--set optim.steps=0: must be greater than or equal to 1, got 0"),
        ("steps", "--set steps: write --set key=value or --set section.key=value"),
        ("optim..steps=1", "write --set key=value"),
        ("=1", "write --set key=value"),
        ("x={url: u, api_key: SECRET, }}", "--set x={url: u, api_key: ..., }}:1:"),
        (
            "x={token: [ {'apiKey': 'SECRET one', \"secret\" : \"SECRET\", k: hf_SECRET1234, l: sk-SECRET1234}",
            "k: ..., l: ...}:1",
        ),
        ("name=[a", "--set name=[a:1:3: expected ',' or ']'"),
        ("more=api_key=SECRET1", "--set more=api_key=...: must be a valid dictionary, got 'api_key=..."),
        ("more='token: SECRET1'", "got 'token: ..."),
        ("nome.Authorization=Bearer SECRET1", "--set nome.Authorization=...: nome: unknown key"),
        ("nome={x-auth-token: token SECRET1}", "--set nome={x-auth-token: ...}: unknown key"),
        ("name.first=1", "--set name.first=1: name: must be a valid string"),
    ],
)
def test_a_mistake_in_a_set_is_named(text: str, expected: str, tmp_path: Path) -> None:
    said = message(tmp_path, "name: x", sets=(text,))
    assert expected in said
    assert "SECRET" not in said


def test_a_key_in_a_file_is_not_repeated(tmp_path: Path) -> None:
    said = message(tmp_path, "name: {api_key: SECRET}")
    assert said.startswith("0.yaml: name: must be a valid string, got {'api_key': ...")
    assert "SECRET" not in said
    said = r"^optim\.api_key=\.\.\.: no such file; if it is a setting, write --set before it$"
    with pytest.raises(UserError, match=said):
        load(Train, [Path("optim.api_key=SECRET")])


def test_secrets_are_looked_for_in_time_that_grows_with_the_text() -> None:
    """A run of letters that is no name was read again from each of its letters: 150 s for as many."""
    start = time.process_time()
    for text in ("a" * 100_000, "a-" * 50_000, "a " * 50_000, "a:" * 50_000, " " * 100_000, "'" * 100_000):
        assert mask_secrets(text) == text
    assert time.process_time() - start < 20
    assert mask_secrets(f"{'a' * 100_000}.api_key=SECRET") == f"{'a' * 100_000}.api_key=..."


def test_the_layer_that_gave_the_value_is_named(tmp_path: Path) -> None:
    assert message(tmp_path, "optim: {steps: x}", "optim: {learning_rate: 0.1}").startswith("0.yaml: optim.steps")
    assert message(tmp_path, "optim: {steps: 2}", "optim: {steps: x}").startswith("1.yaml: optim.steps")
    assert message(tmp_path, "optim: {steps: 2}", sets=("last=3",)).startswith("0.yaml, --set last=3: last: 3 given")


def test_missing_values_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^defaults of Needy: path: missing; give it a value \(and 1 more\)$"):
        load(Needy)
    with pytest.raises(UserError, match=r"^--set path=a: optim: missing; give it a value$"):
        load(Needy, (), ["path=a"])
    assert load(Needy, (), ["path=a", "optim.steps=2"]).optim == Optim(steps=2)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("name: a")
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(UserError, match=r"trian\.yaml: no such file; did you mean 'train\.yaml'\?"):
        load(Train, [tmp_path / "trian.yaml"])
    with pytest.raises(UserError, match="not UTF-8 at byte 6"):
        load(Train, [tmp_path / "latin.yaml"])
    with pytest.raises(UserError, match="Is a directory"):
        load(Train, [tmp_path])
    with pytest.raises(UserError, match="no such file"):
        load(Train, [tmp_path / "none" / "a.yaml"])


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
WORDS = st.sampled_from(
    ["1e-4", "1e5", "no", "on", "~", "null", "", "0x10", "1:30", "<<", "=", "2026-01-01", "1_0", ".5", "-"]
)


@given(TEXTS | WORDS, st.floats(min_value=1e-300, max_value=1), st.integers(1, 10**12), TEXTS | WORDS)
def test_yaml_written_is_read_back_equal(name: str, rate: float, steps: int, key: str) -> None:
    config = Train(name=name, optim=Optim(learning_rate=rate, steps=steps), more={key: Optim()})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.yaml"
        file.write_text(to_yaml(config), encoding="utf-8", newline="")
        assert load(Train, [file]) == config


def test_yaml_written_names_every_value(tmp_path: Path) -> None:
    assert to_yaml(Method()) == "weights:\n  kind: leap\n  reach: 3.0\ngap_floor: null\ncoupling: null\n"
    (tmp_path / "a.yaml").write_text(to_yaml(Train()))
    assert load(Train, [tmp_path / "a.yaml"]) == Train()


def test_fields_table_documents_every_key() -> None:
    rows = {row.path: (row.type, row.default, row.doc) for row in fields_table(Train)}
    assert rows["optim.learning_rate"] == ("float > 0 <= 1", "0.5", "Step size, per update.")
    assert rows["method"] == ("Method", "sparse", "")
    assert rows["method.weights"] == ("leap | euler", "euler", "")
    assert rows["method.weights(leap).reach"] == ("float", "1.0", "How far it leaps, in sigma.")
    assert rows["method.weights(euler).refill"] == ("none | mass", "mass", "")
    assert rows["rewards[](leap).reach"][0] == "float"
    assert rows["more[].steps"] == ("int >= 1", "10", "")
    assert rows["precision"] == ("float32 | bfloat16", "float32", "")
    assert rows["last"] == ("int | null", "null", "")
    assert rows["out"] == ("Path", "runs", "")
    assert {row.path: row.default for row in fields_table(Needy)}["path"] == "required"
