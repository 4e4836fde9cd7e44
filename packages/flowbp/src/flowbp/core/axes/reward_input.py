"""First axis: what the reward sees."""

from typing import Annotated, Literal

from pydantic import Field

from flowbp.core.axes.grid import Count
from imgen_common.config import Config


class Sample(Config):
    """The sampled image x_N itself."""

    kind: Literal["sample"] = "sample"


class SampleRenoised(Config):
    """The sample, and `copies` one-step restorations of it:

        x'_m = (1 - sigma) x_N + sigma eps_m,   y_m = x'_m - sigma v(x'_m, sigma),   sigma = sigma_{N-1}

    The loss is the mean over all 1 + copies; each restoration costs one gradient evaluation at step N-1.
    Source: DRaFT-LV, arXiv 2309.17400.
    """

    kind: Literal["sample_renoised"] = "sample_renoised"
    copies: Count = 2
    """Renoised copies per sample, >= 1."""


class PosteriorMean(Config):
    """The one-step estimate  x_i - sigma_i v_i  at the step where the active set stops the rollout.

    That is the end of an Euler rollout on the grid sigma_0 ... sigma_i, 0, and all weights refer to that grid.
    """

    kind: Literal["posterior_mean"] = "posterior_mean"


RewardInput = Annotated[Sample | SampleRenoised | PosteriorMean, Field(discriminator="kind")]
