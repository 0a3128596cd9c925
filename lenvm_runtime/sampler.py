"""SGLang's sampler with one step before it: the logits of rows under length control are steered."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.sampler import Sampler
from torch import Tensor

from lenvm_runtime.steering import Step


class LenVMSampler(Sampler):
    """Stock sampling on every row; rows without control reach it with their logits untouched."""

    def forward(
        self,
        logits_output: Any,
        sampling_info: Any,
        return_logprob: bool,
        top_logprobs_nums: list[int],
        token_ids_logprobs: list[list[int]],
        positions: Tensor,
    ) -> Any:
        """Steer, then sample as SGLang does. ``positions`` [rows]: index of each row's last token."""
        step: Step | None = getattr(sampling_info, "lenvm_step", None)
        if step is not None:
            sampling_info.lenvm_step = None  # it holds the batch, which holds this
            sampling_info = step.steer(logits_output, sampling_info, positions)
        return super().forward(
            logits_output, sampling_info, return_logprob, top_logprobs_nums, token_ids_logprobs, positions
        )


class InverseCdfSampler(LenVMSampler):
    """Draws unfiltered samples by inverting the cumulative distribution: one uniform number a row.

    The same distribution as the stock sampler's, not the same tokens for a seed. On a CPU the stock one
    draws an exponential number for every token of the vocabulary, in one thread.
    """

    def _sample_from_probs(
        self, probs: Tensor, sampling_info: Any, positions: Tensor, simple_sampling_case: bool
    ) -> Tensor:
        if not simple_sampling_case or sampling_info.sampling_seed is not None:
            drawn: Tensor = super()._sample_from_probs(probs, sampling_info, positions, simple_sampling_case)
            return drawn
        return sample_inverse_cdf(probs)


def sample_inverse_cdf(probs: Tensor) -> Tensor:
    """One token a row of ``probs`` [rows, vocab] (need not be normalised): int64 [rows].

    A token of probability 0 is never drawn: the uniform number lies in (0, total].
    """
    cumulative = probs.cumsum(dim=-1)
    total = cumulative[:, -1:]
    uniform = 1.0 - torch.rand_like(total)  # (0, 1]
    return torch.searchsorted(cumulative, uniform * total).squeeze(-1)
