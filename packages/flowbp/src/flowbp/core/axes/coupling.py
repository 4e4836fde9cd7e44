"""Fourth axis, the bridge: where the state itself carries gradient."""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field

from flowbp.core.axes.grid import ActiveSteps, Share, SplitSteps
from imgen_common.config import Config


class Bridge(Config):
    """The state at the split j carries gradient:  G <- G + alpha c_j J_j^T G  for the steps before j."""

    kind: Literal["bridge"] = "bridge"
    alpha: Share = 0.3
    """Share of the Jacobian that is kept, 0 (none) to 1."""

    def couple(self, steps: Iterable[int], active: ActiveSteps) -> dict[int, float]:
        """Coupling by step; `steps` are those with a weight."""
        return {i: self.alpha for i in steps if isinstance(active, SplitSteps) and i == active.split}


class Every(Config):
    """The state at every active step carries gradient; alpha 1 on all steps is full backpropagation."""

    kind: Literal["every"] = "every"
    alpha: Share = 1.0
    """Share of each Jacobian that is kept, 0 (none) to 1."""

    def couple(self, steps: Iterable[int], active: ActiveSteps) -> dict[int, float]:
        return dict.fromkeys(steps, self.alpha)


Coupling = Annotated[Bridge | Every, Field(discriminator="kind")]
