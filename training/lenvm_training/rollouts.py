"""Sample completions of prompts from the served engine into a resumable JSONL file.

One row a completion: ``{"prompt_id", "domain", "sample", "prompt_token_ids", "output_token_ids",
"finish_reason", "sampling"}``. ``output_token_ids`` includes the end token of a finished answer.
A run that is started again samples only what is missing.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from lenvm_training.prompts import Prompt

FINISHED = "stop"
TRUNCATED = "length"


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; stored with each row. Temperature 1 and top-p 1: the model's own distribution."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 640


class EngineError(RuntimeError):
    """The engine did not answer, or refused a request."""


async def sample_rollouts(
    prompts: list[Prompt],
    tokenizer: Any,
    engine_url: str,
    path: Path,
    num_samples: int,
    sampling: Sampling,
    concurrency: int = 64,
    seed: int = 0,
    stop: asyncio.Event | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> int:
    """Append the missing completions to ``path``, in shuffled order; return how many were added.

    Once ``stop`` is set no new completion is begun, and those under way are finished: cutting them off
    would leave out the long ones. Raises EngineError when the engine is down; rows already written stay.
    """
    jobs = [(prompt, sample) for prompt in prompts for sample in range(num_samples)]
    done = _completed(path)
    missing = [job for job in jobs if (job[0].id, job[1]) not in done]
    random.Random(seed).shuffle(missing)
    queue = iter(missing)
    added = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=engine_url, timeout=None, limits=limits, transport=transport) as client:
        with path.open("a", encoding="utf-8") as stream, tqdm(total=len(jobs), initial=len(done)) as progress:

            async def work() -> None:
                nonlocal added
                for prompt, sample in queue:
                    if stop is not None and stop.is_set():
                        return
                    row = await _sample_one(client, prompt, sample, tokenizer, sampling)
                    stream.write(json.dumps(row) + "\n")
                    stream.flush()
                    progress.update()
                    added += 1

            await asyncio.gather(*(work() for _ in range(concurrency)))
    return added


def read_rollouts(path: Path) -> Iterable[dict[str, Any]]:
    """Rows of a rollout file; a last line cut by a crash is left out and sampled again."""
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            if line.endswith("\n"):
                yield json.loads(line)


def _completed(path: Path) -> set[tuple[str, int]]:
    """The completions in ``path``, after cutting off a last line that a crash left half written."""
    if not path.exists():
        return set()
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        with path.open("r+b") as stream:
            stream.truncate(content.rfind(b"\n") + 1)
    return {(row["prompt_id"], row["sample"]) for row in read_rollouts(path)}


def prompt_token_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The prompt in the model's chat template, up to and including the start of the answer."""
    encoded = tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


async def _sample_one(
    client: httpx.AsyncClient, prompt: Prompt, sample: int, tokenizer: Any, sampling: Sampling
) -> dict[str, Any]:
    token_ids = prompt_token_ids(tokenizer, prompt)
    body = {"input_ids": token_ids, "sampling_params": asdict(sampling)}
    try:
        response = await client.post("/generate", json=body)
    except httpx.TransportError as error:
        raise EngineError(f"the engine at {client.base_url} does not answer: {error!r}") from error
    if response.status_code != 200:
        raise EngineError(f"the engine refused prompt {prompt.id}: {response.text[:200]}")
    answer = response.json()
    return {
        "prompt_id": prompt.id,
        "domain": prompt.domain,
        "sample": sample,
        "prompt_token_ids": token_ids,
        "output_token_ids": answer["output_ids"],
        "finish_reason": answer["meta_info"]["finish_reason"]["type"],
        "sampling": asdict(sampling),
    }
