"""What a process sends to the others in one update."""

from statistics import mean

from flowbp.core.engine import num_backward_passes
from flowbp.core.settings import GuidanceRescale
from flowbp.core.types import Backbone
from flowbp.training.preflight import CheckedRun, batch_sizes

FLOAT32_BYTES, BFLOAT16_BYTES = 4, 2


def sent_bytes(backbone: Backbone, job: CheckedRun) -> float:
    """Bytes that each of n processes sends in an update, averaged over the run's plans, with ring collectives.

    Gathering or reducing and scattering M bytes sends (n - 1)/n M, reducing for all twice that.  T: the trained weights
    in float32; G: all weights in the precision in which they are gathered.

        ddp      gradients are reduced for all once: 2 T
        zero2    gradients are reduced and scattered, new weights gathered: 2 T
        fsdp2    weights are gathered for every evaluation of the network and again for every backward pass, gradients
        zero3    are reduced and scattered once, or with `sync: step` in every backward pass
    """
    config, count = job.config, job.num_processes
    trained = FLOAT32_BYTES * job.num_weights
    if config.distributed.kind in ("ddp", "zero2"):
        return 2 * trained * (count - 1) / count
    narrow = backbone.bfloat16 and config.lora is None and config.distributed.kind == "fsdp2"
    gathered = sum(p.numel() * (BFLOAT16_BYTES if narrow else p.element_size()) for p in backbone.net.parameters())
    forwards, backwards = network_calls(job, backbone.guidance_rescale)
    batch = batch_sizes(config, count)
    reductions = 1.0 if config.distributed.sync == "update" else backwards * batch.gradient_accumulation_steps
    gathers = (forwards + backwards) * batch.gradient_accumulation_steps
    return (gathers * gathered + reductions * trained) * (count - 1) / count


def network_calls(job: CheckedRun, rescale: GuidanceRescale) -> tuple[float, float]:
    """Forward passes of the network in a micro-batch, with those of the rollout, and backward passes.

    rescale: that of the model's pipeline.
    """
    config, guidance = job.config, job.config.classifier_free_guidance
    regularised = config.regularise is not None
    swept = mean(num_backward_passes(p, config.active_steps_per_forward, regularised=regularised) for p in job.plans)
    coupled = mean(sum(term.coupling > 0 for term in plan.terms) for plan in job.plans)
    is_detached = guidance.scale != 1 and guidance.detach_negative
    guided = 1 if guidance.scale == 1 or guidance.batched else 2  # without a gradient, or with one of both branches
    valued = 2 if is_detached else guided
    # a regularised pass needs the values too, of its own and of the base, branch after branch
    anchored = swept - coupled if regularised else 0.0
    forwards = (swept - anchored) * (valued if guidance.gradient_needs_negative(rescale) else 1) + anchored * 2 * valued
    return config.num_inference_steps * guided + forwards, swept * (1 if is_detached else guided)
