"""The length control of one request: its fields, their validation, their form on the wire.

The only module that the gateway shares with the engine plugin. Standard library only.

Wire form (SGLang's ``custom_params``, whose values may nest one level): ``{"lenvm": {"values": bool,
"mode": ..., ...}}``, with the fields of the control beside ``values`` when there is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MODES = ("equal", "at_least", "at_most", "tilt", "scale")
STRATEGIES = ("natural", "hard")
MAX_TARGET = 1_000_000
MAX_BETA = 10_000.0
MAX_FACTOR = 100.0

_PARAMETER_OF = {
    "equal": "target",
    "at_least": "target",
    "at_most": "target",
    "tilt": "beta",
    "scale": "factor",
}
_FIELDS = ("mode", "target", "beta", "factor", "strategy")


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
    * ``scale``: ``equal`` to ``factor`` times the length predicted at the prompt boundary.

    ``strategy`` is ``natural`` (reweights the model's own distribution by the chance to end where
    asked) or ``hard`` (the paper's argmin/argmax over candidate values); it does not apply to ``tilt``.
    """

    mode: str
    target: int | None = None
    beta: float | None = None
    factor: float | None = None
    strategy: str = "natural"

    @property
    def is_neutral(self) -> bool:
        """Whether this control leaves every distribution as it is."""
        return self.mode == "tilt" and self.beta == 0

    @classmethod
    def parse(cls, raw: object, field: str = "length_control") -> LengthControl:
        """Validate a ``length_control`` object. Raises LengthControlError naming the field."""
        if not isinstance(raw, Mapping):
            raise LengthControlError(field, "must be an object with a 'mode'")
        for key in raw:
            if key not in _FIELDS:
                raise LengthControlError(f"{field}.{key}", f"unknown field; known: {', '.join(_FIELDS)}")
        mode = raw.get("mode")
        if mode not in MODES:
            raise LengthControlError(f"{field}.mode", f"must be one of {', '.join(MODES)}")
        needed = _PARAMETER_OF[mode]
        for key in ("target", "beta", "factor"):
            if key == needed and raw.get(key) is None:
                raise LengthControlError(f"{field}.{key}", f"is required by mode '{mode}'")
            if key != needed and raw.get(key) is not None:
                raise LengthControlError(f"{field}.{key}", f"is not a parameter of mode '{mode}'")
        strategy = raw.get("strategy", "natural")
        if strategy not in STRATEGIES:
            raise LengthControlError(f"{field}.strategy", f"must be one of {', '.join(STRATEGIES)}")
        if mode == "tilt" and "strategy" in raw:
            raise LengthControlError(f"{field}.strategy", "is not a parameter of mode 'tilt'")
        if needed == "target":
            return cls(mode, target=_integer(raw["target"], f"{field}.target"), strategy=strategy)
        if needed == "beta":
            return cls(mode, beta=_number(raw["beta"], f"{field}.beta", -MAX_BETA, MAX_BETA))
        factor = _number(raw["factor"], f"{field}.factor", 0.0, MAX_FACTOR)
        if factor == 0:
            raise LengthControlError(f"{field}.factor", "must be greater than 0")
        return cls(mode, factor=factor, strategy=strategy)

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
        if not isinstance(custom_params, Mapping):
            return None
        lenvm = custom_params.get("lenvm")
        if not isinstance(lenvm, Mapping) or "mode" not in lenvm:
            return None
        return cls.parse({key: value for key, value in lenvm.items() if key != "values"}, "custom_params.lenvm")

    def to_dict(self) -> dict[str, Any]:
        """The control as it is applied: only the fields of its mode."""
        fields: dict[str, Any] = {"mode": self.mode, _PARAMETER_OF[self.mode]: getattr(self, _PARAMETER_OF[self.mode])}
        return fields if self.mode == "tilt" else {**fields, "strategy": self.strategy}


def build_custom_params(control: LengthControl | None, values: bool) -> dict[str, Any]:
    """The wire form of a request's control and of whether its chunks carry values."""
    return {"lenvm": {"values": values, **(control.to_dict() if control else {})}}


def wants_values(custom_params: object) -> bool:
    """Whether the chunks of a request in wire form carry values (true when it does not say)."""
    lenvm = custom_params.get("lenvm") if isinstance(custom_params, Mapping) else None
    return bool(lenvm.get("values", True)) if isinstance(lenvm, Mapping) else True


def _integer(raw: object, field: str) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int) or not 1 <= raw <= MAX_TARGET:
        raise LengthControlError(field, f"must be an integer from 1 to {MAX_TARGET}")
    return raw


def _number(raw: object, field: str, low: float, high: float) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not math.isfinite(raw) or not low <= raw <= high:
        raise LengthControlError(field, f"must be a number from {low:g} to {high:g}")
    return float(raw)
