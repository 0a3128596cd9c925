"""A separate LenVM in the real engine: values of states and candidates, mixed batches, memory pressure.

With the default model in bf16; `test_steps_in_a_batch.py` has the same engine with tiny models, exactly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from lenvm_kernels import decoder_layer
from lenvm_kernels.checkpoint import load_value_head
from lenvm_runtime.length_control import ValueQuery
from lenvm_runtime.serve import ServeConfig, Stack, free_port, running_stack

pytestmark = pytest.mark.e2e

# Both sides run in bf16 with sums in another order (see test_values.py).
MAX_VALUE_ERROR = 0.05
MEAN_VALUE_ERROR = 0.01
MEAN_ROUNDING_ERROR = 0.05
"""Of values in int8."""

MAX_TOTAL_TOKENS = 480
SHARED_PREFIX = "Here is a list of words: " + ", ".join(f"word{i}" for i in range(24)) + ". "
CONTROLS: tuple[dict[str, Any] | None, ...] = (
    None,
    {"mode": "equal", "target": 30},
    {"mode": "at_least", "target": 20},
    {"mode": "at_most", "target": 25, "strategy": "hard"},
    {"mode": "tilt", "beta": 15.0},
    {"mode": "target_mean", "factor": 0.8},
    {"mode": "scale", "factor": 0.5, "entropy_threshold": 0.5},
)


class Engine:
    """A running engine with the separate LenVM, and its offline twin."""

    def __init__(self, stack: Stack, model: Any, tokenizer: Any, head: Any) -> None:
        self.url, self.gateway_url, self.tokenizer = stack.engine_url, stack.gateway_url, tokenizer
        self._model, self._head = model, head

    def prompt(self, question: str) -> list[int]:
        messages = [{"role": "user", "content": question}]
        return list(
            self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        )

    async def generate(
        self, client: httpx.AsyncClient, prompt: list[int], control: dict[str, Any] | None, **sampling: Any
    ) -> dict[str, Any]:
        params = {"max_new_tokens": 24, "custom_params": {"lenvm": control or {}}, **sampling}
        body = {"input_ids": prompt, "sampling_params": params, "return_logprob": True, "top_logprobs_num": 12}
        answer = (await client.post(f"{self.url}/generate", json=body)).json()
        assert "output_ids" in answer, answer
        return answer

    def num_used_tokens(self) -> int:
        return httpx.get(f"{self.url}/v1/loads", timeout=60).json()["loads"][0]["num_used_tokens"]

    def forward(self, token_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """V of every state and log-probabilities of every next token, by a plain transformers forward."""
        with torch.inference_mode():
            out = self._model(torch.tensor([token_ids]), output_hidden_states=True)
            return self._head(out.hidden_states[-1][0]), torch.log_softmax(out.logits[0].float(), -1)

    def check_values(self, prompt: list[int], answer: dict[str, Any]) -> None:
        values, _ = self.forward(prompt + answer["output_ids"])
        streamed = torch.tensor(answer["meta_info"]["lenvm_value"])
        errors = (streamed - values[len(prompt) - 1 : -1]).abs()
        assert len(errors) == len(answer["output_ids"])
        assert errors.max() < MAX_VALUE_ERROR
        assert errors.mean() < MEAN_VALUE_ERROR


@contextmanager
def running(
    lenvm_folder: Path, reference_model: tuple[Any, Any], arguments: dict[str, str], in_int8: bool = False
) -> Iterator[Engine]:
    flat = tuple(part for pair in arguments.items() for part in pair)
    model, tokenizer = reference_model
    head = load_value_head(lenvm_folder, model.config.hidden_size)
    with running_stack(ServeConfig("127.0.0.1", free_port(), None, lenvm_folder, flat, in_int8)) as stack:
        yield Engine(stack, model, tokenizer, head)


@pytest.fixture(scope="module")
def engine(lenvm_folder: Path, reference_model: tuple[Any, Any]) -> Iterator[Engine]:
    arguments = {
        "--chunked-prefill-size": "64",
        "--random-seed": "7",
        "--max-total-tokens": str(MAX_TOTAL_TOKENS),
        "--max-running-requests": "8",
        "--schedule-conservativeness": "0.1",  # admits more than fits, so that requests are retracted
    }
    with running(lenvm_folder, reference_model, arguments) as started:
        yield started


@pytest.fixture
async def http() -> Any:
    async with httpx.AsyncClient(timeout=300) as client:
        yield client


def steered(answer: dict[str, Any], step: int) -> dict[int, float]:
    """Log-probabilities of the candidates that a step sampled from."""
    return {token: logprob for logprob, token, _ in answer["meta_info"]["output_top_logprobs"][step] if logprob > -1e4}


async def test_candidate_values_equal_a_plain_forward(engine: Engine, http: httpx.AsyncClient) -> None:
    """log p'(x) = log p(x) + beta v(x) - log Z: the returned log-probabilities tell v(x), up to a constant.

    Asked twice: the prompt is prefilled in chunks first, then comes from the prefix cache.
    """
    beta = 40.0
    prompt = engine.prompt(SHARED_PREFIX + "What is the capital of France?")
    assert len(prompt) > 128
    for asked in range(2):
        answer = await engine.generate(http, prompt, {"mode": "tilt", "beta": beta}, top_k=6, max_new_tokens=3)
        assert (answer["meta_info"]["cached_tokens"] > 64) == (asked == 1)
        engine.check_values(prompt, answer)
        for step in range(len(answer["output_ids"])):
            sequence = prompt + answer["output_ids"][:step]
            _, logprobs = engine.forward(sequence)
            constants = []
            for token, logprob in steered(answer, step).items():
                is_eos = token == engine.tokenizer.eos_token_id
                value = 0.0 if is_eos else float(engine.forward([*sequence, token])[0][-1])
                constants.append((logprob - float(logprobs[-1, token])) / beta - value)
            assert len(constants) == 6
            assert max(constants) - min(constants) < MAX_VALUE_ERROR


async def test_a_row_alone_has_the_distribution_it_has_in_a_mixed_batch(
    engine: Engine, http: httpx.AsyncClient
) -> None:
    """First steps of every mode, greedy and sampled, alone and together. bf16 products depend on the batch's size."""
    prompt = engine.prompt("Name a colour.")
    cases = [
        (control, sampling)
        for control in CONTROLS
        for sampling in ({"temperature": 0}, {"temperature": 1.0, "top_k": 10}, {"temperature": 0.8, "min_p": 0.05})
    ]
    alone = [await engine.generate(http, prompt, control, max_new_tokens=1, **sampling) for control, sampling in cases]
    together = await asyncio.gather(
        *(engine.generate(http, prompt, control, max_new_tokens=1, **sampling) for control, sampling in cases)
    )
    for case, one, other in zip(cases, alone, together, strict=True):
        expected, found = steered(one, 0), steered(other, 0)
        distance = sum(
            abs(torch.tensor(expected.get(x, -torch.inf)).exp() - torch.tensor(found.get(x, -torch.inf)).exp())
            for x in {*expected, *found}
        )
        assert distance < 0.1, case


async def test_values_survive_retraction(engine: Engine, http: httpx.AsyncClient) -> None:
    """More tokens than slots: requests are retracted and prefilled again; every value stays that of a plain forward."""
    prompts = [engine.prompt(f"Tell me something about the number {i}.") for i in range(8)]
    answers = await asyncio.gather(
        *(
            engine.generate(http, prompt, CONTROLS[i % len(CONTROLS)], max_new_tokens=60, ignore_eos=True)
            for i, prompt in enumerate(prompts)
        )
    )
    assert sum(answer["meta_info"]["num_retractions"] for answer in answers) > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        engine.check_values(prompt, answer)
    assert engine.num_used_tokens() == 0


async def test_a_grammar_holds_under_control(engine: Engine, http: httpx.AsyncClient) -> None:
    prompt = engine.prompt("Give me a digit.")
    answer = await engine.generate(http, prompt, CONTROLS[1], regex="[0-9]{3}")
    assert answer["text"].isdigit()
    assert len(answer["text"]) == 3
    engine.check_values(prompt, answer)


async def test_values_of_a_prompt_and_of_given_next_tokens(engine: Engine, http: httpx.AsyncClient) -> None:
    """Beside a generation, in chunks (more than 64 tokens), then with a cached prefix."""
    prompt = engine.prompt(SHARED_PREFIX + "Repeat them.")
    candidates = [253, 30, engine.tokenizer.eos_token_id]
    query = ValueQuery(tuple(candidates)).to_custom_params()
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 1, "custom_params": query}}
    values = engine.forward(prompt)[0]
    after = [float(engine.forward([*prompt, token])[0][-1]) for token in candidates[:2]] + [0.0]
    for _ in range(2):
        response, beside = await asyncio.gather(
            http.post(f"{engine.url}/generate", json=body), engine.generate(http, prompt[:40], CONTROLS[4])
        )
        lenvm = response.json()["lenvm"]
        assert lenvm["token_ids"] == prompt
        assert (torch.tensor(lenvm["values"]) - values).abs().max() < MAX_VALUE_ERROR
        assert [candidate["value"] for candidate in lenvm["candidates"]] == pytest.approx(after, abs=MAX_VALUE_ERROR)
        engine.check_values(prompt[:40], beside)


async def test_the_gateway_serves_it(engine: Engine, http: httpx.AsyncClient, model_name: str) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = {"model": model_name, "messages": messages, "max_completion_tokens": 40, "max_length_hint": 12}
    choice = (await http.post(f"{engine.gateway_url}/v1/chat/completions", json=body)).json()["choices"][0]
    assert choice["lenvm"]["applied"] == {"mode": "at_most", "target": 12, "strategy": "natural"}
    low, high = choice["lenvm"]["prediction"]["interval"]
    assert 1 <= low <= choice["lenvm"]["prediction"]["expected"] <= high
    predicted = await http.post(
        f"{engine.gateway_url}/v1/length/predict", json={"model": model_name, "messages": messages}
    )
    assert predicted.json()["expected"] == pytest.approx(choice["lenvm"]["prediction"]["expected"], rel=0.2)


@pytest.mark.skipif(not decoder_layer.runs_in_int8(), reason="needs AVX-512 VNNI")
async def test_in_int8_the_served_model_is_the_same_and_values_are_near(
    engine: Engine, http: httpx.AsyncClient, lenvm_folder: Path, reference_model: tuple[Any, Any]
) -> None:
    prompts = [engine.prompt(f"Tell me something about the number {i}.") for i in range(4)]
    exact = [await engine.generate(http, prompt, None, temperature=0.0) for prompt in prompts]
    with running(lenvm_folder, reference_model, {"--max-total-tokens": "2048"}, in_int8=True) as rounded:
        answers = [await rounded.generate(http, prompt, None, temperature=0.0) for prompt in prompts]
    errors = torch.cat([_values(answer) - _values(other) for answer, other in zip(answers, exact, strict=True)])
    assert [answer["output_ids"] for answer in answers] == [answer["output_ids"] for answer in exact]
    assert 0 < errors.abs().mean() < MEAN_ROUNDING_ERROR


def _values(answer: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(answer["meta_info"]["lenvm_value"])
