"""``/v1/length/values`` against a plain transformers forward and the same head on the same tokens."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from lenvm_kernels.checkpoint import Head, load_head
from lenvm_kernels.heads import join_features
from lenvm_kernels.length_value import expected_value, length_from_value
from lenvm_runtime.length_control import ValueQuery
from lenvm_runtime.serve import Stack
from lenvm_training.features import capture_layers

pytestmark = pytest.mark.e2e

MAX_ERROR = 0.05  # as in test_values.py: bf16 states through 30 layers
MEAN_ERROR = 0.01
CANDIDATES = [253, 30, 2, 17]  # 2 is EOS


def offline(model: Any, head: Head, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """V of the state at every token of the prompt, and after each of CANDIDATES."""
    layers = head.config.feature_layers
    with torch.inference_mode(), capture_layers(model, layers) as captured:
        states = model.base_model(torch.tensor([prompt]), use_cache=False).last_hidden_state[0]
        features = join_features(states, [captured[layer][0] for layer in layers])[-1:]
        table = head.candidate_head.build_token_table(model.get_input_embeddings().weight)
        logprobs = head.candidate_head.candidate_logprobs(features, table[torch.tensor([CANDIDATES])])
        values = expected_value(logprobs, head.candidate_head.bin_lengths, head.config.gamma)[0]
        return head.value_head(states), values.masked_fill(torch.tensor(CANDIDATES) == 2, 0.0)


async def ask(stack: Stack, model_name: str, **fields: Any) -> httpx.Response:
    async with httpx.AsyncClient(timeout=300) as client:
        return await client.post(f"{stack.gateway_url}/v1/length/values", json={"model": model_name, **fields})


async def test_values_of_prompts_and_candidates_equal_an_offline_forward(
    stack: Stack, model_name: str, reference_model: tuple[Any, Any], head_folder: Path
) -> None:
    """Batched, chunked (more than 64 tokens), again from the prefix cache, and beside generation."""
    model, tokenizer = reference_model
    head = load_head(head_folder)
    texts = ["The", "Bread is made of flour and water.", " ".join(f"Step {i}: knead the dough." for i in range(30))]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    assert len(prompts[2]) > 128
    sampling = {"max_new_tokens": 30, "temperature": 1.0, "ignore_eos": True}
    generation = {"input_ids": prompts[2][:90], "sampling_params": sampling}
    async with httpx.AsyncClient(timeout=300) as client:
        beside = asyncio.create_task(client.post(f"{stack.engine_url}/generate", json=generation))
        first = await ask(stack, model_name, input=prompts, candidates=[CANDIDATES] * 3)
        generated = (await beside).json()
    again = await ask(stack, model_name, input=texts, candidates=[CANDIDATES] * 3)
    assert first.json()["usage"]["prompt_tokens"] == sum(map(len, prompts))
    for response in (first, again):
        for prompt, data in zip(prompts, response.json()["data"], strict=True):
            values, candidate_values = offline(model, head, prompt)
            assert data["token_ids"] == prompt
            errors = (torch.tensor(data["values"]) - values).abs()
            assert errors.max() < MAX_ERROR
            assert errors.mean() < MEAN_ERROR
            assert [candidate["token_id"] for candidate in data["candidates"]] == CANDIDATES
            found = torch.tensor([candidate["value"] for candidate in data["candidates"]])
            assert found[2] == 0
            assert (found - candidate_values).abs().max() < MAX_ERROR
            lengths = length_from_value(torch.tensor(data["values"]), head.config.gamma)
            assert data["remaining"] == pytest.approx(lengths.tolist(), abs=1.0, rel=0.01)
    assert len(generated["meta_info"]["lenvm_value"]) == 30


async def test_an_ordinary_request_beside_a_query_keeps_its_own_input_logprobs(stack: Stack) -> None:
    """One batch of both: the query's prompt gets values, the other's input logprobs are untouched."""
    prompt = list(range(400, 440))
    ordinary = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
    ordinary |= {"return_logprob": True, "logprob_start_len": 0}
    query = {"input_ids": prompt[:17]}
    query |= {"sampling_params": {"max_new_tokens": 1, "custom_params": ValueQuery((3,)).to_custom_params()}}
    async with httpx.AsyncClient(base_url=stack.engine_url, timeout=300) as client:
        alone = (await client.post("/generate", json=ordinary)).json()
        bodies = (query, ordinary, query, ordinary)
        answers = await asyncio.gather(*(client.post("/generate", json=body) for body in bodies))
    expected = [entry[0] for entry in alone["meta_info"]["input_token_logprobs"][1:]]
    for answer in answers[1::2]:
        found = [entry[0] for entry in answer.json()["meta_info"]["input_token_logprobs"][1:]]
        assert found == pytest.approx(expected, abs=0.3)  # bf16 logits of other batch shapes
        assert "lenvm_candidate_values" not in answer.json()["meta_info"]
    for answer in answers[::2]:
        assert "input_token_logprobs" not in answer.json()["meta_info"]
        assert all(-1 < value <= 0 for value in answer.json()["lenvm"]["values"])


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"input": [1, 2], "candidates": [49152]}, "candidates"), ({"input": "x", "candidates": "y"}, "candidates")],
)
async def test_wrong_candidates_are_refused(stack: Stack, model_name: str, fields: dict[str, Any], field: str) -> None:
    response = await ask(stack, model_name, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


async def test_the_vocabularys_last_id_is_given_back(
    stack: Stack, model_name: str, reference_model: tuple[Any, Any]
) -> None:
    last = reference_model[0].config.vocab_size - 1
    inputs = [[1, last, 3], [last]]
    data = (await ask(stack, model_name, input=inputs)).json()["data"]
    assert [one["token_ids"] for one in data] == inputs
