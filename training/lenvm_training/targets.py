"""What a LenVM is regressed on: four spaces of the remaining length behind one interface, and lambda-returns.

With n tokens still to come (the end token counts; n = 0 at the end):

* ``discounted_return``: -(1 - gamma ** n), the length value (``lenvm_kernels.length_value`` owns the map);
* ``length``: n;
* ``normalised_length``: min(n / max_length, 1);
* ``log_length``: log(1 + n).

All four are monotone in n, so each has an inverse (``normalised_length`` up to ``max_length``) and a
recursion y_t = step(y_{t+1}), the Bellman equation of its own scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lenvm_kernels.length_value import bellman_step, length_from_value, value_from_length, value_from_raw

CENSORED = ("leave_out", "bound")
IGNORED = -100
"""Label of positions that are no target (transformers' own convention)."""


class TargetSpace(Protocol):
    """One scale of remaining lengths. Tensors are float, any shape; results have the shape of the argument."""

    rises: ClassVar[bool]
    """Whether targets rise with the remaining length."""

    def target(self, length: Tensor) -> Tensor:
        """The regression target of remaining lengths >= 0 (tokens)."""

    def length(self, target: Tensor) -> Tensor:
        """Remaining length (tokens) that a target or a prediction stands for: the inverse of ``target``."""

    def prediction(self, raw_value: Tensor) -> Tensor:
        """The prediction that the output of the value head's last linear layer stands for."""

    def raw_value(self, target: Tensor) -> Tensor:
        """The output of that layer which stands for a target inside the bounds: the inverse of ``prediction``."""

    def step(self, next_target: Tensor) -> Tensor:
        """The target one token earlier."""


@dataclass(frozen=True)
class DiscountedReturn:
    """-(1 - gamma ** n) in (-1, 0], predicted as -sigmoid(raw): the published form."""

    rises: ClassVar[bool] = False
    gamma: float

    def target(self, length: Tensor) -> Tensor:
        return value_from_length(length, self.gamma)

    def length(self, target: Tensor) -> Tensor:
        return length_from_value(target, self.gamma)

    def prediction(self, raw_value: Tensor) -> Tensor:
        return value_from_raw(raw_value)

    def raw_value(self, target: Tensor) -> Tensor:
        return torch.logit(-target)

    def step(self, next_target: Tensor) -> Tensor:
        return bellman_step(next_target, self.gamma)


@dataclass(frozen=True)
class RawLength:
    """n, predicted as softplus(raw)."""

    rises: ClassVar[bool] = True

    def target(self, length: Tensor) -> Tensor:
        return length

    def length(self, target: Tensor) -> Tensor:
        return target.clamp_min(0)

    def prediction(self, raw_value: Tensor) -> Tensor:
        return torch.nn.functional.softplus(raw_value)

    def raw_value(self, target: Tensor) -> Tensor:
        return target + torch.log(-torch.expm1(-target))

    def step(self, next_target: Tensor) -> Tensor:
        return next_target + 1


@dataclass(frozen=True)
class NormalisedLength:
    """min(n / max_length, 1), predicted as sigmoid(raw)."""

    rises: ClassVar[bool] = True
    max_length: int

    def target(self, length: Tensor) -> Tensor:
        return (length / self.max_length).clamp_max(1)

    def length(self, target: Tensor) -> Tensor:
        return target.clamp(0, 1) * self.max_length

    def prediction(self, raw_value: Tensor) -> Tensor:
        return torch.sigmoid(raw_value)

    def raw_value(self, target: Tensor) -> Tensor:
        return torch.logit(target)

    def step(self, next_target: Tensor) -> Tensor:
        return (next_target + 1 / self.max_length).clamp_max(1)


@dataclass(frozen=True)
class LogLength:
    """log(1 + n), predicted as softplus(raw)."""

    rises: ClassVar[bool] = True

    def target(self, length: Tensor) -> Tensor:
        return torch.log1p(length)

    def length(self, target: Tensor) -> Tensor:
        return torch.expm1(target.clamp_min(0))

    def prediction(self, raw_value: Tensor) -> Tensor:
        return torch.nn.functional.softplus(raw_value)

    def raw_value(self, target: Tensor) -> Tensor:
        return target + torch.log(-torch.expm1(-target))

    def step(self, next_target: Tensor) -> Tensor:
        return torch.log1p(torch.expm1(next_target) + 1)


@dataclass(frozen=True)
class TargetConfig:
    """Which space, with what parameters; ``lam`` < 1 mixes in the model's own estimates (lambda-returns).

    ``censored``: what completions cut by the token limit do: ``leave_out``, or ``bound``: the tokens that a state of
    one still had are the least that its remaining length can be, and a prediction of less than that is an error.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    space: str = "discounted_return"
    gamma: float = 0.997
    max_length: int = 4096
    lam: float = 1.0
    censored: str = "leave_out"

    def __post_init__(self) -> None:
        if self.censored not in CENSORED:
            raise ValueError(f"target.censored: must be one of {', '.join(CENSORED)}, got {self.censored!r}")
        if self.censored == "bound" and self.lam != 1:
            raise ValueError(
                "target.censored: bound needs target.lam 1: lambda-returns start from the end of an answer"
            )
        if self.space not in SPACES:
            raise ValueError(f"target.space: must be one of {', '.join(SPACES)}, got {self.space!r}")
        if not 0 < self.gamma < 1:
            raise ValueError(f"target.gamma: must be between 0 and 1, got {self.gamma}")
        if not 0 <= self.lam <= 1:
            raise ValueError(f"target.lam: must be from 0 to 1, got {self.lam}")
        if self.max_length < 1:
            raise ValueError(f"target.max_length: must be at least 1, got {self.max_length}")

    def build_space(self) -> TargetSpace:
        """The space that the configuration names."""
        return SPACES[self.space](self)


SPACES: dict[str, Callable[[TargetConfig], TargetSpace]] = {
    "discounted_return": lambda config: DiscountedReturn(config.gamma),
    "length": lambda config: RawLength(),
    "normalised_length": lambda config: NormalisedLength(config.max_length),
    "log_length": lambda config: LogLength(),
}


def remaining_labels(prompt_len: int, output_len: int, finished: bool) -> list[int]:
    """Remaining length of each position of prompt + completion; IGNORED where there is no state.

    States run from the prompt's last token (``output_len`` to come) to the end token (0 to come). A
    completion that was cut off is censored: its labels are the least that can be to come, and its last token,
    of which nothing is known, has none.
    """
    end = 0 if finished else IGNORED
    return [IGNORED] * (prompt_len - 1) + list(range(output_len, 0, -1)) + [end]


def censored_errors(errors: Tensor, censored: Tensor, space: TargetSpace) -> Tensor:
    """``errors`` (prediction - target) [B, T] with those of ``censored`` rows (bool [B]) kept only where the
    prediction stands for less than the least remaining length that the target stands for; 0 elsewhere.
    """
    known = errors.clamp_max(0) if space.rises else errors.clamp_min(0)
    return torch.where(censored[:, None], known, errors)


def mean_target(lengths: Sequence[int], space: TargetSpace) -> Tensor:
    """The mean target of all states of completions of the given lengths (tokens): float64 scalar."""
    counted = torch.as_tensor(lengths)
    sums = space.target(torch.arange(int(counted.max()) + 1, dtype=torch.float64)).cumsum(0)
    return sums[counted].sum() / (counted + 1).sum()


def lambda_returns(predictions: Tensor, remaining: Tensor, space: TargetSpace, lam: float) -> Tensor:
    """y_t = step((1 - lam) * prediction_{t+1} + lam * y_{t+1}), from y = target(0) at the end of each row.

    ``predictions`` float [B, T] and ``remaining`` int64 [B, T] (IGNORED outside the states, which are
    consecutive and end with 0) -> [B, T]; entries outside the states mean nothing. lam 1 is ``target``
    of the remaining length itself (Monte Carlo).
    """
    if lam == 1.0:
        return space.target(remaining.clamp_min(0).to(predictions.dtype))
    at_end = space.target(torch.zeros_like(predictions[:, 0]))  # [B]
    columns, later, later_prediction = [], at_end, at_end
    for t in range(remaining.shape[1] - 1, -1, -1):
        mixed = space.step((1 - lam) * later_prediction + lam * later)
        current = torch.where(remaining[:, t] > 0, mixed, at_end)
        columns.append(current)
        later, later_prediction = current, torch.where(remaining[:, t] > 0, predictions[:, t], at_end)
    return torch.stack(columns[::-1], dim=1)
