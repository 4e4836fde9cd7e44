"""The examples of docs/tutorials/python.md run as they stand, each within fifteen lines."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
