"""Length control on the default model: does it reach the length, end by itself, and what does it cost?

Tasks of LIFEBench x targets x modes, each answered four ways with the same sampling (temperature 1,
top-p 0.999, top-k 15): ``natural`` and ``hard`` control, the prompt alone (``prompt_only``), EOS banned
and then forced at the target (``force``; ``at_most`` bans nothing; the forced EOS has no part in the
log-probability). Every prompt asks for the length in words, too.

A natural end is the model's own EOS after a finished sentence. The log-probability per token is the
base model's, of the answer given the prompt, scored afterwards without control; its cost is the
difference to ``prompt_only``.

    python benchmarks/bench_control.py --tasks lifebench_lite.jsonl [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from length_score import deviation, ends_sentence, score
from lenvm_kernels import torchvision_schema
from lenvm_runtime.default_model import ensure_default_model
from lenvm_runtime.length_control import LengthControl, build_custom_params
from lenvm_runtime.serve import ServeConfig, running_engine
from lenvm_runtime.value_model.source import find_folder

TARGETS = (64, 128, 256)
MODES = ("equal", "at_most", "at_least")
METHODS = ("natural", "hard", "prompt_only", "force")
SAMPLING = {"temperature": 1.0, "top_p": 0.999, "top_k": 15}
CAP_TOKENS = 640
MAX_PROMPT_TOKENS = 1500
CONCURRENCY = 48
WORDS = {
    "equal": ("equal to", "等于"),
    "at_most": ("at most", "至多"),
    "at_least": ("at least", "至少"),
}
BUILT_IN_TASKS = (
    "Describe how bread is made.",
    "Explain why the sky is blue.",
    "Write a story about a lost key.",
    "What should a visitor know about Norway?",
    "Compare cats and dogs as pets.",
    "Explain how a bill becomes a law.",
    "Write a letter to a friend about a holiday.",
    "Give advice to someone who starts a new job.",
)


@dataclass(frozen=True)
class Case:
    """One answer to generate."""

    task: int
    mode: str
    target: int
    method: str
    prompt_token_ids: tuple[int, ...]


def main() -> int:
    """Run and print the table; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tasks", type=Path, help="LIFEBench tasks (JSONL, field 'task'); default: eight built-in ones"
    )
    parser.add_argument("--quick", action="store_true", help="a fraction of the tasks: at most 8 minutes on 2 cores")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--engine-url", help="a running engine with the LenVM plugin (default: start one)")
    parser.add_argument("--lenvm", help="a head of the default model, for the engine that is started")
    parser.add_argument("--answers", type=Path, help="write every answer there (JSONL)")
    parser.add_argument("--methods", default=",".join(METHODS))
    parsed = parser.parse_args()
    methods = tuple(parsed.methods.split(","))
    if parsed.engine_url:
        answers = asyncio.run(run(parsed.engine_url, parsed.tasks, parsed.quick, methods))
    else:
        lenvm = find_folder(parsed.lenvm) if parsed.lenvm else None
        with running_engine(ServeConfig("127.0.0.1", 8000, None, lenvm)) as (_, url):
            answers = asyncio.run(run(url, parsed.tasks, parsed.quick, methods))
    figures = summarize(answers)
    print_table(figures, methods)
    if parsed.answers:
        parsed.answers.write_text("".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
    if parsed.json:
        parsed.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


async def run(url: str, tasks_file: Path | None, quick: bool, methods: tuple[str, ...]) -> list[dict[str, Any]]:
    """Generate and score every case: one row an answer."""
    torchvision_schema.declare_if_missing()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ensure_default_model())
    cases = build_cases(read_tasks(tasks_file, quick), tokenizer, methods)
    semaphore = asyncio.Semaphore(CONCURRENCY)
    async with httpx.AsyncClient(base_url=url, timeout=None, trust_env=False) as client:
        await check_engine(client, tokenizer)
        progress = tqdm(total=len(cases), desc="answers", file=sys.stderr)

        async def answer(case: Case) -> dict[str, Any]:
            async with semaphore:
                row = await generate(client, case, tokenizer)
                progress.update()
                return row

        return list(await asyncio.gather(*(answer(case) for case in cases)))


def read_tasks(path: Path | None, quick: bool) -> list[str]:
    """Task texts, with LIFEBench's length placeholders where they have them."""
    if path is None:
        return [f"{task} Your answer must be {{word_count_type}} {{word_count}} words long." for task in BUILT_IN_TASKS]
    with path.open(encoding="utf-8") as stream:
        tasks = [json.loads(line)["task"] for line in stream]
    return tasks[::9] if quick else tasks


def build_cases(tasks: list[str], tokenizer: Any, methods: tuple[str, ...]) -> list[Case]:
    """Tasks x modes x targets x methods, without tasks whose prompt is too long for the model to follow."""
    cases = []
    for index, task in enumerate(tasks):
        for mode in MODES:
            for target in TARGETS:
                messages = [{"role": "user", "content": requested(task, mode, target)}]
                encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
                token_ids = tuple(encoded["input_ids"])
                if len(token_ids) <= MAX_PROMPT_TOKENS:
                    cases += [Case(index, mode, target, method, token_ids) for method in methods]
    return cases


def requested(task: str, mode: str, target: int) -> str:
    """The task with its length requirement filled in, in tokens."""
    english, chinese = WORDS[mode]
    if "字" in task[-40:]:
        return task.replace("{word_count_type}", chinese).replace("{word_count}字", f"{target}个token")
    return task.replace("{word_count_type}", english).replace("{word_count} words", f"{target} tokens")


def sampling_params(case: Case) -> dict[str, Any]:
    """SGLang's sampling parameters of a case."""
    params: dict[str, Any] = {**SAMPLING, "max_new_tokens": CAP_TOKENS}
    if case.method in ("natural", "hard"):
        control = LengthControl(case.mode, target=case.target, strategy=case.method)
        return {**params, "custom_params": build_custom_params(control, values=False)}
    if case.method == "force":  # the forced EOS is the target-th token, and is not generated
        banned = {} if case.mode == "at_most" else {"min_new_tokens": case.target - 1}
        return {**params, **banned, "max_new_tokens": case.target - 1}
    return params


async def generate(client: httpx.AsyncClient, case: Case, tokenizer: Any) -> dict[str, Any]:
    """Generate one answer and score it under the base model."""
    body = {"input_ids": list(case.prompt_token_ids), "sampling_params": sampling_params(case)}
    result = await post(client, body)
    token_ids = result["output_ids"]
    own_end = result["meta_info"]["finish_reason"]["type"] == "stop"
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    length = len(token_ids) + (case.method == "force" and not own_end)
    return {
        "task": case.task,
        "mode": case.mode,
        "target": case.target,
        "method": case.method,
        "length": length,
        "own_end": own_end,
        "natural": own_end and ends_sentence(text),
        "score": score(case.mode, length, case.target),
        "deviation": deviation(length, case.target),
        "logprob": await mean_logprob(client, case.prompt_token_ids, token_ids),
        "text": text,
    }


async def mean_logprob(client: httpx.AsyncClient, prompt: tuple[int, ...], output: list[int]) -> float:
    """Mean log-probability per output token under the base model (one prefill, no control)."""
    body = {
        "input_ids": [*prompt, *output],
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": len(prompt) - 1,
    }
    rows = (await post(client, body))["meta_info"]["input_token_logprobs"]
    scored = rows[-len(output) :]
    assert [row[1] for row in scored] == output, "the scored tokens are not the answer's"
    return statistics.fmean(row[0] for row in scored)


async def check_engine(client: httpx.AsyncClient, tokenizer: Any) -> None:
    """Stop unless control shortens a greedy answer, which ends by itself."""
    token_ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tell me about rivers."}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    greedy = {"temperature": 0, "max_new_tokens": 96}
    control = build_custom_params(LengthControl("at_most", target=12), values=False)
    plain, guided = [
        await post(client, {"input_ids": list(token_ids), "sampling_params": params})
        for params in (greedy, {**greedy, "custom_params": control})
    ]
    shorter = len(guided["output_ids"]) < len(plain["output_ids"])
    assert shorter, "length control had no effect: is the plugin loaded with a head?"
    assert guided["meta_info"]["finish_reason"]["type"] == "stop", "the controlled answer did not end by itself"


async def post(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    response = await client.post("/generate", json=body)
    response.raise_for_status()
    result: dict[str, Any] = response.json()
    return result


def summarize(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Flat figures: MODE_FIGURE for ``natural`` control, MODE_FIGURE_METHOD for the others."""
    figures: dict[str, float] = {"num_answers": float(len(answers))}
    for mode in MODES:
        baseline = [row["logprob"] for row in answers if row["mode"] == mode and row["method"] == "prompt_only"]
        for method in METHODS:
            rows = [row for row in answers if row["mode"] == mode and row["method"] == method]
            if not rows:
                continue
            suffix = "" if method == "natural" else f"_{method}"
            near = {share: [abs(r["deviation"]) <= share / 100 for r in rows] for share in (10, 20)}
            figures[f"{mode}_score{suffix}"] = statistics.fmean(row["score"] for row in rows)
            figures[f"{mode}_deviation{suffix}"] = statistics.fmean(abs(row["deviation"]) for row in rows)
            figures[f"{mode}_own_end{suffix}"] = statistics.fmean(row["own_end"] for row in rows)
            figures[f"{mode}_natural{suffix}"] = statistics.fmean(row["natural"] for row in rows)
            for share, flags in near.items():
                both = [flag and row["natural"] for flag, row in zip(flags, rows, strict=True)]
                figures[f"{mode}_natural_{share}pct{suffix}"] = statistics.fmean(both)
            figures[f"{mode}_logprob{suffix}"] = statistics.fmean(row["logprob"] for row in rows)
            if baseline:
                cost = statistics.fmean(baseline) - figures[f"{mode}_logprob{suffix}"]
                figures[f"{mode}_logprob_cost_nats{suffix}"] = cost
    for suffix in ("", "_hard", "_force"):
        if f"equal_logprob_cost_nats{suffix}" in figures:
            figures[f"logprob_cost_nats{suffix}"] = figures[f"equal_logprob_cost_nats{suffix}"]
    return figures


def print_table(figures: dict[str, float], methods: tuple[str, ...]) -> None:
    """One line a mode and method."""
    columns = ("score", "deviation", "own_end", "natural", "natural_10pct", "natural_20pct", "logprob_cost_nats")
    print(f"{'mode':9s} {'method':12s} " + " ".join(f"{column:>17s}" for column in columns))
    for mode in MODES:
        for method in methods:
            suffix = "" if method == "natural" else f"_{method}"
            cells = [figures.get(f"{mode}_{column}{suffix}", float("nan")) for column in columns]
            print(f"{mode:9s} {method:12s} " + " ".join(f"{cell:17.3f}" for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
