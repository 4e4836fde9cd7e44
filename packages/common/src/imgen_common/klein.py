"""What FLUX.2-klein reads of its text encoder, which its pipeline does not derive by itself."""

from typing import TYPE_CHECKING

from imgen_common.errors import UserError

if TYPE_CHECKING:
    from transformers import Qwen3Config


def text_layers(config: "Qwen3Config", joint_dim: int) -> tuple[int, ...]:
    """Which hidden states the transformer reads: evenly spaced, 9, 18, 27 of klein's 36 layers.

    Their number follows from the transformer's text width.  Raises UserError if the two models do not fit.
    """
    count, rest = divmod(joint_dim, config.hidden_size)
    if rest or not 0 < count < config.num_hidden_layers:
        raise UserError(
            f"a text encoder of {config.num_hidden_layers} layers of width {config.hidden_size} does not fit a "
            f"transformer that reads {joint_dim} numbers per token; take both from one folder"
        )
    return tuple(config.num_hidden_layers * k // (count + 1) for k in range(1, count + 1))
