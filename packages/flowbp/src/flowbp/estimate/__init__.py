"""What a run needs, before it begins: memory by part, operations, time, disk, and which settings would lower the peak.

No weight is read and no GPU is needed; only `measure` runs real updates, to compare with.
"""

from flowbp.estimate.advice import Advice, advise_settings, estimate_as_json
from flowbp.estimate.fastest import Fastest, fastest_that_fits
from flowbp.estimate.measure import measure_run, measure_updates, network_tensors
from flowbp.estimate.memory import Estimate, FakeModels, estimate_run, trace_stages
from flowbp.estimate.speed import Speed, speed_of

__all__ = [
    "Advice",
    "Estimate",
    "FakeModels",
    "Fastest",
    "Speed",
    "advise_settings",
    "estimate_as_json",
    "estimate_run",
    "fastest_that_fits",
    "measure_run",
    "measure_updates",
    "network_tensors",
    "speed_of",
    "trace_stages",
]
