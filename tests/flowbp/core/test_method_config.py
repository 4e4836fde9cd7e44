"""Methods as configuration: presets, overrides, contradictions, unknown names."""

from typing import Annotated

import pytest
from pydantic import ValidationError

from flowbp.core.axes.active import LateBiased, Stratified
from flowbp.core.axes.coupling import Bridge, Every
from flowbp.core.axes.quadrature import Leap
from flowbp.methods import METHODS, Method, get_method
from imgen_common.config import Config, Presets, fields_table, load, to_yaml
from imgen_common.errors import UserError


class Recipe(Config):
    """What a trainer's configuration holds."""

    method: Annotated[Method, Presets(METHODS)] = get_method("flowbp_sparse")
    """The method."""


def recipe(tmp_path, text: str, *sets: str) -> Method:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load(Recipe, [path], sets).method


@pytest.mark.parametrize("name", METHODS)
def test_a_preset_is_the_method(tmp_path, name):
    assert recipe(tmp_path, f"method: {name}\n") == get_method(name)
    assert recipe(tmp_path, f"method: {{preset: {name}}}\n") == get_method(name)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_survives_yaml(tmp_path, name):
    assert recipe(tmp_path, to_yaml(Recipe(method=get_method(name)))) == get_method(name)
    assert Method.model_validate(get_method(name).model_dump(mode="json")) == get_method(name)


def test_overrides_merge_over_the_preset(tmp_path):
    method = recipe(
        tmp_path, "method: {preset: flowbp_bridge, coupling: {alpha: 0.5}, active: {num_active_steps: 4}}\n"
    )
    assert method.coupling == Bridge(alpha=0.5)
    assert method.active == get_method("flowbp_bridge").active.model_copy(update={"num_active_steps": 4})


def test_set_reaches_into_the_default_method():
    assert load(Recipe, [], ["method.active.num_active_steps=7"]).method.active == LateBiased(
        num_active_steps=7, bias=2.0
    )


def test_set_reaches_into_the_preset(tmp_path):
    method = recipe(
        tmp_path, "method: flowbp_bridge\n", "method.coupling.alpha=0.3", "method.quadrature.refill=inclusion"
    )
    assert method.coupling == Bridge(alpha=0.3)
    assert method.quadrature.refill == "inclusion"


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
        ("method: {preset: leapalign, active: {kind: first_supports}}\n", "quadrature.kind lagrange"),
        ("method: {preset: draft_k, quadrature: {refill: inclusion}}\n", "stratified"),
        (
            "method: {preset: flowbp_bridge, active: {split: {kind: dirichlet}}, quadrature: {refill: inclusion}}\n",
            "midpoint",
        ),
        ("method: {preset: flowbp_lagrange, quadrature: {refill: inclusion}}\n", "mass"),
        ("method: {preset: flowbp_bridge, active: {num_active_steps: 1}}\n", "num_active_steps >= 2"),
        ("method: {preset: flowbp_lagrange, quadrature: {order: 13}}\n", "order"),
        ("method: {preset: flowbp_sparse, tail: 0}\n", "method.tail"),
        ("method: {preset: flowbp_sparse, quadrature: {gamma: .nan}}\n", "gamma"),
    ],
)
def test_mistakes_are_answered(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        recipe(tmp_path, text)


def test_a_method_without_active_set_points_to_presets():
    with pytest.raises(ValidationError, match=r"preset: flowbp_sparse \(`flowbp methods`"):
        Method.model_validate({"name": "flowbp_sparse"})


def test_get_lists_the_names():
    with pytest.raises(UserError, match=r"unknown method 'leapaline'; did you mean 'leapalign'\?; allowed: ") as caught:
        get_method("leapaline")
    assert str(caught.value).endswith(", ".join(METHODS))


def test_methods_are_frozen():
    with pytest.raises(ValidationError):
        get_method("leapalign").quadrature = Leap()


def test_names_agree():
    assert all(method.name == name for name, method in METHODS.items())


def test_every_key_is_documented():
    rows = fields_table(Recipe)
    assert len(rows) > 25
    assert [row.path for row in rows if not row.doc and not row.path.endswith("kind")] == []
