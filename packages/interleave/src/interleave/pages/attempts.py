"""What a page says of one attempt: prompts with their changes, reasons and numbers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from imgen_common.console import count
from interleave.pages.words import (
    ATTEMPT_STATUS,
    Change,
    StatusWords,
    describe_error,
    explain_reasoning,
    format_seconds,
    word_changes,
)
from interleave.records import Attempt


@dataclass(frozen=True)
class AttemptView:
    """One attempt of a story.  is_shown: whether its image stands for the step, where there are several attempts."""

    record: Attempt
    is_shown: bool

    @property
    def status(self) -> StatusWords:
        """Its sign, color and words."""
        return ATTEMPT_STATUS[self.record.status]

    @property
    def label(self) -> str:
        """Describes its image in one line."""
        return f"attempt {self.record.attempt}, {self.status.words}: {self.record.prompt_used}"

    @property
    def before_ids(self) -> tuple[str, ...]:
        """The image that the critic compared with."""
        return compared_images(self.record)

    @property
    def error(self) -> str:
        """Why it failed; "" where it did not."""
        return describe_error(self.record.error)

    @property
    def reasons(self) -> str:
        """The critic's reasons in words; "" where it did not judge."""
        return "" if self.record.verdict is None else explain_reasoning(self.record.reasoning or "")

    @property
    def prompts(self) -> list[tuple[str, list[Change]]]:
        """The prompt used and the critic's next one, each under its title with what changed."""
        one = self.record
        changed = one.prompt_used != one.original_prompt
        title = "Prompt, with changes to the plan's" if changed else "Prompt, as in the plan"
        prompts = [(title, word_changes(one.original_prompt, one.prompt_used))]
        if one.revised_prompt:
            title = "Prompt as the generator revised it"
            prompts.append((title, word_changes(one.prompt_used, one.revised_prompt)))
        if one.refined_prompt and one.refined_prompt != one.prompt_used:
            title = "The critic's next prompt, with changes to this one"
            prompts.append((title, word_changes(one.prompt_used, one.refined_prompt)))
        elif one.verdict is False:
            prompts.append(("The critic's next prompt", [("", "the same")]))
        return prompts

    @property
    def facts(self) -> Mapping[str, str]:
        """How the image was made and what it was given."""
        one = self.record
        source, scores, params = "generated from the prompt alone", "", ""
        if one.op == "edit":
            source = f"edited from {count(len(one.source_ids), 'image')}"
        if one.scores:
            scores = (
                f"semantics {one.scores.semantics:g}, quality {one.scores.quality:g} of 10, by {one.scores.judge_id}"
            )
        if one.generator.params:
            params = json.dumps(dict(one.generator.params), ensure_ascii=False)
        probability = one.success_probability
        digits = ".3g" if 0 < (probability or 0) < 0.001 else ".3f"
        times = {"generator" if name == "generate" else name: seconds for name, seconds in one.timings.items()}
        return {
            "source": source,
            "seed": str(one.seed),
            "times": ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in times.items()),
            "critic asked": f"{one.critic_tries} times" if one.critic_tries > 1 else "",
            "probability of success": "" if probability is None else f"{probability:{digits}}",
            "scores": scores,
            "generator": f"{one.generator.id} {params}",
            "image": one.image_id or "",
        }


def compared_images(one: Attempt) -> tuple[str, ...]:
    """The image before, where there was one: before the first the critic compares with a white one."""
    if one.before_id and one.source_ids:
        return (one.before_id,)
    return one.source_ids[-1:]
