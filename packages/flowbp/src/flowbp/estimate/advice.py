"""Which settings would lower the peak, and the estimate as plain data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flowbp.backbones.licenses import license_of
from flowbp.config import TrainConfig
from flowbp.estimate.memory import Estimate, estimate_run
from flowbp.estimate.speed import Speed
from flowbp.training.preflight import CheckedRun, check_run, update_arithmetic
from imgen_common.errors import UserError

SWITCHES = (
    *("model.recompute=all", "per_device_batch_size=1", "reward_batch_size=1", "eval.batch_size=1"),
    *("model.vae.gradient_checkpointing=true", "model.vae.slicing=true", "offload_trajectory=true"),
    *("active_steps_per_forward=1", "data.embeddings=disk", "distributed.sync=step", "distributed.kind=fsdp2"),
)
"""Settings that may lower the peak and train the same; to them comes the precision of each reward."""
DRASTIC = ("model.dtype=bfloat16", "heldout=[]", "lora.rank=16")
"""Settings that change what is trained or watched, tried where the others are not enough."""
WORTH = 0.01
"""Part of the peak that a setting must save to be advised."""
MAX_ADVISED = 5


@dataclass(frozen=True)
class Advice:
    """Settings that lower the peak, in the order of what each saves on top of those before it.

    alone: what each alone would make of the peak, in bytes.  together: what all of them would.
    """

    alone: dict[str, int]
    together: int


def harmless_settings(config: TrainConfig) -> list[str]:
    """`SWITCHES`, and what makes the configuration's rewards smaller; the precision of one has its limits too."""
    parts = (("heldout", config.heldout), ("rewards", config.rewards))
    return [*SWITCHES, *(f"{name}.{i}.storage_dtype=float16" for name, part in parts for i, _ in enumerate(part))]


def advise_settings(
    config_of: Callable[[Sequence[str]], TrainConfig],
    count: int,
    limit: int,
    base: Estimate,
    on_progress: Callable[[str], object] = lambda text: None,
) -> Advice | None:
    """What would lower a peak that exceeds `limit` bytes, one setting on top of the other; None if nothing does.

    config_of: the configuration with changes on top; base: its estimate without.  on_progress: called with what is
    tried.  Several phases of a run may exceed the limit, so that no setting alone lowers the peak: what counts is by
    how much all exceed it together.
    """
    plain = config_of(())

    def estimate_with(*changes: str) -> Estimate | None:
        try:
            config = config_of(changes)
            if config == plain:
                return None
            on_progress(f"trying {' '.join(changes)} ...")
            return estimate_run(check_run(config, count, estimate_only=True))
        except UserError:  # a change that does not go with the rest
            return None

    # each setting is traced alone; what several save is added up, and the answer traced once more
    expected: Mapping[str, int] = base.phases
    chosen: list[str] = []
    alone: dict[str, int] = {}
    for group in (harmless_settings(plain), DRASTIC):
        if _excess(expected, limit) == 0:
            break
        found = {change: estimate for change in group if (estimate := estimate_with(change)) is not None}
        alone |= {change: estimate.peak for change, estimate in found.items()}
        expected = _add_settings(chosen, found, expected, limit, base)
    together = estimate_with(*chosen) if chosen else None
    if together is None or together.peak >= base.peak:
        return None
    return Advice({change: alone[change] for change in chosen}, together.peak)


def _excess(phases: Mapping[str, int], limit: int) -> int:
    return sum(max(0, size - limit) for size in phases.values())


def _add_settings(
    chosen: list[str],
    found: Mapping[str, Estimate],
    phases: Mapping[str, int],
    limit: int,
    base: Estimate,
) -> Mapping[str, int]:
    """Adds to `chosen`, one by one, the setting that saves most, while that is worth it; returns the bytes of the
    phases with all of them.

    found: the estimate with each setting alone, `base` that with none.
    """
    saved = {
        change: {name: size - estimate.phases.get(name, 0) for name, size in base.phases.items()}
        for change, estimate in found.items()
    }
    while saved and _excess(phases, limit) > 0 and len(chosen) < MAX_ADVISED:
        after = {c: {name: phases[name] - less for name, less in saved[c].items()} for c in saved}
        best = min(after, key=lambda change: _excess(after[change], limit))
        if _excess(phases, limit) - _excess(after[best], limit) < WORTH * base.peak:
            break
        chosen.append(best)
        phases = after[best]
        del saved[best]
    return phases


def estimate_as_json(
    job: CheckedRun,
    found: Estimate,
    speed: Speed | str,
    limit: int | None,
    advice: Advice | None,
    measured: tuple[int, float] | None,
) -> dict[str, Any]:
    """Everything that `flowbp estimate` says: bytes, seconds, operations."""
    config = job.config
    arithmetic = update_arithmetic(job)
    models = [config.model.ref, *([config.eval.model] if config.eval.model else [])]
    refs = [*models, *(scorer.ref for scorer in config.scorers)]
    content: dict[str, Any] = {
        "processes": job.num_processes,
        "gradient_accumulation_steps": arithmetic["gradient_accumulation_steps"],
        "static": found.static,
        "activation": found.activation,
        "startup": found.startup,
        "host": found.host,
        "embeddings": found.embeddings,
        "peak": found.peak,
        "untraced": list(found.untraced),
        "counted_for": "cuda" if torch.cuda.is_available() else "cpu",
        "bytes_sent_per_update": found.sent,
        "tflop_per_update": found.flops / 1e12,
        "speed": speed if isinstance(speed, str) else speed.reason,
        "tflops": None if isinstance(speed, str) else speed.tflops,
        "seconds_per_update": None if isinstance(speed, str) else found.flops / 1e12 / speed.tflops,
        "updates": config.max_train_steps,
        "disk": arithmetic["checkpoint_bytes"] * (config.checkpoint.keep + 1),
        "licenses": {ref: license_of(ref) for ref in dict.fromkeys(refs)},
    }
    if limit is not None:
        content |= {"memory": limit, "fits": found.peak <= limit}
    if advice is not None:
        content["advice"] = {"alone": advice.alone, "together": advice.together}
    if measured is not None:
        content["measured"] = {"peak": measured[0], "estimated": found.update_peak, "seconds_per_update": measured[1]}
    return content
