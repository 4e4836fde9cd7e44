"""What each study compares.  A study is data: variants of a method that are trained for equal seconds."""

from collections.abc import Mapping
from dataclasses import dataclass

from flowbp.core.axes.active import All, LateBiased
from flowbp.core.axes.coupling import Every
from flowbp.core.axes.quadrature import Euler
from flowbp.methods import METHODS, Method

SETTINGS = ("num_inference_steps=12", "eval.num_inference_steps=12")
"""Of all studies: at 12 steps every active step can be tried in minutes, and images are nearly as often right."""


@dataclass(frozen=True)
class Study:
    """A comparison of methods that are trained for equal seconds with everything else equal.

    axis: what the variants differ in.  settings: `KEY=VALUE` of the recipe.  parts: parts of the seconds after which
    the training is evaluated.
    """

    title: str
    axis: str
    variants: Mapping[str, Method]
    settings: tuple[str, ...] = ()
    parts: tuple[float, ...] = (1.0,)


def _sparse(num_active_steps: int) -> Method:
    active = LateBiased(num_active_steps=num_active_steps, bias=2.0)
    return Method(active=active, quadrature=Euler(refill="mass", gamma=1.0))


STUDIES: Mapping[str, Study] = {
    "alpha": Study(
        "How strongly should the steps be coupled?",
        "alpha",
        {f"{alpha:g}": Method(active=All(), coupling=Every(alpha=alpha)) for alpha in (0, 0.25, 0.5, 0.75, 1)},
    ),
    "active_steps": Study(
        "How many steps should receive gradient?",
        "active steps K of 12",
        {str(k): _sparse(k) for k in (1, 2, 4, 8, 12)},
    ),
    "refill": Study(
        "Should the weights of the steps that were not drawn be made up for?",
        "refill",
        {
            refill: Method(active=LateBiased(num_active_steps=4, bias=2.0), quadrature=Euler(refill=refill))
            for refill in ("none", "mass", "inclusion")
        },
    ),
    "hacking": Study(
        "Which method exploits the reward?",
        "method",
        METHODS,
        settings=('rewards=[{ref: "builtin:shapes/reward", loss: {kind: hinge}}]', "optim.learning_rate=3e-4"),
        parts=(0.25, 0.5, 1.0),
    ),
}
