"""What guided decoding costs: a separate LenVM, a candidate head, values alone, over plain decoding.

Every kind of run sends as many requests, forced to the same length, with prompts that are in no cache. The engines run
one after the other, so that large models fit on one GPU; the plain engine runs first and last, and its mean is what the
others are divided by. Rows without control are sampled from the whole vocabulary, for which no sampler sorts it.
Checked first on every engine: greedy tokens without control are the plain engine's, values arrive where there is a
LenVM, and control changes the distribution that is sampled from.

    plain         no LenVM; on a GPU stock SGLang, on a CPU with this project's attention and layers
    values        a head: V of every token
    head          a head, every request under control (candidate head), top-k 5
    head_idle     a head, no request asks for values (it computes them, and they stay in the engine)
    states        a separate LenVM, no request under control: one row a request and step
    k5, k15       a separate LenVM, every request under control, top-k 5 and 15
    lenvm_idle    a separate LenVM, no request asks for values: it does not run
    int8_*        the separate LenVM in int8, on a CPU that multiplies bytes

``*_over_plain`` are ratios of wall-clock time (smaller is better), ``idle_plugin_over_stock`` (a head) and
``idle_lenvm_over_stock`` (a separate LenVM) of throughput (larger is better), ``*_step_ms`` wall clock
over decode steps, ``*_PART_ms`` the mean host time of a part of the decode steps that held every request
(`lenvm_runtime.step_times`; what is left of ``*_step_ms`` is scheduling and prefill). ``host_syncs_per_step`` counts
the operators in this project's part of a decode step that make the host wait for a device (`host_reads.py`).

    python benchmarks/bench_guided.py [--quick] [--json FILE] [--model M --lenvm L --head H] [-- SGLANG ARGUMENTS]

Without --model: the default model, its shipped head, and a separate LenVM of the same size.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx

from lenvm_kernels import decoder_layer
from lenvm_runtime.config import WITHOUT_PLUGIN
from lenvm_runtime.length_control import LengthControl, build_custom_params
from lenvm_runtime.serve import NO_HEAD, ServeConfig, running_engine
from lenvm_runtime.value_model.source import find_folder
from sample_lenvm import make_lenvm

PROMPT_LEN = 48
VOCABULARY = 40_000
WHOLE_VOCABULARY = -1
CONTROL = LengthControl("tilt", beta=-20.0)
CHECKED_SEED = 30_000
TOP_LOGPROBS = 20
IMPOSSIBLE = -1e4
MIN_EFFECT = 1e-3


@dataclass(frozen=True)
class Kind:
    """One kind of run: the requests' control, the number of candidates among which it chooses, who asks for values."""

    name: str
    control: LengthControl | None = None
    top_k: int = WHOLE_VOCABULARY
    values: bool = True


PLAIN = Kind("plain")
HEAD_KINDS = (Kind("values"), Kind("head", CONTROL, 5), Kind("head_idle", values=False))
LENVM_KINDS = (
    Kind("states"),
    Kind("k5", CONTROL, 5),
    Kind("k15", CONTROL, 15),
    Kind("lenvm_idle", values=False),
)
INT8_KINDS = (Kind("int8_states"), Kind("int8_k5", CONTROL, 5))


Round = tuple[float, float]
"""When a round began and ended, in seconds since the epoch."""


def len_s(taken: Round) -> float:
    """Seconds that a round took."""
    return taken[1] - taken[0]


@dataclass(frozen=True)
class Setting:
    """What is served and asked."""

    model: str | None
    head: Path | None
    lenvm: Path
    engine_arguments: tuple[str, ...]
    concurrency: int
    num_tokens: int
    rounds: int
    step_times: Path


def main() -> int:
    """Run and print the figures; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--model", help="model folder or hub name, with --lenvm and perhaps --head")
    parser.add_argument("--lenvm", help="separate LenVM, folder or hub name")
    parser.add_argument("--head", help="head folder; without one the head's kinds are left out")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--tokens", type=int, help="tokens an answer")
    parser.add_argument("engine_arguments", nargs="*", help="after --: SGLang's own arguments")
    parsed = parser.parse_args()
    if parsed.model and not parsed.lenvm:
        parser.error("--model needs --lenvm")
    with setting(parsed) as chosen:
        figures = measure(chosen)
    for name, value in figures.items():
        print(f"{name:40s} {value:.4f}")
    if parsed.json:
        parsed.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


@contextmanager
def setting(parsed: argparse.Namespace) -> Iterator[Setting]:
    """The setting of the command line; the default LenVM lives in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield Setting(
            model=parsed.model,
            head=find_folder(parsed.head) if parsed.head else None,
            lenvm=find_folder(parsed.lenvm) if parsed.lenvm else make_lenvm(_new_folder(Path(folder))),
            engine_arguments=tuple(parsed.engine_arguments),
            concurrency=parsed.concurrency,
            num_tokens=parsed.tokens or (32 if parsed.quick else 128),
            rounds=2 if parsed.quick else 5,
            step_times=Path(folder) / "step_times.jsonl",
        )


def _new_folder(parent: Path) -> Path:
    folder = parent / "lenvm"
    folder.mkdir()
    return folder


def measure(chosen: Setting) -> dict[str, float]:
    """Rounds of every kind -> the figures."""
    import torch

    os.environ["LENVM_STEP_TIMES"] = str(chosen.step_times)
    times: dict[str, list[Round]] = {}
    greedy: list[list[int]] = []
    runs: list[tuple[Path | None, tuple[Kind, ...]]] = [(NO_HEAD, (PLAIN,))]
    if chosen.model is None or chosen.head:
        runs.append((chosen.head, HEAD_KINDS))
    runs.append((chosen.lenvm, LENVM_KINDS))
    if not torch.cuda.is_available() and decoder_layer.runs_in_int8():
        runs.append((chosen.lenvm, INT8_KINDS))
    runs.append((NO_HEAD, (PLAIN,)))
    for lenvm, kinds in runs:
        stock = torch.cuda.is_available() and lenvm is NO_HEAD  # on a CPU, SGLang needs our platform
        without_plugin = {WITHOUT_PLUGIN: "1", "SGLANG_PLUGINS": "none"} if stock else {}
        config = ServeConfig("127.0.0.1", 8000, chosen.model, lenvm, chosen.engine_arguments, kinds is INT8_KINDS)
        with patch.dict(os.environ, without_plugin), running_engine(config) as (_, url):
            asyncio.run(measure_engine(url, kinds, chosen, times, greedy))
    steps = [json.loads(line) for line in chosen.step_times.read_text().splitlines()]
    figures = to_figures({name: sum(map(len_s, rounds)) / len(rounds) for name, rounds in times.items()}, chosen)
    parts = part_figures(steps, times, chosen.concurrency)
    assert "lenvm_idle_value_forward_ms" not in parts, "the LenVM ran for requests that do not need it"
    return figures | parts


async def measure_engine(
    url: str, kinds: tuple[Kind, ...], chosen: Setting, times: dict[str, list[Round]], greedy: list[list[int]]
) -> None:
    """Rounds that alternate between the kinds of one engine; the first round warms up."""
    async with httpx.AsyncClient(
        timeout=None, trust_env=False, limits=httpx.Limits(max_connections=chosen.concurrency)
    ) as client:
        await check(client, url, kinds, greedy)
        for number in range(chosen.rounds + 1):
            for index, kind in enumerate(kinds):
                taken = await run_round(client, url, number * len(kinds) + index, kind, chosen)
                if number > 0:
                    times.setdefault(kind.name, []).append(taken)
                    rate = chosen.concurrency * chosen.num_tokens / len_s(taken)
                    print(f"round {number} {kind.name}: {rate:.0f} tokens/s", file=sys.stderr)


async def check(client: httpx.AsyncClient, url: str, kinds: tuple[Kind, ...], greedy: list[list[int]]) -> None:
    """Stop unless greedy tokens are the first engine's, values come from LenVMs, and control acts on its candidates."""
    result = await generate(client, url, CHECKED_SEED, 24, Kind("check"), temperature=0.0)
    greedy.append(result["output_ids"])
    assert greedy[-1] == greedy[0], "greedy tokens differ from the plain engine's"
    has_values = len(result["meta_info"].get("lenvm_value", [])) == 24
    assert has_values == (kinds != (PLAIN,)), "values are missing, or the plain engine has a LenVM"
    for kind in (kind for kind in kinds if kind.control):
        free = await next_token_logprobs(client, url, Kind("free", top_k=kind.top_k))
        controlled = await next_token_logprobs(client, url, kind)
        assert len(controlled) == kind.top_k, f"{kind.name}: not as many candidates as top-k"
        logits = [logprob - free[token] for token, logprob in controlled.items()]
        assert max(logits) - min(logits) > MIN_EFFECT, f"{kind.name}: control changes nothing"


async def next_token_logprobs(client: httpx.AsyncClient, url: str, kind: Kind) -> dict[int, float]:
    """The first token's candidates, by their log-probability."""
    asked = {"return_logprob": True, "top_logprobs_num": TOP_LOGPROBS}
    result = await generate(client, url, CHECKED_SEED, 1, kind, **asked)
    (top,) = result["meta_info"]["output_top_logprobs"]
    return {token: logprob for logprob, token, _ in top if logprob is not None and logprob > IMPOSSIBLE}


async def run_round(client: httpx.AsyncClient, url: str, number: int, kind: Kind, chosen: Setting) -> Round:
    """Begin and end of ``concurrency`` requests of exactly ``num_tokens`` tokens."""
    started = time.time()
    seeds = range(number * chosen.concurrency, (number + 1) * chosen.concurrency)
    results = await asyncio.gather(*(generate(client, url, seed, chosen.num_tokens, kind) for seed in seeds))
    ended = time.time()
    assert all(len(result["output_ids"]) == chosen.num_tokens for result in results), "an answer has another length"
    return started, ended


async def generate(
    client: httpx.AsyncClient, url: str, seed: int, num_tokens: int, kind: Kind, temperature: float = 1.0, **asked: Any
) -> dict[str, Any]:
    """One request with a prompt of its own; ``ignore_eos`` and the cap fix its length. ``asked``: more fields."""
    prompt = [(seed * 7919 + position * 104_729) % VOCABULARY + 10 for position in range(PROMPT_LEN)]
    params: dict[str, Any] = {
        "temperature": temperature,
        "top_k": kind.top_k,
        "max_new_tokens": num_tokens,
        "ignore_eos": True,
        "custom_params": build_custom_params(kind.control, kind.values),
    }
    response = await client.post(f"{url}/generate", json={"input_ids": prompt, "sampling_params": params, **asked})
    response.raise_for_status()
    result: dict[str, Any] = response.json()
    return result


def part_figures(
    steps: Iterable[Mapping[str, Any]], rounds: Mapping[str, list[Round]], num_rows: int
) -> dict[str, float]:
    """Mean milliseconds of each part over the decode steps of all ``num_rows`` requests within the rounds of a kind."""
    full = [step for step in steps if step["decode"] and step["rows"] == num_rows]
    figures: dict[str, float] = {}
    for kind, taken in rounds.items():
        within = [step for step in full if any(began <= step["ended"] <= ended for began, ended in taken)]
        seconds: Counter[str] = Counter()
        for step in within:
            seconds.update(step["seconds"])
        figures |= {f"{kind}_{part}_ms": 1000 * total / len(within) for part, total in sorted(seconds.items())}
    return figures


def to_figures(seconds: dict[str, float], chosen: Setting) -> dict[str, float]:
    """Mean seconds a round by kind -> ratios, times a step, host reads a step."""
    import torch

    from host_reads import count_host_reads  # imports SGLang, which the engines do not wait for

    plain = seconds["plain"]
    ratios = {
        "guided_over_plain_k5": "k5",
        "guided_over_plain_k15": "k15",
        "candidate_head_over_plain": "head",
        "values_only_over_plain": "values",
        "lenvm_values_over_plain": "states",
        "guided_over_plain_k5_int8": "int8_k5",
        "lenvm_values_over_plain_int8": "int8_states",
    }
    figures = {key: seconds[name] / plain for key, name in ratios.items() if name in seconds}
    idle = {"idle_plugin_over_stock": "head_idle", "idle_lenvm_over_stock": "lenvm_idle"}
    figures |= {key: plain / seconds[name] for key, name in idle.items() if name in seconds}
    device = "cuda" if torch.cuda.is_available() else "meta"  # which stands for an accelerator
    figures["host_syncs_per_step"] = float(sum(count_host_reads(device=device).values()))
    for name, elapsed in seconds.items():
        figures[f"{name}_step_ms"] = 1000 * elapsed / chosen.num_tokens
        figures[f"{name}_tokens_per_s"] = chosen.concurrency * chosen.num_tokens / elapsed
    return figures


if __name__ == "__main__":
    sys.exit(main())
