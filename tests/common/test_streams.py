import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from imgen_common.streams import normal, numpy_generator, stream_key, torch_generator

NAMES = st.tuples(st.integers(0, 2**63 - 1), st.text(max_size=8), st.lists(st.integers(-(2**63), 2**63), max_size=3))


@given(NAMES, NAMES)
def test_streams_are_equal_exactly_when_their_names_are(one: tuple, other: tuple) -> None:
    same = stream_key(one[0], one[1], *one[2]) == stream_key(other[0], other[1], *other[2])
    assert same == (one == other)


def test_goldens_hold_on_every_machine() -> None:
    assert stream_key(0, "noise") == 161181303790785572062708837863714492137
    assert numpy_generator(7, "plan", 3, 1).integers(0, 1000, 4).tolist() == [575, 176, 141, 165]
    assert torch.randint(1000, (4,), generator=torch_generator(7, "plan", 3, 1)).tolist() == [994, 699, 459, 190]
    assert normal((3,), 7, "noise", 2).tolist() == pytest.approx([-0.48294, -0.1144035, 0.4600619], abs=1e-6)


def test_a_stream_does_not_depend_on_the_draws_before_it() -> None:
    late = normal((5,), 1, "noise", 9)
    numpy_generator(1, "noise", 8).standard_normal(100)
    torch.rand(10)
    assert torch.equal(late, normal((5,), 1, "noise", 9))
    assert torch.equal(
        torch.rand(5, generator=torch_generator(1, "dropout", 4)),
        torch.rand(5, generator=torch_generator(1, "dropout", 4)),
    )


def test_neighbouring_streams_are_uncorrelated_and_standard() -> None:
    rows = torch.stack([normal((4000,), 0, purpose, step) for purpose in ("a", "b") for step in range(4)])
    correlation = np.corrcoef(rows.numpy()) - np.eye(8)
    assert np.abs(correlation).max() < 0.07
    assert abs(float(rows.mean())) < 0.03
    assert abs(float(rows.std()) - 1) < 0.02


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_dtype_only_rounds(dtype: torch.dtype) -> None:
    exact = normal((2, 3), 5, "noise", dtype=torch.float64)
    rounded = normal((2, 3), 5, "noise", dtype=dtype)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, exact.to(dtype))


def test_shapes_down_to_a_scalar() -> None:
    assert normal((), 0, "noise").shape == ()
    assert normal((0, 3), 0, "noise").shape == (0, 3)
