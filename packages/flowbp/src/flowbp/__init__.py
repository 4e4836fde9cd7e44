"""Aligns flow-matching image models to differentiable rewards by direct reward backpropagation.

Source: FlowBP, arXiv 2606.11075.  The names below are imported when they are first used, so that `import flowbp` is
quick; docs/tutorials/python.md shows them at work.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowbp.config import TrainConfig
    from flowbp.core.engine import BackwardOptions, Outcome, backpropagate, rollout, sweep
    from flowbp.core.method import Method
    from flowbp.core.plan import Plan, draw_plan
    from flowbp.core.types import Trajectory
    from flowbp.evaluation.results import SavedEvaluation, load_evaluations
    from flowbp.evaluation.sampling import sample
    from flowbp.methods import METHODS
    from flowbp.rewards import RewardConfig, load_reward
    from flowbp.training.launch import train
    from imgen_common.config import load as load_config

_PLACES = {
    "BackwardOptions": "flowbp.core.engine",
    "METHODS": "flowbp.methods",
    "Method": "flowbp.core.method",
    "Outcome": "flowbp.core.engine",
    "Plan": "flowbp.core.plan",
    "RewardConfig": "flowbp.rewards",
    "SavedEvaluation": "flowbp.evaluation.results",
    "TrainConfig": "flowbp.config",
    "Trajectory": "flowbp.core.types",
    "backpropagate": "flowbp.core.engine",
    "draw_plan": "flowbp.core.plan",
    "load_config": "imgen_common.config",
    "load_evaluations": "flowbp.evaluation.results",
    "load_reward": "flowbp.rewards",
    "rollout": "flowbp.core.engine",
    "sample": "flowbp.evaluation.sampling",
    "sweep": "flowbp.core.engine",
    "train": "flowbp.training.launch",
}
__all__ = [
    "METHODS",
    "BackwardOptions",
    "Method",
    "Outcome",
    "Plan",
    "RewardConfig",
    "SavedEvaluation",
    "TrainConfig",
    "Trajectory",
    "backpropagate",
    "draw_plan",
    "load_config",
    "load_evaluations",
    "load_reward",
    "rollout",
    "sample",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'flowbp' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_PLACES[name]), "load" if name == "load_config" else name)
