"""The sweep against the joint graph on a whole backbone, in float64."""

from functools import partial

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageUpsample
from diffusers.models.autoencoders.autoencoder_kl_qwenimage21 import QwenImage21Upsample
from diffusers.models.transformers.transformer_krea2 import Krea2RMSNorm
from families import size_of
from fields import gradient, relative
from oracle import backpropagate_jointly, roll
from torch import nn

from flowbp.core.engine import backpropagate, rollout
from flowbp.core.guidance import guided_velocity
from flowbp.core.plan import draw_plan
from flowbp.core.settings import Guidance
from flowbp.core.types import Backbone, Cond, batch_size
from flowbp.methods import METHODS


def assert_sweep_is_joint(backbone: Backbone, cond: Cond, negative: Cond, guidance: Guidance, method: str) -> None:
    """The gradients of the two are equal to 1e-10 for samples with this conditioning."""
    backbone.net.requires_grad_(True)
    for module in backbone.pipe.vae.modules():
        if isinstance(module, QwenImageUpsample | QwenImage21Upsample):
            module.forward = partial(nn.Upsample.forward, module)  # its own computes in float32, whatever it is given
    for module in backbone.net.modules():
        if isinstance(module, Krea2RMSNorm):
            module.double().forward = partial(_rms_norm, module)  # as above; its weights are kept in float32 too
    velocity = guided_velocity(backbone.velocity, cond, negative, guidance, backbone.guidance_rescale)
    sigmas = backbone.sigmas(12, size_of(backbone)).double()
    drawn = draw_plan(METHODS[method], sigmas.tolist(), np.random.default_rng(0))
    x_0 = backbone.noise(batch_size(cond), size_of(backbone), torch.Generator().manual_seed(0)).double()
    eps = torch.randn(max(drawn.copies, 1), *x_0.shape, generator=torch.Generator().manual_seed(1)).double()

    def loss(x: torch.Tensor, rows: slice) -> torch.Tensor:
        return backbone.decode(x).pow(2).mean((1, 2, 3))

    backpropagate(drawn, rollout(velocity, x_0, sigmas, drawn.rollout_spec), velocity, loss, noise=eps)
    swept = gradient(backbone.net)
    backbone.net.zero_grad()
    backpropagate_jointly(METHODS[method], drawn, roll(velocity, x_0, sigmas), loss, eps)
    assert swept.norm() > 0
    assert relative(swept, gradient(backbone.net)) < 1e-10


def _rms_norm(module: Krea2RMSNorm, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.rms_norm(x, (module.dim,), module.weight + 1, module.eps)
