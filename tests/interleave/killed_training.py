"""Trainings in processes of their own, killed by SIGKILL at random moments, as a machine that goes down would."""

import hashlib
import json
import random
import signal
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import forking
from forking import finish


def start(arguments: Sequence[str], log: Path) -> BaseProcess:
    """`interleave ARGUMENTS`."""
    return forking.start(forking.command, "interleave", *arguments, log=log)


def assert_kills_change_nothing(runs: Path, training: Sequence[str], num_updates: int, seed: int = 0) -> Path:
    """Train once in peace and once killed three times; equal weights, and every update logged once, with equal losses.

    training: the command without --runs, --name and --resume.  Returns the folder of the run in peace.
    """
    runs.mkdir()
    log, straight, cut = runs / "log", runs / "straight", runs / "cut"
    finish(start([*training, "--runs", str(runs), "--name", "straight"], log), log)
    rng = random.Random(seed)
    for update in [0, *sorted(rng.sample(range(1, num_updates - 5), 2))]:
        process = begin(runs, training)
        while process.is_alive() and len(updates(cut)) < update:
            time.sleep(0.002)
        process.join(rng.uniform(0, 0.03 if update else 1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()[-3000:]
    finish(begin(runs, training), log)
    assert digest(cut) == digest(straight)
    assert updates(cut) == updates(straight)
    assert [step for step, _ in updates(cut)] == list(range(1, num_updates + 1))
    return straight


def begin(runs: Path, training: Sequence[str]) -> BaseProcess:
    """Begin the run `cut`, or go on with it."""
    cut = runs / "cut"
    if not (cut / "config.yaml").exists():
        return start([*training, "--runs", str(runs), "--name", "cut"], runs / "log")
    words = [word for word in training if not word.endswith(".yaml")]
    return start([*words, "--resume", str(cut)], runs / "log")


def digest(run: Path) -> str:
    """Of the trained weights."""
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()


def updates(run: Path) -> list[tuple[int, float]]:
    """Number and loss of every logged update; a line that is being written is none yet."""
    if not (run / "metrics.jsonl").exists():
        return []
    whole = (run / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, whole) if "loss" in line]
