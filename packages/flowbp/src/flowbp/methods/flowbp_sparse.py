from flowbp.core.axes.active import LateBiased
from flowbp.core.axes.quadrature import Euler
from flowbp.core.axes.reward_input import Sample
from flowbp.core.method import Method

FLOWBP_SPARSE = Method(
    name="flowbp_sparse",
    reward_input=Sample(),
    active=LateBiased(num_active_steps=3, bias=2.0),
    quadrature=Euler(refill="mass", gamma=1.0),
)
"""A few steps drawn towards the clean end, each with its Euler weight; as tuned for FLUX.1-dev.

Tuned (steps, bias, gamma) elsewhere: SD3.5-M 4, 1, 0.5; FLUX.2-klein-base 4, 2, 0.
Source: FlowBP-Sparse, arXiv 2606.11075.
"""
