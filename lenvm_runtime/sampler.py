"""SGLang's sampler with one step before it: the logits of rows under length control are steered."""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.sampler import Sampler
from torch import Tensor

from lenvm_runtime.engine_hooks import StepContext
from lenvm_runtime.head_runner import released


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
        step: StepContext | None = getattr(sampling_info, "lenvm_step", None)
        if step is not None:
            generated = positions + 1 - step.control.prompt_len
            steered = step.runner.steer(
                logits_output.next_token_logits, step.features, step.control, step.slots, generated, sampling_info
            )
            sampling_info = released(sampling_info, steered)
        return super().forward(
            logits_output, sampling_info, return_logprob, top_logprobs_nums, token_ids_logprobs, positions
        )
