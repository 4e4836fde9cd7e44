"""The examples of docs/tutorials/python.md run as they stand, each within fifteen lines."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import flowbp
import interleave
from imgen_common.errors import UserError

PAGE = (Path(__file__).parents[2] / "docs" / "tutorials" / "python.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^## ([^\n]*)\n.*?```python\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL))


def test_there_are_four_short_ones() -> None:
    assert len(EXAMPLES) == 4
    assert all(len([line for line in code.splitlines() if line.strip()]) <= 15 for code in EXAMPLES.values())


@pytest.mark.slow
@pytest.mark.parametrize("title", EXAMPLES)
def test_examples_run(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[title], title, "exec"), {})  # noqa: S102, our own page
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("package", ["flowbp", "interleave"])
def test_importing_a_package_imports_nothing_heavy(package: str) -> None:
    program = (
        f"import sys, {package}; print(sorted({{'torch', 'transformers', 'diffusers', 'PIL'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["flowbp", "interleave"])
def test_every_public_name_is_there(package: str) -> None:
    module = __import__(package)
    assert all(getattr(module, name) is not None for name in module.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'; it has "):
        _ = module.nothing


# --- what is given by hand -------------------------------------------------------------------------------------------


def draw(prompt: str, sources: Any, seed: int) -> Image.Image:
    return Image.new("RGB", (8, 8), "red")


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: interleave.tell_story("a cat", draw, prompts=["cat", " "]), "prompts: step 2 of 2 is empty"),
        (lambda: flowbp.sample("builtin:shapes/generator", []), "prompts: give at least one"),
        (lambda: flowbp.sample("builtin:shapes/generator", ["cat"], seeds=[]), "seeds: give at least one"),
        (lambda: flowbp.sample("builtin:shapes/generator", "cat", images="none.png"), r"none\.png"),
        (lambda: flowbp.load_config(flowbp.TrainConfig, "none.yaml"), "none.yaml: "),
        (
            lambda: interleave.tell_story("a cat", draw, loop=interleave.LoopConfig(select="best_by_judge")),
            "functions give no scores; choose last or first_success",
        ),
        (lambda: interleave.tell_story("a cat", lambda *given: None), r"generate \(.*\) returned null; it must"),
        (lambda: interleave.tell_story("a cat", lambda *given: np.zeros((8, 8, 3))), "returned a ndarray; it must"),
        (lambda: interleave.tell_story("a cat", draw, lambda *given: True), r"criticize .* returned True; it must"),
        (lambda: interleave.tell_story("a cat", draw, lambda *given: (True, 3)), r"returned \(True, 3\); it must"),
    ],
)
def test_what_is_given_and_what_functions_return_is_refused_in_words(act: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        act()


def test_one_prompt_file_and_setting_may_be_given_alone(tmp_path: Path) -> None:
    assert len(interleave.tell_story("a cat", draw, prompts="cat").images) == 1
    assert flowbp.load_config(flowbp.TrainConfig, [], "seed=3").seed == 3


def test_paths_may_be_texts_and_a_critic_may_leave_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 7\n")
    assert interleave.load_config(interleave.RunConfig, [str(tmp_path / "a.yaml")]).seed == 7
    assert flowbp.load_evaluations(str(tmp_path)) == {}
    with pytest.raises(UserError, match="none: no such folder; give that of a run"):
        flowbp.load_evaluations(str(tmp_path / "none"))
    verdicts = iter([(np.bool_(False), None), (np.float32(1) > 0, None)])
    story = interleave.tell_story("a cat", draw, lambda *given: next(verdicts), folder=str(tmp_path / "run"))
    assert [(one.status, one.prompt_used) for one in story.attempts] == [("rejected", "a cat"), ("accepted", "a cat")]
    assert story.trajectory.status == "complete"
