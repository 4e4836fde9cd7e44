"""Methods as configuration: presets, overrides, contradictions, unknown names."""

import pytest
from pydantic import ValidationError

from flowbp.axes import Bridge, Every, LateBiased, Leap, Stratified
from flowbp.methods import METHODS, Method, get
from imgen_common.config import Config, fields_table, load, to_yaml
from imgen_common.errors import UserError


class Recipe(Config):
    """What a trainer's configuration holds."""

    method: Method = get("flowbp_sparse")
    """The method."""


def recipe(tmp_path, text: str, *sets: str) -> Method:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load(Recipe, [path], sets).method


@pytest.mark.parametrize("name", METHODS)
def test_a_preset_is_the_method(tmp_path, name):
    assert recipe(tmp_path, f"method: {name}\n") == get(name)
    assert recipe(tmp_path, f"method: {{preset: {name}}}\n") == get(name)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_survives_yaml(tmp_path, name):
    assert recipe(tmp_path, to_yaml(Recipe(method=get(name)))) == get(name)
    assert Method.model_validate(get(name).model_dump(mode="json")) == get(name)


def test_overrides_merge_over_the_preset(tmp_path):
    method = recipe(tmp_path, "method: {preset: flowbp_bridge, coupling: {alpha: 0.5}, active: {num_steps: 4}}\n")
    assert method.coupling == Bridge(alpha=0.5)
    assert method.active == get("flowbp_bridge").active.model_copy(update={"num_steps": 4})


def test_set_reaches_into_the_default_method():
    assert load(Recipe, [], ["method.active.num_steps=7"]).method.active == LateBiased(num_steps=7, bias=2.0)


def test_set_reaches_into_the_preset(tmp_path):
    method = recipe(tmp_path, "method: flowbp_bridge\n", "method.coupling.alpha=0.3", "method.weights.refill=inclusion")
    assert method.coupling == Bridge(alpha=0.3)
    assert method.weights.refill == "inclusion"


def test_another_kind_replaces_its_subtree(tmp_path):
    method = recipe(tmp_path, "method: flowbp_bridge\n", "method.coupling.kind=every", "method.active.kind=stratified")
    assert method.coupling == Every(alpha=1.0)
    assert method.active == Stratified()


def test_null_removes_a_coupling(tmp_path):
    assert recipe(tmp_path, "method: leapalign\n", "method.coupling=null").coupling is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: flowbp_brige\n", "did you mean 'flowbp_bridge'"),
        ("method: {preset: flowbp_bridge, coupling: {alpha: 1.5}}\n", "method.coupling.alpha"),
        ("method: {preset: flowbp_bridge, coupling: {alfa: 0.5}}\n", "did you mean 'alpha'"),
        ("method: {preset: flowbp_sparse, coupling: {kind: brige}}\n", "did you mean 'bridge'"),
        ("method: {preset: flowbp_sparse, coupling: {kind: bridge}}\n", "give active.split"),
        ("method: {preset: flowbp_sparse, gap_floor: 0.1}\n", "Euler weights have no legs"),
        ("method: {preset: flowbp_sparse, reward_input: {kind: posterior_mean}}\n", "reward_input.kind sample"),
        ("method: {preset: refl, gap_floor: 0.1}\n", "posterior mean"),
        ("method: {preset: leapalign, active: {kind: first_supports}}\n", "weights.kind lagrange"),
        ("method: {preset: draft_k, weights: {refill: inclusion}}\n", "stratified"),
        (
            "method: {preset: flowbp_bridge, active: {split: {kind: dirichlet}}, weights: {refill: inclusion}}\n",
            "midpoint",
        ),
        ("method: {preset: flowbp_lagrange, weights: {refill: inclusion}}\n", "mass"),
        ("method: {preset: flowbp_bridge, active: {num_steps: 1}}\n", "num_steps >= 2"),
        ("method: {preset: flowbp_lagrange, weights: {order: 13}}\n", "order"),
        ("method: {preset: flowbp_sparse, tail: 0}\n", "method.tail"),
        ("method: {preset: flowbp_sparse, weights: {gamma: .nan}}\n", "gamma"),
    ],
)
def test_mistakes_are_answered(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        recipe(tmp_path, text)


def test_a_method_without_active_set_points_to_presets():
    with pytest.raises(ValidationError, match=r"preset: NAME .*flowbp_sparse"):
        Method.model_validate({"name": "flowbp_sparse"})


def test_get_lists_the_names():
    with pytest.raises(UserError, match=r"unknown method 'leapaline'; did you mean 'leapalign'\?; allowed: refl, "):
        get("leapaline")


def test_methods_are_frozen():
    with pytest.raises(ValidationError):
        get("leapalign").weights = Leap()


def test_names_agree():
    assert all(method.name == name for name, method in METHODS.items())
    assert dict(Method.presets()) == dict(METHODS)


def test_every_key_is_documented():
    rows = fields_table(Recipe)
    assert len(rows) > 25
    assert [row.path for row in rows if not row.doc and not row.path.endswith("kind")] == []
