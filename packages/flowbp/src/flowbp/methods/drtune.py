from flowbp.core.axes.active import SpacedPrefix
from flowbp.core.axes.reward_input import PosteriorMean
from flowbp.core.method import Method

DRTUNE = Method(name="drtune", reward_input=PosteriorMean(), active=SpacedPrefix(num_active_steps=3, early_stop=0.4))
"""Equally spaced steps of a rollout that stops early; every network input is detached.

Source: DRTune, arXiv 2405.00760, in flow form.
"""
