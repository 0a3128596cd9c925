"""Trains value head and candidate head on the frozen served model: states, training, figures, folder, card."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM

from lenvm_kernels.checkpoint import save_head
from lenvm_kernels.heads import HeadConfig
from lenvm_training.evaluation import evaluate_head
from lenvm_training.features import extract_states
from lenvm_training.model import default_device
from lenvm_training.model_card import write_model_card
from lenvm_training.trainer import TrainSettings, train_head


@dataclass(frozen=True)
class HeadsSettings:
    """Heads on frozen states. ``work`` keeps the states (reused), ``out`` is the head folder to write.

    ``layers``: decoder layers read beside the final state; ``num_bins``, ``max_length``: bins of remaining lengths.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    work: str
    out: str
    layers: tuple[int, ...] = ()
    rank: int = 256
    epochs: int = 8
    states: int = 24
    num_bins: int = 32
    max_length: int = 1024


def train_heads(
    settings: HeadsSettings,
    backbone: Path,
    base_model: str,
    gamma: float,
    rollouts: list[dict[str, Any]],
    held_rollouts: list[dict[str, Any]],
) -> dict[str, float]:
    """Train, evaluate and write the head folder with its card; returns the figures on ``held_rollouts``.

    ``backbone`` is the served model's folder, ``base_model`` its name for the card.
    """
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.bfloat16).to(default_device()).eval()
    layers, work, out = settings.layers, Path(settings.work), Path(settings.out)
    states = extract_states(model, rollouts, layers, settings.states, work / "train")
    in_validation = torch.tensor([_is_validation(row["prompt_id"]) for row in rollouts])[states.rollout]
    train, validation = states.select(~in_validation), states.select(in_validation)
    held_out = extract_states(model, held_rollouts, layers, settings.states, work / "eval")
    config = _head_config(settings, model, base_model, gamma, shared_sampling(rollouts))
    optimisation = TrainSettings(epochs=settings.epochs)
    embeddings = model.get_input_embeddings().weight.detach().cpu()
    head = train_head(config, train, validation, layers, embeddings, optimisation)
    figures = evaluate_head(head, train, held_out, layers, held_rollouts)
    save_head(head, out)
    write_model_card(out, config, optimisation, rollouts, held_rollouts, figures, backbone)
    return figures


def shared_sampling(rollouts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The sampling settings that every completion has."""
    first, *others = (row["sampling"] for row in rollouts)
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def _head_config(
    settings: HeadsSettings, model: Any, base_model: str, gamma: float, sampling: dict[str, float]
) -> HeadConfig:
    eos = model.generation_config.eos_token_id
    return HeadConfig(
        base_model=base_model,
        hidden_size=model.config.hidden_size,
        vocab_size=model.config.vocab_size,
        gamma=gamma,
        num_bins=settings.num_bins,
        max_length=settings.max_length,
        rank=settings.rank,
        feature_layers=settings.layers,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,),
        sampling=sampling,
    )


def _is_validation(prompt_id: str) -> bool:
    """A tenth of the prompts, the same ones in every run."""
    return zlib.crc32(prompt_id.encode()) % 10 == 0
