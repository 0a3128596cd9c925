"""A whole experiment on a tiny model: its configuration and data set, and a disk that is full."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tiny import make_backbone


def write_config(folder: Path, **changes: Any) -> str:
    if not (folder / "backbone").exists():
        make_backbone(folder / "backbone")
    words = [{"q": f"w{4 + index % 50} w{10 + index // 50}"} for index in range(60)]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in words))
    content = {
        "prompts": {
            "out": "prompts.jsonl",
            "eval_out": "eval_prompts.jsonl",
            "eval_fraction": 0.3,
            "sources": [{"path": "words.jsonl", "domain": "words", "columns": {"text": "q"}, "count": 40}],
            "self_made": 10,
        },
        "rollouts": {
            "out": "rollouts.jsonl",
            "eval_out": "eval.jsonl",
            "samples": 2,
            "eval_samples": 4,
            "concurrency": 8,
        },
        "model": {"backbone": "backbone", "served_model": "backbone", "kind": "full"},
        "target": {"gamma": 0.9},
        "data": {"rollouts": ["rollouts.jsonl"], "eval_rollouts": ["eval.jsonl"]},
        "training": {
            "output_dir": "run",
            "max_steps": 10,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "report_to": "none",
            "disable_tqdm": True,
            "save_steps": 5,
        },
        "evaluation": {"out": "run/evaluation"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({**content, **changes}))
    return "config.yaml"


def lines(path: str) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
