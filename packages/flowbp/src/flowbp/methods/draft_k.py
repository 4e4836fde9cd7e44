from flowbp.axes import Every, LastSteps, Sample
from flowbp.methods.base import Method

DRAFT_K = Method(name="draft_k", reward_input=Sample(), active=LastSteps(num_steps=3), coupling=Every(alpha=1.0))
"""Backpropagation through the last K steps.  The paper varies K; 3 costs as much as the other methods here.

Source: DRaFT-K, arXiv 2309.17400.
"""
