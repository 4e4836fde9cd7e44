"""Small training sets on disk, of shapes-like pictures, for tests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from interleave.formats.rows import Evaluation, RlRow, SftRow
from interleave.parts import Look, Picture
from interleave.prompts import render_critic, render_plan, render_planner, render_verdict, template
from interleave.records import Plan, PlanStep, Verdict
from interleave.store import PictureStore

COLOURS = ("red", "blue", "green", "yellow", "purple", "orange")
WHITE = Picture.of(Image.new("RGB", (32, 32), "white"))


def picture(number: int) -> Picture:
    """A picture that no other number has."""
    pixels = np.full((32, 32, 3), 255, np.uint8)
    pixels[4:28, 4:28] = np.random.default_rng(number).integers(0, 255, 3)
    return Picture.of(Image.fromarray(pixels))


def critic_row(number: int, store: PictureStore) -> SftRow:
    """An attempt to judge; the answer names what is asked for."""
    colour = COLOURS[number % len(COLOURS)]
    look = Look(WHITE, picture(number), f"draw a {colour} circle", f"draw a {colour} circle")
    store.put(look.before), store.put(look.after)
    verdict = Verdict(
        success=number % 2 == 0,
        refined_prompt=f"draw a {colour} circle",
        reasoning=f"want {colour}" + " keep" * (number % 3),
    )
    return SftRow.of(render_critic(template("shapes_critic"), look), render_verdict(verdict), f"t{number}")


def planner_row(number: int) -> SftRow:
    """A request in words alone."""
    colour = COLOURS[number % len(COLOURS)]
    plan = Plan(steps=(PlanStep(index=1, prompt=f"draw a {colour} circle", instruction="circle"),), reasoning="plan")
    return SftRow.of(render_planner(template("shapes_planner"), f"a {colour} circle", ()), render_plan(plan))


def rl_row(number: int, store: PictureStore) -> RlRow:
    """An attempt with its scores; every third succeeded."""
    colour = COLOURS[number % len(COLOURS)]
    after = picture(number)
    store.put(WHITE), store.put(after)
    success = number % 3 == 0
    return RlRow(
        origin_prompt=f"draw a {colour} circle",
        rewritten_prompt="",
        before_id=WHITE.id,
        after_id=after.id,
        is_t2i=True,
        evaluation=Evaluation(success=success, semantics=10 if success else 2, quality=5),
    )


def write(path: Path, rows: Sequence[SftRow | RlRow]) -> None:
    """Rows as the set's JSON lines."""
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")


def make_set(folder: Path, critic: int = 8, mixed: int = 6, rl: int = 6) -> Path:
    """critic_sft (pictures), planner_sft (half text alone) and critic_rl."""
    folder.mkdir()
    store = PictureStore(folder / "pictures")
    write(folder / "critic_sft.jsonl", [critic_row(i, store) for i in range(critic)])
    planner = [planner_row(i) if i % 2 else critic_row(i, store) for i in range(mixed)]
    write(folder / "planner_sft.jsonl", planner)
    write(folder / "critic_rl.jsonl", [rl_row(i, store) for i in range(rl)])
    return folder
