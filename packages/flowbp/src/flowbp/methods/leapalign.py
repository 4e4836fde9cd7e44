from flowbp.core.axes.active import Pair, Uniform
from flowbp.core.axes.coupling import Bridge
from flowbp.core.axes.quadrature import Leap
from flowbp.core.axes.reward_input import Sample
from flowbp.core.method import Method

LEAPALIGN = Method(
    name="leapalign",
    reward_input=Sample(),
    active=Pair(sampler=Uniform()),
    quadrature=Leap(),
    coupling=Bridge(alpha=0.3),
    gap_floor=0.1,
)
"""Two pinned leaps x_k -> x_j -> x_N; samples whose leaps land far off weigh less.

Source: LeapAlign, arXiv 2604.15311.
"""
