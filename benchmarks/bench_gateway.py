"""What the gateway costs: 32 concurrent streams through it against the same streams on the engine's own port.

Starts the default stack, or takes a running one: ``--engine-url`` (SGLang with the plugin) and ``--gateway-url``.
First checks that both give the same chunks, values and text for greedy requests; then times interleaved rounds.

Figures: ``gateway_over_direct_throughput`` (median over rounds of the ratio of completion tokens a second) and
``added_ttft_ms`` (difference of the median times to the first streamed event, all streams of all rounds).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import orjson

from lenvm_runtime.length_control import build_custom_params
from lenvm_runtime.serve import ServeConfig, free_port, running_stack

TOPICS = ("tides", "bread", "chess", "glass", "bees", "maps", "violins", "volcanoes")
CPU_SERIES = "lenvm_gateway_process_cpu_seconds_total "


@dataclass(frozen=True)
class Target:
    """Where a request goes: ``extra`` are the body fields that only this target takes."""

    name: str
    url: str
    model: str
    headers: dict[str, str]
    extra: dict[str, Any]


@dataclass(frozen=True)
class Load:
    """One timed load: ``num_streams`` at once, each of exactly ``num_tokens``."""

    num_streams: int
    num_tokens: int
    num_rounds: int


@dataclass(frozen=True)
class Result:
    """One load's outcome."""

    tokens_per_s: float
    ttfts_s: list[float]


def prompt(index: int) -> str:
    """A short question, different for each stream."""
    return f"Write {index + 2} sentences about {TOPICS[index % len(TOPICS)]}."


def request_body(target: Target, index: int, num_tokens: int) -> bytes:
    """A greedy streamed request of exactly ``num_tokens``."""
    body = {
        "model": target.model,
        "messages": [{"role": "user", "content": prompt(index)}],
        "temperature": 0,
        "max_completion_tokens": num_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return orjson.dumps({**body, **target.extra})


async def stream(client: httpx.AsyncClient, target: Target, body: bytes) -> tuple[bytes, float]:
    """The whole stream's bytes and the seconds to its first."""
    started, first, parts = time.perf_counter(), 0.0, []
    headers = {"content-type": "application/json", **target.headers}
    url = f"{target.url}/v1/chat/completions"
    async with client.stream("POST", url, content=body, headers=headers) as response:
        if response.status_code != 200:
            raise SystemExit(f"{target.name}: {response.status_code} {(await response.aread()).decode()}")
        async for part in response.aiter_raw():
            first = first or time.perf_counter() - started
            parts.append(part)
    return b"".join(parts), first


def read_chunks(data: bytes) -> list[dict[str, Any]]:
    """The chunks of a stream that ended well, without what differs between two identical requests."""
    events = data.split(b"\n\n")
    if events[-2:] != [b"data: [DONE]", b""]:
        raise SystemExit(f"a stream ended with {events[-2:]!r}")
    chunks = [orjson.loads(event.removeprefix(b"data: ")) for event in events[:-2]]
    return [{key: value for key, value in chunk.items() if key not in ("id", "created", "model")} for chunk in chunks]


def count_tokens(data: bytes) -> int:
    """The completion tokens that a stream's usage chunk reports."""
    return int(read_chunks(data[data.rindex(b'data: {"') :])[-1]["usage"]["completion_tokens"])


async def check(client: httpx.AsyncClient, direct: Target, gateway: Target, num_tokens: int) -> None:
    """Both targets give the same chunks, one request at a time, prompts cached."""
    for index in range(4):
        await stream(client, direct, request_body(direct, index, num_tokens))
        seen = [
            read_chunks((await stream(client, t, request_body(t, index, num_tokens)))[0]) for t in (direct, gateway)
        ]
        if seen[0] != seen[1]:
            raise SystemExit(f"prompt {index}: the gateway's chunks differ from the engine's")
        num_values = sum(len(c["choices"][0].get("lenvm", {}).get("values", [])) for c in seen[0] if c["choices"])
        if num_values != num_tokens:
            raise SystemExit(f"prompt {index}: {num_values} values for {num_tokens} tokens")


async def run_load(client: httpx.AsyncClient, target: Target, load: Load) -> Result:
    """All streams at once; every one must have all its tokens."""
    bodies = [request_body(target, index, load.num_tokens) for index in range(load.num_streams)]
    started = time.perf_counter()
    outcomes = await asyncio.gather(*[stream(client, target, body) for body in bodies])
    elapsed_s = time.perf_counter() - started
    if any(count_tokens(data) != load.num_tokens for data, _ in outcomes):
        raise SystemExit(f"{target.name}: a stream was short of {load.num_tokens} tokens")
    return Result(load.num_streams * load.num_tokens / elapsed_s, [first for _, first in outcomes])


async def gateway_cpu_s(client: httpx.AsyncClient, gateway: Target) -> float:
    """CPU seconds that the gateway's process has used."""
    text = (await client.get(f"{gateway.url}/metrics")).raise_for_status().text
    return float(next(line for line in text.splitlines() if line.startswith(CPU_SERIES)).split()[1])


async def measure(client: httpx.AsyncClient, direct: Target, gateway: Target, load: Load) -> dict[str, float]:
    """The figures of interleaved rounds, each target first in turn."""
    results: dict[str, list[Result]] = {direct.name: [], gateway.name: []}
    cpu_s = 0.0
    for number in range(load.num_rounds):
        for target in (direct, gateway) if number % 2 == 0 else (gateway, direct):
            before_s = await gateway_cpu_s(client, gateway)
            result = await run_load(client, target, load)
            if target is gateway:
                cpu_s += await gateway_cpu_s(client, gateway) - before_s
            results[target.name].append(result)
            print(f"round {number} {target.name}: {result.tokens_per_s:.1f} tok/s, TTFT {median(result.ttfts_s):.3f} s")
    pairs = list(zip(results["gateway"], results["direct"], strict=True))
    ttft_s = {name: median(t for result in some for t in result.ttfts_s) for name, some in results.items()}
    return {
        "gateway_over_direct_throughput": round(median(g.tokens_per_s / d.tokens_per_s for g, d in pairs), 4),
        "added_ttft_ms": round(1000 * (ttft_s["gateway"] - ttft_s["direct"]), 2),
        "direct_tokens_per_s": round(median(d.tokens_per_s for _, d in pairs), 2),
        "gateway_tokens_per_s": round(median(g.tokens_per_s for g, _ in pairs), 2),
        "gateway_cpu_us_per_token": round(1e6 * cpu_s / (load.num_rounds * load.num_streams * load.num_tokens), 1),
        "num_streams": load.num_streams,
        "num_tokens": load.num_tokens,
        "num_rounds": load.num_rounds,
    }


async def bench(engine_url: str, gateway_url: str, api_key: str, load: Load) -> dict[str, float]:
    """Check, warm up, measure."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    async with httpx.AsyncClient(timeout=600, trust_env=False, limits=httpx.Limits(max_connections=None)) as client:
        models = (await client.get(f"{gateway_url}/v1/models", headers=headers)).raise_for_status().json()
        model = models["data"][0]["id"]
        direct = Target("direct", engine_url, model, {}, {"custom_params": build_custom_params(None, values=True)})
        gateway = Target("gateway", gateway_url, model, headers, {})
        await check(client, direct, gateway, 16)
        print("checked: same chunks, values and text")
        await run_load(client, direct, Load(load.num_streams, 4, 1))
        return await measure(client, direct, gateway, load)


@contextmanager
def running_urls(engine_url: str | None, gateway_url: str | None) -> Iterator[tuple[str, str]]:
    """The addresses of the stack given, or of one started for the benchmark."""
    if engine_url and gateway_url:
        yield engine_url.rstrip("/"), gateway_url.rstrip("/")
        return
    with running_stack(ServeConfig("127.0.0.1", free_port(), None, None)) as stack:
        yield stack.engine_url, stack.gateway_url


def main() -> None:
    """Read the arguments, run, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-url", help="with --gateway-url: a running stack (default: start one)")
    parser.add_argument("--gateway-url")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: at most 8 minutes on 2 cores")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    load = Load(arguments.streams, *((48, 3) if arguments.quick else (128, 7)))
    if bool(arguments.engine_url) != bool(arguments.gateway_url):
        parser.error("--engine-url and --gateway-url go together")
    with running_urls(arguments.engine_url, arguments.gateway_url) as (engine_url, gateway_url):
        measured = asyncio.run(bench(engine_url, gateway_url, arguments.api_key, load))
    figures = orjson.dumps(measured, option=orjson.OPT_INDENT_2)
    sys.stdout.buffer.write(figures + b"\n")
    if arguments.json:
        arguments.json.write_bytes(figures + b"\n")


if __name__ == "__main__":
    main()
