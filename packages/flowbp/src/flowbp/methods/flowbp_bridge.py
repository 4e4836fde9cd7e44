from flowbp.core.axes.active import LateBiased, Uniform
from flowbp.core.axes.coupling import Bridge
from flowbp.core.axes.quadrature import Euler
from flowbp.core.axes.reward_input import Sample
from flowbp.core.method import Method

FLOWBP_BRIDGE = Method(
    name="flowbp_bridge",
    reward_input=Sample(),
    active=LateBiased(num_active_steps=5, bias=2.0, split=Uniform()),
    quadrature=Euler(refill="mass", gamma=1.0),
    coupling=Bridge(alpha=0.1),
)
"""FlowBP-Sparse on both sides of a step j through which the state carries gradient; as tuned for FLUX.1-dev.

Tuned (steps, bias, gamma, alpha) elsewhere: SD3.5-M 5, 4, 0, 0.5; FLUX.2-klein-base 3, 4, 0.5, 1.
Source: FlowBP-Bridge, arXiv 2606.11075.
"""
