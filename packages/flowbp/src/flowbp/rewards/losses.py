"""From a reward's scores to the loss that is minimized."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Gt

from imgen_common.config import Config

if TYPE_CHECKING:
    from torch import Tensor


class Hinge(Config):
    """loss = max(0, ceiling - score): the papers' loss; without a ceiling loss = -score."""

    kind: Literal["hinge"] = "hinge"
    ceiling: float | None = None
    """Score from which an image no longer contributes, in the reward's units; null: none."""


class LogSigmoid(Config):
    """loss = -log sigmoid((score - center) / width): an image's share fades as its score passes the center."""

    renamed: ClassVar = {"centre": "center"}

    kind: Literal["log_sigmoid"] = "log_sigmoid"
    center: float
    """Score at which the gradient has fallen to a half, in the reward's units."""
    width: Annotated[float, Gt(0)] = 1.0
    """How gradually it fades, in the reward's units."""


class Sigmoid(Config):
    """loss = -sigmoid((score - center) / width): as if the score were the log-odds that an image is accepted.  Images
    near the center count most; those far from it, good or hopeless, hardly."""

    kind: Literal["sigmoid"] = "sigmoid"
    center: float
    """Score at which the gradient is largest, in the reward's units."""
    width: Annotated[float, Gt(0)] = 1.0
    """How gradually it fades on both sides, in the reward's units."""


def reward_losses(loss: Hinge | LogSigmoid | Sigmoid, scores: "Tensor") -> "Tensor":
    """Per-sample losses of scores; both (b,)."""
    from torch import sigmoid
    from torch.nn.functional import softplus

    if isinstance(loss, Hinge):
        return -scores if loss.ceiling is None else (loss.ceiling - scores).clamp(min=0)
    if isinstance(loss, Sigmoid):
        return -sigmoid((scores - loss.center) / loss.width)
    return softplus((loss.center - scores) / loss.width)
