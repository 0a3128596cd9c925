"""What the training package costs: a trainer step against the bare model, rollouts against the bare engine.

``trainer_over_bare``: wall clock of LoRA training of the default model by `lenvm_training`, divided by that of
forward and backward of the same model on the same batches. ``rollouts_over_engine``: tokens/s of
`sample_rollouts`, divided by those of plain ``/generate`` requests at the same concurrency.
Rounds alternate. Checked first: both sides of the first give the same loss, and each completion is sampled once.

    python benchmarks/bench_training.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lenvm_kernels import torchvision_schema

torchvision_schema.declare_if_missing()

import httpx  # noqa: E402
import torch  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from lenvm_runtime.default_model import ensure_default_model  # noqa: E402
from lenvm_runtime.serve import NO_HEAD, ServeConfig, running_engine  # noqa: E402
from lenvm_training.endpoints import Sampling  # noqa: E402
from lenvm_training.lenvm_trainer import LenVMTrainer, training_arguments  # noqa: E402
from lenvm_training.model import LenVM, ModelSettings, build_lenvm  # noqa: E402
from lenvm_training.prompts import Prompt, template_prompts  # noqa: E402
from lenvm_training.rollout_data import RolloutCollator, RolloutDataset  # noqa: E402
from lenvm_training.rollouts import ChatEncoder, prompt_token_ids, read_rollouts, sample_rollouts  # noqa: E402
from lenvm_training.targets import TargetConfig  # noqa: E402

BATCH, ACCUMULATED = 2, 4
PROMPT_LEN, OUTPUT_LEN = 40, 120
CONCURRENCY = 32
SAMPLING = Sampling(temperature=0.0, max_new_tokens=64)
"""The likeliest tokens: both sides are answered alike, where drawn lengths would differ by a fifth between rounds."""


def main() -> int:
    """Run and print the figures; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at most 8 minutes on 2 cores")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parsed = parser.parse_args()
    rounds, steps = (2, 2) if parsed.quick else (5, 5)
    figures = measure_training(rounds, steps) | measure_rollouts(rounds)
    for name, value in figures.items():
        print(f"{name:40s} {value:.4f}")
    if parsed.json:
        parsed.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def measure_training(rounds: int, steps: int) -> dict[str, float]:
    """Alternate trainer and bare loop over the same batches; the first round of each warms up."""
    settings = ModelSettings(str(ensure_default_model()), "SmolLM2-135M-Instruct", kind="lora")
    model = build_lenvm(settings, TargetConfig())
    dataset = RolloutDataset(_random_rows(BATCH * ACCUMULATED * steps))
    collator = RolloutCollator(0)
    items = [dataset[index] for index in range(len(dataset))]
    batches = [collator(items[start : start + BATCH]) for start in range(0, len(items), BATCH)]
    _check_losses(model, batches[0])
    times = {"trainer": 0.0, "bare": 0.0}
    for number in range(rounds + 1):
        for name, elapsed in (("trainer", _train(model, dataset, steps)), ("bare", _run_bare(model, batches))):
            times[name] += elapsed if number else 0.0
    num_steps = rounds * steps
    return {
        "trainer_over_bare": times["trainer"] / times["bare"],
        "trainer_step_s": times["trainer"] / num_steps,
        "bare_step_s": times["bare"] / num_steps,
    }


def _random_rows(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 40_000, (count, PROMPT_LEN + OUTPUT_LEN), generator=generator).tolist()
    return [
        {
            "prompt_id": str(index),
            "sample": 0,
            "prompt_token_ids": row[:PROMPT_LEN],
            "output_token_ids": row[PROMPT_LEN:],
            "finish_reason": "stop",
        }
        for index, row in enumerate(ids)
    ]


def _train(model: LenVM, dataset: RolloutDataset, steps: int) -> float:
    """Seconds of ``steps`` optimizer steps, without the Trainer's construction and final save."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            {
                "output_dir": folder,
                "max_steps": steps,
                "per_device_train_batch_size": BATCH,
                "gradient_accumulation_steps": ACCUMULATED,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "bf16": True,
            }
        )
        trainer = LenVMTrainer(model=model, args=arguments, train_dataset=dataset, data_collator=RolloutCollator(0))
        started = time.perf_counter()
        trainer.train()
        return time.perf_counter() - started


def _run_bare(model: LenVM, batches: list[dict[str, torch.Tensor]]) -> float:
    """Seconds of forward and backward of the language model and a mean of its states, without an optimizer."""
    model.train()
    started = time.perf_counter()
    for batch in batches:
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
            states = model.causal_model.base_model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
            ).last_hidden_state
        states.float().mean().backward()
    model.zero_grad()
    return time.perf_counter() - started


def _check_losses(model: LenVM, batch: dict[str, torch.Tensor]) -> None:
    with torch.inference_mode():
        output = model.eval()(**batch)
        is_state = batch["labels"] >= 0
        targets = model.space.target(batch["labels"][is_state].float())
        expected = (output.predictions[is_state] - targets).square().mean()
    assert torch.allclose(output.loss, expected, rtol=1e-4), (output.loss, expected)


def measure_rollouts(rounds: int) -> dict[str, float]:
    """Tokens/s of `sample_rollouts` and of plain requests, on one engine, in turn."""
    folder = ensure_default_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = template_prompts(4 * CONCURRENCY, "short_long", 0)
    tokens, times = {"rollouts": 0, "engine": 0}, {"rollouts": 0.0, "engine": 0.0}
    with running_engine(ServeConfig("127.0.0.1", 8000, None, NO_HEAD)) as (_, url):
        for number in range(rounds + 1):
            for name, run in (("rollouts", _sample), ("engine", _plain_requests)):
                started = time.perf_counter()
                count = run(prompts, tokenizer, url)
                if number:
                    tokens[name] += count
                    times[name] += time.perf_counter() - started
    rates = {name: tokens[name] / times[name] for name in tokens}
    return {
        "rollouts_over_engine": rates["rollouts"] / rates["engine"],
        "rollouts_tokens_per_s": rates["rollouts"],
        "engine_tokens_per_s": rates["engine"],
    }


def _sample(prompts: list[Prompt], tokenizer: Any, url: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rollouts.jsonl"
        asyncio.run(sample_rollouts(prompts, ChatEncoder(tokenizer), url, path, 1, SAMPLING, CONCURRENCY))
        rows = list(read_rollouts(path))
    assert sorted(row["prompt_id"] for row in rows) == sorted(prompt.id for prompt in prompts)
    return sum(len(row["output_token_ids"]) for row in rows)


def _plain_requests(prompts: list[Prompt], tokenizer: Any, url: str) -> int:
    ids = [prompt_token_ids(tokenizer, prompt) for prompt in prompts]

    async def run() -> int:
        queue = iter(ids)
        async with httpx.AsyncClient(
            timeout=None, trust_env=False, limits=httpx.Limits(max_connections=CONCURRENCY)
        ) as client:

            async def work() -> int:
                count = 0
                for token_ids in queue:
                    body = {"input_ids": token_ids, "sampling_params": asdict(SAMPLING)}
                    answer = (await client.post(f"{url}/generate", json=body)).json()
                    count += len(answer["output_ids"])
                return count

            return sum(await asyncio.gather(*(work() for _ in range(CONCURRENCY))))

    return asyncio.run(run())


if __name__ == "__main__":
    sys.exit(main())
