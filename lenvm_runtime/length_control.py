"""The length control of one request: its fields, their validation, their form on the wire.

The only module that the gateway shares with the engine plugin. Standard library only.

Wire form (SGLang's ``custom_params``, whose values may nest one level): ``{"lenvm": {"values": bool,
"mode": ..., ...}}``, with the fields of the control beside ``values`` when there is one. A request for the
values of its own prompt has ``{"lenvm": {"input_values": true, "candidates": [ids]}}`` (`ValueQuery`). A key that
neither class reads is refused by one of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

MODES = ("equal", "at_least", "at_most", "tilt", "scale", "target_mean")
STRATEGIES = ("natural", "hard")
SCALINGS = ("length", "value")
MAX_TARGET = 1_000_000
MAX_BETA = 10_000.0
MAX_FACTOR = 100.0
MAX_TOP_K = 128
"""Of a request under control, whose candidates are scored one by one."""
MAX_STOP_TOKENS = 16
"""Of a request under control, beside the EOS ids: each is a candidate."""
MAX_ENTROPY = 20.0
"""Nats: more than the entropy of any vocabulary."""

_PARAMETERS_OF = {
    "equal": ("target",),
    "at_least": ("target",),
    "at_most": ("target",),
    "tilt": ("beta",),
    "scale": ("factor",),
    "target_mean": ("target", "factor"),
}
_TILTS = ("tilt", "target_mean")
_FIELDS = (
    "mode",
    "target",
    "beta",
    "factor",
    "scaling",
    "strategy",
    "entropy_threshold",
    "min_value",
    "max_mean_value",
)
WITHOUT_LENVM = "lenvm:without-values"
"""What the key of a request in SGLang's prefix cache holds if a separate LenVM does not run for it."""
TOP_K_KEY = "lenvm_top_k"
"""In ``custom_params``, set by the engine's API process: the top-k of a request under control. SGLang replaces that of
a greedy one by 1."""
_WIRE_FIELD = "custom_params.lenvm"
_FIELDS_BESIDE_CONTROL = ("values", "input_values", "candidates")


class LengthControlError(ValueError):
    """An unusable length field. ``field`` is the request field's dotted name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


@dataclass(frozen=True, slots=True)
class LengthControl:
    """How long the answer should be, in completion tokens (the end-of-sequence token counts).

    * ``equal``, ``at_least``, ``at_most``: relative to ``target`` tokens;
    * ``tilt``: p'(x) ~ p(x) * exp(beta * v(x)); beta > 0 shortens, beta < 0 lengthens, 0 is no control;
    * ``scale``: ``equal`` to ``factor`` times the length predicted at the prompt boundary;
    * ``target_mean``: at every step the tilt whose mean value is a wanted one: that of ``target`` tokens in
      all, or ``factor`` times what is predicted there without control. ``scaling`` says whether the factor
      is of the remaining ``length`` (default) or of the ``value``. 1 is no control.

    ``strategy`` is ``natural`` (reweights the model's own distribution by the chance to end where
    asked) or ``hard`` (the paper's argmin/argmax over candidate values); it does not apply to the tilts.
    ``entropy_threshold`` > 0, in nats: steps whose candidates have a lower entropy are not controlled.
    ``min_value`` in (-1, 0], with every mode: candidates of a lower value, which lead to more tokens than that value
    stands for, are not chosen while one of at least that value that does not end the answer is left.
    ``max_mean_value`` in (-1, 0]: steps whose candidates' mean value is greater, nearer the end, are not controlled.
    """

    mode: str
    target: float | None = None
    beta: float | None = None
    factor: float | None = None
    scaling: str | None = None
    strategy: str = "natural"
    entropy_threshold: float = 0.0
    min_value: float | None = None
    max_mean_value: float = 0.0

    @property
    def is_neutral(self) -> bool:
        """Whether this control leaves every distribution as it is."""
        return self.min_value is None and (
            (self.mode == "tilt" and self.beta == 0) or (self.mode == "target_mean" and self.factor == 1)
        )

    @classmethod
    def parse(cls, raw: object, field: str = "length_control") -> LengthControl:
        """Validate a ``length_control`` object. Raises LengthControlError naming the field."""
        if not isinstance(raw, Mapping):
            raise LengthControlError(field, "must be an object with a 'mode'")
        for key in raw:
            if key not in _FIELDS:
                raise LengthControlError(f"{field}.{key}", f"unknown field; known: {', '.join(_FIELDS)}")
        raw = {key: value for key, value in raw.items() if value is not None}
        mode = raw.get("mode")
        if mode not in MODES:
            raise LengthControlError(f"{field}.mode", f"must be one of {', '.join(MODES)}")
        parameter = _check_parameters(raw, mode, field)
        value = raw[parameter]
        return cls(
            mode,
            target=_integer(value, f"{field}.target") if parameter == "target" else None,
            beta=_number(value, f"{field}.beta", -MAX_BETA, MAX_BETA) if parameter == "beta" else None,
            factor=_positive(value, f"{field}.factor", MAX_FACTOR) if parameter == "factor" else None,
            scaling=_scaling(raw, mode, parameter, field),
            strategy=_strategy(raw, mode, field),
            entropy_threshold=_number(
                raw.get("entropy_threshold", 0.0), f"{field}.entropy_threshold", 0.0, MAX_ENTROPY
            ),
            min_value=_bound(raw.get("min_value"), f"{field}.min_value"),
            max_mean_value=_bound(raw.get("max_mean_value"), f"{field}.max_mean_value") or 0.0,
        )

    @classmethod
    def from_request(cls, body: Mapping[str, Any]) -> LengthControl | None:
        """Read ``max_length_hint`` or ``length_control`` of a request body; None when it has neither."""
        hint, control = body.get("max_length_hint"), body.get("length_control")
        if hint is not None and control is not None:
            raise LengthControlError("max_length_hint", "give it or length_control, not both")
        if hint is not None:
            return cls("at_most", target=_integer(hint, "max_length_hint"))
        return None if control is None else cls.parse(control)

    @classmethod
    def from_custom_params(cls, custom_params: object) -> LengthControl | None:
        """Read the wire form. Raises LengthControlError on a malformed one."""
        lenvm = _read_wire_form(custom_params)
        fields = {key: value for key, value in lenvm.items() if key not in _FIELDS_BESIDE_CONTROL}
        return None if not fields or lenvm.get("input_values") else cls.parse(fields, _WIRE_FIELD)

    def at_predicted_length(self, length: float) -> LengthControl:
        """``equal`` to the target of a ``scale`` control whose answer is predicted to be so long; other modes: self."""
        if self.factor is None or self.mode != "scale":
            return self
        return replace(self, mode="equal", target=max(self.factor * length, 1.0), factor=None)

    def to_dict(self) -> dict[str, Any]:
        """The control as it is applied: only the fields of its mode."""
        parameters = {name: getattr(self, name) for name in (*_PARAMETERS_OF[self.mode], "scaling")}
        fields = {"mode": self.mode, **{name: value for name, value in parameters.items() if value is not None}}
        if self.mode not in _TILTS:
            fields["strategy"] = self.strategy
        if self.entropy_threshold:
            fields["entropy_threshold"] = self.entropy_threshold
        if self.min_value is not None:
            fields["min_value"] = self.min_value
        return {**fields, "max_mean_value": self.max_mean_value} if self.max_mean_value else fields


def check_sampling(control: LengthControl | None, params: Mapping[str, Any]) -> None:
    """Raise LengthControlError for a parameter of SGLang's that a control cannot honour."""
    if control is None or control.is_neutral:
        return
    if (params.get("top_k") or 0) > MAX_TOP_K:
        raise LengthControlError("top_k", f"must be at most {MAX_TOP_K} with a length control, or -1")
    if len(params.get("stop_token_ids") or ()) > MAX_STOP_TOKENS:
        raise LengthControlError("stop_token_ids", f"must be at most {MAX_STOP_TOKENS} with a length control")


@dataclass(frozen=True, slots=True)
class ValueQuery:
    """A request for the value at each token of its prompt, and after each of ``candidate_ids`` as next token."""

    candidate_ids: tuple[int, ...] = ()

    @classmethod
    def from_custom_params(cls, custom_params: object) -> ValueQuery | None:
        """Read the wire form; None where it asks for no input values. Raises LengthControlError on a malformed one."""
        lenvm = _read_wire_form(custom_params)
        if not lenvm.get("input_values"):
            if "candidates" in lenvm:
                raise LengthControlError(f"{_WIRE_FIELD}.candidates", "is read with 'input_values' only")
            return None
        for key in lenvm:
            if key not in _FIELDS_BESIDE_CONTROL:
                raise LengthControlError(f"{_WIRE_FIELD}.{key}", "is not read with 'input_values'")
        ids = lenvm.get("candidates", [])
        if not isinstance(ids, list) or not all(isinstance(token, int) and token >= 0 for token in ids):
            raise LengthControlError(f"{_WIRE_FIELD}.candidates", "must be a list of token ids")
        return cls(tuple(ids))

    def to_custom_params(self) -> dict[str, Any]:
        """The wire form."""
        return {"lenvm": {"input_values": True, "candidates": list(self.candidate_ids)}}


def build_custom_params(control: LengthControl | None, values: bool) -> dict[str, Any]:
    """The wire form of a request's control and of whether its chunks carry values."""
    return {"lenvm": {"values": values, **(control.to_dict() if control else {})}}


def wants_values(custom_params: object) -> bool:
    """Whether the chunks of a request in wire form carry values (true when it does not say)."""
    values: bool = _read_wire_form(custom_params).get("values", True)
    return values


def needs_lenvm(custom_params: object) -> bool:
    """Whether a request in wire form reads values, of its prompt or its answer, or is under a control that does."""
    control = LengthControl.from_custom_params(custom_params)
    guided = control is not None and not control.is_neutral
    return guided or wants_values(custom_params) or ValueQuery.from_custom_params(custom_params) is not None


def _read_wire_form(custom_params: object) -> Mapping[str, Any]:
    """The ``lenvm`` object of a request's ``custom_params``, empty without one."""
    lenvm = custom_params.get("lenvm") if isinstance(custom_params, Mapping) else None
    if lenvm is None:
        return {}
    if not isinstance(lenvm, Mapping):
        raise LengthControlError(_WIRE_FIELD, "must be an object")
    for key in ("values", "input_values"):
        if not isinstance(lenvm.get(key, False), bool):
            raise LengthControlError(f"{_WIRE_FIELD}.{key}", "must be true or false")
    return lenvm


def _check_parameters(raw: Mapping[str, Any], mode: str, field: str) -> str:
    """The one parameter of ``mode`` that is given; an error where that is none, several, or another mode's."""
    given = [name for name in ("target", "beta", "factor") if raw.get(name) is not None]
    known = _PARAMETERS_OF[mode]
    for name in given:
        if name not in known:
            raise LengthControlError(f"{field}.{name}", f"is not a parameter of mode '{mode}'")
    if not given:
        raise LengthControlError(f"{field}.{known[0]}", f"is required by mode '{mode}'{_alternatives(known)}")
    if len(given) > 1:
        raise LengthControlError(f"{field}.{given[1]}", f"give it or {given[0]}, not both")
    return given[0]


def _alternatives(parameters: tuple[str, ...]) -> str:
    return f", or {parameters[1]}" if len(parameters) > 1 else ""


def _strategy(raw: Mapping[str, Any], mode: str, field: str) -> str:
    strategy = raw.get("strategy", "natural")
    if strategy not in STRATEGIES:
        raise LengthControlError(f"{field}.strategy", f"must be one of {', '.join(STRATEGIES)}")
    if mode in _TILTS and "strategy" in raw:
        raise LengthControlError(f"{field}.strategy", f"is not a parameter of mode '{mode}'")
    return str(strategy)


def _scaling(raw: Mapping[str, Any], mode: str, parameter: str, field: str) -> str | None:
    if mode != "target_mean" or parameter != "factor":
        if "scaling" in raw:
            raise LengthControlError(f"{field}.scaling", "is a parameter of mode 'target_mean' with factor only")
        return None
    scaling = raw.get("scaling", "length")
    if scaling not in SCALINGS:
        raise LengthControlError(f"{field}.scaling", f"must be one of {', '.join(SCALINGS)}")
    return str(scaling)


def _integer(raw: object, field: str) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int) or not 1 <= raw <= MAX_TARGET:
        raise LengthControlError(field, f"must be an integer from 1 to {MAX_TARGET}")
    return raw


def _number(raw: object, field: str, low: float, high: float) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not math.isfinite(raw) or not low <= raw <= high:
        raise LengthControlError(field, f"must be a number from {low:g} to {high:g}")
    return float(raw)


def _bound(raw: object, field: str) -> float | None:
    """A value in (-1, 0]."""
    if raw is None:
        return None
    number = _number(raw, field, -1.0, 0.0)
    if number == -1:
        raise LengthControlError(field, "must be greater than -1")
    return number


def _positive(raw: object, field: str, high: float) -> float:
    number = _number(raw, field, 0.0, high)
    if number == 0:
        raise LengthControlError(field, "must be greater than 0")
    return number
