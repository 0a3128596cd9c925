"""What values and length control cost: throughput of the engine with and without the plugin's head.

Three runs of the same engine on the same requests, forced to the same length: no head (``plain``),
values for every request (``values``), and half of the requests under natural control (``control``).
Rounds alternate between the engines, which are both up, idle in turn; the ratio is of summed times.
Checked first: greedy tokens with the head are those without it, and values arrive for every token.

    python benchmarks/bench_values.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from lenvm_runtime.length_control import LengthControl, build_custom_params
from lenvm_runtime.serve import NO_HEAD, ServeConfig, running_engine

CONCURRENCY = 32
PROMPT_LEN = 48
VOCABULARY = 40_000


def main() -> int:
    """Run and print the figures; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at most 8 minutes on 2 cores")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parsed = parser.parse_args()
    rounds, num_tokens = (4, 64) if parsed.quick else (10, 128)
    with (
        running_engine(ServeConfig("127.0.0.1", 8000, None, NO_HEAD)) as (_, plain_url),
        running_engine(ServeConfig("127.0.0.1", 8000, None, None)) as (_, head_url),
    ):
        figures = asyncio.run(measure(plain_url, head_url, rounds, num_tokens))
    for name, value in figures.items():
        print(f"{name:40s} {value:.4f}")
    if parsed.json:
        parsed.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


async def measure(plain_url: str, head_url: str, rounds: int, num_tokens: int) -> dict[str, float]:
    """Alternate the three kinds of runs; returns ratios of throughput and the absolute tokens/s."""
    async with httpx.AsyncClient(
        timeout=None, trust_env=False, limits=httpx.Limits(max_connections=CONCURRENCY)
    ) as client:
        await check(client, plain_url, head_url)
        kinds = {"plain": (plain_url, None), "values": (head_url, None), "control": (head_url, num_tokens)}
        times = dict.fromkeys(kinds, 0.0)
        for number in range(rounds + 1):
            for index, (kind, (url, target)) in enumerate(kinds.items()):  # each with prompts that no cache holds
                elapsed = await run_round(client, url, number * len(kinds) + index, num_tokens, target)
                if number > 0:  # the first round warms up
                    times[kind] += elapsed
                    print(f"round {number} {kind}: {CONCURRENCY * num_tokens / elapsed:.0f} tokens/s", file=sys.stderr)
    total = rounds * CONCURRENCY * num_tokens
    figures = {f"{kind}_tokens_per_s": total / elapsed for kind, elapsed in times.items()}
    figures["values_over_plain_throughput"] = times["plain"] / times["values"]
    figures["control_over_plain_throughput"] = times["plain"] / times["control"]
    return figures


async def run_round(client: httpx.AsyncClient, url: str, number: int, num_tokens: int, target: int | None) -> float:
    """Time of CONCURRENCY requests of exactly ``num_tokens`` tokens; every second one controlled with a ``target``."""
    started = time.perf_counter()
    results = await asyncio.gather(
        *(
            generate(client, url, number * CONCURRENCY + index, num_tokens, target if index % 2 else None)
            for index in range(CONCURRENCY)
        )
    )
    elapsed = time.perf_counter() - started
    assert all(len(result["output_ids"]) == num_tokens for result in results), "an answer has another length"
    return elapsed


async def check(client: httpx.AsyncClient, plain_url: str, head_url: str) -> None:
    """Stop unless the head leaves greedy tokens alone and gives a value for each."""
    plain, valued = [await generate(client, url, 0, 32, None, temperature=0.0) for url in (plain_url, head_url)]
    assert plain["output_ids"] == valued["output_ids"], "greedy tokens differ with the head"
    assert "lenvm_value" not in plain["meta_info"], "the plain engine has a head"
    assert len(valued["meta_info"]["lenvm_value"]) == 32, "a token has no value"


async def generate(
    client: httpx.AsyncClient, url: str, seed: int, num_tokens: int, target: int | None, temperature: float = 1.0
) -> dict[str, Any]:
    """One request with a prompt of its own; ``ignore_eos`` and the cap fix its length."""
    prompt = [(seed * 7919 + position * 104_729) % VOCABULARY + 10 for position in range(PROMPT_LEN)]
    params: dict[str, Any] = {"temperature": temperature, "max_new_tokens": num_tokens, "ignore_eos": True}
    if target is not None:
        params["custom_params"] = build_custom_params(LengthControl("equal", target=4 * target), values=True)
    response = await client.post(f"{url}/generate", json={"input_ids": prompt, "sampling_params": params})
    response.raise_for_status()
    result: dict[str, Any] = response.json()
    return result


if __name__ == "__main__":
    sys.exit(main())
