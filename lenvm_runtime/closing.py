"""Which tokens finish a sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

_CLOSING = re.compile(r"[.!?。！？…][\"'”’)\]*_`»]*\s*$")


def closing_tokens(texts: Sequence[str], vocab_size: int) -> Tensor:
    """Tokens whose text ends a sentence: bool [vocab_size], on the CPU. ``texts``: by token id."""
    closing = torch.zeros(vocab_size, dtype=torch.bool)
    known = texts[:vocab_size]
    closing[: len(known)] = torch.tensor([_CLOSING.search(text) is not None for text in known])
    return closing
