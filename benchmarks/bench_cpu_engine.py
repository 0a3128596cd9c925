"""The CPU engine against SGLang's own CPU attention and against llama.cpp's server, on the default model.

Decode: tokens/s at several numbers of requests and lengths of context, stock SGLang (``torch_native`` attention, this
project's plugin left out, its platform class kept, without which SGLang does not start here) and ours. The clock runs
from the eighth token of a batch to its last: the time of batches of long answers less that of batches of eight tokens
(admitting 96 requests takes as long as ten steps). Rounds alternate; engines that are not asked are idle.

llama.cpp: the OpenAI server of llama-cpp-python on the 4-bit GGUF file that our bf16 folder is made from, whole
requests with short prompts, prefill included. That server answers one request at a time; it runs with one thread, with
half of the cores and with all, and the best counts. Its environment is built once, in the user's cache (a few minutes),
for this CPU but without AMX: with it this version crashes at the first token of this model.

Checked first: greedy tokens of the two SGLang engines for a batch of word prompts are the same, or part where a plain
transformers forward in fp32 has the two tokens within what rounding to bf16 moves (the stock engine's own error is
0.07 nats in the root mean square, 0.4 at most).
Peak memory is the sum of the processes' high-water marks of resident memory.

    python benchmarks/bench_cpu_engine.py [--quick] [--json FILE] [--no-llamacpp]
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import psutil

from lenvm_kernels import torchvision_schema
from lenvm_runtime import default_model
from lenvm_runtime.config import WITHOUT_PLUGIN
from lenvm_runtime.serve import NO_HEAD, ServeConfig, free_port, running_engine

LLAMACPP = "llama-cpp-python[server]==0.3.36"
LLAMACPP_FLAGS = "-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8"
VOCABULARY = 40_000
NEAR_TIE_NATS = 0.25  # in fp32
NUM_CHECKED, CHECKED_TOKENS = 32, 24
WORDS = "the cat river stone green music window paper under seven quiet mountain garden yellow morning".split()
REQUESTS = (1, 8, 32, 96)
QUICK_LENGTHS, FULL_LENGTHS = (300,), (32, 300, 1000)
FIRST_TOKENS, NUM_TOKENS = 8, 48
ROUNDS = 2
LLAMACPP_REQUESTS = (1, 8, 32)
LLAMACPP_TOKENS = 48


def main() -> int:
    """Run and print the figures; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at most 8 minutes on 2 cores, llama.cpp's build aside")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--no-llamacpp", action="store_true", help="leave llama.cpp out")
    parsed = parser.parse_args()
    cells = [(n, length) for n in REQUESTS for length in (QUICK_LENGTHS if parsed.quick else FULL_LENGTHS)]
    python = None if parsed.no_llamacpp else llamacpp_python()
    capacity = str(max(n * (length + NUM_TOKENS + 16) for n, length in cells) + 4096)
    with sglang(stock=True, capacity=capacity) as stock, sglang(stock=False, capacity=capacity) as ours:
        figures = asyncio.run(measure_decode({"torch_native": stock[1], "ours": ours[1]}, cells))
        figures |= memory_figures({"torch_native": stock[0], "ours": ours[0]})
        report(figures, parsed.json)  # kept if the rest fails
        if python is not None:
            report(figures | compare_llamacpp(python, ours[1]), parsed.json)
    return 0


def report(figures: dict[str, float], path: Path | None) -> None:
    """Print figures, and write them to ``path``."""
    for name, value in figures.items():
        print(f"{name:44s} {value:.4f}", flush=True)
    if path:
        path.write_text(json.dumps(figures, indent=2) + "\n")


@contextmanager
def sglang(stock: bool, capacity: str) -> Iterator[tuple[int, str]]:
    """An engine without a head: its process id and address."""
    arguments: tuple[str, ...] = ("--max-total-tokens", capacity, "--max-running-requests", "96")
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))}
    if stock:
        arguments += ("--attention-backend", "torch_native")
        environment |= {"SGLANG_PLUGINS": "lenvm_cpu", WITHOUT_PLUGIN: "1"}  # the platform alone
    config = ServeConfig("127.0.0.1", 8000, None, NO_HEAD, arguments)
    with ExitStack() as stack:
        with patch.dict(os.environ, environment):
            process, url = stack.enter_context(running_engine(config))
        yield process.pid, url


async def measure_decode(urls: dict[str, str], cells: list[tuple[int, int]]) -> dict[str, float]:
    """Tokens/s of every engine and cell, and the ratios."""
    figures: dict[str, float] = {}
    async with new_client(max_connections=96) as client:
        figures |= await check_greedy(client, urls["torch_native"], urls["ours"])
        for num_requests, length in cells:
            prompts = [make_ids(length, index) for index in range(num_requests)]
            times = dict.fromkeys(urls, 0.0)
            for url in urls.values():
                await time_batch(client, url, prompts, 1)
            for _ in range(ROUNDS):
                for name, url in urls.items():
                    times[name] += await time_batch(client, url, prompts, NUM_TOKENS)
                    times[name] -= await time_batch(client, url, prompts, FIRST_TOKENS)
            num_tokens = ROUNDS * num_requests * (NUM_TOKENS - FIRST_TOKENS)
            for name, elapsed in times.items():
                figures[f"{name}_{num_requests}x{length}_tokens_per_s"] = num_tokens / elapsed
            ratio = times["torch_native"] / times["ours"]
            figures[f"ours_over_torch_native_{num_requests}x{length}"] = ratio
            print(f"{num_requests} x {length}: ours / torch_native {ratio:.2f}", file=sys.stderr, flush=True)
    figures["ours_over_torch_native_1"] = figures["ours_over_torch_native_1x300"]
    return figures


def new_client(max_connections: int) -> httpx.AsyncClient:
    """A client that waits as long as it takes, and drops idle connections before uvicorn does (5 s)."""
    limits = httpx.Limits(max_connections=max_connections, keepalive_expiry=1.0)
    return httpx.AsyncClient(timeout=None, trust_env=False, limits=limits)


async def time_batch(client: httpx.AsyncClient, url: str, prompts: list[list[int]], num_tokens: int) -> float:
    """Seconds that `run_batch` takes."""
    started = time.perf_counter()
    await run_batch(client, url, prompts, num_tokens)
    return time.perf_counter() - started


async def run_batch(
    client: httpx.AsyncClient, url: str, prompts: Sequence[list[int] | str], num_tokens: int
) -> list[Any]:
    """One answer of exactly ``num_tokens`` to each prompt, all at once."""
    answers = await asyncio.gather(*(generate(client, url, prompt, num_tokens) for prompt in prompts))
    assert all(len(answer["output_ids"]) == num_tokens for answer in answers), "an answer has another length"
    return answers


async def check_greedy(client: httpx.AsyncClient, stock_url: str, our_url: str) -> dict[str, float]:
    """Share of prompts with the same greedy tokens, and the greatest lead, in nats, of one token where they part.

    Stops where that is no near tie.
    """
    prompts = [make_text(1000 + index, 20 + 10 * index) for index in range(NUM_CHECKED)]
    stock, ours = [
        [answer["output_ids"] for answer in await run_batch(client, url, prompts, CHECKED_TOKENS)]
        for url in (stock_url, our_url)
    ]
    parted = [row for row in zip(prompts, stock, ours, strict=True) if row[1] != row[2]]
    greatest = max(reference_leads(parted), default=0.0)
    assert greatest <= NEAR_TIE_NATS, f"the engines part where one token leads by {greatest:.2f} nats in fp32"
    return {"greedy_equal_share": 1 - len(parted) / NUM_CHECKED, "greedy_greatest_lead_nats": greatest}


def reference_leads(parted: list[tuple[str, list[int], list[int]]]) -> Iterator[float]:
    """By how many nats one of the two first different tokens leads the other, by transformers in fp32."""
    if not parted:
        return
    torchvision_schema.declare_if_missing()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = default_model.ensure_default_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, stock, ours in parted:
        step = next(index for index, (a, b) in enumerate(zip(stock, ours, strict=True)) if a != b)
        with torch.inference_mode():
            logits = model(torch.tensor([tokenizer(prompt)["input_ids"] + stock[:step]])).logits[0, -1]
        yield abs(float(logits[stock[step]] - logits[ours[step]]))


async def generate(client: httpx.AsyncClient, url: str, prompt: list[int] | str, num_tokens: int) -> Any:
    """A greedy answer of exactly ``num_tokens``."""
    given = {"text": prompt} if isinstance(prompt, str) else {"input_ids": prompt}
    sampling = {"temperature": 0.0, "max_new_tokens": num_tokens, "ignore_eos": True}
    response = await client.post(f"{url}/generate", json={**given, "sampling_params": sampling})
    response.raise_for_status()
    return response.json()


def make_ids(length: int, seed: int) -> list[int]:
    """A prompt of its own, ``length`` tokens."""
    return [(seed * 7919 + position * 104_729) % VOCABULARY + 10 for position in range(length)]


def make_text(seed: int, num_words: int) -> str:
    """A prompt of its own, of words."""
    return f"Note {seed}: " + " ".join(
        WORDS[(seed * 7 + place * (3 + seed % 4)) % len(WORDS)] for place in range(num_words)
    )


def memory_figures(processes: dict[str, int]) -> dict[str, float]:
    """Peak resident memory of each engine's processes in GB, and the ratio."""
    peaks = {name: peak_memory(pid) for name, pid in processes.items()}
    figures = {f"{name}_peak_rss_gb": peak / 1e9 for name, peak in peaks.items()}
    return figures | {"ours_over_torch_native_peak_rss": peaks["ours"] / peaks["torch_native"]}


def peak_memory(pid: int) -> int:
    """Sum of the high-water marks of a process and its descendants, in bytes."""
    root = psutil.Process(pid)
    statuses = [Path(f"/proc/{process.pid}/status").read_text() for process in (root, *root.children(recursive=True))]
    lines = [line for status in statuses for line in status.splitlines() if line.startswith("VmHWM")]
    return sum(int(line.split()[1]) * 1024 for line in lines)


def compare_llamacpp(python: Path, our_url: str) -> dict[str, float]:
    """Whole requests of LLAMACPP_TOKENS greedy tokens: tokens/s of both servers, and the ratios."""
    ours = asyncio.run(measure_completions(our_url, default_model.MODEL_NAME, {"ignore_eos": True}))
    theirs: dict[int, float] = {}
    cores = len(os.sched_getaffinity(0))
    for num_threads in sorted({1, max(1, cores // 2), cores}):
        with llamacpp_server(python, num_threads) as url:
            measured = asyncio.run(measure_completions(url, "model", {"min_tokens": LLAMACPP_TOKENS}))
        print(f"llama.cpp with {num_threads} threads: {measured}", file=sys.stderr, flush=True)
        theirs = {n: max(rate, theirs.get(n, 0.0)) for n, rate in measured.items()}
    figures: dict[str, float] = {}
    for n in LLAMACPP_REQUESTS:
        figures |= {f"ours_{n}_whole_tokens_per_s": ours[n], f"llamacpp_{n}_whole_tokens_per_s": theirs[n]}
        figures[f"ours_over_llamacpp_{n}"] = ours[n] / theirs[n]
    return figures


async def measure_completions(url: str, model: str, options: dict[str, Any]) -> dict[int, float]:
    """Tokens/s of ``/v1/completions`` for each number of requests at once."""
    rates = {}
    async with new_client(max_connections=32) as client:

        async def complete(index: int) -> None:
            body = {
                "model": model,
                "prompt": make_text(index, 30),
                "max_tokens": LLAMACPP_TOKENS,
                "temperature": 0.0,
                **options,
            }
            response = await client.post(f"{url}/v1/completions", json=body)
            response.raise_for_status()
            assert response.json()["usage"]["completion_tokens"] == LLAMACPP_TOKENS, "an answer has another length"

        await complete(99)  # warms up
        for n in LLAMACPP_REQUESTS:
            started = time.perf_counter()
            await asyncio.gather(*(complete(100 * n + index) for index in range(n)))
            rates[n] = n * LLAMACPP_TOKENS / (time.perf_counter() - started)
    return rates


@contextmanager
def llamacpp_server(python: Path, num_threads: int) -> Iterator[str]:
    """llama.cpp's OpenAI server on the default model's GGUF file: its address."""
    spec = importlib.util.find_spec(default_model.GGUF_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    model = next(Path(spec.origin).parent.rglob(default_model.GGUF_FILE))
    port = free_port()
    command = [str(python), "-m", "llama_cpp.server", "--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--n_ctx", "2048", "--n_threads", str(num_threads), "--n_threads_batch", str(num_threads)]
    command += ["--interrupt_requests", "false", "--verbose", "false"]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"{url}/v1/models", server)
        yield url
    finally:
        server.terminate()
        server.wait(20)


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    """Return once ``url`` answers; RuntimeError when the server ends or takes over two minutes."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.3)
    raise RuntimeError(f"{url} does not answer")


def llamacpp_python() -> Path:
    """The interpreter of llama.cpp's environment; builds it at the first call."""
    folder = default_model.cache_dir() / "llamacpp" / "no-amx"
    python = folder / "bin" / "python"
    probe = [str(python), "-c", "import llama_cpp.server"]
    if not python.exists() or subprocess.run(probe, capture_output=True, check=False).returncode:
        print("building llama-cpp-python (once, a few minutes)", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        environment = {**os.environ, "CMAKE_ARGS": LLAMACPP_FLAGS}
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir", LLAMACPP]
        subprocess.run(command, check=True, env=environment)
    return python


if __name__ == "__main__":
    sys.exit(main())
