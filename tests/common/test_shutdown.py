"""Ctrl-C, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU take one path, and a second one is not taken for the first."""

import asyncio
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator

import pytest
import typer

from imgen_common import shutdown
from imgen_common.errors import run_cli
from imgen_common.shutdown import GracefulShutdown, ended_at_once, interrupted_by_signals, message_when_stopped


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal() -> Iterator[None]:
    """A shell that starts the tests in the background has them ignore Ctrl-C, and nohup SIGHUP."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before[0])
    signal.signal(signal.SIGHUP, before[1])


CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGXCPU: 152}
CODES |= {signal.SIGUSR1: 138, signal.SIGUSR2: 140}


def raised_in_command(number: signal.Signals, monkeypatch: pytest.MonkeyPatch, asynchronous: bool) -> int:
    """The exit code of a command that receives a signal while it loads, without anything to save."""
    app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)

    async def wait() -> None:
        signal.raise_signal(number)
        await asyncio.sleep(60)

    @app.command()
    def load() -> None:
        with message_when_stopped(lambda: "stopped; continue with: prog --resume x"):
            if asynchronous:
                asyncio.run(wait())
            signal.raise_signal(number)

    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(SystemExit) as ended:
        run_cli(app, "prog")
    return int(ended.value.code or 0)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("number", CODES)
def test_every_signal_says_how_to_continue(
    number: signal.Signals, asynchronous: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(one) for one in CODES]
    assert raised_in_command(number, monkeypatch, asynchronous) == CODES[number]
    assert capsys.readouterr().err == "\nstopped; continue with: prog --resume x\n"
    assert [signal.getsignal(one) for one in CODES] == before


@pytest.mark.parametrize("number", CODES)
def test_the_first_signal_waits_and_a_later_one_stops_at_once(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(shutdown.time, "monotonic", lambda: now[0])
    with interrupted_by_signals(), GracefulShutdown("stopping after this update") as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        signal.raise_signal(signal.SIGINT)  # the launcher passes on what the terminal sent to all processes
        now[0] += shutdown.REPEAT_SECONDS
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert shutdown.exit_code() == CODES[number]
    assert capfd.readouterr().err == "\nstopping after this update\n"


@pytest.mark.parametrize("number", CODES)
def test_a_download_ends_at_once(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its threads would keep the process until the file is whole."""
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended, ended_at_once("stopped; go on"):
        signal.raise_signal(number)
    assert ended.value.code == CODES[number]
    assert capfd.readouterr().err == "\nstopped; go on\n"


def test_what_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with interrupted_by_signals(), GracefulShutdown() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_thread_has_no_signals_to_handle() -> None:
    entered = []

    def train() -> None:
        with GracefulShutdown() as stop:
            entered.append(stop.requested)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert entered == [False]


def wait_in_worker() -> None:
    signal.raise_signal(signal.SIGINT)  # reaches all processes of a terminal, and is the parent's business
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()


def test_a_forked_worker_can_be_terminated() -> None:
    with GracefulShutdown() as stop:
        worker = multiprocessing.get_context("fork").Process(target=wait_in_worker)
        worker.start()
        worker.join(60)
        assert worker.exitcode == -signal.SIGTERM
        assert not stop.requested
