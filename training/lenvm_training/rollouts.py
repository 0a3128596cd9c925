"""Sample completions of prompts from a served model into a resumable JSONL file.

One row a completion: ``{"prompt_id", "prompt_digest", "domain", "sample", "prompt_token_ids", "output_token_ids",
"finish_reason", "sampling", "tokenizer"}`` and ``images`` where the prompt has some.
``output_token_ids`` includes the end token of a finished answer; ``tokenizer`` is the fingerprint of
the vocabulary. A run that is started again samples only what is missing (or was aborted), with the same sampling.

Completions that were cut by a lower token limit can be gone on with (`Beginnings`): given its first tokens, the rest
of a completion has the distribution that it would have had in one piece.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import random
import resource
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import httpx
from jinja2 import TemplateError
from tqdm import tqdm

from lenvm_training.endpoints import (
    WHOLE,
    Completion,
    Endpoint,
    EngineError,
    MissingCompletionsError,
    Request,
    Retry,
    Sampling,
    connect,
)
from lenvm_training.prompts import Prompt, parse_object
from lenvm_training.tokens import tokenizer_fingerprint

FINISHED, TRUNCATED = WHOLE
CONNECT_TIMEOUT_S = 60.0
POOL_CONNECTIONS = 64
"""Connections a client: the time httpx spends in choosing one grows with more than the square of their number."""
SPARE_FILES = 256
IDENTIFYING_FIELDS = {"prompt_id": str, "sample": int, "finish_reason": str}

Beginnings = Mapping[tuple[str, int], dict[str, Any]]
"""Rows sampled with a lower token limit, by prompt id and sample: cut ones are gone on with, ended ones taken over."""


class RolloutWriteError(RuntimeError):
    """A row could not be written (a full disk, say); the rows before it stay."""


class PromptEncoder(Protocol):
    """How a prompt becomes the token ids that are completed."""

    fingerprint: str

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompt up to where the answer starts. Raises ValueError for one that cannot be written so."""


class ChatEncoder:
    """The model's chat template, up to and including the start of the answer. Text only."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.fingerprint = tokenizer_fingerprint(tokenizer)

    def encode(self, prompt: Prompt) -> list[int]:
        return prompt_token_ids(self._tokenizer, prompt)


class ImageChatEncoder:
    """The chat template of a vision-language model's processor: image tokens as many as the images need."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.fingerprint = tokenizer_fingerprint(processor.tokenizer)

    def encode(self, prompt: Prompt) -> list[int]:
        from lenvm_training.rollout_data import open_image

        with template_refusals(f"prompt {prompt.id}"):
            text = self._processor.apply_chat_template(prompt.messages, add_generation_prompt=True, tokenize=False)
        images = [open_image(path) for path in prompt.images] or None
        encoded = self._processor(text=[text], images=images)
        return [int(token) for token in encoded["input_ids"][0]]


class CachedEncoder:
    """Encodes each prompt (by its id) once: pictures above all are slow."""

    def __init__(self, encoder: PromptEncoder) -> None:
        self._encoder = encoder
        self._token_ids: dict[str, list[int]] = {}
        self.fingerprint = encoder.fingerprint

    def encode(self, prompt: Prompt) -> list[int]:
        if prompt.id not in self._token_ids:
            self._token_ids[prompt.id] = self._encoder.encode(prompt)
        return self._token_ids[prompt.id]


async def sample_rollouts(
    prompts: list[Prompt],
    encoder: PromptEncoder,
    engine_url: str,
    path: Path,
    num_samples: int,
    sampling: Sampling,
    concurrency: int = 64,
    seed: int = 0,
    api: str = "engine",
    retry: Retry | None = None,
    stop: asyncio.Event | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
    beginnings: Beginnings | None = None,
) -> int:
    """Append the missing completions to ``path``, in shuffled order; return how many were added.

    Those of ``beginnings`` are not begun anew.

    Once ``stop`` is set no new completion is begun, and those under way are finished: cutting them off
    would leave out the long ones. So it is when ``concurrency`` requests (at least two) in a row had no answer in
    all their tries: EngineError, the engine is down. Fewer are passed over: MissingCompletionsError, at the end.
    RolloutWriteError when a row cannot be written; rows already written stay. ValueError: ``path`` holds rollouts of
    another tokenizer or sampling or of prompts that have changed, or another process is writing to it; ``engine_url``
    is no address; the system does not allow as many connections as ``concurrency``; or a prompt cannot be completed, or
    none can (what is under way then is finished, too).
    """
    _check_url(engine_url)
    reserve_files(concurrency)
    retry = retry or Retry()
    jobs = [(prompt, sample) for prompt in prompts for sample in range(num_samples)]
    added = 0
    unusable: list[ValueError] = []
    given_up = _GivenUp(max(2, concurrency))
    path.parent.mkdir(parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        write = stack.enter_context(_writer(path))
        done = _completed(path, prompts, encoder, sampling)
        missing = [job for job in jobs if (job[0].id, job[1]) not in done]
        random.Random(seed).shuffle(missing)
        queue = iter(missing)
        endpoints = []
        for _ in range(0, concurrency, POOL_CONNECTIONS):
            client = await stack.enter_async_context(_client(engine_url, retry.timeout_s, transport))
            endpoints.append(await connect(api, client, retry))
        progress = stack.enter_context(_Progress(len(jobs), len(jobs) - len(missing)))

        async def work(endpoint: Endpoint) -> None:
            nonlocal added
            for prompt, sample in queue:
                if unusable or given_up.is_down or (stop is not None and stop.is_set()):
                    return
                begun = (beginnings or {}).get((prompt.id, sample))
                try:
                    row = await _sample_one(endpoint, prompt, sample, encoder, sampling, begun)
                except EngineError as error:
                    given_up.add(error)
                    continue
                except ValueError as error:
                    unusable.append(error)
                    return
                write(row)
                progress.count(row)
                if len(row["output_token_ids"]) > row.get("begun", 0):
                    given_up.in_a_row = 0
                added += 1

        await _run_all(work(endpoints[number % len(endpoints)]) for number in range(concurrency))
    if unusable:
        raise unusable[0]
    if stop is None or not stop.is_set():  # else more is missing, and the caller knows why
        given_up.raise_last(added)
    return added


@dataclass
class _GivenUp:
    """Requests that had no usable answer in all their tries. The engine is down after ``patience`` in a row."""

    patience: int
    errors: list[EngineError] = field(default_factory=list)
    in_a_row: int = 0
    is_down: bool = False

    def add(self, error: EngineError) -> None:
        self.errors.append(error)
        self.in_a_row += 1
        self.is_down = self.is_down or self.in_a_row >= self.patience

    def raise_last(self, num_answered: int) -> None:
        if self.is_down:
            raise self.errors[-1]
        if self.errors:
            missing = f"{len(self.errors)} completions are missing; the last: " if num_answered else ""
            raise MissingCompletionsError(f"{missing}{self.errors[-1]}")


def _check_url(url: str) -> None:
    """Raises ValueError for what is no address of a server."""
    name = "rollouts.engine_url / --engine-url"
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"{name}: {url!r} is no address ({error})") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"{name}: must be http://HOST:PORT, got {url!r}")


def reserve_files(connections: int) -> None:
    """Raise this process's limit on open files for so many connections. Raises ValueError above the hard limit."""
    needed = connections + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if needed > hard != resource.RLIM_INFINITY:
        raise ValueError(
            f"concurrency: {connections} connections need {needed} open files, the system allows {hard} (ulimit -Hn)"
        )
    if needed > soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _client(url: str, timeout_s: float, transport: httpx.AsyncBaseTransport | None) -> httpx.AsyncClient:
    """Connections are kept open; the key of OPENAI_API_KEY goes along where it is set."""
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=POOL_CONNECTIONS, max_keepalive_connections=POOL_CONNECTIONS)
    timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))
    return httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits, headers=headers, transport=transport)


async def _run_all(coroutines: Iterable[Any]) -> None:
    """Run together; the first error ends all and is raised itself."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Progress:
    """A bar over completions with tokens/s, the share that finished, and the time left."""

    def __init__(self, total: int, done: int) -> None:
        self._bar = tqdm(total=total, initial=done, unit="completion")
        self._started = time.monotonic()
        self._tokens = self._added = self._finished = 0

    def count(self, row: dict[str, Any]) -> None:
        self._added += 1
        self._tokens += len(row["output_token_ids"])
        self._finished += row["finish_reason"] == FINISHED
        rate = self._tokens / max(time.monotonic() - self._started, 1e-9)
        share = f"{self._finished / self._added:.0%}"
        self._bar.set_postfix({"tokens/s": f"{rate:.0f}", "finished": share}, refresh=False)
        self._bar.update()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


@contextmanager
def _writer(path: Path) -> Iterator[Any]:
    """A function that appends one row, unbuffered: what it returned from is in the file.

    Raises ValueError while another process has the file.
    """
    with path.open("ab", buffering=0) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another process is writing to it") from None

        def write(row: dict[str, Any]) -> None:
            line = json.dumps(row).encode() + b"\n"
            try:
                if stream.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                raise RolloutWriteError(f"{path}: {error.strerror}; the rows written so far stay") from None

        yield write


def read_rollouts(path: Path) -> Iterable[dict[str, Any]]:
    """Rows of a rollout file; a last line cut by a crash is left out and sampled again. Raises ValueError."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                return
            row = parse_object(line, f"{path}:{number}")
            for name, kind in IDENTIFYING_FIELDS.items():
                if not isinstance(row.get(name), kind):
                    raise ValueError(f"{path}:{number}: no field {name!r} of type {kind.__name__}: no rollouts")
            yield row


def check_sampling(path: Path, sampling: Sampling) -> None:
    """Raise ValueError when ``path`` holds completions that were sampled otherwise."""
    if path.exists():
        for row in read_rollouts(path):
            _check_sampling(path, row, sampling)


def _check_sampling(
    path: Path, row: dict[str, Any], sampling: Sampling, advice: str = "; write to another file"
) -> None:
    there = row.get("sampling")
    there = there if isinstance(there, dict) else {}
    for name, value in asdict(sampling).items():
        if there.get(name) != value:
            known = there.get(name, "unknown")
            raise ValueError(f"{path}: holds rollouts sampled with {name} {known}, not {value}{advice}")


def _completed(
    path: Path, prompts: Iterable[Prompt], encoder: PromptEncoder, sampling: Sampling
) -> set[tuple[str, int]]:
    """The completions in ``path``, after cutting off a last line that a crash left half written.

    Raises ValueError unless they are of this tokenizer, of this sampling and, those of ``prompts``, of their texts.
    """
    _cut_half_line(path)
    by_id, encoder = {prompt.id: prompt for prompt in prompts}, CachedEncoder(encoder)
    done = set()
    for row in read_rollouts(path):
        if row.get("tokenizer", encoder.fingerprint) != encoder.fingerprint:
            raise ValueError(f"{path}: holds rollouts of another tokenizer; write to another file")
        _check_sampling(path, row, sampling)
        if row["finish_reason"] not in WHOLE:
            continue
        if row["prompt_id"] in by_id:
            _check_prompt(path, row, by_id[row["prompt_id"]], encoder)
        done.add((row["prompt_id"], row["sample"]))
    return done


def _check_prompt(path: Path, row: dict[str, Any], prompt: Prompt, encoder: PromptEncoder) -> None:
    if "prompt_digest" in row:
        same = row["prompt_digest"] == prompt.digest
    else:
        same = row.get("prompt_token_ids") == encoder.encode(prompt) and row.get("images", []) == prompt.images
    if not same:
        raise ValueError(f"{path}: prompt {prompt.id}: was another one when it was sampled; write to another file")


def _cut_half_line(path: Path) -> None:
    with path.open("rb+") as stream:
        end = stream.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            stream.seek(start)
            newline = stream.read(end - start).rfind(b"\n")
            if newline >= 0:
                break
            end = start
        stream.truncate(start + newline + 1 if end else 0)


def prompt_token_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The prompt in the model's chat template, up to and including the start of the answer.

    Raises ValueError when the template refuses it.
    """
    with template_refusals(f"prompt {prompt.id}"):
        encoded = tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


@contextmanager
def template_refusals(name: str) -> Iterator[None]:
    """A chat template that cannot write what is given to it raises ValueError, with ``name``."""
    try:
        yield
    except (TemplateError, TypeError) as error:
        raise ValueError(f"{name}: the chat template refuses it ({error})") from error


async def _sample_one(
    endpoint: Endpoint,
    prompt: Prompt,
    sample: int,
    encoder: PromptEncoder,
    sampling: Sampling,
    begun: dict[str, Any] | None,
) -> dict[str, Any]:
    token_ids = encoder.encode(prompt)
    if begun is None:
        request = Request(prompt.id, token_ids, prompt.messages, prompt.images)
        completion = await endpoint.complete(request, sampling)
    else:
        completion = await _go_on(endpoint, prompt.id, sampling, begun)
    row: dict[str, Any] = {
        "prompt_id": prompt.id,
        "prompt_digest": prompt.digest,
        "domain": prompt.domain,
        "sample": sample,
        "prompt_token_ids": token_ids,
        "output_token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "sampling": asdict(sampling),
        "tokenizer": encoder.fingerprint,
    }
    if prompt.images:
        row["images"] = list(prompt.images)
    if begun is not None:
        row["begun"] = len(begun["output_token_ids"])
    return row


async def _go_on(endpoint: Endpoint, prompt_id: str, sampling: Sampling, begun: dict[str, Any]) -> Completion:
    """The completion that begins with ``begun``: itself where it ended, with what comes after it where it was cut."""
    written, reason = list(begun["output_token_ids"]), begun["finish_reason"]
    left = sampling.max_new_tokens - len(written)
    if reason != TRUNCATED or not left:
        await asyncio.sleep(0)  # lets signals and answers through
        return Completion(written, reason)
    token_ids = [*begun["prompt_token_ids"], *written]
    rest = await endpoint.complete(Request(prompt_id, token_ids), replace(sampling, max_new_tokens=left))
    return Completion(written + rest.token_ids, rest.finish_reason)


def read_beginnings(paths: Iterable[Path], fingerprint: str, sampling: Sampling) -> Beginnings:
    """Completions to go on with, of the tokenizer ``fingerprint`` and of ``sampling`` with at most its token limit.

    One whose end token was the last that the limit allowed is said to be cut (SGLang looks at the limit first): it
    ended if its last token is one that ended another completion. Raises ValueError: other tokenizer or sampling, two
    completions of one name, or what cannot be cut in two (images; a repetition penalty, which a server may count over
    the answer alone).
    """
    if sampling.repetition_penalty != 1:
        raise ValueError("rollouts.extend: not with a repetition penalty")
    beginnings: dict[tuple[str, int], dict[str, Any]] = {}
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        for number, row in enumerate(read_rollouts(path), 1):
            key = (row["prompt_id"], row["sample"])
            _check_sampling(path, row, replace(sampling, max_new_tokens=_lower_limit(row, sampling)), "")
            if row.get("tokenizer") != fingerprint:
                raise ValueError(f"{path}: holds rollouts of another tokenizer")
            if row.get("images"):
                raise ValueError(f"{path}: prompt {key[0]}: has images; its completions cannot be gone on with")
            if key in beginnings:
                raise ValueError(f"{path}: prompt {key[0]} sample {key[1]} is there twice")
            if row["finish_reason"] in WHOLE:
                beginnings[key] = _begun(row, f"{path}:{number}")
    ends = {row["output_token_ids"][-1] for row in beginnings.values() if row["finish_reason"] == FINISHED}
    for row in beginnings.values():
        if row["output_token_ids"][-1] in ends:
            row["finish_reason"] = FINISHED
    return beginnings


def _lower_limit(row: dict[str, Any], sampling: Sampling) -> int:
    """The row's own token limit, where it tells one that is not greater."""
    there = row.get("sampling")
    limit = there.get("max_new_tokens") if isinstance(there, dict) else None
    return limit if isinstance(limit, int) and 0 < limit < sampling.max_new_tokens else sampling.max_new_tokens


def _begun(row: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        tokens = {name: array("i", row[name]) for name in ("prompt_token_ids", "output_token_ids")}
    except (LookupError, TypeError, OverflowError):
        tokens = {}
    if not all(tokens.values()) or not tokens:
        raise ValueError(f"{where}: prompt {row['prompt_id']} sample {row['sample']}: without its token ids")
    return tokens | {"finish_reason": row["finish_reason"]}


def check_beginnings(
    beginnings: Beginnings, prompts: Iterable[Prompt], encoder: PromptEncoder, num_samples: int
) -> int:
    """How many of the completions of ``prompts`` are in ``beginnings``. Raises ValueError when a prompt has changed."""
    found = 0
    for prompt in prompts:
        for sample in range(num_samples):
            begun = beginnings.get((prompt.id, sample))
            if begun is None:
                continue
            if list(begun["prompt_token_ids"]) != encoder.encode(prompt):
                raise ValueError(f"prompt {prompt.id}: not the one that its completions to go on with are of")
            found += 1
    return found
