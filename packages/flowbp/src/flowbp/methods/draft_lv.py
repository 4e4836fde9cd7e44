from flowbp.core.axes.active import LastSteps
from flowbp.core.axes.reward_input import SampleRenoised
from flowbp.core.method import Method

DRAFT_LV = Method(name="draft_lv", reward_input=SampleRenoised(copies=2), active=LastSteps(num_active_steps=1))
"""The last step of the sample and of two renoised copies of it, averaged.

Source: DRaFT-LV, arXiv 2309.17400, in flow form.
"""
