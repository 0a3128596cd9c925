"""Small lists of the host as device tensors, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(values: Sequence[Any], dtype: torch.dtype, device: Any) -> Tensor:
    """A tensor of ``values`` on ``device``; to CUDA through pinned memory, since other copies may wait."""
    is_cuda = torch.device(device).type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=is_cuda).to(device, non_blocking=True)
