"""Which process a launcher started, and what is left over from another launch."""

import pytest
import torch

from imgen_common.devices import announce_process, any_process, launched_process
from imgen_common.errors import UserError

PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "process"),
    [
        ({}, (0, 1)),
        (PLACE, (0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        (PLACE | {"RANK": "0", "WORLD_SIZE": "1"}, (0, 1)),
        (PLACE | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, (0, 1)),
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1)),
        ({"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": ""}, (0, 1)),
        (PLACE | {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4)),
    ],
)
def test_processes_of_launchers(environment: dict[str, str], process: tuple[int, int]) -> None:
    assert launched_process(environment) == process


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "1"},
        {"WORLD_SIZE": "2"},
        {"LOCAL_RANK": "0"},
        {"LOCAL_RANK": "1"},
        {"WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        PLACE | {"RANK": "0", "WORLD_SIZE": "2"},
        PLACE | {"RANK": "1", "WORLD_SIZE": "2"},
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
        PLACE | {"RANK": "2", "WORLD_SIZE": "2"},
        PLACE | {"RANK": "1"},
        PLACE | {"RANK": "first", "WORLD_SIZE": "2"},
        PLACE | {"RANK": "0", "WORLD_SIZE": "0"},
        {"RANK": "-1", "WORLD_SIZE": "1"},
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"},
        {"PMI_SIZE": "8"},
    ],
)
def test_what_is_left_over_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"the environment has .*for one process: unset "):
        launched_process(environment)


@pytest.mark.parametrize(
    ("host", "launcher", "waits"),
    [
        ("node17.invalid", {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, True),
        ("192.0.2.7", {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, True),
        ("127.0.0.1", {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, False),
        ("node17.invalid", {}, False),  # a job's script exported it for others
        ("job-master-0.invalid", {"RANK": "0", "WORLD_SIZE": "1"}, False),  # Kubernetes, of a job of one process
    ],
)
def test_the_only_process_does_not_wait_for_another_machine(
    monkeypatch: pytest.MonkeyPatch, host: str, launcher: dict[str, str], waits: bool
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (PLACE | launcher | {"MASTER_ADDR": host}).items():
        monkeypatch.setenv(name, value)
    if not waits:
        assert announce_process() == (0, 1)
        return
    with pytest.raises(UserError, match=rf"MASTER_ADDR={host} is not this machine, and WORLD_SIZE is 1: unset RANK"):
        announce_process()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert announce_process() == (0, 1)


@pytest.mark.parametrize(("torchrun", "said"), [(False, "process 1 of 2, as RANK and WORLD_SIZE"), (True, "")])
def test_a_process_that_prints_nothing_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], torchrun: bool, said: str
) -> None:
    for name, value in (PLACE | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    else:
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert announce_process().rank == 1
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize(
    ("own", "others", "found"),
    [(False, 0, False), (False, 1, True), (False, 7, True), (True, 0, True), (True, 7, True)],
)
def test_a_signal_that_one_process_got_stops_all(
    own: bool, others: int, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """others: of seven other processes, how many have the flag up."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flags: flags.add_(others))
    assert any_process(own, torch.device("cpu")) == found


@pytest.mark.parametrize("flag", [True, False])
def test_a_process_alone_asks_nobody(flag: bool) -> None:
    assert any_process(flag, torch.device("cpu")) == flag
