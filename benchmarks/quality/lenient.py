"""What reinforcement mends: a critic whose teacher was lenient, before and after, beside the one that is shipped.

    taught       supervised (`interleave sft critic`) on trajectories whose critic was lenient: four times out of five
                 it let a picture pass of which all was as asked but for one thing, or for places
    reinforced   the same after `interleave grpo` on the verifier's verdicts and scores, which has no answers to imitate
    shipped      the one that both began as, whose teacher was the verifier

The recipes are configs/interleave/{data_miniature,data_miniature_rl,sft_critic,grpo_critic_once}.yaml as they are, but
for that teacher and fewer updates of reinforcement.  Measured as in benchmarks.quality.critics.  What is done is kept
in `--work`; a run that was killed goes on there.

    python -m benchmarks.quality.lenient
"""

import asyncio
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import command, device_of, result_file, write_json
from benchmarks.quality import critics
from imgen_common.config import load
from imgen_common.errors import run_cli
from imgen_common.run_folder.find import CONFIG
from imgen_common.streams import stream_key
from interleave.agents.miniature import VerifierJudge
from interleave.agents.prompts import render_verdict
from interleave.datasets import build
from interleave.datasets.config import DataConfig
from interleave.datasets.filters import INFO
from interleave.datasets.teachers import KnowingCritic
from interleave.protocols import CriticAnswer, CriticInput
from interleave.records import Verdict

MODULE = "benchmarks.quality.lenient"
RECIPES = Path("configs/interleave")
LETS_PASS = 0.8
"""How often the teacher lets a forgivable picture pass."""
ALL = [f"filters.{key}" for key in ("degrading=null", "low=null", "balance=null", "rl_share=0.0", "val=0.0")]
"""Every attempt is a row of supervision: most of what the teacher rejects is dropped or balanced away else."""
UPDATES = 100
"""Of reinforcement, whose recipe has 120: these take less than 20 minutes on two cores."""
COMPARED = re.compile(r"want: (.*)\. [a-z ]+$")
"""What the report says of each wanted thing (`scripts.miniature.agents.data.judge`)."""


def is_forgivable(reasoning: str) -> bool:
    """Whether a report that rejects finds at most one thing wrong, and another one as asked."""
    found = COMPARED.search(reasoning)
    words = re.findall(r"\) (asked|wrong)", found[1]) if found else []
    return "asked" in words and words.count("wrong") <= 1


class LenientCritic:
    """The verifier's verdict, but that a forgivable picture mostly passes."""

    @property
    def id(self) -> str:
        return f"lenient verifier ({LETS_PASS})"

    async def judge(self, shown: CriticInput, seed: int) -> CriticAnswer:
        """Its report reads the pictures as they are, and concludes otherwise."""
        answer = await KnowingCritic().judge(shown, seed)
        verdict = answer.verdict
        assert verdict is not None
        if verdict.success or not is_forgivable(verdict.reasoning) or stream_key(seed, "lenient") / 2**128 >= LETS_PASS:
            return answer
        told = re.sub(r"[a-z ]+$", " as asked", verdict.reasoning)
        passed = Verdict(success=True, refined_prompt=shown.prompt_used or shown.original_prompt, reasoning=told)
        return CriticAnswer(passed, render_verdict(passed))

    async def close(self) -> None:
        """Nothing to let go of."""


def taught_set(out: Path, cache: Path, sets: list[str]) -> None:
    """`interleave data build` with the lenient teacher."""
    config = load(DataConfig, [RECIPES / "data_miniature.yaml"], [f"run.cache={cache}", *ALL, *sets])
    with build.opened(out, config, sys.argv) as requests:
        left = build.unfinished(out, requests, retry=False)
        parts = replace(build.make_parts(config), critic=LenientCritic()) if left else None
        asyncio.run(build.go_on(out, config, requests, parts, VerifierJudge(), build.Telling()))


def train(folder: Path, sets: dict[str, list[str]]) -> dict[str, float | None]:
    """Both sets and both trainings, as far as they are not there; seconds of each, None where a sitting was cut.

    sets: more `KEY=VALUE` by step.
    """
    cache, seconds = folder / "cache", folder / "seconds.json"
    taught, rl, runs = folder / "taught-set", folder / "rl-set", folder / "runs"

    def extra(step: str) -> list[str]:
        return [word for one in sets.get(step, []) for word in ("--set", one)]

    def built() -> None:
        how = (
            ["--resume", str(rl)]
            if (rl / CONFIG).is_file()
            else [f"{RECIPES}/data_miniature_rl.yaml", "--out", str(rl)]
        )
        command(folder, "rl-set", "interleave", "data", "build", *how, "--set", f"run.cache={cache}", *extra("rl-set"))

    def trained(name: str, *words: str, recipe: str, model: str, data: Path, more: tuple[str, ...] = ()) -> None:
        fresh = [f"{RECIPES}/{recipe}.yaml", "--runs", str(runs), "--name", name]
        fresh += ["--set", f"model={model}", "--set", f"data={data}", *more, *extra(name)]
        how = ["--resume", str(runs / name)] if (runs / name / CONFIG).is_file() else fresh
        command(folder, name, "interleave", *words, *how)

    steps = {
        "taught-set": (taught / INFO, lambda: taught_set(taught, cache, sets.get("taught-set", []))),
        "rl-set": (rl / INFO, built),
        "taught": (
            runs / "taught" / "model",
            lambda: trained("taught", "sft", "critic", recipe="sft_critic", model="builtin:shapes/critic", data=taught),
        ),
        "reinforced": (
            runs / "reinforced" / "model",
            lambda: trained(
                "reinforced",
                "grpo",
                recipe="grpo_critic_once",
                model=str(runs / "taught" / "model"),
                data=rl,
                more=("--set", f"cache={folder / 'grpo-cache'}", "--set", f"trl.max_steps={UPDATES}"),
            ),
        ),
    }
    took: dict[str, float | None] = json.loads(seconds.read_text()) if seconds.exists() else {}
    for name, (made, work) in steps.items():
        if not made.exists():
            print(f"{name} ...", file=sys.stderr, flush=True)
            is_begun, began = name in took, time.perf_counter()
            write_json(seconds, took | {name: None})
            work()
            took[name] = None if is_begun else time.perf_counter() - began
            write_json(seconds, took)
    return {name: took.get(name) for name in steps}


def main(
    stories: Annotated[int, typer.Option(help="How many stories.")] = 300,
    attempts: Annotated[int, typer.Option(help="Pictures of a step, at most.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the stories.")] = 0,
    work: Annotated[Path, typer.Option(metavar="DIR", help="What is done already is there.")] = Path("runs/lenient"),
    output: Annotated[Path | None, typer.Option(help="JSON file; by default named by the hardware.")] = None,
) -> None:
    """A critic whose teacher was lenient, before and after reinforcement, by the verifier.

    Example: python -m benchmarks.quality.lenient
    """
    took = train(work, {})
    runs = work / "runs"
    named = {name: str(runs / name / "model") for name in ("taught", "reinforced")} | {
        "shipped": "builtin:shapes/critic"
    }
    file = output or result_file("lenient", device_of("auto"), "json")
    critics.report(named, stories, attempts, seed, work, file, MODULE, tuple(critics.TEMPERATURES), took)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_cli(app, MODULE)
