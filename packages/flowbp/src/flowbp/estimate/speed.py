"""How much a run computes, and how fast it is assumed to be."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flowbp.core.settings import GuidanceRescale
from flowbp.training.preflight import CheckedRun
from imgen_common.devices import PEAK_TFLOPS, find_card, known_card

SHARE = 0.5
"""Part of the peak that training with large batches reaches."""


@dataclass(frozen=True)
class Speed:
    """tflops: assumed TFLOP/s.  reason: where they come from, for a reader."""

    tflops: float
    reason: str


def speed_of(gpu: str | None, tflops: float | None) -> Speed | str:
    """The speed that is assumed: `tflops`, or half the peak of the card named `gpu`, or of this machine's.

    A text that says why there is none, where neither is given and this machine's GPU is not known.  Raises UserError
    for an unknown name.
    """
    if tflops is not None:
        return Speed(tflops, "as given")
    if gpu is None and not torch.cuda.is_available():
        return "not estimated: torch sees no GPU; name one with --gpu, or give --tflops"
    found = known_card(gpu) if gpu is not None else find_card(torch.cuda.get_device_name())
    if found is not None:
        return Speed(SHARE * PEAK_TFLOPS[found], f"half the peak of {found}")
    given, known = torch.cuda.get_device_name(), ", ".join(PEAK_TFLOPS)
    return f"not estimated: the peak of {given} is not known here; give --tflops, or --gpu with one of {known}"


def micro_batch_flops(stages: Mapping[str, float], job: CheckedRun, rescale: GuidanceRescale) -> float:
    """Operations of one micro-batch, averaged over the run's plans.

    stages: operations of each stage, once.  rescale: that of the model's pipeline.
    """
    config = job.config
    num_swept = sum(plan.num_gradient_forwards for plan in job.plans) / len(job.plans)
    guidance = config.classifier_free_guidance
    negative = guidance.scale != 1 and not guidance.gradient_needs_negative(rescale)  # is half of a rollout's step
    step = stages["swept step"] / config.active_steps_per_forward  # with a regulariser's base
    swept = num_swept * step
    if config.regularise is not None:  # which has a pass of its own at a coupled step; the other needs no value
        coupled = sum(term.coupling > 0 for plan in job.plans for term in plan.terms) / len(job.plans)
        swept += coupled * (step - stages["rollout"] * (1.5 if negative else 1))
    # what is kept is not evaluated again, of a guided step with a detached negative the other branch
    kept = sum(len(plan.keep_graphs(config.keep_graphs).graphs) for plan in job.plans) / len(job.plans)
    rolled = config.num_inference_steps - kept * (0.5 if negative else 1)
    return rolled * stages["rollout"] + swept + stages["reward"]
