from flowbp.axes import Bridge, Leap, Pair, Sample, Uniform
from flowbp.methods.base import Method

LEAPALIGN = Method(
    name="leapalign",
    reward_input=Sample(),
    active=Pair(sampler=Uniform()),
    weights=Leap(),
    coupling=Bridge(alpha=0.3),
    gap_floor=0.1,
)
"""Two pinned leaps x_k -> x_j -> x_N; samples whose leaps land far off weigh less.

Source: LeapAlign, arXiv 2604.15311 (facts 3.4).
"""
