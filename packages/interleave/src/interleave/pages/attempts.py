"""The attempts of a step: prompts as word differences, verdicts, reasons and numbers."""

import json
from collections.abc import Sequence

from imgen_common.page import fold, text
from interleave.pages.images import Shots
from interleave.pages.words import (
    MARKS,
    count,
    describe_error,
    fact_list,
    format_seconds,
    labeled,
    preformatted,
    user,
    word_diff,
)
from interleave.records import Attempt


def attempts_html(attempts: Sequence[Attempt], shown: Attempt | None, shots: Shots) -> str:
    return "".join(attempt_html(one, shots, one is shown and len(attempts) > 1) for one in attempts)


def attempt_html(one: Attempt, shots: Shots, chosen: bool) -> str:
    _, colour, words = MARKS[one.status]
    chips = f'<span class="chip {colour}">{text(words)}</span>' + (' <span class="chip">shown</span>' if chosen else "")
    error = f'<p class="warn">{user(describe_error(one.error))}</p>' if one.error else ""
    answer = fold("The critic's answer as it came", preformatted(one.raw)) if one.raw else ""
    return (
        f'<article class="attempt"><h3>Attempt {one.attempt} {chips}</h3>{_before_after(one, shots)}'
        f"<div>{error}{_prompts(one)}{_reasons(one)}{_numbers(one)}{answer}</div></article>"
    )


def compared_images(one: Attempt) -> tuple[str, ...]:
    """The picture before, where there was one: before the first the critic compares with an empty one."""
    if one.before_id and one.source_ids:
        return (one.before_id,)
    return one.source_ids[-1:]


def _before_after(one: Attempt, shots: Shots) -> str:
    before = [shots.show(image_id, "the picture before") for image_id in compared_images(one)]
    figures = [f"<figure>{picture}<figcaption>before</figcaption></figure>" for picture in before]
    if one.image_id:
        picture = shots.show(one.image_id, one.prompt_used)
        figures.append(f"<figure>{picture}<figcaption>{'after' if before else 'drawn'}</figcaption></figure>")
    return f'<div class="pair">{"".join(figures)}</div>'


def _prompts(one: Attempt) -> str:
    changed = one.prompt_used != one.original_prompt
    title = "Prompt, as changed from the plan's" if changed else "Prompt, as the plan has it"
    told = [labeled(title, word_diff(one.original_prompt, one.prompt_used))]
    if one.refined_prompt and one.refined_prompt != one.prompt_used:
        title = "The critic's next prompt, as changed from this"
        told.append(labeled(title, word_diff(one.prompt_used, one.refined_prompt)))
    elif one.verdict is False:
        told.append(labeled("The critic's next prompt", "the same"))
    return "".join(told)


def _reasons(one: Attempt) -> str:
    return labeled("The critic's reasons", text(one.reasoning)) if one.reasoning else ""


def _numbers(one: Attempt) -> str:
    names = {"generate": "drawing", "critic": "judging", "judge": "scoring"}
    times = ", ".join(f"{names.get(name, name)} {format_seconds(value)}" for name, value in one.timings.items())
    sources = f"edited from {count(len(one.source_ids), 'picture')}" if one.op == "edit" else "drawn from words alone"
    params = json.dumps(dict(one.generator.params), ensure_ascii=False) if one.generator.params else ""
    return fact_list(
        {
            "how": sources,
            "seed": str(one.seed),
            "times": times,
            "asked": f"{one.critic_tries} times" if one.critic_tries > 1 else "",
            "probability of success": "" if one.success_probability is None else f"{one.success_probability:.3f}",
            "scores": _scores(one),
            "generator": f"{one.generator.id} {params}",
            "picture": one.image_id or "",
        }
    )


def _scores(one: Attempt) -> str:
    if one.scores is None:
        return ""
    return f"semantics {one.scores.semantics:g}, quality {one.scores.quality:g} of 10, by {one.scores.judge_id}"
