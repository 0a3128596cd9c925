"""Trains the value head and the candidate head on kept states with transformers' Trainer: one run a head.

A run lies in ``<work>/<head>/<fingerprint>``, the fingerprint being that of its settings and of the tensors it reads:
a checkpoint of other settings or states is never resumed, and a run that is complete is not trained again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from lenvm_kernels.checkpoint import Head, load_head
from lenvm_kernels.heads import CandidateHead, HeadConfig, ValueHead
from lenvm_kernels.length_value import bin_edges, value_from_length
from lenvm_training.features import StateTable
from lenvm_training.head_losses import CandidateLoss, ValueLoss, features_of, imputed_returns
from lenvm_training.head_settings import HeadsSettings
from lenvm_training.lenvm_trainer import (
    ResumableTrainer,
    best_checkpoint,
    claim_output,
    last_checkpoint,
    training_arguments,
)

DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 1024,
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # of all steps
    "logging_steps": 0.01,
    "save_total_limit": 2,  # the best and the last
    "seed": 0,
    "report_to": "tensorboard",
}
"""transformers.TrainingArguments of the heads, where ``heads.training`` does not say otherwise."""

LogHistory = list[dict[str, Any]]
IMPUTE_ROWS = 16_384
FORM = ("hidden_size", "vocab_size", "gamma", "num_bins", "max_length", "rank", "feature_layers", "eos_token_ids")
"""Fields of `HeadConfig` that decide what the weights mean."""


class StateRows(Dataset[dict[str, Tensor]]):
    """States as the keyword arguments of a loss; a batch is one indexing of each tensor [N, ...].

    ``labels`` int64 [N] are remaining lengths.
    """

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors["labels"])

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        index = torch.tensor(rows)
        return {name: tensor[index] for name, tensor in self.tensors.items()}


class HeadTrainer(ResumableTrainer):
    """A Trainer whose best checkpoint is found wherever the folder lies now."""

    def _load_best_model(self) -> None:
        self.state.best_model_checkpoint = str(best_checkpoint(self))
        super()._load_best_model()


def train_head(
    config: HeadConfig, train: StateTable, validation: StateTable, embeddings: Tensor, settings: HeadsSettings
) -> tuple[Head, dict[str, LogHistory]]:
    """Train both heads on ``train``; returns them, on the CPU, and the Trainer's log of each trained one by its name.

    Both tables captured ``settings.layers``; ``embeddings`` [vocab, d] are the served model's. For each head on its
    own, the epoch with the least loss on ``validation`` is kept: other prompts than those of ``train``, and than
    those it is evaluated on. Raises ValueError for settings and states that cannot be used.
    """
    if not (len(train.position) and len(validation.position)):
        raise ValueError("data.rollouts: too few prompts; a tenth of them is set apart to choose the best epoch")
    torch.manual_seed((DEFAULTS | settings.training)["seed"])
    head = start_head(config, settings.start)
    value = ValueLoss(head.value_head, settings.censored, settings.dropout)
    candidate = CandidateLoss(head.candidate_head, config, embeddings, settings.dropout)
    logs: dict[str, LogHistory] = {}
    if "candidate" in settings.train:
        logs["candidate"] = _fit(
            "candidate",
            candidate,
            _candidate_rows(train, config, settings.layers),
            _candidate_rows(validation, config, settings.layers),
            settings,
            {"max_length": config.max_length, "embeddings": tensors_digest({"embeddings": embeddings})},
        )
    if "value" in settings.train:
        logs["value"] = _fit(
            "value",
            value,
            _value_rows(train, head, settings),
            _value_rows(validation, head, settings),
            settings,
            {"censored": settings.censored},
        )
    return head, logs


def start_head(config: HeadConfig, folder: str) -> Head:
    """The head to train: that of ``folder``, or fresh weights. Raises ValueError for a head of another form."""
    if not folder:
        return Head(config, ValueHead(config.hidden_size), CandidateHead(config))
    start = load_head(Path(folder))
    for name in FORM:
        there, wanted = getattr(start.config, name), getattr(config, name)
        if there != wanted:
            raise ValueError(f"heads.start: {folder} has {name} {there}, this run {wanted}")
    return Head(config, start.value_head.requires_grad_(True), start.candidate_head.requires_grad_(True))


def head_arguments(settings: HeadsSettings, output: Path, num_validation: int) -> TrainingArguments:
    """The arguments of one head's run. Raises ValueError naming an unknown or unusable key of ``heads.training``.

    Validation is one batch, so that its loss is the mean over all its states.
    """
    own = {
        "output_dir": str(output),
        "num_train_epochs": settings.epochs,
        "per_device_eval_batch_size": num_validation,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "ddp_broadcast_buffers": False,  # the embeddings are one
        "gradient_checkpointing": False,  # there are no layers to run again
    }
    return training_arguments(DEFAULTS | settings.training, own, "heads.training")


def recorded_settings(settings: HeadsSettings) -> dict[str, Any]:
    """How the heads are trained, defaults included."""
    return {"start": Path(settings.start).name, "train": list(settings.train), **_optimisation(settings)}


def _optimisation(settings: HeadsSettings) -> dict[str, Any]:
    training = DEFAULTS | settings.training
    return {"epochs": settings.epochs, "dropout": settings.dropout, "training": training}


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and every byte."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _value_rows(states: StateTable, head: Head, settings: HeadsSettings) -> StateRows:
    returns = value_from_length(states.remaining.float(), head.config.gamma)
    if settings.censored == "impute" and states.censored.any():
        censored = states.select(states.censored)
        returns[states.censored] = _imputed(censored, head, settings.layers)
    return StateRows(features=states.final, labels=returns, censored=states.censored)


@torch.inference_mode()
def _imputed(states: StateTable, head: Head, layers: tuple[int, ...]) -> Tensor:
    config, lengths = head.config, head.candidate_head.bin_lengths
    edges = bin_edges(config.num_bins, config.max_length)
    features = features_of(states, config, layers)
    parts = []
    for rows in torch.arange(len(states.position)).split(IMPUTE_ROWS):
        logprobs = head.candidate_head.state_logprobs(features[rows].float())
        parts.append(imputed_returns(logprobs, states.remaining[rows], lengths, edges, config.gamma))
    return torch.cat(parts)


def _candidate_rows(states: StateTable, config: HeadConfig, layers: tuple[int, ...]) -> StateRows:
    features = features_of(states, config, layers)
    return StateRows(features=features, labels=states.remaining, censored=states.censored, next_token=states.next_token)


def _as_fetched(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """`StateRows` makes batches; nothing is left to collate."""
    return batch


def _fit(
    name: str,
    module: nn.Module,
    train: StateRows,
    validation: StateRows,
    settings: HeadsSettings,
    loss_settings: dict[str, Any],
) -> LogHistory:
    """Train ``module`` in place, from its last checkpoint if there is one, and leave it at its best epoch."""
    record = _record(module, train, validation, settings, loss_settings)
    output = Path(settings.work) / name / hashlib.sha256(record.encode()).hexdigest()[:16]
    arguments = head_arguments(settings, output, len(validation))
    with arguments.main_process_first():
        claim_output(output, record)
        checkpoint = last_checkpoint(output)
    trainer = HeadTrainer(
        module,
        arguments,
        data_collator=_as_fetched,
        train_dataset=train,
        eval_dataset=validation,
    )
    with redirect_stdout(sys.stderr):  # the Trainer prints its log; standard output is for figures
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.state.best_global_step is None:
        raise ValueError(f"heads.training: the {name} head's loss on validation was never a finite number")
    module.cpu().eval()
    history: LogHistory = trainer.state.log_history
    return history


def _record(
    module: nn.Module, train: StateRows, validation: StateRows, settings: HeadsSettings, loss_settings: dict[str, Any]
) -> str:
    """Everything that decides the weights of a run, as JSON."""
    start = tensors_digest(module.state_dict())
    data = {"train": tensors_digest(train.tensors), "validation": tensors_digest(validation.tensors)}
    count = PartialState().num_processes
    processes = {"processes": count} if count > 1 else {}
    return (
        json.dumps({**loss_settings, **_optimisation(settings), **data, **processes, "start": start}, indent=2) + "\n"
    )
