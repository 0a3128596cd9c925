"""Draws from the whole vocabulary on a CPU: the same tokens as SGLang's, faster (`lenvm_kernels.multinomial`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lenvm_kernels.multinomial import multinomial
from lenvm_runtime import compat


def register() -> None:
    """Take over the draws that SGLang makes with torch.multinomial."""
    compat.around(compat.DRAW, _draw)


def _draw(
    original: Callable[..., Any], probs: Tensor, sampling_seed: Tensor | None = None, positions: Tensor | None = None
) -> Any:
    """[rows, vocab] probabilities -> [rows] int32 tokens; seeded rows are drawn by SGLang."""
    if sampling_seed is not None:
        return original(probs, sampling_seed=sampling_seed, positions=positions)
    return multinomial(probs).view(-1).to(torch.int32)
