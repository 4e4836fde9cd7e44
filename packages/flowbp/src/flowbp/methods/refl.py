from flowbp.core.axes.active import OneOfTail
from flowbp.core.axes.quadrature import Leap
from flowbp.core.axes.reward_input import PosteriorMean
from flowbp.core.method import Method

REFL = Method(name="refl", reward_input=PosteriorMean(), active=OneOfTail(num_active_steps=11), quadrature=Leap())
"""Reward of the one-step estimate at one of the last 11 steps; gradient -sigma_i (dv_i/dtheta)^T g.

Source: ReFL, arXiv 2304.05977, in flow form.
"""
