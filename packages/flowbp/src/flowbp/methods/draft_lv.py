from flowbp.axes import LastSteps, SampleRenoised
from flowbp.methods.base import Method

DRAFT_LV = Method(name="draft_lv", reward_input=SampleRenoised(copies=2), active=LastSteps(num_steps=1))
"""The last step of the sample and of two renoised copies of it, averaged.

Source: DRaFT-LV, arXiv 2309.17400, in flow form (facts 3.2).
"""
