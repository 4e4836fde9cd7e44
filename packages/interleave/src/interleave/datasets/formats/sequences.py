"""Interleaved sequences for models that generate text and images."""

from collections.abc import Iterable
from pathlib import Path

from imgen_common.judging.escaping import escape_control_tokens
from interleave.agents.prompts import safe_json
from interleave.datasets.files import copy_image, write_json
from interleave.datasets.rows import FinishedStory, before_and_after
from interleave.records import Attempt
from interleave.storage.images import ImageStore

IMAGE_TOKEN = "<image><img_token></image>"


def write_interleaved(
    stories: Iterable[FinishedStory], file: Path, images: ImageStore, reflection: bool = False
) -> int:
    """Write {messages, images} items of the stories whose every step succeeded; returns how many there are.

    The assistant's turn is `<gthink>` the plan's reasoning, and for each step `<plan>` its prompt, the accepted image
    and `<info>` its text; with `reflection` also the rejected images, each image followed by `<critic>` its verdict.
    Unlike in the reference's files, every tag is closed, and a step may be without a text.
    """
    items = []
    for story in stories:
        sequence = _sequence(story, reflection)
        if sequence is None:
            continue
        text, image_ids = sequence
        given = story.trajectory.request.image_ids
        user = IMAGE_TOKEN * len(given) + escape_control_tokens(story.trajectory.request.text)
        items.append(
            {
                "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": text}],
                "images": [copy_image(file, f"images/{name}.png", name, images) for name in (*given, *image_ids)],
            }
        )
    write_json(file, items)
    return len(items)


def _sequence(story: FinishedStory, reflection: bool) -> tuple[str, list[str]] | None:
    plan, chosen = story.trajectory.plan, story.selected_attempts()
    if plan is None:
        return None
    parts, image_ids = [f"<gthink>{escape_control_tokens(plan.reasoning)}</gthink>"], []
    for step in plan.steps:
        if step.prompt is not None:
            last = chosen.get(step.index)
            if last is None or not last.verdict:
                return None
            parts.append(f"<plan>{escape_control_tokens(step.prompt)}</plan>")
            shown = [a for a in story.judged_attempts() if a.step == step.index and a.attempt <= last.attempt]
            for attempt in shown if reflection else [last]:
                image_ids.append(before_and_after(attempt)[1])
                parts.append(IMAGE_TOKEN + (_criticism(attempt) if reflection else ""))
        if step.text:
            parts.append(f"<info>{escape_control_tokens(step.text)}</info>")
    return "".join(parts), image_ids


def _criticism(attempt: Attempt) -> str:
    verdict = {"success": attempt.verdict, "refine_prompt": "" if attempt.verdict else attempt.refined_prompt}
    return f"<critic><think>{escape_control_tokens(attempt.reasoning or '')}</think>{safe_json(verdict)}</critic>"
