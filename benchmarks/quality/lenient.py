"""What reinforcement learning corrects: a critic with a lenient teacher, before and after, beside the shipped one.

    supervised   trained (`interleave sft critic`) on trajectories whose critic was lenient: it accepted four out of
                 five images in which one thing, or only the places, were not as asked
    reinforced   the same after `interleave grpo` on the verifier's verdicts and scores, without answers to imitate
    shipped      the critic that both started from, whose teacher was the verifier

The recipes are configs/interleave/{data_miniature,data_miniature_rl,sft_critic,grpo_critic_once}.yaml, except for that
teacher and for fewer updates of reinforcement learning.  The critics are measured by benchmarks.quality.critics.
Finished steps are kept in `--work`; the same command resumes.

    python -m benchmarks.quality.lenient
"""

import asyncio
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import choose_device, read_json, result_file, resume_arguments, run_command, write_json
from benchmarks.quality.critics import TEMPERATURES, CriticSettings, report_critics
from imgen_common.config import load
from imgen_common.errors import run_cli
from imgen_common.streams import stream_key
from interleave.agents.miniature import VerifierJudge
from interleave.agents.prompts import render_verdict
from interleave.datasets import build
from interleave.datasets.config import DataConfig
from interleave.datasets.filters import INFO
from interleave.datasets.teachers import TeacherCritic
from interleave.protocols import CriticAnswer, CriticInput
from interleave.records import Verdict

MODULE = "benchmarks.quality.lenient"
RECIPES = Path("configs/interleave")
ACCEPTANCE_RATE = 0.8
"""Share of the forgivable images that the teacher accepts."""
KEEP_EVERY_ROW = [f"filters.{key}" for key in ("degrading=null", "low=null", "balance=null", "rl_share=0.0", "val=0.0")]
"""Every attempt is a row of supervised data: the filters of the recipe would drop most of what the teacher rejects."""
GRPO_STEPS = 100
"""Updates of reinforcement learning.  The recipe has 120; these take less than 20 minutes on two cores."""
WANTED_THINGS = re.compile(r"want: (.*)\. [a-z ]+$")
"""The part of a report about each wanted thing (scripts/miniature/agents/data.py)."""


def is_forgivable(reasoning: str) -> bool:
    """Whether a rejecting report has at most one thing wrong, and another one as asked."""
    found = WANTED_THINGS.search(reasoning)
    words = re.findall(r"\) (asked|wrong)", found[1]) if found else []
    return "asked" in words and words.count("wrong") <= 1


class LenientCritic:
    """The verifier as critic, except that it accepts most forgivable images."""

    @property
    def id(self) -> str:
        return f"lenient verifier ({ACCEPTANCE_RATE})"

    async def judge(self, shown: CriticInput, seed: int) -> CriticAnswer:
        """The verifier's answer; for an accepted forgivable image the same report with another conclusion."""
        answer = await TeacherCritic().judge(shown, seed)
        verdict = answer.verdict
        assert verdict is not None
        is_strict = stream_key(seed, "lenient") / 2**128 >= ACCEPTANCE_RATE
        if verdict.success or is_strict or not is_forgivable(verdict.reasoning):
            return answer
        reasoning = re.sub(r"[a-z ]+$", " as asked", verdict.reasoning)
        accepted = Verdict(success=True, refined_prompt=shown.prompt_used or shown.original_prompt, reasoning=reasoning)
        return CriticAnswer(accepted, render_verdict(accepted))

    async def close(self) -> None:
        """Releases nothing."""


@dataclass(frozen=True)
class Steps:
    """The steps of the training under `folder`; sets: additional `KEY=VALUE` by step."""

    folder: Path
    sets: Mapping[str, Sequence[str]]

    def list_steps(self) -> dict[str, tuple[Path, Callable[[], None]]]:
        """{step: (what exists when it is finished, the work)} in order."""
        runs = self.folder / "runs"
        return {
            "supervised-set": (self.folder / "supervised-set" / INFO, self.build_supervised_set),
            "rl-set": (self.folder / "rl-set" / INFO, self.build_rl_set),
            "supervised": (runs / "supervised" / "model", self.train_supervised),
            "reinforced": (runs / "reinforced" / "model", self.train_reinforced),
        }

    def build_supervised_set(self) -> None:
        """Does what `interleave data build` does, with the lenient teacher."""
        out = self.folder / "supervised-set"
        sets = [f"run.cache={self.folder / 'cache'}", *KEEP_EVERY_ROW, *self.sets.get("supervised-set", ())]
        config = load(DataConfig, [RECIPES / "data_miniature.yaml"], sets)
        with build.open_build(out, config, sys.argv) as requests:
            left = build.unfinished_requests(out, requests, retry=False)
            parts = replace(build.make_parts(config), critic=LenientCritic()) if left else None
            asyncio.run(build.continue_build(out, config, requests, parts, VerifierJudge(), build.BuildProgress()))

    def build_rl_set(self) -> None:
        """Runs `interleave data build`."""
        out = self.folder / "rl-set"
        words = resume_arguments(out, [f"{RECIPES}/data_miniature_rl.yaml", "--out", str(out)])
        sets = [f"run.cache={self.folder / 'cache'}", *self.sets.get("rl-set", ())]
        run_command(self.folder, "rl-set", "interleave", "data", "build", *words, *_set_options(sets))

    def train_supervised(self) -> None:
        """Runs `interleave sft critic`."""
        sets = ["model=builtin:shapes/critic", f"data={self.folder / 'supervised-set'}"]
        self._train("supervised", ["sft", "critic"], "sft_critic", sets)

    def train_reinforced(self) -> None:
        """Runs `interleave grpo`."""
        sets = [f"model={self.folder / 'runs' / 'supervised' / 'model'}", f"data={self.folder / 'rl-set'}"]
        sets += [f"cache={self.folder / 'grpo-cache'}", f"trl.max_steps={GRPO_STEPS}"]
        self._train("reinforced", ["grpo"], "grpo_critic_once", sets)

    def _train(self, name: str, words: Sequence[str], recipe: str, sets: Sequence[str]) -> None:
        runs = self.folder / "runs"
        fresh = [f"{RECIPES}/{recipe}.yaml", "--runs", str(runs), "--name", name]
        fresh += _set_options([*sets, *self.sets.get(name, ())])
        run_command(self.folder, name, "interleave", *words, *resume_arguments(runs / name, fresh))


def _set_options(sets: Sequence[str]) -> list[str]:
    return [word for one in sets for word in ("--set", one)]


def train_critics(folder: Path, sets: Mapping[str, Sequence[str]]) -> dict[str, float | None]:
    """Runs the steps that are not finished; returns the seconds of each, None where it was interrupted.

    sets: additional `KEY=VALUE` by step.
    """
    file, steps = folder / "seconds.json", Steps(folder, sets).list_steps()
    seconds: dict[str, float | None] = read_json(file) if file.exists() else {}
    for name, (made, work) in steps.items():
        if not made.exists():
            print(f"{name} ...", file=sys.stderr, flush=True)
            is_begun, start = name in seconds, time.perf_counter()
            write_json(file, seconds | {name: None})
            work()
            seconds[name] = None if is_begun else time.perf_counter() - start
            write_json(file, seconds)
    return {name: seconds.get(name) for name in steps}


def main(
    stories: Annotated[int, typer.Option(help="How many stories.")] = 300,
    attempts: Annotated[int, typer.Option(help="Most images per step.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the stories.")] = 0,
    work: Annotated[Path, typer.Option(metavar="DIR", help="Folder of finished steps.")] = Path("runs/lenient"),
    output: Annotated[Path | None, typer.Option(help="JSON file; by default named by the hardware.")] = None,
) -> None:
    """A critic whose teacher was lenient, before and after reinforcement learning, by the verifier.

    Example: python -m benchmarks.quality.lenient
    """
    seconds = train_critics(work, {})
    named = {name: str(work / "runs" / name / "model") for name in ("supervised", "reinforced")}
    named["shipped"] = "builtin:shapes/critic"
    settings = CriticSettings(stories, attempts, seed, work, tuple(TEMPERATURES))
    file = output or result_file("lenient", choose_device("auto"), "json")
    report_critics(named, settings, file, MODULE, seconds)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_cli(app, MODULE)
