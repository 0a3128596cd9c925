"""Draws on a CPU, from the whole vocabulary and after filters: the same tokens as SGLang's, faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lenvm_kernels.filtered_draw import draw_filtered
from lenvm_kernels.multinomial import multinomial
from lenvm_runtime import compat


def register() -> None:
    """Take over the draws that SGLang makes with torch.multinomial."""
    compat.around(compat.DRAW, _draw)
    compat.around(compat.DRAW_FILTERED, _draw_filtered)


def _draw(
    original: Callable[..., Any], probs: Tensor, sampling_seed: Tensor | None = None, positions: Tensor | None = None
) -> Any:
    """[rows, vocab] probabilities -> [rows] int32 tokens; seeded rows are drawn by SGLang."""
    if sampling_seed is not None:
        return original(probs, sampling_seed=sampling_seed, positions=positions)
    return multinomial(probs).view(-1).to(torch.int32)


def _draw_filtered(
    original: Callable[..., Any],
    probs: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    min_ps: Tensor,
    need_min_p_sampling: bool,
    sampling_seed: Tensor | None,
    positions: Tensor,
) -> Any:
    """The same, of rows with top-k, top-p or min-p."""
    if sampling_seed is not None:
        return original(probs, top_ks, top_ps, min_ps, need_min_p_sampling, sampling_seed, positions)
    return draw_filtered(probs, top_ks, top_ps, min_ps)
