"""Small training sets on disk, of shapes-like images, for tests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from interleave.agents.prompts import load_template, render_critic, render_plan, render_planner, render_verdict
from interleave.datasets.rows import Evaluation, RlRow, SftRow
from interleave.protocols import CriticInput, HashedImage
from interleave.records import Plan, PlanStep, Verdict
from interleave.storage.images import ImageStore

COLOURS = ("red", "blue", "green", "yellow", "purple", "orange")
WHITE = HashedImage.from_pil(Image.new("RGB", (32, 32), "white"))


def picture(number: int) -> HashedImage:
    """An image that no other number has."""
    pixels = np.full((32, 32, 3), 255, np.uint8)
    pixels[4:28, 4:28] = np.random.default_rng(number).integers(0, 255, 3)
    return HashedImage.from_pil(Image.fromarray(pixels))


def critic_row(number: int, store: ImageStore) -> SftRow:
    """An attempt to judge; the answer names what is asked for."""
    colour = COLOURS[number % len(COLOURS)]
    shown = CriticInput(WHITE, picture(number), f"draw a {colour} circle", f"draw a {colour} circle")
    store.put(shown.before), store.put(shown.after)
    verdict = Verdict(
        success=number % 2 == 0,
        refined_prompt=f"draw a {colour} circle",
        reasoning=f"want {colour}" + " keep" * (number % 3),
    )
    return SftRow.from_message(
        render_critic(load_template("shapes_critic"), shown), render_verdict(verdict), f"t{number}"
    )


def planner_row(number: int) -> SftRow:
    """A request in words alone."""
    colour = COLOURS[number % len(COLOURS)]
    plan = Plan(steps=(PlanStep(index=1, prompt=f"draw a {colour} circle", instruction="circle"),), reasoning="plan")
    return SftRow.from_message(
        render_planner(load_template("shapes_planner"), f"a {colour} circle", ()), render_plan(plan)
    )


def rl_row(number: int, store: ImageStore) -> RlRow:
    """An attempt with its scores; every third succeeded."""
    colour = COLOURS[number % len(COLOURS)]
    after = picture(number)
    store.put(WHITE), store.put(after)
    success = number % 3 == 0
    return RlRow(
        original_prompt=f"draw a {colour} circle",
        prompt_used="",
        before_id=WHITE.id,
        after_id=after.id,
        is_t2i=True,
        evaluation=Evaluation(success=success, semantics=10 if success else 2, quality=5),
    )


def write(path: Path, rows: Sequence[SftRow | RlRow]) -> None:
    """Rows as the set's JSON lines."""
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")


def make_set(folder: Path, critic: int = 8, mixed: int = 6, rl: int = 6) -> Path:
    """critic_sft (images), planner_sft (half text alone) and critic_rl."""
    folder.mkdir()
    store = ImageStore(folder / "images")
    write(folder / "critic_sft.jsonl", [critic_row(i, store) for i in range(critic)])
    planner = [planner_row(i) if i % 2 else critic_row(i, store) for i in range(mixed)]
    write(folder / "planner_sft.jsonl", planner)
    write(folder / "critic_rl.jsonl", [rl_row(i, store) for i in range(rl)])
    return folder
