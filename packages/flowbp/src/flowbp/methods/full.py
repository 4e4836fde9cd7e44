from flowbp.axes import All, Every, Sample
from flowbp.methods.base import Method

FULL = Method(name="full", reward_input=Sample(), active=All(), coupling=Every(alpha=1.0))
"""Exact backpropagation through the whole rollout, in the memory of one network evaluation."""
