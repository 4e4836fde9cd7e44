"""Measures the miniature's agents on requests and images that they have not seen, by the verifier."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from imgen_common.shapes.scene import Split
from imgen_common.shapes.stories import plan_is_correct, sample_story
from imgen_common.streams import numpy_generator
from interleave.agents.parsing import ParseFailure, parse_plan, parse_verdict
from interleave.datasets.teachers import make_verdict, wordings
from interleave.models.chat.local import to_conversation
from interleave.protocols import Message
from interleave.records import Plan, Verdict
from scripts.miniature.agents.cases import to_cases
from scripts.miniature.agents.data import critic_message, planner_message, read_cases
from scripts.miniature.agents.models import MAX_LENGTH
from scripts.miniature.agents.pool import GeneratedImages

BATCH = 50


@torch.no_grad()
def generate_answers(folder: Path, messages: Sequence[Message]) -> Iterator[str]:
    """Greedy answers of the checkpoint in `folder`, in float32."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    for start in range(0, len(messages), BATCH):
        batch = processor.apply_chat_template(
            [to_conversation(message) for message in messages[start : start + BATCH]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        prompt = batch["input_ids"].shape[1]
        made = model.generate(**batch, max_new_tokens=MAX_LENGTH - prompt, do_sample=False)
        yield from processor.batch_decode(made[:, prompt:], skip_special_tokens=True)


def measure_planner(folder: Path, count: int, seed: int, split: Split = "test") -> dict[str, float]:
    """Shares of `count` plain requests and as many riddles with a valid plan, and with a correct one."""
    result: dict[str, float] = {}
    for kind in ("plain", "riddle"):
        rng = numpy_generator(seed, f"planner-{kind}")
        stories = [sample_story(rng, split, riddle=kind == "riddle") for _ in range(count)]
        plans = list(map(parse_plan, generate_answers(folder, [planner_message(s.request) for s in stories])))
        prompts = [[s.prompt or "" for s in plan.steps] if isinstance(plan, Plan) else [] for plan in plans]
        correct = [plan_is_correct(p, s) for p, s in zip(prompts, stories, strict=True)]
        result[f"{kind}/valid"] = sum(isinstance(plan, Plan) for plan in plans) / count
        result[f"{kind}/correct"] = sum(correct) / count
        for steps in range(1, 5):
            chosen = [c for c, s in zip(correct, stories, strict=True) if len(s.steps) == steps]
            result[f"{kind}/correct of {steps} steps"] = sum(chosen) / max(len(chosen), 1)
    return result


def measure_critic(folder: Path, generated: GeneratedImages) -> dict[str, float]:
    """Agreement with the verifier on generated images, for captions (`t2i`) and changes (`edit`).

    accuracy: of the verdicts; one that cannot be parsed counts as wrong.  accepts_right, accepts_wrong: shares of right
    and of wrong images that are accepted.  right: share of right images.  reading: share of reports that are exactly
    right.  same: share of rejections whose refined prompt asks for the same as the original.
    """
    cases = to_cases(generated)
    found = read_cases(cases)
    truths = [make_verdict(*f, case.original, case.used) for case, f in zip(cases, found, strict=True)]
    verdicts: list[Verdict | ParseFailure] = list(
        map(parse_verdict, generate_answers(folder, [critic_message(case) for case in cases]))
    )
    result = {"parsable": sum(isinstance(v, Verdict) for v in verdicts) / len(verdicts)}
    for kind in ("t2i", "edit", "all"):
        rows = [i for i, case in enumerate(cases) if kind == "all" or (case.before is None) == (kind == "t2i")]
        said = [(v.success if isinstance(v := verdicts[i], Verdict) else None, truths[i].success) for i in rows]
        right, wrong = [s for s, truth in said if truth], [s for s, truth in said if not truth]
        result[f"{kind}/num"] = len(rows)
        result[f"{kind}/right"] = len(right) / len(rows)
        result[f"{kind}/accuracy"] = sum(s == truth for s, truth in said) / len(rows)
        result[f"{kind}/accepts_right"] = sum(s is True for s in right) / max(len(right), 1)
        result[f"{kind}/accepts_wrong"] = sum(s is not False for s in wrong) / max(len(wrong), 1)
        read = [isinstance(v := verdicts[i], Verdict) and v.reasoning == truths[i].reasoning for i in rows]
        result[f"{kind}/reading"] = sum(read) / len(rows)
    same = [
        verdict.refined_prompt in wordings(case.original, before)
        for case, (before, _), verdict in zip(cases, found, verdicts, strict=True)
        if isinstance(verdict, Verdict) and not verdict.success
    ]
    return result | {"same": sum(same) / max(len(same), 1)}
