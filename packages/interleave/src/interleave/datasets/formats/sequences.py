"""Interleaved sequences for models that write and draw."""

from collections.abc import Iterable
from pathlib import Path

from interleave.agents.prompts import escape_control_tokens, safe_json
from interleave.datasets.files import beside, write_json
from interleave.datasets.rows import Story, pair
from interleave.records import Attempt
from interleave.storage.images import ImageStore

IMAGE_TOKEN = "<image><img_token></image>"


# --- interleaved sequences for models that draw and write ------------------------------------------------------------


def write_interleaved(stories: Iterable[Story], file: Path, pictures: ImageStore, reflection: bool = False) -> int:
    """Write {messages, images} items of the stories whose every step succeeded; how many there are.

    The assistant's turn is `<gthink>` the plan's reasoning, and for each step `<plan>` its prompt, the accepted picture
    and `<info>` its text; with `reflection` the rejected pictures too, each picture followed by `<critic>` what was
    said of it.  Unlike the reference's, every tag is closed, and a step without a text costs no story.
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
                "images": [beside(file, f"images/{name}.png", name, pictures) for name in (*given, *image_ids)],
            }
        )
    write_json(file, items)
    return len(items)


def _sequence(story: Story, reflection: bool) -> tuple[str, list[str]] | None:
    plan, chosen = story.trajectory.plan, story.chosen()
    if plan is None:
        return None
    parts, image_ids = [f"<gthink>{escape_control_tokens(plan.reasoning)}</gthink>"], []
    for step in plan.steps:
        if step.prompt is not None:
            last = chosen.get(step.index)
            if last is None or not last.verdict:
                return None
            parts.append(f"<plan>{escape_control_tokens(step.prompt)}</plan>")
            shown = [a for a in story.judged() if a.step == step.index and a.attempt <= last.attempt]
            for attempt in shown if reflection else [last]:
                image_ids.append(pair(attempt)[1])
                parts.append(IMAGE_TOKEN + (_criticism(attempt) if reflection else ""))
        if step.text:
            parts.append(f"<info>{escape_control_tokens(step.text)}</info>")
    return "".join(parts), image_ids


def _criticism(attempt: Attempt) -> str:
    said = {"success": attempt.verdict, "refine_prompt": "" if attempt.verdict else attempt.refined_prompt}
    return f"<critic><think>{escape_control_tokens(attempt.reasoning or '')}</think>{safe_json(said)}</critic>"
