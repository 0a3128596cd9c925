"""Requests without control get SGLang's own tokens: the hooks of a head or a separate LenVM do not disturb sampling.

Fresh engines with the same seed, one without a LenVM, answer the same requests one after the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from lenvm_runtime.length_control import LengthControl, build_custom_params
from lenvm_runtime.serve import NO_HEAD, ServeConfig, running_engine

pytestmark = pytest.mark.e2e

PARAMETERS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 20, "min_p": 0.02},
    {"temperature": 0},
)
NEUTRAL = build_custom_params(LengthControl("tilt", beta=0.0), values=True)
SAME_MEAN = build_custom_params(LengthControl("target_mean", factor=1.0, scaling="length"), values=True)
NEVER_UNSURE_ENOUGH = build_custom_params(LengthControl("equal", target=5, entropy_threshold=20.0), values=True)


def answers(head: Path | None, custom_params: list[dict[str, Any] | None]) -> list[list[int]]:
    arguments = ("--random-seed", "7", "--disable-radix-cache", "--max-total-tokens", "4096")
    with running_engine(ServeConfig("127.0.0.1", 8000, None, head, arguments)) as (_, url):
        outputs = []
        for parameters, custom in zip(PARAMETERS, custom_params, strict=True):
            sampling = {"max_new_tokens": 24, "ignore_eos": True, "custom_params": custom, **parameters}
            body = {"text": "The history of bread begins", "sampling_params": sampling}
            outputs.append(httpx.post(f"{url}/generate", json=body, timeout=120).json()["output_ids"])
        body = {"text": "Bread", "sampling_params": {"max_new_tokens": 1, "custom_params": SAME_MEAN}}
        assert httpx.post(f"{url}/generate", json=body, timeout=120).status_code == (400 if head == NO_HEAD else 200)
        return outputs


def test_no_control_and_neutral_controls_give_sglangs_own_tokens(lenvm_folder: Path) -> None:
    stock = answers(NO_HEAD, [None] * 4)
    for lenvm in (None, lenvm_folder):
        assert stock == answers(lenvm, [None, NEUTRAL, NEVER_UNSURE_ENOUGH, SAME_MEAN])
