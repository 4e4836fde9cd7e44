from flowbp.core.axes.active import Dirichlet, FirstSupports
from flowbp.core.axes.coupling import Bridge
from flowbp.core.axes.quadrature import Lagrange
from flowbp.core.axes.reward_input import Sample
from flowbp.core.method import Method

FLOWBP_LAGRANGE = Method(
    name="flowbp_lagrange",
    reward_input=Sample(),
    active=FirstSupports(sampler=Dirichlet(clean=2.5, gap=6.0, noisy=2.0), num_supports=2, later_gain=0.25),
    quadrature=Lagrange(order=3, refill="mass", gamma=0.5),
    coupling=Bridge(alpha=0.1),
    gap_floor=0.2,
)
"""LeapAlign's two legs, each integrated through three velocities, two of them active; as tuned for FLUX.1-dev.

Tuned (gamma, gap_floor) elsewhere: SD3.5-M 0, 0.2 with active.sampler.cap 10; FLUX.2-klein-base 0, 0.1 with tail 0.7.
Source: FlowBP-Lagrange, arXiv 2606.11075.
"""
