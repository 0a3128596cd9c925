"""LIFEBench's length score, deviation and what counts as a natural end."""

from __future__ import annotations

import math
import re

_SENTENCE_END = re.compile(r"[.!?。！？…][\"'”’)\]*_`»]*\s*$|```\s*$|\|\s*$")


def deviation(length: int, target: int) -> float:
    """(length - target) / target."""
    return (length - target) / target


def score(mode: str, length: int, target: int) -> float:
    """0 to 100: exp(5 d) below, exp(-2 d) above the target; 100 on the allowed side of at_most and at_least."""
    d = deviation(length, target)
    if (mode == "at_most" and d <= 0) or (mode == "at_least" and d >= 0):
        return 100.0
    return 100.0 * math.exp(5 * d if d < 0 else -2 * d)


def ends_sentence(text: str) -> bool:
    """Whether a text ends after a finished sentence, a table's row or a code block."""
    return bool(_SENTENCE_END.search(text))
