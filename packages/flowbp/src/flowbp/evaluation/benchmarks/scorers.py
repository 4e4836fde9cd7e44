"""Loading what scores the images of a benchmark: a reward, the judge, or the rules of GenEval."""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from PIL import Image

from flowbp.evaluation import vlm_judge
from flowbp.evaluation.benchmarks.settings import GENEVAL, JUDGED, Prompt, ScorerSpec
from flowbp.rewards import RewardConfig, load_reward
from imgen_common import hub
from imgen_common.images import from_pil

ScoreRows = list[dict[str, Any]]
ScoreImages = Callable[[Sequence[Image.Image], Sequence[Prompt]], ScoreRows]
"""score_images(images, prompts) -> a row for each image: its `score` (None: there is none) and what explains it."""


def load_scorer(spec: ScorerSpec, device: torch.device, judge_url: str | None) -> ScoreImages:
    """The scorer with its weights."""
    if spec.kind in JUDGED:
        return _judge(spec, judge_url)
    if spec.kind == GENEVAL:
        return _geneval(spec, device)
    reward = load_reward(RewardConfig(score=spec.kind, ref=spec.ref), device)

    def score(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> ScoreRows:
        with torch.no_grad():
            found = reward(from_pil(images).to(device), [prompt.text for prompt in prompts]).tolist()
        return [{"score": value if math.isfinite(value) else None} for value in found]

    return score


def _judge(spec: ScorerSpec, judge_url: str | None) -> ScoreImages:
    judge = vlm_judge.Judge(cast(vlm_judge.Criterion, spec.kind), vlm_judge.check_url(judge_url), spec.ref)
    return lambda images, prompts: [
        {"score": score} | ({"answer": answer} if score is None else {})
        for score, answer in judge(images, [prompt.text for prompt in prompts])
    ]


def _geneval(spec: ScorerSpec, device: torch.device) -> ScoreImages:
    from flowbp.evaluation.benchmarks.detector import Detector, GenEval
    from flowbp.rewards.clip import ClipReward

    clip = ClipReward.load(hub.resolve(cast(str, spec.color_model)), device=device)
    rules = GenEval(Detector.load(spec.ref, device), clip)

    def score(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> ScoreRows:
        tasks = [prompt.task for prompt in prompts if prompt.task]
        found = zip(tasks, rules(images, tasks), strict=True)
        return [{"tag": task.tag, "score": float(not wrong), "mistakes": wrong} for task, wrong in found]

    return score
