"""Models with random weights, for speed alone: a served model, a separate LenVM and a head, as folders.

    python benchmarks/random_models.py FOLDER --served CONFIG.json --lenvm CONFIG.json --tokenizer MODEL_FOLDER

FOLDER/served and FOLDER/lenvm hold the configurations and the tokenizer, and no weights: serve them with SGLang's
``--load-format dummy``. FOLDER/head is a value head and a candidate head on the served model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from lenvm_kernels.checkpoint import Head, save_head, save_value_head
from lenvm_kernels.heads import CandidateHead, HeadConfig, ValueHead

GAMMA = 0.997
WEIGHT_SCALE = 100.0
"""Of what reads tokens and states. Those of dummy weights are thousandths, whose values would hardly differ."""
NUM_BINS, MAX_LENGTH, RANK = 32, 1024, 256


def main() -> int:
    """Write the folders; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name in ("served", "lenvm", "tokenizer"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parsed = parser.parse_args()
    torch.manual_seed(0)
    served = make_model(parsed.folder / "served", parsed.served, parsed.tokenizer)
    lenvm = make_model(parsed.folder / "lenvm", parsed.lenvm, parsed.tokenizer)
    save_value_head(make_value_head(lenvm["hidden_size"]), parsed.folder / "lenvm")
    (parsed.folder / "lenvm/lenvm_config.json").write_text(json.dumps({"gamma": GAMMA}))
    save_head(make_head(served), parsed.folder / "head")
    return 0


def make_model(folder: Path, config: Path, tokenizer: Path) -> dict[str, Any]:
    """A model folder without weights; returns its configuration."""
    folder.mkdir(parents=True)
    shutil.copy(config, folder / "config.json")
    for path in tokenizer.glob("tokenizer*"):
        shutil.copy(path, folder)
    content: dict[str, Any] = json.loads(config.read_text())
    return content


def make_head(served: dict[str, Any]) -> Head:
    """A random head on the final states of a model of this configuration."""
    size, eos = served["hidden_size"], served["eos_token_id"]
    ends = tuple(eos) if isinstance(eos, list) else (eos,)
    config = HeadConfig("random", size, served["vocab_size"], GAMMA, NUM_BINS, MAX_LENGTH, RANK, (), ends)
    candidate_head = CandidateHead(config)
    with torch.no_grad():
        candidate_head.token.weight *= WEIGHT_SCALE
        candidate_head.out.weight *= WEIGHT_SCALE / 10
    return Head(config, make_value_head(size), candidate_head)


def make_value_head(size: int) -> ValueHead:
    """A random value head whose values differ between states of dummy weights."""
    head = ValueHead(size)
    with torch.no_grad():
        head.summary.weight *= WEIGHT_SCALE
    return head


if __name__ == "__main__":
    sys.exit(main())
