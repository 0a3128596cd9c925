"""Rollouts: what is missing is sampled, what is there stays, a half-written line is sampled again."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from lenvm_training.prompts import Prompt, PromptFileError, prompts_from_file, read_prompts, template_prompts
from lenvm_training.rollouts import EngineError, Sampling, read_rollouts, sample_rollouts

PROMPTS = [Prompt(f"p{index}", "math", [{"role": "user", "content": str(index)}]) for index in range(5)]


class Tokenizer:
    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(messages[0]["content"]), 7]}


def engine(requests: list[dict[str, Any]], fail_after: int = 10**9) -> httpx.MockTransport:
    def answer(request: httpx.Request) -> httpx.Response:
        if len(requests) >= fail_after:
            raise httpx.ConnectError("down")
        requests.append(json.loads(request.content))
        return httpx.Response(200, json={"output_ids": [1, 2], "meta_info": {"finish_reason": {"type": "stop"}}})

    return httpx.MockTransport(answer)


def sample(path: Path, transport: httpx.MockTransport, stop: asyncio.Event | None = None) -> int:
    return asyncio.run(
        sample_rollouts(PROMPTS, Tokenizer(), "http://engine", path, 2, Sampling(), 3, stop=stop, transport=transport)
    )


def test_every_completion_is_sampled_once(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    requests: list[dict[str, Any]] = []
    assert sample(path, engine(requests)) == 10
    rows = list(read_rollouts(path))
    assert len({(row["prompt_id"], row["sample"]) for row in rows}) == 10
    assert rows[0]["sampling"] == {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 640}
    assert sample(path, engine(requests)) == 0
    assert len(requests) == 10


def test_a_run_goes_on_after_the_engine_died_and_a_line_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    with pytest.raises(EngineError):
        sample(path, engine([], fail_after=4))
    kept = path.read_text()
    path.write_text(kept[:-20])
    assert sample(path, engine([])) == 10 - (len(kept.splitlines()) - 1)
    assert len({(row["prompt_id"], row["sample"]) for row in read_rollouts(path)}) == 10


def test_nothing_new_begins_after_stop(tmp_path: Path) -> None:
    stop = asyncio.Event()
    stop.set()
    assert sample(tmp_path / "rollouts.jsonl", engine([]), stop) == 0


def test_templates_give_different_prompts_and_are_reproducible() -> None:
    prompts = template_prompts(60, "short_long", 3)
    assert len({prompt.messages[0]["content"] for prompt in prompts}) == 60
    assert prompts == template_prompts(60, "short_long", 3)
    assert "{" not in "".join(prompt.messages[0]["content"] for prompt in template_prompts(60, "requested", 3))


@pytest.mark.parametrize("line", ["not json", '{"other": 1}'])
def test_a_bad_prompt_file_names_the_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "a"}\n' + line + "\n")
    with pytest.raises(PromptFileError, match=r"bad\.jsonl:2"):
        prompts_from_file(path, "math", 5, 0)


def test_prompt_files_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(prompt.to_json() + "\n" for prompt in PROMPTS))
    assert read_prompts(path) == PROMPTS
