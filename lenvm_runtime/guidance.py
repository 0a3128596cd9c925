"""Steering of the guided rows of one step, whichever model gave the candidates' values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lenvm_kernels.candidates import Candidates
from lenvm_kernels.length_control import (
    DEFAULT_KERNEL,
    Mode,
    Strategy,
    mean_target,
    mean_value,
    needs_scoring,
    solve_mean_tilt,
    steer_candidates,
)
from lenvm_kernels.value_bound import NO_MIN_VALUE, forbid_low_values


@dataclass(frozen=True)
class GuidedRows:
    """The controls of a step's G guided rows: every tensor [G], on the device, but ``closing_tokens`` [vocab] bool.

    ``after_closing``: whether the last token closed a sentence.
    ``has_mean`` (host): whether a row asks for a mean value, whose beta has to be solved for; ``has_min_value``,
    ``has_max_mean_value`` (host): whether a row has a ``min_value``, or a ``max_mean_value`` below 0.
    """

    mode: Tensor
    strategy: Tensor
    target: Tensor
    factor: Tensor
    beta: Tensor
    entropy_threshold: Tensor
    generated: Tensor
    after_closing: Tensor
    closing_tokens: Tensor
    has_mean: bool
    min_value: Tensor
    has_min_value: bool
    max_mean_value: Tensor
    has_max_mean_value: bool

    @property
    def may_end_anywhere(self) -> Tensor:
        """Rows that EOS is a candidate of whatever its chance: those of the natural strategy. bool [G]"""
        return (self.strategy == Strategy.NATURAL) & (self.mode < Mode.TILT)

    @property
    def is_met(self) -> Tensor:
        """Rows with nothing left to ask for: the next token meets their lower bound, and no ``min_value`` holds."""
        met = (self.mode == Mode.AT_LEAST) & (self.generated + 1 >= self.target)
        return met & (self.min_value <= NO_MIN_VALUE)

    def needs_scoring(self, candidates: Candidates) -> Tensor:
        """Rows whose candidates have to be scored: bool [G]. The others are not steered."""
        needed = needs_scoring(candidates.logprobs, self.mode, self.beta, self.entropy_threshold, self.min_value)
        return needed & ~self.is_met

    def needs_steering(self, candidates: Candidates, values: Tensor) -> Tensor:
        """Rows to steer, once their candidates' ``values`` [G, C] are known: bool [G].

        The others are sampled as if they had no control.
        """
        needed = self.needs_scoring(candidates)
        if self.has_max_mean_value:
            needed &= mean_value(candidates.logprobs, values, candidates.eos_mask) <= self.max_mean_value
        return needed

    def steer(
        self, candidates: Candidates, values: Tensor, bin_logprobs: Tensor, bin_lengths: Tensor, gamma: float
    ) -> Tensor:
        """Steered log-probabilities [G, C], for the candidates' ``values`` [G, C] and ``bin_logprobs`` [G, C, M]."""
        if self.has_min_value:
            bounded = forbid_low_values(candidates.logprobs, values, candidates.eos_mask, self.min_value)
            candidates = candidates._replace(logprobs=bounded)
        return steer_candidates(
            candidates.logprobs,
            values,
            bin_logprobs,
            candidates.eos_mask,
            bin_lengths,
            self.generated,
            self.mode,
            self.strategy,
            self.target,
            self._solve_beta(candidates, values, gamma) if self.has_mean else self.beta,
            self.closing_tokens[candidates.ids],
            self.after_closing,
            gamma,
            DEFAULT_KERNEL,
        )

    def _solve_beta(self, candidates: Candidates, values: Tensor, gamma: float) -> Tensor:
        scored = (candidates.logprobs, values, candidates.eos_mask)
        wanted = mean_target(*scored, self.generated, self.mode, self.target, self.factor, gamma)
        return torch.where(self.mode >= Mode.MEAN_TARGET, solve_mean_tilt(*scored, wanted), self.beta)
