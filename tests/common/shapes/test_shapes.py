"""The shapes world: scenes, captions, splits, edits and the verifier."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import interpolate, pad

from imgen_common.shapes.edits import sample_edit, verify_edits
from imgen_common.shapes.render import AREA, CENTROID, coverage, draw, render
from imgen_common.shapes.scene import (
    CATEGORIES,
    SHAPES,
    SIZE,
    Placed,
    Scene,
    Spec,
    Thing,
    balanced_specs,
    compose,
    parse_caption,
    sample_spec,
    specs,
    split_of,
)
from imgen_common.shapes.steps import EDIT_KINDS, MAX_DRIFT
from imgen_common.shapes.verify import accuracy, detect, verify
from scripts.miniature.world.negatives import hard_negative, turned
from scripts.miniature.world.vocabulary import MAX_TOKENS, WORDS, clip_tokenizer, qwen_tokenizer

SPLITS = ("train", "tune", "test")


@pytest.fixture(scope="module", params=[200, pytest.param(700, marks=pytest.mark.exhaustive)])
def world(request: pytest.FixtureRequest) -> tuple[list[Spec], Tensor]:
    """Captions of all three splits, so many of each, and an image of each caption."""
    rng = np.random.default_rng(0)
    chosen = [spec for split in SPLITS for spec in balanced_specs(request.param, rng, split)]
    return chosen, torch.from_numpy(draw(chosen, rng))


def test_the_verifier_reads_rendered_scenes(world: tuple[list[Spec], Tensor]) -> None:
    chosen, images = world
    scores = accuracy(verify(images, chosen), chosen)
    assert scores["all"] >= 0.995
    assert set(scores) == {"all", *CATEGORIES}
    assert min(scores.values()) >= 0.99


@pytest.mark.parametrize(("height", "width", "least"), [(33, 33, 1.0), (64, 64, 1.0), (200, 200, 1.0), (64, 72, 0.98)])
def test_the_verifier_reads_images_of_another_size(
    world: tuple[list[Spec], Tensor], height: int, width: int, least: float
) -> None:
    chosen, images = world[0][:40], world[1][:40]
    side = min(height, width)
    images = interpolate(images, (side, side), mode="bicubic").clamp(0, 1)
    images = pad(images, ((width - side) // 2, (width - side) // 2, 0, 0), value=0.5)
    rng = np.random.default_rng(1)
    assert accuracy(verify(images, chosen), chosen)["all"] >= least
    assert not any(verify(images, [hard_negative(spec, rng) for spec in chosen]))


@pytest.mark.parametrize("shape", [(1, 1), (300, 1), (7, 2000), (32, 31)])
def test_an_image_of_any_size_has_a_verdict(shape: tuple[int, int]) -> None:
    assert verify(torch.zeros(1, 3, *shape), [parse_caption("a red circle")]) == [False]


def test_the_verifier_forgives_noise(world: tuple[list[Spec], Tensor]) -> None:
    chosen, images = world
    noisy = images[:600] + 0.05 * torch.randn(600, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    assert accuracy(verify(noisy, chosen[:600]), chosen[:600])["all"] >= 0.99


def test_the_verifier_refuses_hard_negatives(world: tuple[list[Spec], Tensor]) -> None:
    chosen, images = world
    rng = np.random.default_rng(1)
    wrong = [hard_negative(spec, rng) for spec in chosen]
    assert accuracy(verify(images, wrong), wrong)["all"] <= 0.005


def test_the_verifier_sees_nothing_in_grey_and_nothing_right_in_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    grey = torch.full((1, 3, SIZE, SIZE), 0.2)
    assert detect(grey) == [[]]
    noise = torch.rand(200, 3, SIZE, SIZE, generator=generator)
    captions = balanced_specs(200, np.random.default_rng(0), "test")
    assert accuracy(verify(noise, captions), captions)["all"] == 0


def test_the_verifier_is_strict() -> None:
    rng = np.random.default_rng(3)
    red, blue = Thing("red", "circle"), Thing("blue", "square")
    both = torch.from_numpy(render(compose(Spec("binding", (red, blue)), rng)))[None]
    assert verify(both, [Spec("binding", (blue, red))])[0]
    alone = verify(both, [Spec("single", (red,))])[0]
    assert not alone
    swapped = verify(both, [Spec("binding", (Thing("blue", "circle"), Thing("red", "square")))])[0]
    assert not swapped


@pytest.mark.parametrize("shape", SHAPES)
def test_the_verifier_says_where_a_thing_is(shape: str) -> None:
    """A square's half side is 0.88 of its radius, a triangle ends 0.85 of it below its center; see `coverage`."""
    x, y, radius = 10.0, 20.0, 6.0
    placed = Placed(Thing("red", shape), x, y, radius, (0.88, 0.16, 0.16))
    ((found,),) = detect(torch.from_numpy(render(Scene(0.1, (placed,))))[None])
    side, bottom = {"square": (5.28, 5.28), "triangle": (5.55, 5.1)}.get(shape, (6.0, 6.0))
    top = 5.28 if shape == "square" else 6.0
    # pixels are of width 1 around whole numbers
    edges = (x - side, y - top, x + side + 1, y + bottom + 1)
    assert found.box == pytest.approx(edges, abs=1.5)


def test_the_verifier_reads_batches_of_color_images() -> None:
    for shape in [(3, 32, 32), (1, 1, 32, 32), (1, 4, 64, 64)]:
        with pytest.raises(ValueError, match=r"\(n, 3, h, w\)"):
            detect(torch.zeros(shape))


def test_captions_are_inverted() -> None:
    everything = [s for c in CATEGORIES for split in SPLITS for s in specs(c, split)]
    assert [parse_caption(s.caption) for s in everything] == everything
    assert len({s.caption for s in everything}) == len(everything)
    with pytest.raises(KeyError):
        parse_caption("a red dog")


def test_splits_share_neither_caption_nor_scene() -> None:
    for a, b in itertools.combinations(SPLITS, 2):
        for of in (lambda s: s.caption, lambda s: tuple(sorted(s.things))):
            first, second = ({of(s) for c in CATEGORIES for s in specs(c, split)} for split in (a, b))
            assert first.isdisjoint(second)
    for category in CATEGORIES:
        sizes = [len(specs(category, split)) for split in SPLITS]
        assert min(sizes) >= 3
        assert 0.6 <= sizes[0] / sum(sizes) <= 0.8


def test_balanced_captions_repeat_only_when_all_were_used() -> None:
    chosen = balanced_specs(240, np.random.default_rng(0), "test")
    counts = {c: [s for s in chosen if s.category == c] for c in CATEGORIES}
    assert all(len(found) == 40 for found in counts.values())
    for category, found in counts.items():
        fresh = found[: len(specs(category, "test"))]
        assert len(set(fresh)) == len(fresh)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from(CATEGORIES), st.sampled_from(SPLITS))
def test_a_hard_negative_is_another_caption(seed: int, category: str, split: str) -> None:
    rng = np.random.default_rng(seed)
    spec = sample_spec(rng, split, category)
    negative = hard_negative(spec, rng)
    assert negative.caption != spec.caption
    assert parse_caption(negative.caption) == negative


def test_edits_are_exact_and_stay_in_their_split() -> None:
    rng = np.random.default_rng(5)
    chosen = [sample_edit(rng, split, kind) for split in SPLITS for kind in EDIT_KINDS for _ in range(20)]
    before, after = (
        torch.from_numpy(np.stack([render(getattr(e, side)) for e in chosen])) for side in ("before", "after")
    )
    assert sum(verify_edits(after, chosen)) / len(chosen) >= 0.99
    assert not any(verify_edits(before, chosen))
    for i, edit in enumerate(chosen):
        assert split_of(tuple(sorted(edit.after.things))) == SPLITS[i // (20 * len(EDIT_KINDS))]
        assert len(edit.instruction.split()) < MAX_TOKENS


def test_an_edit_must_leave_the_rest_in_place() -> None:
    rng = np.random.default_rng(6)
    edit = sample_edit(rng, "train", "recolour")
    moved = torch.from_numpy(render(edit.after))[None].roll(int(MAX_DRIFT) + 2, dims=3)
    assert not verify_edits(moved, [edit])[0]


def test_templates_know_their_area_and_centre() -> None:
    for shape in AREA:
        mask = coverage(shape, 15.5, 15.5, 10.0)
        assert mask.sum() == pytest.approx(AREA[shape] * 100, rel=0.02)
        rows = np.arange(SIZE)
        assert (mask.sum(1) * rows).sum() / mask.sum() - 15.5 == pytest.approx(CENTROID[shape] * 10, abs=0.1)


def test_every_word_is_one_token() -> None:
    qwen, clip = qwen_tokenizer(), clip_tokenizer()
    for word in WORDS:
        assert len(qwen(" " + word).input_ids) == 1
        assert len(clip(word).input_ids) == 3
    text = qwen.apply_chat_template([{"role": "user", "content": "a red circle"}], tokenize=False)
    assert qwen.convert_ids_to_tokens(qwen(text).input_ids) == ["Ġa", "Ġred", "Ġcircle", "<|im_end|>"]
    assert clip.decode(clip("odd wörds").input_ids, skip_special_tokens=True) == "odd wörds"


def test_places_are_distinguished_by_a_negative_of_their_own() -> None:
    from scripts.miniature.world.rewards import HELDOUT, sample_batch

    specs, negatives, images = sample_batch(HELDOUT, 3)
    assert len(specs) == len(images) == HELDOUT.schedule.batch
    placed = [i for i, spec in enumerate(specs) if spec.place]
    assert len(placed) >= HELDOUT.places * len(specs)
    for i in placed:
        assert negatives[i * HELDOUT.negatives] == turned(specs[i])
        assert turned(turned(specs[i])) == specs[i]
