"""Validation of a request's length fields and their wire form."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lenvm_runtime.length_control import (
    LengthControl,
    LengthControlError,
    ValueQuery,
    build_custom_params,
    check_sampling,
    wants_values,
)

CONTROLS = st.one_of(
    st.builds(
        LengthControl,
        st.sampled_from(["equal", "at_least", "at_most"]),
        target=st.integers(1, 10_000),
        strategy=st.sampled_from(["natural", "hard"]),
    ),
    st.builds(LengthControl, st.just("tilt"), beta=st.floats(-1000, 1000), entropy_threshold=st.floats(0, 20)),
    st.builds(LengthControl, st.just("scale"), factor=st.floats(0.01, 100), min_value=st.floats(-0.999, 0)),
    st.builds(
        LengthControl, st.just("target_mean"), target=st.integers(1, 10_000), max_mean_value=st.floats(-0.999, 0)
    ),
    st.builds(
        LengthControl,
        st.just("target_mean"),
        factor=st.floats(0.01, 100),
        scaling=st.sampled_from(["length", "value"]),
        entropy_threshold=st.floats(0, 20),
    ),
)


@given(control=CONTROLS, values=st.booleans())
def test_the_wire_form_round_trips(control: LengthControl, values: bool) -> None:
    wire = build_custom_params(control, values)
    assert LengthControl.from_custom_params(wire) == control
    assert wants_values(wire) is values
    assert all(isinstance(value, str | int | float | bool) for value in wire["lenvm"].values())  # SGLang nests once


def test_a_request_without_control_has_none_on_the_wire() -> None:
    wire = build_custom_params(None, values=True)
    assert wire == {"lenvm": {"values": True}}
    assert LengthControl.from_custom_params(wire) is None
    assert LengthControl.from_custom_params(None) is None


@pytest.mark.parametrize(
    ("lenvm", "field"),
    [
        ({"target": 40}, "mode"),
        ({"values": False, "strategy": "hard"}, "mode"),
        ({"mod": "equal", "target": 40}, "mod"),
        ({"mode": "equal", "target": 40, "input_values": True}, "mode"),
        ({"candidates": [3]}, "candidates"),
        ({"input_values": False, "candidates": [3]}, "candidates"),
        ({"input_values": True, "candidate": [3]}, "candidate"),
        ({"input_values": "yes"}, "input_values"),
        ({"values": "no"}, "values"),
        ([], None),
    ],
)
def test_a_key_on_the_wire_that_nothing_reads_is_named(lenvm: Any, field: str | None) -> None:
    wire = {"lenvm": lenvm}
    with pytest.raises(LengthControlError) as caught:
        _ = LengthControl.from_custom_params(wire), ValueQuery.from_custom_params(wire)
    assert caught.value.field == f"custom_params.lenvm.{field}" if field else "custom_params.lenvm"


@pytest.mark.parametrize("lenvm", [None, {}, {"values": False}, {"input_values": False}])
def test_a_request_that_asks_for_nothing_may_say_so(lenvm: Any) -> None:
    wire = {"lenvm": lenvm}
    assert LengthControl.from_custom_params(wire) is None is ValueQuery.from_custom_params(wire)


def test_max_length_hint_is_short_for_at_most() -> None:
    assert LengthControl.from_request({"max_length_hint": 200}) == LengthControl("at_most", target=200)
    assert LengthControl.from_request({}) is None


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"max_length_hint": 0}, "max_length_hint"),
        ({"max_length_hint": True}, "max_length_hint"),
        ({"max_length_hint": 1.5}, "max_length_hint"),
        ({"max_length_hint": 9, "length_control": {}}, "max_length_hint"),
        ({"length_control": []}, "length_control"),
        ({"length_control": {}}, "length_control.mode"),
        ({"length_control": {"mode": "at_most"}}, "length_control.target"),
        ({"length_control": {"mode": "at_most", "target": 0}}, "length_control.target"),
        ({"length_control": {"mode": "at_most", "target": 5, "beta": 1}}, "length_control.beta"),
        ({"length_control": {"mode": "tilt", "beta": float("nan")}}, "length_control.beta"),
        ({"length_control": {"mode": "tilt", "beta": 1, "strategy": "hard"}}, "length_control.strategy"),
        ({"length_control": {"mode": "scale", "factor": 0}}, "length_control.factor"),
        ({"length_control": {"mode": "equal", "target": 5, "strategy": "soft"}}, "length_control.strategy"),
        ({"length_control": {"mode": "equal", "target": 5, "x": 1}}, "length_control.x"),
        ({"length_control": {"mode": "target_mean"}}, "length_control.target"),
        ({"length_control": {"mode": "target_mean", "target": 5, "factor": 2}}, "length_control.factor"),
        ({"length_control": {"mode": "target_mean", "beta": 2}}, "length_control.beta"),
        ({"length_control": {"mode": "target_mean", "factor": 0}}, "length_control.factor"),
        ({"length_control": {"mode": "target_mean", "factor": 2, "scaling": "log"}}, "length_control.scaling"),
        ({"length_control": {"mode": "target_mean", "target": 2, "scaling": "value"}}, "length_control.scaling"),
        ({"length_control": {"mode": "scale", "factor": 2, "scaling": "value"}}, "length_control.scaling"),
        ({"length_control": {"mode": "target_mean", "target": 5, "strategy": "hard"}}, "length_control.strategy"),
        (
            {"length_control": {"mode": "equal", "target": 5, "entropy_threshold": -1}},
            "length_control.entropy_threshold",
        ),
        ({"length_control": {"mode": "equal", "target": 5, "min_value": -1}}, "length_control.min_value"),
        ({"length_control": {"mode": "equal", "target": 5, "min_value": 0.5}}, "length_control.min_value"),
        ({"length_control": {"mode": "equal", "target": 5, "min_value": "low"}}, "length_control.min_value"),
        ({"length_control": {"min_value": -0.5}}, "length_control.mode"),
        ({"length_control": {"mode": "tilt", "beta": 1, "max_mean_value": -1}}, "length_control.max_mean_value"),
        ({"length_control": {"mode": "tilt", "beta": 1, "max_mean_value": 0.5}}, "length_control.max_mean_value"),
        ({"length_control": {"mode": "tilt", "beta": 1, "max_mean_value": True}}, "length_control.max_mean_value"),
    ],
)
def test_unusable_fields_are_named(body: dict[str, Any], field: str) -> None:
    with pytest.raises(LengthControlError) as caught:
        LengthControl.from_request(body)
    assert caught.value.field == field


def test_a_factor_of_the_mean_is_of_the_length_unless_told_otherwise() -> None:
    control = LengthControl.parse({"mode": "target_mean", "factor": 2})
    assert control == LengthControl("target_mean", factor=2.0, scaling="length")
    assert control.to_dict() == {"mode": "target_mean", "factor": 2.0, "scaling": "length"}


def test_beta_zero_and_an_unchanged_mean_are_neutral() -> None:
    assert LengthControl("tilt", beta=0.0).is_neutral
    assert LengthControl("target_mean", factor=1.0, scaling="value").is_neutral
    assert not LengthControl("target_mean", target=1).is_neutral
    assert not LengthControl("tilt", beta=0.1).is_neutral
    assert not LengthControl("tilt", beta=0.0, min_value=-0.5).is_neutral
    assert not LengthControl("at_most", target=1).is_neutral
    assert LengthControl("tilt", beta=0.0, max_mean_value=-0.5).is_neutral


def test_a_gate_that_every_step_passes_is_no_gate() -> None:
    control = LengthControl.parse({"mode": "tilt", "beta": 1, "max_mean_value": 0})
    assert (
        control == LengthControl("tilt", beta=1.0) == LengthControl.parse({**control.to_dict(), "max_mean_value": None})
    )
    assert "max_mean_value" not in control.to_dict()


@pytest.mark.parametrize(
    ("params", "field"), [({"top_k": 129}, "top_k"), ({"stop_token_ids": [*range(17)]}, "stop_token_ids")]
)
def test_what_a_control_cannot_honour_is_named(params: dict[str, Any], field: str) -> None:
    with pytest.raises(LengthControlError) as caught:
        check_sampling(LengthControl("tilt", beta=1.0), params)
    assert caught.value.field == field
    check_sampling(LengthControl("tilt", beta=0.0), params)
    check_sampling(None, params)


@pytest.mark.parametrize("params", [{}, {"top_k": None}, {"top_k": -1}, {"top_k": 128, "stop_token_ids": [*range(16)]}])
def test_other_parameters_go_with_a_control(params: dict[str, Any]) -> None:
    check_sampling(LengthControl("tilt", beta=1.0), params)
