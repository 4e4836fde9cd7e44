"""Classifier-free guidance: values, gradients, batches, conditioning helpers."""

import pytest
import torch
from fields import noise
from torch import Tensor, nn

from flowbp.core.guidance import guided_velocity, rescale_norm
from flowbp.core.settings import Guidance
from flowbp.core.types import batch_size, concat, repeat_batch
from imgen_common.errors import UserError

COND = {"text": noise(2, 3, seed=1)}
NEGATIVE = {"text": noise(2, 3, seed=2)}
X, SIGMA = noise(2, 3, seed=3), torch.full((2,), 0.5, dtype=torch.float64)


class Field(nn.Module):
    """v = tanh(W x + U text); counts its evaluations."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(noise(3, 3, seed=4))
        self.u = nn.Parameter(noise(3, 3, seed=5))
        self.batches: list[int] = []

    def forward(self, x: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
        assert len(x) == len(sigma) == len(cond["text"])
        self.batches.append(len(x))
        return torch.tanh(x @ self.w + cond["text"] @ self.u)


@pytest.fixture
def field():
    return Field()


def grads(field: Field, v: Tensor) -> tuple[Tensor, ...]:
    field.zero_grad()
    return torch.autograd.grad((v * noise(*v.shape, seed=9)).sum(), [field.w, field.u])


def test_scale_one_is_a_single_forward(field):
    v = guided_velocity(field, COND, NEGATIVE)(X, SIGMA)
    assert field.batches == [2]
    torch.testing.assert_close(v, field(X, SIGMA, COND))


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_the_value_is_the_guided_velocity(field, detach, batched):
    velocity = guided_velocity(field, COND, NEGATIVE, Guidance(scale=4.0, detach_negative=detach, batched=batched))
    want = field(X, SIGMA, NEGATIVE) + 4 * (field(X, SIGMA, COND) - field(X, SIGMA, NEGATIVE))
    torch.testing.assert_close(velocity(X, SIGMA), want)
    with torch.no_grad():
        torch.testing.assert_close(velocity(X, SIGMA), want)


def test_which_forwards_are_batched(field):
    def batches(guidance: Guidance, grad: bool) -> list[int]:
        field.batches.clear()
        with torch.set_grad_enabled(grad):
            guided_velocity(field, COND, NEGATIVE, guidance)(X, SIGMA)
        return list(field.batches)

    detached, both = Guidance(scale=4.0), Guidance(scale=4.0, detach_negative=False)
    assert batches(detached, grad=False) == batches(both, grad=False) == batches(both, grad=True) == [4]
    assert batches(detached, grad=True) == [2, 2]
    separate = both.model_copy(update={"batched": False})
    assert batches(separate, grad=False) == batches(separate, grad=True) == [2, 2]


def test_a_detached_negative_gives_the_scaled_gradient_of_the_positive(field):
    got = grads(field, guided_velocity(field, COND, NEGATIVE, Guidance(scale=4.0))(X, SIGMA))
    positive = grads(field, field(X, SIGMA, COND))
    for a, b in zip(got, positive, strict=True):
        torch.testing.assert_close(a, 4 * b)


def test_both_branches_carry_gradient_otherwise(field):
    x = X.clone().requires_grad_()
    velocity = guided_velocity(field, COND, NEGATIVE, Guidance(scale=4.0, detach_negative=False))
    want = 4 * field(x, SIGMA, COND) - 3 * field(x, SIGMA, NEGATIVE)
    cotangent = noise(2, 3, seed=9)
    for got, exact in zip(
        torch.autograd.grad((velocity(x, SIGMA) * cotangent).sum(), [field.w, field.u, x]),
        torch.autograd.grad((want * cotangent).sum(), [field.w, field.u, x]),
        strict=True,
    ):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_gradient_alone_is_the_same_without_a_negative_that_has_none(field, detach, scale):
    x, cotangent = X.clone().requires_grad_(), noise(2, 3, seed=9)
    guidance, gradients, batches = Guidance(scale=scale, detach_negative=detach), [], []
    for gradient_only in (False, True):
        field.batches.clear()
        v = guided_velocity(field, COND, NEGATIVE, guidance, gradient_only=gradient_only)(x, SIGMA)
        batches.append(sum(field.batches))
        gradients.append(torch.autograd.grad(v, [field.w, field.u, x], cotangent))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert batches[1] == (2 if detach or scale == 1 else 4)
    assert batches[0] == (2 if scale == 1 else 4)


def test_a_rescaled_velocity_has_the_norm_of_the_conditional_one(field):
    guided, conditional = guided_velocity(field, COND, NEGATIVE, Guidance(scale=4.0))(X, SIGMA), field(X, SIGMA, COND)
    v = guided_velocity(field, COND, NEGATIVE, Guidance(scale=4.0, rescale="norm"))(X, SIGMA)
    torch.testing.assert_close(v, guided * (conditional.norm(dim=1) / guided.norm(dim=1))[:, None])
    assert not torch.allclose(v, guided)


def test_the_channels_of_each_position_are_rescaled():
    guided, conditional = noise(2, 3, 4, 5, seed=1), noise(2, 3, 4, 5, seed=2)
    v = rescale_norm(guided, conditional)
    for b, row, column in ((0, 0, 0), (1, 2, 3)):
        one, other = v[b, :, row, column], guided[b, :, row, column]
        torch.testing.assert_close(one.norm(), conditional[b, :, row, column].norm())
        torch.testing.assert_close(one / one.norm(), other / other.norm())


@pytest.mark.parametrize("detach", [True, False])
def test_the_gradient_of_a_rescaled_velocity_is_its_slope(field, detach):
    """By finite differences; a detached negative keeps its value, on which both depend."""
    guidance = Guidance(scale=4.0, detach_negative=detach, rescale="norm", batched=False)
    constant, cotangent = field(X, SIGMA, NEGATIVE).detach(), noise(2, 3, seed=9)
    parameters = {"w": noise(3, 3, seed=4), "u": noise(3, 3, seed=5), "x": X}
    directions = {name: noise(*value.shape, seed=i) for i, (name, value) in enumerate(parameters.items(), 10)}

    def loss(step: float, name: str) -> Tensor:
        given = parameters | {name: parameters[name] + step * directions[name]}

        def velocity(x: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
            if detach and cond["text"] is NEGATIVE["text"]:
                return constant
            return torch.tanh(x @ given["w"] + cond["text"] @ given["u"])

        return (guided_velocity(velocity, COND, NEGATIVE, guidance)(given["x"], SIGMA) * cotangent).sum()

    x = X.clone().requires_grad_()
    v = guided_velocity(field, COND, NEGATIVE, guidance)(x, SIGMA)
    for name, gradient in zip("wux", torch.autograd.grad((v * cotangent).sum(), [field.w, field.u, x]), strict=True):
        slope = (loss(1e-5, name) - loss(-1e-5, name)) / 2e-5
        assert slope.item() == pytest.approx((gradient * directions[name]).sum().item(), rel=1e-8)


def test_the_setting_comes_before_what_the_pipeline_does(field):
    plain, norm = (
        guided_velocity(field, COND, NEGATIVE, Guidance(scale=4.0, rescale=one))(X, SIGMA) for one in ("none", "norm")
    )
    for setting, default, expected in ((None, "none", plain), (None, "norm", norm), ("none", "norm", plain)):
        v = guided_velocity(field, COND, NEGATIVE, Guidance(scale=4.0, rescale=setting), default)(X, SIGMA)
        assert torch.equal(v, expected)


def test_copies_repeat_the_conditioning(field):
    velocity = guided_velocity(field, COND, NEGATIVE, Guidance(scale=2.0))
    other = noise(2, 3, seed=7)
    v = velocity(torch.cat([X, other]), torch.cat([SIGMA, SIGMA]))
    torch.testing.assert_close(v, torch.cat([velocity(X, SIGMA), velocity(other, SIGMA)]))
    with pytest.raises(ValueError, match="3 latents are no whole number of copies of 2"):
        velocity(noise(3, 3), SIGMA)


def test_one_negative_serves_all(field):
    one = {"text": NEGATIVE["text"][:1]}
    v = guided_velocity(field, COND, one, Guidance(scale=2.0))(X, SIGMA)
    torch.testing.assert_close(v, guided_velocity(field, COND, repeat_batch(one, 2), Guidance(scale=2.0))(X, SIGMA))


def test_compensation_divides_by_the_scale():
    assert Guidance(scale=4.0, compensate=True).backward_scale == 0.25
    assert Guidance(scale=4.0).backward_scale == 1.0


def test_bad_guidance_is_refused(field):
    with pytest.raises(UserError, match="needs a negative prompt"):
        guided_velocity(field, COND, None, Guidance(scale=3.0))
    with pytest.raises(ValueError, match="3 negative prompts for 2 samples"):
        guided_velocity(field, COND, {"text": noise(3, 3)}, Guidance(scale=3.0))
    with pytest.raises(ValueError):
        Guidance(scale=0.0)


def test_conditioning_helpers():
    tiled = repeat_batch({"a": torch.arange(4).reshape(2, 2)}, 2)
    assert tiled["a"].tolist() == [[0, 1], [2, 3], [0, 1], [2, 3]]
    assert batch_size(concat(tiled, tiled)) == 8
    with pytest.raises(ValueError, match=r"pad both .*batched"):
        concat({"a": torch.zeros(2, 3)}, {"a": torch.zeros(2, 4)})
    with pytest.raises(ValueError, match="differ in keys"):
        concat({"a": torch.zeros(2)}, {"b": torch.zeros(2)})
    with pytest.raises(ValueError, match="one batch size"):
        batch_size({"a": torch.zeros(2), "b": torch.zeros(3)})
