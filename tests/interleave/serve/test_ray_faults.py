"""Where Ray cannot start: one line that says what to set."""

import errno

import pytest

from imgen_common.errors import UserError
from interleave.serve import ServeConfig, prepare_ray

LONG = "validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /long/ray/session/sockets/plasma"


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("error", "address", "said"),
    [
        (OSError(LONG), None, "AF_UNIX .*; set RAY_TMPDIR to a folder with a short path"),
        (
            OSError(errno.EROFS, "Read-only file system", "/home/.ray"),
            None,
            "'/home/.ray'; it keeps files in .*; set RAY_TMPDIR to",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/tmp/ray"), None, "Permission denied.*; set RAY_TMPDIR"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/tmp/ray"),
            None,
            "No space left.*; it keeps files in .*; set RAY_TMPDIR to",
        ),
        (
            ConnectionError("Could not find any\nrunning instance"),
            "auto",
            "ray_address auto: Could not find any",
        ),
        (RuntimeError("Version mismatch:\n Ray 2.1"), "auto", "ray_address auto: Version mismatch: Ray 2.1"),
    ],
)
def test_ray_that_cannot_start_is_one_line(
    error: Exception, address: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServeConfig(ray_address=address)
    prepare_ray(config)
    import ray

    from interleave.serve.ray import cluster

    def init(**options: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UserError, match=said) as caught, cluster(config):
        pass
    assert "\n" not in str(caught.value)
