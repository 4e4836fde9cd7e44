from flowbp.core.axes.active import All
from flowbp.core.axes.coupling import Every
from flowbp.core.axes.reward_input import Sample
from flowbp.core.method import Method

FULL = Method(name="full", reward_input=Sample(), active=All(), coupling=Every(alpha=1.0))
"""Exact backpropagation through the whole rollout, in the memory of one network evaluation."""
