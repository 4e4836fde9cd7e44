from flowbp.core.axes.active import LastSteps
from flowbp.core.axes.coupling import Every
from flowbp.core.axes.reward_input import Sample
from flowbp.core.method import Method

DRAFT_K = Method(name="draft_k", reward_input=Sample(), active=LastSteps(num_active_steps=3), coupling=Every(alpha=1.0))
"""Backpropagation through the last K steps.  The paper varies K; 3 costs as much as the other methods here.

Source: DRaFT-K, arXiv 2309.17400.
"""
