"""Rollouts: what is missing is sampled, what is there stays, a half-written line is sampled again."""

from __future__ import annotations

import asyncio
import fcntl
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest
from jinja2 import TemplateError

from lenvm_training.endpoints import (
    EndpointError,
    EngineError,
    MissingCompletionsError,
    PromptRefusedError,
    Retry,
    Sampling,
)
from lenvm_training.prompts import Prompt, PromptFileError, read_prompts, template_prompts
from lenvm_training.rollout_data import load_rollouts
from lenvm_training.rollouts import (
    CachedEncoder,
    ChatEncoder,
    RolloutWriteError,
    check_beginnings,
    check_sampling,
    read_beginnings,
    read_rollouts,
    reserve_files,
    sample_rollouts,
)
from local_engine import asyncio_engine
from tiny_experiment import full_disk

PROMPTS = [Prompt(f"p{index}", "math", [{"role": "user", "content": str(index)}]) for index in range(5)]
AT_ONCE = Retry(attempts=3, first_delay_s=0.0)


class Tokenizer:
    def __init__(self, size: int = 8) -> None:
        self.size = size

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(messages[0]["content"]), 7]}

    def get_vocab(self) -> dict[str, int]:
        return {str(index): index for index in range(self.size)}

    def get_added_vocab(self) -> dict[str, int]:
        return {}


def engine(requests: list[dict[str, Any]], fail_after: int = 10**9) -> httpx.MockTransport:
    def answer(request: httpx.Request) -> httpx.Response:
        if len(requests) >= fail_after:
            raise httpx.ConnectError("down")
        requests.append(json.loads(request.content))
        return httpx.Response(200, json={"output_ids": [1, 2], "meta_info": {"finish_reason": {"type": "stop"}}})

    return httpx.MockTransport(answer)


def sample(path: Path, transport: httpx.MockTransport, **options: Any) -> int:
    encoder = ChatEncoder(options.pop("tokenizer", Tokenizer()))
    prompts, sampling = options.pop("prompts", PROMPTS), options.pop("sampling", Sampling())
    options = {"retry": AT_ONCE, "transport": transport, "concurrency": 3} | options
    return asyncio.run(sample_rollouts(prompts, encoder, "http://engine", path, 2, sampling, **options))


def test_every_completion_is_sampled_once(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    requests: list[dict[str, Any]] = []
    assert sample(path, engine(requests)) == 10
    rows = list(read_rollouts(path))
    assert len({(row["prompt_id"], row["sample"]) for row in rows}) == 10
    assert rows[0]["sampling"] == {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_new_tokens": 640,
    }
    assert requests[0]["sampling_params"] == rows[0]["sampling"]
    assert rows[0]["output_token_ids"] == [1, 2]
    assert sample(path, engine(requests)) == 0
    assert len(requests) == 10


def test_a_run_goes_on_after_the_engine_died_and_a_line_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    with pytest.raises(EngineError, match="http://engine does not answer"):
        sample(path, engine([], fail_after=4))
    kept = path.read_text()
    path.write_text(kept[:-20])
    assert sample(path, engine([])) == 10 - (len(kept.splitlines()) - 1)
    assert len({(row["prompt_id"], row["sample"]) for row in read_rollouts(path)}) == 10


@pytest.mark.parametrize("cut", [1, 5, 70_000])
def test_a_half_line_of_any_length_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rollouts.jsonl"
    sample(path, engine([]))
    whole = path.read_text()
    path.write_text(whole + '{"prompt_id": "' + "x" * cut)
    assert sample(path, engine([])) == 0
    assert path.read_text() == whole
    path.write_text("x" * cut)
    assert sample(path, engine([])) == 10


def flaky(failures: int, fail: Callable[[], httpx.Response]) -> httpx.MockTransport:
    """Each request fails so many times before it is answered."""
    seen: dict[bytes, int] = {}

    def answer(request: httpx.Request) -> httpx.Response:
        seen[request.content] = seen.get(request.content, 0) + 1
        if seen[request.content] <= failures:
            return fail()
        return httpx.Response(200, json={"output_ids": [5], "meta_info": {"finish_reason": {"type": "stop"}}})

    return httpx.MockTransport(answer)


def drop() -> httpx.Response:
    raise httpx.ReadError("dropped")


def answer_with(**content: Any) -> Callable[[], httpx.Response]:
    return lambda: httpx.Response(200, json=content)


STOPPED = {"finish_reason": {"type": "stop"}}


@pytest.mark.parametrize(
    "fail",
    [
        drop,
        lambda: httpx.Response(503),
        lambda: httpx.Response(429),
        lambda: httpx.Response(200, text="<html>"),
        lambda: httpx.Response(200, content=b"\xff"),
        lambda: httpx.Response(200, json=[1]),
        answer_with(error="busy"),
        answer_with(output_ids=[], meta_info=STOPPED),
        answer_with(output_ids=[None], meta_info=STOPPED),
        answer_with(output_ids=[1], meta_info={"finish_reason": None}),
        answer_with(output_ids=[1], meta_info={"finish_reason": {"type": "abort"}}),
        answer_with(output_ids=[1], meta_info={"finish_reason": {"type": "content_filter"}}),
        answer_with(output_ids=[-1], meta_info=STOPPED),
        answer_with(output_ids=[2**31], meta_info=STOPPED),
        lambda: httpx.Response(200, text="[" * 100_000),
        lambda: httpx.Response(200, content=b"no gzip", headers={"Content-Encoding": "gzip"}),
    ],
)
def test_passing_failures_are_tried_again(tmp_path: Path, fail: Callable[[], httpx.Response]) -> None:
    path = tmp_path / "rollouts.jsonl"
    assert sample(path, flaky(2, fail)) == 10
    assert len(list(read_rollouts(path))) == 10
    with pytest.raises(EngineError):
        sample(tmp_path / "other.jsonl", flaky(9, fail))


def test_a_request_that_never_succeeds_cuts_no_other_off(tmp_path: Path) -> None:
    """Else what is under way, which is long, would be lost each time, and the rest never be sampled."""
    path, seen = tmp_path / "r.jsonl", []

    async def answer(request: httpx.Request) -> httpx.Response:
        first_token = json.loads(request.content)["input_ids"][0]
        seen.append(first_token)
        if first_token == 0:
            return httpx.Response(500, text="no")
        await asyncio.sleep(0.02)
        return httpx.Response(200, json={"output_ids": [1], "meta_info": STOPPED})

    with pytest.raises(MissingCompletionsError, match=r"^2 completions are missing; the last: .* prompt p0: 500 no"):
        sample(path, httpx.MockTransport(answer), concurrency=4)
    assert len(list(read_rollouts(path))) == 8
    assert seen.count(0) == 2 * AT_ONCE.attempts
    seen.clear()
    with pytest.raises(EngineError):
        sample(path, httpx.MockTransport(answer), concurrency=4)
    assert set(seen) == {0}, "the others are there"


def test_nothing_new_is_begun_on_an_engine_that_is_down(tmp_path: Path) -> None:
    tries: list[int] = []

    def answer(_: httpx.Request) -> httpx.Response:
        tries.append(1)
        raise httpx.ConnectError("down")

    prompts = [Prompt(f"p{i}", "math", [{"role": "user", "content": str(i)}]) for i in range(100)]
    with pytest.raises(EngineError, match="does not answer") as error:
        sample(tmp_path / "r.jsonl", httpx.MockTransport(answer), prompts=prompts, concurrency=4)
    assert not isinstance(error.value, MissingCompletionsError)
    assert len(tries) <= 2 * 4 * AT_ONCE.attempts


def test_a_completion_that_is_not_whole_is_sampled_again(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    sample(path, engine([]))
    rows = [row | ({"finish_reason": "error"} if row["sample"] else {}) for row in read_rollouts(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sample(path, engine([])) == 5


def test_a_completion_that_is_not_whole_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    sample(path, engine([]))
    rows = [row | ({"finish_reason": "error"} if row["sample"] else {}) for row in read_rollouts(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    begun = read_beginnings([path], rows[0]["tokenizer"], Sampling())
    assert sorted(begun) == [(prompt.id, 0) for prompt in PROMPTS]


def test_what_is_taken_over_does_not_count_as_an_answer_of_the_engine(tmp_path: Path) -> None:
    path, tries = tmp_path / "r.jsonl", []
    prompts = [Prompt(f"p{i}", "math", [{"role": "user", "content": str(i)}]) for i in range(100)]
    sample(path, engine([]), prompts=prompts)
    begun = read_beginnings([path], ChatEncoder(Tokenizer()).fingerprint, Sampling(max_new_tokens=700))
    for prompt in prompts[::10]:
        begun[prompt.id, 0]["finish_reason"] = "length"

    def answer(_: httpx.Request) -> httpx.Response:
        tries.append(1)
        raise httpx.ConnectError("down")

    long = {"prompts": prompts, "sampling": Sampling(max_new_tokens=700), "beginnings": begun}
    with pytest.raises(EngineError, match="does not answer"):
        sample(tmp_path / "long.jsonl", httpx.MockTransport(answer), **long)
    assert len(tries) <= 2 * 3 * AT_ONCE.attempts


def test_a_stop_says_nothing_of_what_is_missing(tmp_path: Path) -> None:
    stop = asyncio.Event()

    def answer(request: httpx.Request) -> httpx.Response:
        if json.loads(request.content)["input_ids"][0] == 0:
            stop.set()
            return httpx.Response(500)
        return httpx.Response(200, json={"output_ids": [1], "meta_info": STOPPED})

    assert sample(tmp_path / "r.jsonl", httpx.MockTransport(answer), stop=stop) < 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling": None}, "sampled with temperature unknown"),
        ({"sample": [1]}, "r.jsonl:1: no field 'sample' of type int"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "r.jsonl"
    sample(path, engine([]))
    path.write_text("".join(json.dumps(row | change) + "\n" for row in read_rollouts(path)))
    with pytest.raises(ValueError, match=message):
        sample(path, engine([]))


@pytest.mark.parametrize("tokens", [[], None, ["a"], 5])
def test_beginnings_need_their_token_ids(tmp_path: Path, tokens: Any) -> None:
    path = tmp_path / "r.jsonl"
    sample(path, engine([]))
    rows = list(read_rollouts(path))
    path.write_text(json.dumps(rows[0] | {"output_token_ids": tokens}) + "\n")
    with pytest.raises(
        ValueError, match=rf"r\.jsonl:1: prompt {rows[0]['prompt_id']} sample \d: without its token ids"
    ):
        read_beginnings([path], rows[0]["tokenizer"], Sampling())


def test_an_answer_that_cannot_be_used_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"answer to prompt p\d cannot be used \(KeyError\('output_ids'\)\): .*busy"):
        sample(tmp_path / "r.jsonl", flaky(9, answer_with(error="busy")))


def test_an_aborted_completion_in_the_file_is_sampled_again(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    sample(path, engine([]))
    first, *others = path.read_text().splitlines()
    aborted = json.loads(first) | {"finish_reason": "abort", "output_token_ids": [1]}
    path.write_text("\n".join([json.dumps(aborted), *others]) + "\n")
    assert sample(path, engine([])) == 1
    again = [
        row
        for row in load_rollouts([path])
        if (row["prompt_id"], row["sample"]) == (aborted["prompt_id"], aborted["sample"])
    ]
    assert [row["finish_reason"] for row in again] == ["stop"]
    assert sample(path, engine([])) == 0


def test_a_file_belongs_to_one_sampling(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    sample(path, engine([]))
    before = path.read_bytes()
    other = Sampling(max_new_tokens=9)
    message = "rollouts.jsonl: holds rollouts sampled with max_new_tokens 640, not 9; write to another file"
    for run in (lambda: sample(path, engine([]), sampling=other), lambda: check_sampling(path, other)):
        with pytest.raises(ValueError, match=message):
            run()
    assert path.read_bytes() == before
    check_sampling(path, Sampling())
    check_sampling(tmp_path / "none.jsonl", other)


def counting_engine(requests: list[dict[str, Any]], stop_at: int) -> httpx.MockTransport:
    """Goes on counting from the last token of what it is given; an answer ends with ``stop_at``."""

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        requests.append(body)
        last = body["input_ids"][-1]
        tokens = list(range(last + 1, last + 1 + body["sampling_params"]["max_new_tokens"]))
        ended = stop_at in tokens
        tokens = tokens[: tokens.index(stop_at) + 1] if ended else tokens
        reason = {"type": "stop" if ended else "length"}
        return httpx.Response(200, json={"output_ids": tokens, "meta_info": {"finish_reason": reason}})

    return httpx.MockTransport(answer)


@pytest.mark.parametrize(("stop_at", "length", "reason"), [(9, 2, "stop"), (11, 4, "stop"), (99, 5, "length")])
def test_cut_completions_are_gone_on_with_and_ended_ones_taken_over(
    tmp_path: Path, stop_at: int, length: int, reason: str
) -> None:
    short, long = tmp_path / "short.jsonl", tmp_path / "long.jsonl"
    sampling = Sampling(max_new_tokens=5)
    sample(short, counting_engine([], stop_at), sampling=Sampling(max_new_tokens=3))
    begun = read_beginnings([short], ChatEncoder(Tokenizer()).fingerprint, sampling)
    requests: list[dict[str, Any]] = []
    assert sample(long, counting_engine(requests, stop_at), sampling=sampling, beginnings=begun) == 10
    for row in read_rollouts(long):
        assert row["output_token_ids"] == list(range(8, 8 + length))
        assert row["finish_reason"] == reason
        assert row["sampling"]["max_new_tokens"] == 5
    assert len(requests) == (0 if stop_at == 9 else 10)
    assert all(request["sampling_params"]["max_new_tokens"] == 2 for request in requests)
    assert load_rollouts([long, short]) == load_rollouts([short, long]) == load_rollouts([long])
    assert len(load_rollouts([short, short])) == 10, "completions that nothing was begun with count, once"


def test_an_end_at_the_very_limit_is_an_end(tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    sample(path, counting_engine([], 10), sampling=Sampling(max_new_tokens=3))
    rows = list(read_rollouts(path))
    rows[0]["finish_reason"] = "length"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    begun = read_beginnings([path], ChatEncoder(Tokenizer()).fingerprint, Sampling(max_new_tokens=5))
    assert {row["finish_reason"] for row in begun.values()} == {"stop"}


def test_what_cannot_be_gone_on_with_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    sample(path, counting_engine([], 99), sampling=Sampling(max_new_tokens=3))
    fingerprint = ChatEncoder(Tokenizer()).fingerprint
    begun = read_beginnings([path], fingerprint, Sampling(max_new_tokens=5))
    others = [Prompt("p0", "math", [{"role": "user", "content": "8"}])]
    assert check_beginnings(begun, PROMPTS[:2], ChatEncoder(Tokenizer()), 3) == 4
    with pytest.raises(ValueError, match="prompt p0: not the one"):
        check_beginnings(begun, others, ChatEncoder(Tokenizer()), 1)
    for paths, sampling, message in (
        ([path], Sampling(max_new_tokens=2), "max_new_tokens 3, not 2"),
        ([path], Sampling(temperature=0.5), "temperature 1.0, not 0.5"),
        ([path], Sampling(repetition_penalty=1.1), "repetition penalty"),
        ([path, path], Sampling(), "there twice"),
        ([tmp_path / "none.jsonl"], Sampling(), "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            read_beginnings(paths, fingerprint, sampling)
    with pytest.raises(ValueError, match="another tokenizer"):
        read_beginnings([path], "other", Sampling())


def test_a_stalled_request_is_given_up_and_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: set[str] = set()

    async def answer(body: dict[str, Any]) -> Any:
        if (key := str(body["input_ids"])) not in seen:
            seen.add(key)
            await asyncio.Event().wait()
        return {"output_ids": [1], "meta_info": STOPPED}

    async def run() -> int:
        async with asyncio_engine(answer) as url:
            retry = Retry(attempts=3, first_delay_s=0.0, timeout_s=0.2)
            return await sample_rollouts(
                PROMPTS, ChatEncoder(Tokenizer()), url, tmp_path / "r.jsonl", 1, Sampling(), retry=retry
            )

    assert asyncio.run(asyncio.wait_for(run(), 30)) == 5
    assert "prompt p0: no answer in 0.2 s (rollouts.timeout_s), it is lost" in capsys.readouterr().err


@contextmanager
def open_files(soft: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_two_thousand_requests_are_in_flight_at_once(tmp_path: Path) -> None:
    count = 2000
    waiting = 0
    prompts = [Prompt(str(index), "math", [{"role": "user", "content": str(index)}]) for index in range(count)]

    async def run() -> int:
        all_here = asyncio.Event()

        async def answer(body: dict[str, Any]) -> Any:
            nonlocal waiting
            waiting += 1
            if waiting == count:
                all_here.set()
            await all_here.wait()
            return {"output_ids": body["input_ids"], "meta_info": STOPPED}

        async with asyncio_engine(answer) as url:
            path, encoder = tmp_path / "r.jsonl", ChatEncoder(Tokenizer())
            return await sample_rollouts(prompts, encoder, url, path, 1, Sampling(), count, retry=Retry(attempts=1))

    with open_files(2 * count + 512):  # the engine's ends are in this process too
        assert asyncio.run(run()) == count
    rows = list(read_rollouts(tmp_path / "r.jsonl"))
    assert all(row["output_token_ids"] == [int(row["prompt_id"]), 7] for row in rows)


def test_the_limit_on_open_files_is_raised_or_named(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open_files(300):
        sample(tmp_path / "r.jsonl", engine([]), concurrency=500)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (756, hard)
        reserve_files(10)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (756, hard), "never lowered"
    with pytest.raises(ValueError, match=rf"concurrency: {hard} connections need {hard + 256} open files.* {hard} "):
        reserve_files(hard)


@pytest.mark.parametrize(
    ("status", "error"), [(400, PromptRefusedError), (413, PromptRefusedError), (422, PromptRefusedError),
                          (401, EndpointError), (404, EndpointError), (410, EndpointError), (307, EndpointError)]
)  # fmt: skip
def test_a_refusal_is_not_tried_again(tmp_path: Path, status: int, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"engine refused prompt p\d: {status} too long"):
        sample(tmp_path / "r.jsonl", flaky(1, lambda: httpx.Response(status, text="too long")))


def test_a_prompt_that_the_server_will_not_answer_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"

    def answer(request: httpx.Request) -> httpx.Response:
        if json.loads(request.content)["input_ids"][0] == 0:
            return httpx.Response(451, text="unavailable for legal reasons")
        return httpx.Response(200, json={"output_ids": [1], "meta_info": STOPPED})

    with pytest.raises(MissingCompletionsError, match="prompt p0: 451 unavailable"):
        sample(path, httpx.MockTransport(answer), retry=Retry(attempts=1))
    assert {row["prompt_id"] for row in read_rollouts(path)} == {prompt.id for prompt in PROMPTS} - {"p0"}


@pytest.mark.parametrize("concurrency", [1, 10])
def test_what_is_under_way_is_finished_when_a_prompt_is_refused(tmp_path: Path, concurrency: int) -> None:
    path, seen = tmp_path / "r.jsonl", []

    async def answer(request: httpx.Request) -> httpx.Response:
        first_token = json.loads(request.content)["input_ids"][0]
        seen.append(first_token)
        await asyncio.sleep(0.01)
        if first_token == 0:
            return httpx.Response(400, text="too long")
        await asyncio.sleep(0.05)
        return httpx.Response(200, json={"output_ids": [1], "meta_info": STOPPED})

    for _ in range(2):
        with pytest.raises(ValueError, match=r"refused prompt p0: 400 too long .*rollouts.max_prompt_tokens"):
            sample(path, httpx.MockTransport(answer), concurrency=concurrency)
        assert len(list(read_rollouts(path))) == len(seen) - seen.count(0)
    if concurrency == 1:
        assert seen[-1] == 0, "nothing new is begun"
    else:
        assert sample(path, engine([]), prompts=PROMPTS[1:]) == 0


@pytest.mark.parametrize("has_digest", [True, False])
def test_completions_of_a_prompt_that_has_changed_are_not_taken_for_its_own(tmp_path: Path, has_digest: bool) -> None:
    path, requests = tmp_path / "r.jsonl", []
    sample(path, engine([]))
    if not has_digest:  # as older files have none
        rows = [{name: row[name] for name in row if name != "prompt_digest"} for row in read_rollouts(path)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = path.read_bytes()
    changed = Prompt("p3", "math", [{"role": "user", "content": "8"}])
    for prompt in (changed, replace(PROMPTS[3], images=["other.png"])):
        with pytest.raises(ValueError, match=r"r\.jsonl: prompt p3: .* write to another file"):
            sample(path, engine(requests), prompts=[*PROMPTS[:3], prompt, Prompt("new", "math", changed.messages)])
    assert not requests
    assert path.read_bytes() == before
    assert sample(path, engine(requests), prompts=PROMPTS[:3]) == 0, "others may be left out"


def test_a_chat_template_that_writes_the_date_can_be_gone_on_with(tmp_path: Path) -> None:
    class Dated(Tokenizer):
        day = 1

        def apply_chat_template(self, *arguments: Any, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [self.day, *super().apply_chat_template(*arguments, **options)["input_ids"]]}

    tokenizer = Dated()
    assert sample(tmp_path / "r.jsonl", engine([]), tokenizer=tokenizer) == 10
    tokenizer.day = 2
    assert sample(tmp_path / "r.jsonl", engine([]), tokenizer=tokenizer) == 0


def test_one_process_writes_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with path.open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"r\.jsonl: another process is writing to it"):
            sample(path, engine([]))
    assert sample(path, engine([])) == 10


@pytest.mark.parametrize("url", ["http://host:port", "http://", "host:8000", "ftp://host", "http://a\nb"])
def test_what_is_no_address_is_named(tmp_path: Path, url: str) -> None:
    path = tmp_path / "r.jsonl"
    with pytest.raises(ValueError, match=r"rollouts\.engine_url / --engine-url: "):
        asyncio.run(sample_rollouts(PROMPTS, ChatEncoder(Tokenizer()), url, path, 1, Sampling(), retry=AT_ONCE))
    assert not path.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -2),
     ("min_p", 1.5), ("repetition_penalty", 0.0), ("max_new_tokens", 0)],
)  # fmt: skip
def test_sampling_outside_its_range_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^rollouts\.sampling\.{name}: must be .*, got {value}"):
        replace(Sampling(), **{name: value})


@pytest.mark.parametrize("error", [TemplateError("roles must alternate"), TypeError("no list")])
def test_a_prompt_that_the_chat_template_refuses_is_named(tmp_path: Path, error: Exception) -> None:
    class Strict(Tokenizer):
        def apply_chat_template(self, *_: Any, **__: Any) -> NoReturn:
            raise error

    with pytest.raises(ValueError, match=rf"prompt p\d: the chat template refuses it \({error}\)"):
        sample(tmp_path / "r.jsonl", engine([]), tokenizer=Strict())


def test_delays_double_up_to_the_limit() -> None:
    retry = Retry(attempts=5, first_delay_s=1.0, max_delay_s=5.0)
    assert [retry.delay_s(failures) for failures in (1, 2, 3, 4, 5)] == [1, 2, 4, 5, 5]


def test_nothing_new_begins_after_stop(tmp_path: Path) -> None:
    stop = asyncio.Event()
    stop.set()
    assert sample(tmp_path / "rollouts.jsonl", engine([]), stop=stop) == 0


def test_each_prompt_is_encoded_once(tmp_path: Path) -> None:
    class Counting(ChatEncoder):
        count = 0

        def encode(self, prompt: Prompt) -> list[int]:
            self.count += 1
            return super().encode(prompt)

    counting = Counting(Tokenizer())
    encoder = CachedEncoder(counting)
    lists = [encoder.encode(PROMPTS[0]) for _ in range(3)]
    assert counting.count == 1
    assert lists == [[0, 7]] * 3
    assert encoder.fingerprint == counting.fingerprint


def test_a_file_belongs_to_one_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    sample(path, engine([]))
    with pytest.raises(ValueError, match="another tokenizer"):
        sample(path, engine([]), tokenizer=Tokenizer(9))


def test_a_full_disk_leaves_a_file_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    with full_disk(1000), pytest.raises(RolloutWriteError, match="rows written so far stay"):
        sample(path, engine([]))
    assert path.stat().st_size == 1000
    kept = len(list(read_rollouts(path)))
    assert 0 < kept < 10
    assert sample(path, engine([])) == 10 - kept
    assert len({(row["prompt_id"], row["sample"]) for row in read_rollouts(path)}) == 10


def openai_server(bodies: list[Any], choice: dict[str, Any], more: dict[str, Any] | None = None) -> httpx.MockTransport:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "served"}]})
        bodies.append((request.url.path, json.loads(request.content)))
        return httpx.Response(200, json={"choices": [choice], **(more or {})})

    return httpx.MockTransport(answer)


def test_an_openai_endpoint_gets_and_gives_token_ids(tmp_path: Path) -> None:
    path, bodies = tmp_path / "rollouts.jsonl", []
    transport = openai_server(bodies, {"text": "x", "token_ids": [9, 1], "finish_reason": "length"})
    assert sample(path, transport, api="openai") == 10
    route, body = bodies[0]
    assert route == "/v1/completions"
    assert body["prompt"][1] == 7
    assert {name: value for name, value in body.items() if name != "prompt"} == {
        "model": "served",
        "max_tokens": 640,
        "return_token_ids": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    row = next(iter(read_rollouts(path)))
    assert (row["output_token_ids"], row["finish_reason"]) == ([9, 1], "length")


@pytest.mark.parametrize("key", ["", "sk-test"])
def test_the_api_key_goes_along_where_it_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    seen: set[str | None] = set()

    def answer(request: httpx.Request) -> httpx.Response:
        seen.add(request.headers.get("authorization"))
        return httpx.Response(200, json={"output_ids": [1], "meta_info": {"finish_reason": {"type": "stop"}}})

    sample(tmp_path / "r.jsonl", httpx.MockTransport(answer))
    assert seen == {f"Bearer {key}" if key else None}


def test_an_endpoint_without_token_ids_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match="returns no token ids"):
        sample(tmp_path / "r.jsonl", openai_server([], {"text": "x", "finish_reason": "stop"}), api="openai")


def test_an_answer_that_is_not_whole_says_nothing_of_the_endpoint(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="finish reason content_filter"):
        sample(tmp_path / "r.jsonl", openai_server([], {"finish_reason": "content_filter"}), api="openai")


def seen_prompt(folder: Path) -> Prompt:
    image = folder / "dot.png"
    image.write_bytes(b"png bytes")
    content = [{"type": "image"}, {"type": "text", "text": "3"}]
    return Prompt("seen", "images", [{"role": "user", "content": content}], [str(image)])


def sample_seen(path: Path, prompt: Prompt, transport: httpx.MockTransport) -> int:
    """One completion of a prompt of three tokens."""

    class Encoder:
        fingerprint = "f"

        def encode(self, prompt: Prompt) -> list[int]:
            return [4, 4, 4]

    options = {"api": "openai", "retry": AT_ONCE, "transport": transport}
    return asyncio.run(sample_rollouts([prompt], Encoder(), "http://e", path, 1, Sampling(), **options))


@pytest.mark.parametrize("usage", [{}, {"usage": None}, {"usage": {"prompt_tokens": 3}}])
def test_images_are_as_many_tokens_to_the_server(tmp_path: Path, usage: dict[str, Any]) -> None:
    prompt, choice = seen_prompt(tmp_path), {"token_ids": [1], "finish_reason": "stop"}
    assert sample_seen(tmp_path / "r.jsonl", prompt, openai_server([], choice, usage)) == 1
    with pytest.raises(EngineError, match="cannot be used"):
        sample_seen(tmp_path / "o.jsonl", prompt, openai_server([], choice, {"usage": "many"}))
    with pytest.raises(EndpointError, match=r"prompt seen: the server reads 5 tokens, .* processor makes 3"):
        sample_seen(tmp_path / "o.jsonl", prompt, openai_server([], choice, {"usage": {"prompt_tokens": 5}}))


def test_images_go_as_data_and_stay_in_the_row(tmp_path: Path) -> None:
    prompt = seen_prompt(tmp_path)
    (image,) = prompt.images
    bodies: list[Any] = []
    path = tmp_path / "r.jsonl"
    assert sample_seen(path, prompt, openai_server(bodies, {"token_ids": [1], "finish_reason": "stop"})) == 1
    route, body = bodies[0]
    assert route == "/v1/chat/completions"
    assert body["messages"][0]["content"][0] == {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64,cG5nIGJ5dGVz"},
    }
    (row,) = read_rollouts(path)
    assert row["images"] == [image]
    with pytest.raises(EndpointError, match="images need an OpenAI-compatible endpoint"):
        sample(tmp_path / "other.jsonl", engine([]), prompts=[Prompt("s", "i", PROMPTS[0].messages, [image])])


def test_templates_give_different_prompts_and_are_reproducible() -> None:
    prompts = template_prompts(60, "short_long", 3)
    assert len({prompt.messages[0]["content"] for prompt in prompts}) == 60
    assert prompts == template_prompts(60, "short_long", 3)
    assert "{" not in "".join(prompt.messages[0]["content"] for prompt in template_prompts(60, "requested", 3))


@pytest.mark.parametrize(("domain", "available"), [("short_long", 9499), ("requested", 6409)])
def test_all_prompts_that_templates_have_can_be_drawn(domain: str, available: int) -> None:
    assert len({prompt.text for prompt in template_prompts(available, domain, 0)}) == available
    with pytest.raises(ValueError, match=f"{domain} has {available} different prompts, {available + 1} are asked for"):
        template_prompts(available + 1, domain, 0)


def as_prompt(messages: Any, **fields: Any) -> bytes:
    return json.dumps({"id": "b", "domain": "d", "messages": messages, **fields}).encode()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1]", "not a JSON object"),
        (b"[" * 100_000, "not a JSON object"),
        (b'{"id": "\xff"}', "not UTF-8 text"),
        (b'{"id": "b", "domain": "d"}', "no field 'messages'"),
        (as_prompt(None), "field 'messages' must be a list"),
        (as_prompt(["hello"]), "field 'messages' must be a list"),
        (as_prompt([{"role": "user", "content": None}]), "field 'messages' must be a list"),
        (as_prompt([{"role": "user", "content": [{"type": "text"}]}]), "field 'messages' must be a list"),
        (as_prompt([], images="a.png"), "field 'images' must be a list"),
        (as_prompt([], id="a"), "a second prompt of the id 'a'"),
    ],
)
def test_a_bad_prompt_file_names_the_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(as_prompt([], id="a", images=None) + b"\n" + line + b"\n")
    with pytest.raises(PromptFileError, match=rf"bad\.jsonl:2: {message}"):
        read_prompts(path)


def test_prompt_files_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(prompt.to_json() + "\n" for prompt in PROMPTS))
    assert read_prompts(path) == PROMPTS
