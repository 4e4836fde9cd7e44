"""What a machine offers, and bundles without secrets."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import typer

from imgen_common import files
from imgen_common.doctor import findings
from imgen_common.doctor.bundle import without_secrets, write_bundle
from imgen_common.doctor.commands import build_doctor
from imgen_common.doctor.findings import Finding, examine
from imgen_common.errors import UserError


def states(runs: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for finding in examine(runs):
        found.setdefault(finding.area, set()).add(finding.state)
    return found


def test_a_folder_that_is_not_there_yet_is_examined_where_it_would_be(tmp_path: Path) -> None:
    found = states(tmp_path / "not" / "there")
    assert found["file system of the runs"] == {"ok"}
    assert found["clock"] == {"ok"}
    assert not list(tmp_path.iterdir())


def test_what_a_file_system_lacks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*given: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(findings.fcntl, "flock", lacking)
    found = [finding for finding in examine(tmp_path) if finding.state == "warning" and "flock" in finding.text]
    assert [finding.text for finding in found] == ["no locks (flock) (Function not implemented)"]
    assert "only one process" in found[0].remedy


def test_locks_are_tried_as_runs_take_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_on_nfs(file: Any, _: int) -> None:
        if not file.writable():
            raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(findings.fcntl, "flock", as_on_nfs)
    assert states(tmp_path)["file system of the runs"] == {"ok"}


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**given: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(findings.tempfile, "TemporaryDirectory", refused)
    assert states(tmp_path)["file system of the runs"] == {"problem"}


def test_a_machine_without_a_folder_of_temporary_files_is_examined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(findings.tempfile, "gettempdir", missing)
    found = {finding.area: finding for finding in examine(tmp_path)}
    assert "set TMPDIR" in found["disk, temporary files"].remedy
    assert found["file system of the runs"].state == "ok"


def test_tokens_are_named_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmn")
    monkeypatch.setenv("JUDGE_API_KEY", "top-secret-value")
    text = json.dumps([vars(finding) for finding in examine(tmp_path)])
    assert "Hugging Face: there" in text
    assert "JUDGE_API_KEY" in text
    assert "abcdefghijklmn" not in text
    assert "top-secret-value" not in text


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.parametrize(
    ("value", "is_offline"), [("1", True), ("True", True), ("on", True), ("Yes", True), ("0", False)]
)
def test_a_machine_that_is_kept_from_the_network_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, is_offline: bool
) -> None:
    for other in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    found = [finding.text for finding in findings._tokens() if finding.area == "network"]
    assert found == [f"{name} is set: nothing is downloaded"] * is_offline


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), ValueError("found a file: hub")])
def test_a_cache_of_models_that_cannot_be_read_is_a_problem(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refused() -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.scan_cache_dir", refused)
    found = list(findings._models())
    assert [finding.state for finding in found] == ["problem"]
    assert "Permission denied" in found[0].text or "found a file" in found[0].text


def test_a_bundle_that_is_there_is_refused_before_anything_is_examined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imgen_common.doctor.findings.examine", None)
    (tmp_path / "it.zip").touch()
    with pytest.raises(UserError, match="exists; give another name"):
        build_doctor("prog", list)(tmp_path, bundle=tmp_path / "it.zip")


def test_licenses_of_cached_models_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(tmp_path))
    assert [f.text for f in examine(tmp_path) if f.area == "models"] == ["org/name, 0.00 GiB, license: apache-2.0"]


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("warning", 0), ("problem", 1)])
def test_only_a_problem_is_a_failure(
    state: Any, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [Finding("disk", state, "2 GiB free", "make room")]
    monkeypatch.setattr(findings, "examine", lambda runs: found)
    doctor = build_doctor("flowbp", lambda: [])
    for as_json in (False, True):
        with pytest.raises(typer.Exit) as ending:
            doctor(as_json=as_json)
        assert ending.value.exit_code == code
        said = capsys.readouterr().out
        assert (json.loads(said) == [vars(found[0])]) if as_json else ("disk: 2 GiB free; make room" in said)


def test_a_run_without_a_bundle_is_refused() -> None:
    with pytest.raises(UserError, match="add --bundle"):
        build_doctor("flowbp", lambda: [])(run="x")


@pytest.mark.parametrize(
    "secret",
    [
        "http://me:pa55word@host/v1",
        "sk-abcdefgh12345678",
        "Authorization: Bearer abc.def-ghi",
        "value-of-my-key",
        "hf_qwertzuiop",
    ],
)
def test_secrets_are_taken_out(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "value-of-my-key")
    cleaned = without_secrets(f"url: {secret} end")
    for part in ("pa55word", "abcdefgh12345678", "abc.def-ghi", "value-of-my-key", "qwertzuiop"):
        assert part not in cleaned
    assert cleaned.startswith("url: ")
    assert cleaned.endswith(" end")


def test_a_bundle_holds_findings_and_the_last_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, file = tmp_path / "run", tmp_path / "report.zip"
    run.mkdir()
    (run / "config.yaml").write_text(f"name: x\nplace: {Path.home()}/models\n")
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {i}}}\n' for i in range(1000)))
    write_bundle(file, "flowbp", [Finding("gpu", "ok", "none")], run)
    with zipfile.ZipFile(file) as bundle:
        parts = {name: bundle.read(name).decode() for name in bundle.namelist()}
    assert set(parts) == {"environment.json", "findings.json", "run/config.yaml", "run/metrics.jsonl"}
    assert "place: ~/models" in parts["run/config.yaml"]
    assert parts["run/metrics.jsonl"].splitlines()[-1] == '{"step": 999}'
    assert len(parts["run/metrics.jsonl"].splitlines()) == 200
    with pytest.raises(UserError, match=r"report\.zip: exists; give another name"):
        write_bundle(file, "flowbp", [], None)
    with monkeypatch.context() as full:
        full.setattr(files, "sync", lambda _: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
        with pytest.raises(UserError, match=r"new\.zip: the disk is full"):
            write_bundle(tmp_path / "new.zip", "flowbp", [], None)
    assert not [entry for entry in tmp_path.iterdir() if "new.zip" in entry.name]
    with pytest.raises(UserError, match="no run folder"):
        write_bundle(tmp_path / "other.zip", "flowbp", [], tmp_path)
    assert not os.path.exists(tmp_path / "other.zip")
