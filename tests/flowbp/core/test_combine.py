"""Several rewards' gradients made one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowbp.core.multi_reward import combine_gradients, gradient_agreement


def draws(rewards: int, samples: int, seed: int) -> torch.Tensor:
    return torch.randn(rewards, samples, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).flatten(1).sum(1)


@given(st.integers(0, 999), st.sampled_from(["weighted", "normalized", "pcgrad"]))
def test_one_reward_stays_what_it_is(seed: int, how: str) -> None:
    g = draws(1, 3, seed)
    assert torch.allclose(combine_gradients(g, torch.ones(1), how), g[0], atol=1e-12)


@given(st.integers(0, 999), st.integers(2, 4))
def test_weights_scale_and_samples_are_apart(seed: int, rewards: int) -> None:
    g, w = draws(rewards, 3, seed), torch.arange(1.0, rewards + 1)
    assert torch.allclose(
        combine_gradients(g, w, "weighted"), sum(k * x for k, x in zip(w, g, strict=True)), atol=1e-12
    )
    for how in ("weighted", "normalized", "pcgrad"):
        alone = torch.cat([combine_gradients(g[:, i : i + 1], w, how) for i in range(3)])
        assert torch.allclose(combine_gradients(g, w, how), alone, atol=1e-12)


@given(st.integers(0, 999), st.floats(1e-6, 1e6))
def test_normalized_does_not_see_the_scale_of_a_reward(seed: int, scale: float) -> None:
    g, w = draws(2, 2, seed), torch.tensor([1.0, 3.0])
    direction = combine_gradients(g, w, "normalized")
    other = combine_gradients(torch.stack([g[0] * scale, g[1]]), w, "normalized")
    cosine = dot(direction, other) / (dot(direction, direction) * dot(other, other)).sqrt()
    assert torch.allclose(cosine, torch.ones(2, dtype=torch.float64), atol=1e-9)


@given(st.integers(0, 999))
def test_pcgrad_never_climbs_against_one_of_two(seed: int) -> None:
    g = draws(2, 4, seed)
    found = combine_gradients(g, torch.ones(2), "pcgrad")
    for own in g:
        assert (dot(found, own) >= -1e-9).all()
    friends = dot(g[0], g[1]) >= 0
    assert torch.allclose(found[friends], (g[0] + g[1])[friends], atol=1e-12)


def test_cosines_and_norms() -> None:
    g = torch.zeros(3, 1, 2)
    g[0, 0], g[1, 0] = torch.tensor([3.0, 4.0]), torch.tensor([-4.0, 3.0])
    found = gradient_agreement(g)
    assert found.norms[:, 0].tolist() == [5.0, 5.0, 0.0]
    assert found.cosines[0, 1].item() == pytest.approx(0, abs=1e-12)
    assert found.cosines[0, 0].item() == pytest.approx(1)
    assert found.cosines[0, 2].item() == 0
    for how in ("weighted", "normalized", "pcgrad"):
        assert not math.isnan(combine_gradients(g, torch.ones(3), how).sum().item())
