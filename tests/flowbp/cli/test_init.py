"""`flowbp init`: a recipe as one commented file, which reads as the recipe."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from flowbp.cli import app
from flowbp.config import TrainConfig, starter
from flowbp.config.starter import REWARDS, Starter, find_starter, write_starter
from imgen_common.config import load, read_yaml
from imgen_common.errors import UserError

CONFIGS = Path(__file__).parents[3] / "configs" / "flowbp"
FAMILIES = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir() and path.name != "miniature")
LARGE = 10**12


def starters(family: str) -> list[Starter]:
    """What `find_starter` gives for one GPU and for eight, where there is anything."""
    found = []
    for gpus in (1, 8):
        try:
            found.append(find_starter(family, LARGE, gpus))
        except UserError:
            continue
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_reads_as_the_recipe_and_explains_each_key(family: str, tmp_path: Path) -> None:
    assert starters(family)
    for one in starters(family):
        text = write_starter("mine", one, "hpsv2")
        file = tmp_path / "mine.yaml"
        file.write_text(text)
        assert load(TrainConfig, [file]) == load(TrainConfig, [one.file], ["name=mine"])
        lines = text.splitlines()
        for key in read_yaml(file):
            at = next(i for i, line in enumerate(lines) if line.startswith(f"{key}:"))
            assert lines[at - 1].startswith("# "), key
        assert max(map(len, lines)) < 140


@pytest.mark.parametrize(
    ("family", "reward"),
    [(family, "hpsv3") for family in FAMILIES]
    + [("sd3_5_medium", reward) for reward in REWARDS if reward not in ("hpsv2", "hpsv3")],
)
def test_another_reward_is_trained_and_that_of_the_recipe_held_out(family: str, reward: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(write_starter("mine", starters(family)[0], reward))
    config = load(TrainConfig, [file])
    assert [(one.name, one.ref) for one in config.rewards] == [(reward, REWARDS[reward]["ref"])]
    watched = [one.name for one in config.heldout]
    assert "hpsv2" in watched
    assert reward not in watched
    assert len(set(watched)) == len(watched)
    assert f"{reward} was not tried" in file.read_text().replace("\n# ", " ")


@pytest.mark.parametrize(
    ("family", "memory", "gpus", "expected"),
    [
        ("sd3_5_medium", 24 * 10**9, 1, "lora_24gb"),
        ("sd3_5_medium", 24 * 2**30, 1, "lora_24gb"),
        ("sd3_5_medium", 40 * 10**9, 8, "lora_24gb"),
        ("sd3_5_medium", 80 * 10**9, 8, "flowbp_bridge"),
        ("qwen_image", 141 * 10**9, 1, "lora_80gb"),
    ],
)
def test_the_largest_recipe_that_fits_is_chosen(family: str, memory: int, gpus: int, expected: str) -> None:
    assert find_starter(family, memory, gpus).file.stem == expected


@pytest.mark.parametrize(
    ("family", "memory", "gpus", "said"),
    [
        ("sd3_5_mediun", LARGE, 1, "did you mean 'sd3_5_medium'?; allowed: flux1_dev, "),
        ("miniature", LARGE, 1, "no such family; allowed: "),
        ("sd3_5_medium", 16 * 10**9, 1, "for 1 GPU of 16 GB; there are: lora_24gb.yaml, 1 GPU of 24 GB; flowbp_bridge"),
        ("flux1_dev", 80 * 10**9, 4, "for 4 GPUs of 80 GB; there are: flowbp_bridge.yaml, 8 GPUs of 80 GB; give"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_there_is(family: str, memory: int, gpus: int, said: str) -> None:
    with pytest.raises(UserError) as error:
        find_starter(family, memory, gpus)
    assert said in str(error.value)


def test_an_unknown_reward_is_refused() -> None:
    with pytest.raises(UserError, match=r"--reward 'hps': unknown.*allowed: hpsv2, pickscore"):
        write_starter("mine", starters("sd3_5_medium")[0], "hps")


def test_an_installed_package_says_where_the_recipes_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "PLACES", (Path("nowhere"),))
    with pytest.raises(UserError, match="in the folder of a clone"):
        find_starter("sd3_5_medium", LARGE, 1)


def test_an_existing_file_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["init", "mine", "--family", "sd3_5_medium", "--memory", "24GiB"]
    first = CliRunner().invoke(app, words)
    assert first.exit_code == 0, first.output
    assert "flowbp estimate mine.yaml --memory 24GiB\n  flowbp train mine.yaml" in first.output
    spaced = CliRunner().invoke(app, [words[0], "a run", *words[2:]]).output
    assert "flowbp estimate 'a run.yaml' --memory 24GiB\n  flowbp train 'a run.yaml'" in spaced
    (tmp_path / "mine.yaml").write_text("seed: 3\n")
    for name, said in (("mine", "exists already"), ("mine.yaml", "exists already"), ("a/b", "plain name")):
        result = CliRunner().invoke(app, [words[0], name, *words[2:]])
        assert isinstance(result.exception, UserError)
        assert said in str(result.exception)
    assert (tmp_path / "mine.yaml").read_text() == "seed: 3\n"
