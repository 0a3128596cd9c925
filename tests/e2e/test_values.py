"""Streamed values equal those of a plain transformers forward and the same head on the same tokens."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from lenvm_kernels.checkpoint import load_head
from lenvm_runtime.serve import Stack
from lenvm_training.features import capture_layers

pytestmark = pytest.mark.e2e

# Both sides run the model in bf16 (8 bits of mantissa) with sums in another order; through 30 layers the
# states differ by about 1%, and the head's sigmoid (slope 1/4 at most) turns that into about 0.01.
MAX_VALUE_ERROR = 0.05
MEAN_VALUE_ERROR = 0.01

LONG_PROMPT = "Here is a list of words: " + ", ".join(f"word{i}" for i in range(60)) + ". What is the tenth word?"
QUESTIONS = (
    "What is the capital of France?",
    "Write two sentences about rain.",
    "Count from one to ten.",
    LONG_PROMPT,
    "What is the capital of France?",  # its prompt comes from the prefix cache
)


def offline_values(model: Any, head: Any, prompt: list[int], output: list[int]) -> torch.Tensor:
    """V of every state, from the prompt boundary on."""
    layers = head.config.feature_layers
    with torch.inference_mode(), capture_layers(model, layers):
        states = model.base_model(torch.tensor([prompt + output]), use_cache=False).last_hidden_state[0]
        return head.value_head(states[len(prompt) - 1 : -1])


async def generate(stack: Stack, prompt: list[int], params: dict[str, Any]) -> dict[str, Any]:
    async with httpx.AsyncClient(timeout=300) as client:
        body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 40, **params}}
        return (await client.post(f"{stack.engine_url}/generate", json=body)).json()


@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}])
async def test_values_equal_an_offline_forward(
    stack: Stack, reference_model: tuple[Any, Any], head_folder: Path, params: dict[str, Any]
) -> None:
    model, tokenizer = reference_model
    head = load_head(head_folder)
    prompts = [
        list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        )
        for question in QUESTIONS
    ]
    assert len(prompts[3]) > 128, "the long prompt must be prefilled in several chunks"
    answers = await asyncio.gather(*(generate(stack, prompt, params) for prompt in prompts))
    repeated = await generate(stack, prompts[3], params)
    assert repeated["meta_info"]["cached_tokens"] > 64
    for prompt, answer in [*zip(prompts, answers, strict=True), (prompts[3], repeated)]:
        streamed = torch.tensor(answer["meta_info"]["lenvm_value"])
        assert len(streamed) == len(answer["output_ids"])
        errors = (streamed - offline_values(model, head, prompt, answer["output_ids"])).abs()
        assert errors.max() < MAX_VALUE_ERROR
        assert errors.mean() < MEAN_VALUE_ERROR


async def test_each_chunk_carries_the_values_of_its_tokens(stack: Stack, async_client: Any, model_name: str) -> None:
    stream = await async_client.chat.completions.create(
        model=model_name,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_completion_tokens=60,
        stream=True,
        stream_options={"include_usage": True},
    )
    values: list[float] = []
    remaining: list[float] = []
    predictions, endings, num_tokens = [], [], 0
    async for chunk in stream:
        if chunk.usage:
            num_tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            lenvm = (choice.model_extra or {}).get("lenvm") or {}
            values += lenvm.get("values", [])
            remaining += lenvm.get("remaining", [])
            if "prediction" in lenvm:
                predictions.append((len(values), lenvm["prediction"]))
            if "ended" in lenvm:
                endings.append((choice.finish_reason, lenvm["ended"], lenvm["applied"]))
    assert len(values) == len(remaining) == num_tokens > 0
    assert all(-1 < value <= 0 for value in values)
    gamma = load_head(Path(__file__).parents[2] / "lenvm_runtime" / "heads" / model_name).config.gamma
    assert remaining == pytest.approx([math.log1p(v) / math.log(gamma) for v in values], abs=1.0)
    assert len(predictions) == 1
    low, high = predictions[0][1]["interval"]
    assert 1 <= low <= high
    assert endings == [("stop", "natural", None)]
