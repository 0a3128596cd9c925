"""Decode steps of a separate LenVM in the real engine, against plain transformers forwards: tiny models in fp32.

Every distribution that a request was sampled from is computed again for the request alone: the models' forwards by
transformers, one sequence at a time, then SGLang's definitions of penalties and biases, then the pure operators of
guidance on that one row. Rounding aside, what else was in the batch must not be seen.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from lenvm_kernels.candidate_limits import limit_candidates
from lenvm_kernels.candidates import TOP_K_ALL, select_candidates
from lenvm_kernels.length_distribution import expected_length
from lenvm_kernels.length_value import bin_lengths, length_from_value
from lenvm_kernels.value_distribution import build_value_table, distribution_from_value
from lenvm_runtime.closing import closing_tokens
from lenvm_runtime.control_batch import ControlBatch
from lenvm_runtime.default_model import cache_dir
from lenvm_runtime.length_control import LengthControl
from lenvm_runtime.serve import ServeConfig, running_engine
from tiny_lenvm import byte_tokenizer, offline_values, save_lenvm, save_model

pytestmark = pytest.mark.e2e

GAMMA = 0.99
EOS = 2
FIRST_BYTE = 3
WITHOUT_VALUES: dict[str, Any] = {"values": False}
"""Of a request that the LenVM does not run for."""
CONTEXT = 512
TOLERANCE = 2e-3
"""Of a probability: fp32 sums in another order, through exponents of up to a few hundred."""
VALUE_NOISE = 1e-5
"""Of a candidate's value in fp32. A mean value at the edge of what the candidates can reach needs a tilt of thousands,
which makes a probability of it: there the twin's own answer moves as much with its values."""

NUM_ABORT_REQUESTS = int(os.environ.get("LENVM_TEST_ABORT_REQUESTS", "1000"))
"""How many requests the abort test sends."""

MEAN_VALUE = -0.5
"""Of the candidates of about half the steps."""
MAX_TOTAL_TOKENS = 1600
GPU_ARGUMENTS = {"attention_backend": "triton", "sampling_backend": "pytorch", "mem_fraction_static": "0.2"}
"""FlashAttention has no fp32. ``TRITON_F32_DEFAULT=ieee`` in the environment keeps Triton's products from tf32."""
FP32_NORM = Path(__file__).parents[1] / "fp32_norm"
MAX_RUNNING = 28
CONTROLS: tuple[dict[str, Any], ...] = (
    {"mode": "equal", "target": 30},
    {"mode": "equal", "target": 30, "strategy": "hard"},
    {"mode": "at_least", "target": 10},
    {"mode": "at_least", "target": 60, "strategy": "hard"},
    {"mode": "at_most", "target": 60},
    {"mode": "tilt", "beta": -15.0},
    {"mode": "tilt", "beta": 0.0, "min_value": -0.45},
    {"mode": "target_mean", "target": 70},
    {"mode": "target_mean", "factor": 1.1},
    {"mode": "target_mean", "factor": 1.05, "scaling": "value"},
    {"mode": "scale", "factor": 0.5},
    {"mode": "equal", "target": 40, "entropy_threshold": 1.5},
    {"mode": "tilt", "beta": -15.0, "max_mean_value": MEAN_VALUE},
)
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0, "top_k": 10},
    {"temperature": 0.8, "min_p": 0.05},
    {"temperature": 0.0},
    {"temperature": 1.2, "top_p": 0.9},
)
LONG_CONTROLS: tuple[dict[str, Any], ...] = (
    {"mode": "equal", "target": 150},
    {"mode": "at_least", "target": 150, "strategy": "hard"},
    {"mode": "tilt", "beta": -15.0},
    {"mode": "target_mean", "factor": 1.1},
    {"mode": "scale", "factor": 2.0},
)
PENALTIES = {"frequency_penalty": 0.7, "presence_penalty": 0.3, "repetition_penalty": 1.3}
LETTERS = {"regex": "[abcd]{40}"}
WITHOUT_C = {**LETTERS, "logit_bias": {str(byte_tokenizer().convert_tokens_to_ids("c")): -100.0}}
ROWS: tuple[tuple[dict[str, Any] | None, dict[str, Any]], ...] = (
    *((control, SAMPLINGS[i % len(SAMPLINGS)]) for i, control in enumerate(CONTROLS)),
    *((None, {**sampling, "ignore_eos": True}) for sampling in SAMPLINGS),
    (None, LETTERS),
    (CONTROLS[0], LETTERS),
    (CONTROLS[1], WITHOUT_C),
    (CONTROLS[5], {"temperature": 0.5, "top_k": 1}),
    (CONTROLS[5], {"temperature": 0.0, "top_k": 3}),
    (CONTROLS[3], {"temperature": 0.0, "top_k": 4}),
    (None, {**PENALTIES, "ignore_eos": True}),
    (CONTROLS[5], PENALTIES),
    (CONTROLS[4], {"logit_bias": {"70": 3.0, "80": -100.0}, "stop_token_ids": [60, 90]}),
    (CONTROLS[5], {"top_k": 38, "ignore_eos": True}),
    ({"mode": "at_most", "target": 5, "strategy": "hard"}, {"top_k": 10, "ignore_eos": True}),
)


class Twin:
    """The engine's two models in plain transformers, and one row's distribution computed with them."""

    def __init__(self, served: Any, lenvm: Any, head: Any) -> None:
        from lenvm_runtime.value_model.step import NUM_BINS

        self._served, self._lenvm, self._head = served, lenvm, head
        self._random = torch.Generator().manual_seed(0)
        self.num_tokens = served.config.vocab_size
        self._bins = bin_lengths(NUM_BINS, int(length_from_value(-1.0, GAMMA)))
        self._table = build_value_table(self._bins, GAMMA)
        tokenizer = byte_tokenizer()
        texts = tokenizer.batch_decode([[token] for token in range(self.num_tokens)])
        self._closing = closing_tokens(texts, self.num_tokens)

    def values(self, token_ids: list[int]) -> Tensor:
        """V of every state of a sequence."""
        return offline_values(self._lenvm, self._head, token_ids)

    def candidate_values(self, token_ids: list[int], candidates: list[int]) -> Tensor:
        """V after each of these next tokens; 0 after EOS."""
        with torch.no_grad():
            sequences = torch.tensor([[*token_ids, token] for token in candidates])
            after = self._head(self._lenvm.base_model(sequences).last_hidden_state[:, -1])
        return after.masked_fill(sequences[:, -1] == EOS, 0.0)

    def logits(self, prompt: list[int], output: list[int], sampling: dict[str, Any], penalized: list[int]) -> Tensor:
        """Next-token logits after penalties for the ``penalized`` tokens, grammar and bias: [vocabulary]."""
        with torch.no_grad():
            logits = self._served(torch.tensor([prompt + output])).logits[0, -1]
        counts = Counter(penalized)
        seen = torch.tensor(list(counts), dtype=torch.int64)
        times = torch.tensor(list(counts.values()), dtype=torch.float32)
        logits[seen] -= sampling.get("frequency_penalty", 0.0) * times + sampling.get("presence_penalty", 0.0)
        repeated = sampling.get("repetition_penalty", 1.0)
        logits[seen] = torch.where(logits[seen] < 0, logits[seen] * repeated, logits[seen] / repeated)
        if "regex" in sampling:
            letters = torch.tensor(byte_tokenizer().convert_tokens_to_ids(list("abcd")))
            logits = torch.full_like(logits, -torch.inf).index_copy(0, letters, logits[letters])
        for token, bias in sampling.get("logit_bias", {}).items():
            logits[int(token)] += bias
        return logits

    def probs(
        self,
        prompt: list[int],
        output: list[int],
        control: dict[str, Any] | None,
        sampling: dict[str, Any],
        penalized: list[int],
        noise: float = 0.0,
    ) -> Tensor:
        """What a row with this control and these parameters samples its next token from: [vocabulary].

        ``noise``: the values of candidates are off by up to so much.
        """
        logits = self.logits(prompt, output, sampling, penalized)
        greedy = sampling.get("temperature", 1.0) == 0
        temperature = 1.0 if greedy else sampling.get("temperature", 1.0)
        steered = (
            self._steered_probs(logits, prompt, output, control, sampling, temperature, noise) if control else None
        )
        return torch.softmax(logits / temperature, -1) if steered is None else steered

    def sensitivity(
        self,
        prompt: list[int],
        output: list[int],
        control: dict[str, Any],
        sampling: dict[str, Any],
        penalized: list[int],
    ) -> float:
        """The most that values off by VALUE_NOISE move a probability, of a few draws."""
        exact, *moved = (
            self.probs(prompt, output, control, sampling, penalized, VALUE_NOISE * (i > 0)) for i in range(9)
        )
        return max(float((probs - exact).abs().max()) for probs in moved)

    def _steered_probs(
        self,
        logits: Tensor,
        prompt: list[int],
        output: list[int],
        control: dict[str, Any],
        sampling: dict[str, Any],
        temperature: float,
        noise: float,
    ) -> Tensor | None:
        if control["mode"] == "at_least" and len(output) + 1 >= control["target"]:
            return None  # not by `needs_steering`, which the engine asks too
        top_k = 1 if sampling.get("temperature") == 0 else sampling.get("top_k", TOP_K_ALL)
        endless = [sampling.get("ignore_eos", False)]
        stops = sampling.get("stop_token_ids", [])
        parsed, asked = [LengthControl.parse(control)], [sampling.get("top_k")]
        rows = ControlBatch.build(parsed, [len(prompt)], [top_k], "cpu", endless, [stops], asked)
        assert rows is not None
        last = torch.tensor((prompt + output)[-1:])
        targets = self._scaled_target(prompt, control)
        guided = rows.guided_rows(torch.tensor([len(output)]), targets, last, self._closing)
        candidates = select_candidates(
            logits[None],
            torch.tensor([temperature]),
            torch.tensor([top_k]),
            torch.tensor([sampling.get("top_p", 1.0)]),
            torch.tensor([sampling.get("min_p", 0.0)]),
            rows.end_ids(torch.tensor([EOS])),
            rows.num_candidates,
            guided.may_end_anywhere,
        )
        if rows.has_limits:
            candidates = limit_candidates(candidates, rows.max_rank, rows.endless, guided.may_end_anywhere)
        ids = candidates.ids[0].tolist()
        chosen = (candidates.logprobs[0] > -torch.inf).tolist()
        values = torch.zeros(1, len(ids))
        kept = [column for column, is_candidate in enumerate(chosen) if is_candidate]
        scored = self.candidate_values(prompt + output, [ids[column] for column in kept])
        values[0, kept] = scored + noise * (2 * torch.rand(len(kept), generator=self._random) - 1)
        values[candidates.eos_mask] = 0.0
        if not guided.needs_steering(candidates, values):
            return None
        steered = guided.steer(candidates, values, distribution_from_value(values, self._table), self._bins, GAMMA)
        probs = torch.zeros(len(logits))
        return probs.scatter_reduce(0, candidates.ids[0], steered[0].exp(), "amax")

    def _scaled_target(self, prompt: list[int], control: dict[str, Any]) -> Tensor:
        remaining = expected_length(distribution_from_value(self.values(prompt)[-1:], self._table), self._bins)
        return (control.get("factor", 1.0) * remaining).clamp_min(1.0)


def longer_histories(prompt: list[int], output: list[int], histories: list[list[int]]) -> list[list[int]]:
    """The tokens that SGLang may have penalized by this step, from those by the step before.

    It counts one more at each decode step: with overlap scheduling the newest one is not known yet, and the one
    before it is counted in its place, unless a prefill came between.
    """
    if not output:
        return histories
    newest = {output[-1], output[-2] if len(output) > 1 else prompt[-1]}
    return list(
        {tuple(sorted([*history, token])): [*history, token] for history in histories for token in newest}.values()
    )


class Engine:
    """The running engine with the tiny models."""

    def __init__(self, url: str, twin: Twin) -> None:
        self.url, self.twin = url, twin

    async def generate(
        self, client: httpx.AsyncClient, prompt: list[int], control: dict[str, Any] | None, **sampling: Any
    ) -> dict[str, Any]:
        params = {"max_new_tokens": 24, "custom_params": {"lenvm": control or {}}, **sampling}
        body = {"input_ids": prompt, "sampling_params": params, "return_logprob": True, "top_logprobs_num": 40}
        answer = (await client.post(f"{self.url}/generate", json=body)).json()
        assert "output_ids" in answer, answer
        return answer

    async def load(self, client: httpx.AsyncClient) -> dict[str, Any]:
        return (await client.get(f"{self.url}/v1/loads")).json()["loads"][0]

    async def idle(self, client: httpx.AsyncClient) -> dict[str, Any]:
        """The load once no request is left."""
        for _ in range(300):
            load = await self.load(client)
            if load["num_running_reqs"] + load["num_waiting_reqs"] == 0:
                return load
            await asyncio.sleep(0.1)
        raise AssertionError(f"requests are left: {load}")

    def batch_sizes(self) -> list[int]:
        """Requests of each decode step so far, from the engine's log."""
        port = self.url.rpartition(":")[2]
        log = (cache_dir() / "logs" / f"engine-{port}.log").read_text(errors="replace")
        return [int(size) for size in re.findall(r"Decode batch.*?#running-req: (\d+)", log)]

    def check_values(self, prompt: list[int], answer: dict[str, Any]) -> None:
        """V of each state that a token was sampled from."""
        expected = self.twin.values(prompt + answer["output_ids"])[len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.tensor(answer["meta_info"]["lenvm_value"]), expected, atol=1e-4, rtol=0)

    def check_steps(
        self,
        prompt: list[int],
        answer: dict[str, Any],
        control: dict[str, Any] | None,
        sampling: dict[str, Any],
        every: int = 1,
    ) -> None:
        """The returned log-probabilities of the steps are those of the row alone."""
        histories: list[list[int]] = [[]]
        for step in range(0, len(answer["output_ids"]), every):
            output = answer["output_ids"][:step]
            if "frequency_penalty" in sampling:
                histories = longer_histories(prompt, output, histories)
            logprobs, tokens, _ = zip(*answer["meta_info"]["output_top_logprobs"][step], strict=True)
            found = torch.zeros(self.twin.num_tokens).index_copy(0, torch.tensor(tokens), torch.tensor(logprobs).exp())
            errors = [
                largest_error(found, self.twin.probs(prompt, output, control, sampling, history))
                for history in histories
            ]
            if min(errors) >= TOLERANCE and control and control["mode"] == "target_mean":
                request = (prompt, output, control, sampling)
                errors = [
                    error - self.twin.sensitivity(*request, history)
                    for error, history in zip(errors, histories, strict=True)
                ]
            assert min(errors) < TOLERANCE, (control, sampling, step)
            histories = [history for history, error in zip(histories, errors, strict=True) if error < TOLERANCE]
            if sampling.get("temperature") == 0:
                assert found[answer["output_ids"][step]] >= found.max() - TOLERANCE


def largest_error(found: Tensor, expected: Tensor) -> float:
    """Of the returned probabilities (the others are 0 in ``found``), or by which one left out exceeds the least."""
    returned = found > 0
    left_out = expected.masked_fill(returned, 0.0).max() - found[returned].min()
    return max(float((found - expected)[returned].abs().max()), float(left_out))


@contextmanager
def running(tmp_path_factory: pytest.TempPathFactory, **arguments: str) -> Iterator[Engine]:
    """An engine with the tiny models and these arguments of SGLang beside the tests' own."""
    served, lenvm = (tmp_path_factory.mktemp(name) for name in ("served", "lenvm"))
    tiny = {"tokenizer": byte_tokenizer(), "context": CONTEXT}
    model = save_model(served, "llama", **tiny)
    twin = Twin(model, *save_lenvm(lenvm, "qwen2", gamma=GAMMA, **tiny))
    arguments = {
        "dtype": "float32",
        "chunked_prefill_size": "64",
        "random_seed": "7",
        "max_total_tokens": str(MAX_TOTAL_TOKENS),
        "max_running_requests": str(MAX_RUNNING),
        "schedule_conservativeness": "0.1",  # admits more than fits, so that requests are retracted
        "decode_log_interval": "1",
        **(GPU_ARGUMENTS if torch.cuda.is_available() else {}),
        **arguments,
    }
    flat = tuple(part for name, value in arguments.items() for part in (f"--{name.replace('_', '-')}", value))
    plugins = [str(FP32_NORM), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(plugins)} if torch.cuda.is_available() else {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with running_engine(ServeConfig("127.0.0.1", 8000, str(served), lenvm, flat)) as (_, url):
            yield Engine(url, twin)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with running(tmp_path_factory) as started:
        yield started


@pytest.fixture
async def http() -> Any:
    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        yield client


def make_prompt(seed: int, length: int = 20) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(FIRST_BYTE + 30, FIRST_BYTE + 120) for _ in range(length)]


async def test_overlap_scheduling_stays_on(engine: Engine, http: httpx.AsyncClient) -> None:
    info = (await http.get(f"{engine.url}/server_info")).json()
    assert info["disable_overlap_schedule"] is False


@pytest.mark.parametrize(("field", "value"), [("top_k", 200), ("stop_token_ids", [*range(17)]), ("min_value", None)])
async def test_what_a_control_cannot_honour_is_a_400_that_names_it(
    engine: Engine, http: httpx.AsyncClient, field: str, value: Any
) -> None:
    control = {"mode": "tilt", "beta": 1.0, **({"min_value": -2.0} if field == "min_value" else {})}
    params = {"max_new_tokens": 2, field: value} if value else {"max_new_tokens": 2}
    body = {"input_ids": make_prompt(0), "sampling_params": {**params, "custom_params": {"lenvm": control}}}
    response = await http.post(f"{engine.url}/generate", json=body)
    assert response.status_code == 400
    assert field in response.text


async def test_a_row_in_a_mixed_batch_samples_from_the_distribution_it_has_alone(
    engine: Engine, http: httpx.AsyncClient
) -> None:
    """Every decode step of every row, while long generations without control, one without values, run beside it."""
    before = len(engine.batch_sizes())
    long = [
        asyncio.create_task(engine.generate(http, make_prompt(100 + i), params, max_new_tokens=150, ignore_eos=True))
        for i, params in enumerate((None, WITHOUT_VALUES))
    ]
    while (await engine.load(http))["num_running_reqs"] < len(long):
        await asyncio.sleep(0.02)
    prompts = [make_prompt(i) for i in range(len(ROWS))]
    answers = await asyncio.gather(
        *(
            engine.generate(http, prompt, control, max_new_tokens=16, **sampling)
            for prompt, (control, sampling) in zip(prompts, ROWS, strict=True)
        )
    )
    beside = await asyncio.gather(*long)
    shared = [size for size in engine.batch_sizes()[before:] if size > len(ROWS) - 4]
    assert len(shared) >= 8, "too few decode steps held nearly all rows"
    assert sum(len(answer["output_ids"]) > 8 for answer in answers) > len(ROWS) - 4
    for prompt, answer, (control, sampling) in zip(prompts, answers, ROWS, strict=True):
        engine.check_values(prompt, answer)
        engine.check_steps(prompt, answer, control, sampling)
        assert sampling is not WITHOUT_C or "c" not in answer["text"]
    engine.check_values(make_prompt(100), beside[0])
    assert "lenvm_value" not in beside[1]["meta_info"]


async def test_greedy_rows_without_control_have_the_tokens_that_they_have_alone(
    engine: Engine, http: httpx.AsyncClient
) -> None:
    greedy = {"temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True}
    plain = [(make_prompt(300 + i), (None, WITHOUT_VALUES)[i % 2]) for i in range(6)]
    alone = [(await engine.generate(http, prompt, lenvm, **greedy))["output_ids"] for prompt, lenvm in plain]
    before = len(engine.batch_sizes())
    guided = (engine.generate(http, make_prompt(400 + i), row, max_new_tokens=24) for i, row in enumerate(CONTROLS))
    beside = await asyncio.gather(*(engine.generate(http, *request, **greedy) for request in plain), *guided)
    assert max(engine.batch_sizes()[before:]) > len(plain)
    assert [answer["output_ids"] for answer in beside[: len(plain)]] == alone


async def test_a_prompt_read_without_values_is_read_again_for_them(engine: Engine, http: httpx.AsyncClient) -> None:
    """Its cached tokens have no keys of the LenVM. Each kind of request finds what its own kind has cached."""
    prompt = make_prompt(50, 100)
    kinds = (WITHOUT_VALUES, None, CONTROLS[5], WITHOUT_VALUES, {**CONTROLS[5], **WITHOUT_VALUES})
    found = []
    for lenvm in kinds:
        answer = await engine.generate(http, prompt, lenvm, temperature=0.0)
        found.append(answer["meta_info"]["cached_tokens"] > len(prompt) // 2)  # not a first token by chance
        if lenvm is WITHOUT_VALUES:
            assert "lenvm_value" not in answer["meta_info"]
            engine.check_steps(prompt, answer, None, {"temperature": 0.0}, every=4)
        elif "values" in (lenvm or {}):
            engine.check_steps(prompt, answer, CONTROLS[5], {"temperature": 0.0}, every=4)
        else:
            engine.check_values(prompt, answer)
    assert found == [False, False, True, True, True]


async def test_candidate_values_survive_retraction(engine: Engine, http: httpx.AsyncClient) -> None:
    """More tokens than slots: retracted requests are prefilled again, and steered as a row that never was."""
    prompts = [make_prompt(200 + i, 40) for i in range(16)]
    rows = [(LONG_CONTROLS[i % len(LONG_CONTROLS)], SAMPLINGS[i % 3]) for i in range(len(prompts))]
    answers = await asyncio.gather(
        *(
            engine.generate(http, prompt, control, max_new_tokens=120, **sampling)
            for prompt, (control, sampling) in zip(prompts, rows, strict=True)
        )
    )
    retracted = [answer["meta_info"]["num_retractions"] > 0 for answer in answers]
    assert any(retracted)
    for prompt, answer, (control, sampling), again in zip(prompts, answers, rows, retracted, strict=True):
        engine.check_values(prompt, answer)
        if again:
            engine.check_steps(prompt, answer, control, sampling, every=10)
    assert (await engine.idle(http))["num_used_tokens"] == 0


async def test_candidate_values_survive_aborts_that_leave_no_slot(engine: Engine, http: httpx.AsyncClient) -> None:
    """Every mode, greedy and sampled, with shared prefixes and grammars; a third of the clients leave."""
    rng, slots = random.Random(0), asyncio.Semaphore(2 * MAX_RUNNING)
    left = 0

    async def ask(number: int) -> None:
        nonlocal left
        prompt = make_prompt(0, 70 * rng.randrange(2)) + make_prompt(number, rng.randint(2, 20))
        control, sampling = rng.choice((None, WITHOUT_VALUES, *CONTROLS)), {**rng.choice((*SAMPLINGS, LETTERS))}
        sampling["max_new_tokens"] = rng.randint(1, 40)
        patience = rng.choice((None, None, rng.uniform(0.01, 1.0)))
        async with slots:
            request = asyncio.create_task(engine.generate(http, prompt, control, **sampling))
            done, _ = await asyncio.wait({request}, timeout=patience)
            if done:
                answer = request.result()
                assert "regex" not in sampling or set(answer["text"]) <= set("abcd")
                return
            left += 1
            request.cancel()

    await asyncio.gather(*(ask(number) for number in range(NUM_ABORT_REQUESTS)))
    assert left > NUM_ABORT_REQUESTS // 20
    assert (await engine.idle(http))["num_used_tokens"] == 0
    prompts = [make_prompt(0, 70), *(make_prompt(i) for i in range(3))]
    rows = list(zip(prompts, (CONTROLS[5], CONTROLS[0], CONTROLS[8], CONTROLS[6]), strict=True))
    answers = await asyncio.gather(*(engine.generate(http, prompt, control, top_k=6) for prompt, control in rows))
    for (prompt, control), answer in zip(rows, answers, strict=True):
        engine.check_values(prompt, answer)
        engine.check_steps(prompt, answer, control, {"top_k": 6}, every=4)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="each rank is bound to a core")
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="each rank needs a GPU of its own")
async def test_both_models_are_split_over_two_ranks(
    tmp_path_factory: pytest.TempPathFactory, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")  # SGLang asks for a NUMA node a rank otherwise
    rows = list(zip((None, CONTROLS[0], CONTROLS[5], CONTROLS[8]), SAMPLINGS, strict=True))
    prompts = [make_prompt(300 + i) for i in range(len(rows))]
    with running(tmp_path_factory, tp_size="2") as engine:
        answers = await asyncio.gather(
            *(
                engine.generate(http, prompt, control, **sampling)
                for prompt, (control, sampling) in zip(prompts, rows, strict=True)
            )
        )
        for prompt, answer, (control, sampling) in zip(prompts, answers, rows, strict=True):
            engine.check_values(prompt, answer)
            engine.check_steps(prompt, answer, control, sampling, every=3)
