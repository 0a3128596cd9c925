"""SGLang's sampler with one step before it: the logits of rows under length control are steered."""

from __future__ import annotations

from typing import Any

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
