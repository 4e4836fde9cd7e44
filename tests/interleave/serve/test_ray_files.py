"""Where Ray keeps its files: not in the home folder, and in a folder of temporary files that it can use."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from interleave.serve import ServeConfig, prepare_ray

START = """
from interleave.serve import ServeConfig, prepare_ray
prepare_ray(ServeConfig())
from interleave.serve import ray
with ray.cluster(ServeConfig()):
    pass
"""
NAMES = (
    *("RAY_USAGE_STATS_ENABLED", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"),
    *("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_ENABLE_UV_RUN_RUNTIME_ENV"),
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's variables are unset, and again what they were after the test."""
    for name in (*NAMES, "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_a_cluster_of_our_own_has_a_token_that_needs_no_home() -> None:
    prepare_ray(ServeConfig())
    token = os.environ["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    prepare_ray(ServeConfig())
    assert os.environ["RAY_AUTH_TOKEN"] == token


def test_replicas_run_in_the_environment_of_the_service_under_uv_run_too() -> None:
    code = """
from interleave.serve import ServeConfig, prepare_ray
prepare_ray(ServeConfig())
from ray._private.ray_constants import RAY_ENABLE_UV_RUN_RUNTIME_ENV
print(RAY_ENABLE_UV_RUN_RUNTIME_ENV)
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


@pytest.mark.parametrize(("name", "value"), [("RAY_AUTH_TOKEN", "mine"), ("RAY_AUTH_TOKEN_PATH", "/secrets/ray")])
def test_a_token_of_the_users_is_kept(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    prepare_ray(ServeConfig())
    assert os.environ[name] == value
    assert os.environ.get("RAY_AUTH_TOKEN", "mine") == "mine"


def test_another_cluster_is_joined_with_its_own_token() -> None:
    prepare_ray(ServeConfig(ray_address="auto"))
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("variable", "folder", "said"),
    [
        ("RAY_TMPDIR", "/tmp/" + "x" * 90, "its sockets would be too long"),
        ("TMPDIR", "/tmp/" + "é" * 25, "its sockets would be too long"),
        ("RAY_TMPDIR", "/proc/none", "No such file or directory"),
        ("RAY_TMPDIR", "/dev/null", "Not a directory"),
    ],
)
def test_a_folder_that_ray_cannot_use_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, variable: str, folder: str, said: str
) -> None:
    """In a process of its own, as Ray reads its variables once."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(variable, folder)
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True)
    assert re.search(f"UserError: .*{said}.*it keeps files in .*; set RAY_TMPDIR", done.stderr.splitlines()[-1])
    assert not Path(folder).is_dir()
