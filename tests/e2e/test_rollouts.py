"""``lenvm rollouts`` with an engine of its own: stopped midway, it goes on; rows hold what the engine said."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tokenizers import Tokenizer

from lenvm_runtime.default_model import ensure_default_model

pytestmark = pytest.mark.e2e

SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "max_new_tokens": 40,
}
SAMPLES = 3
END = 2
CONCURRENCY = 4


def write_experiment(folder: Path) -> None:
    """Questions with short answers and a long one, and an engine that logs what it says."""
    words = ("house", "river", "green", "winter", "bread", "window", "music")
    questions = [f"What is the opposite of {word}? One word." for word in words] + ["Write a long story about a whale."]
    prompts = [
        {"id": f"p{number}", "domain": "words", "messages": [{"role": "user", "content": question}]}
        for number, question in enumerate(questions)
    ]
    for name, part in (("prompts", prompts[1:]), ("eval_prompts", prompts[:1])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in part))
    model = str(ensure_default_model())
    engine_arguments = ["--dtype=bfloat16", "--max-total-tokens=4096", "--max-running-requests=8", "--log-requests"]
    engine_arguments += ["--log-requests-level=3", "--log-requests-format=json", "--log-requests-target=said"]
    content = {
        "prompts": {"out": "prompts.jsonl", "eval_out": "eval_prompts.jsonl", "templates": 1},
        "rollouts": {
            "out": "rollouts.jsonl",
            "eval_out": "eval.jsonl",
            "samples": SAMPLES,
            "eval_samples": SAMPLES,
            "concurrency": CONCURRENCY,
            "sampling": SAMPLING,
            "engine_arguments": engine_arguments,
        },
        "model": {"backbone": model, "served_model": model},
        "data": {"rollouts": ["rollouts.jsonl"]},
        "training": {"output_dir": "run"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content))


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lenvm_runtime.cli", "rollouts", "config.yaml"]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)


def whole_rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def finished_requests(folder: Path) -> list[dict[str, Any]]:
    """The engine's own record: ``output_ids``, ``text`` and ``meta_info`` of each answer."""
    (path,) = (folder / "said").iterdir()
    events = [json.loads(line[line.index("{") :]) for line in path.read_text().splitlines()]
    answers = [event["out"] for event in events if event["event"] == "request.finished"]
    return [answer for answer in answers if not answer["meta_info"]["id"].startswith("HEALTH_CHECK")]


def test_a_run_that_is_stopped_goes_on_and_loses_nothing(tmp_path: Path) -> None:
    write_experiment(tmp_path)
    out = tmp_path / "rollouts.jsonl"
    with start(tmp_path) as first:
        while len(whole_rows(out)) < 2:
            assert first.poll() is None, first.stderr and first.stderr.read()
            time.sleep(0.05)
        started = psutil.Process(first.pid).children(recursive=True)
        assert len(started) >= 3, "the engine's processes and the command that samples"
        first.send_signal(signal.SIGINT)
        _, errors = first.communicate(timeout=300)
    assert first.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "lenvm rollouts: stopped; run the same command again to go on"
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive
    kept = whole_rows(out)
    total = 7 * SAMPLES
    assert 2 <= len(kept) < total
    assert len(finished_requests(tmp_path)) == SAMPLES + len(kept), "what was under way is in the file"

    with start(tmp_path) as second:
        _, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    rows = whole_rows(out)
    assert rows[: len(kept)] == kept
    assert len(rows) == total == len({(row["prompt_id"], row["sample"]) for row in rows})
    rows += whole_rows(tmp_path / "eval.jsonl")
    said = {tuple(answer["output_ids"]): answer for answer in finished_requests(tmp_path)}
    assert len(finished_requests(tmp_path)) == len(rows) == total + SAMPLES, "nothing is sampled twice"
    tokenizer = Tokenizer.from_file(str(ensure_default_model() / "tokenizer.json"))
    for row in rows:
        answer = said[tuple(row["output_token_ids"])]
        assert tokenizer.decode(row["output_token_ids"], skip_special_tokens=True) == answer["text"]
        assert row["finish_reason"] == answer["meta_info"]["finish_reason"]["type"]
        assert row["sampling"] == SAMPLING
        if row["finish_reason"] == "stop":
            assert row["output_token_ids"][-1] == END
        else:  # an end at the last token allowed counts as cut there
            assert len(row["output_token_ids"]) == SAMPLING["max_new_tokens"]
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
