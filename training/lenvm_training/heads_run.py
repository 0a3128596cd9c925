"""Trains value head and candidate head on the frozen served model: states, training, figures, folder, card."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lenvm_kernels.checkpoint import load_head, save_head
from lenvm_kernels.heads import HeadConfig
from lenvm_training import plots
from lenvm_training.evaluation import MIN_SAMPLES, evaluate_head
from lenvm_training.features import extract_states
from lenvm_training.head_settings import HeadsSettings
from lenvm_training.head_trainer import head_arguments, recorded_settings, start_head, train_head
from lenvm_training.model import load_language_model
from lenvm_training.model_card import CARD_FILE, described_data, write_model_card
from lenvm_training.rollouts import FINISHED, TRUNCATED

LOSSES = {"value": "squared error of the value", "candidate": "negative log-likelihood, nats"}


def train_heads(
    settings: HeadsSettings,
    backbone: Path,
    base_model: str,
    gamma: float,
    rollouts: list[dict[str, Any]],
    held_rollouts: list[dict[str, Any]],
) -> dict[str, float]:
    """Train, evaluate and write the head folder with its card; returns the figures on ``held_rollouts``.

    ``backbone`` is the served model's folder, ``base_model`` its name for the card. Of several processes, which share
    the work, the first one evaluates and writes; the others return no figures. Raises ValueError for settings
    and rollouts that cannot be used: for those and a bad key of ``heads.training`` before anything is loaded, for
    ``heads.start`` and ``heads.layers`` before the states are computed.
    """
    arguments = head_arguments(settings, Path(settings.work), 1)
    _check_rollouts(rollouts, held_rollouts)
    model = load_language_model(backbone, torch.bfloat16).to(arguments.device).eval()
    layers, work, out = settings.layers, Path(settings.work), Path(settings.out)
    config = _head_config(settings, model, base_model, gamma, shared_sampling(rollouts))
    start_head(config, settings.start)  # raises before the long part
    states = extract_states(model, rollouts, layers, settings.state_share, work / "train")
    in_validation = torch.tensor([_is_validation(row["prompt_id"]) for row in rollouts])[states.rollout]
    train, validation = states.select(~in_validation), states.select(in_validation)
    held_out = extract_states(model, held_rollouts, layers, settings.state_share, work / "eval")
    embeddings = model.get_input_embeddings().weight.detach().cpu()
    head, logs = train_head(config, train, validation, embeddings, settings)
    if arguments.process_index:
        return {}
    save_head(head, out, getattr(torch, settings.save_dtype))
    figures = evaluate_head(load_head(out), train, held_out, layers, held_rollouts)
    for name, label in LOSSES.items():
        if name in logs:
            plots.plot_loss(out / f"{name}_loss.png", logs[name], "eval_loss", label)
    own = {"censored": settings.censored, "state_share": settings.state_share}
    start = described_data(Path(settings.start) / CARD_FILE) if settings.start else ""
    write_model_card(out, config, own | recorded_settings(settings), rollouts, held_rollouts, figures, backbone, start)
    return figures


def _check_rollouts(rollouts: Sequence[dict[str, Any]], held_rollouts: Sequence[dict[str, Any]]) -> None:
    pictured = next((row for row in [*rollouts, *held_rollouts] if row.get("images")), None)
    if pictured:
        raise ValueError(f"prompt {pictured['prompt_id']}: has images, which heads do not read; train a LenVM")
    if not rollouts:
        raise ValueError("data.rollouts: no completion is left to train on (data.max_tokens, data.max_prompts)")
    samples = Counter(row["prompt_id"] for row in held_rollouts if row["finish_reason"] in (FINISHED, TRUNCATED))
    for name, rows in (("rollouts", rollouts), ("eval_rollouts", held_rollouts)):
        if not any(row["finish_reason"] == FINISHED for row in rows):
            raise ValueError(f"data.{name}: no completion that ended")
    if max(samples.values(), default=0) < MIN_SAMPLES:
        raise ValueError(f"data.eval_rollouts: no prompt has {MIN_SAMPLES} completions to compare a prediction with")


def shared_sampling(rollouts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The sampling settings that every completion has."""
    first, *others = (row["sampling"] for row in rollouts)
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def _head_config(
    settings: HeadsSettings, model: Any, base_model: str, gamma: float, sampling: dict[str, float]
) -> HeadConfig:
    num_layers = getattr(model.config, "num_hidden_layers", None)
    if num_layers is None:
        raise ValueError(f"model.backbone: heads are for text models, not for {model.config.model_type}; train a LenVM")
    for layer in settings.layers:
        if not 0 <= layer < num_layers:
            raise ValueError(f"heads.layers: must be of 0 to {num_layers - 1}, got {layer}")
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
