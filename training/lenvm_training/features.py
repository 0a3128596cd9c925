"""States of rollouts, read off by a plain transformers forward of the served model, in resumable shards.

Of each completion up to ``states_per_rollout`` positions are kept, the prompt boundary always among them:
with L the completion's length (the end token counts), t a kept position and ``remaining`` = L - t,
the state's features, the token that was drawn from it and what is left. Completions cut by the token
limit are marked ``censored``: their ``remaining`` is only a lower bound.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from lenvm_training.rollouts import FINISHED, TRUNCATED

SHARD_ROLLOUTS = 256
MAX_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class StateTable:
    """N kept states. ``prompt`` is the index of the prompt, ``rollout`` that of the completion."""

    final: Tensor  # [N, d] post-norm final state
    layers: Tensor  # [N, num_layers, d] outputs of the captured decoder layers
    next_token: Tensor  # [N] int64
    position: Tensor  # [N] int64, t
    remaining: Tensor  # [N] int64, L - t >= 1
    censored: Tensor  # [N] bool
    rollout: Tensor  # [N] int64

    def select(self, rows: Tensor) -> StateTable:
        """The given rows (indices or mask)."""
        return StateTable(**{name: tensor[rows] for name, tensor in vars(self).items()})


def extract_states(
    model: Any,
    rollouts: Sequence[dict[str, Any]],
    layers: Sequence[int],
    states_per_rollout: int,
    folder: Path,
    seed: int = 0,
) -> StateTable:
    """Compute the states of ``rollouts`` (rows of a rollout file), reusing the shards in ``folder``.

    ``layers`` are 0-based decoder layers whose outputs are captured. Aborted completions are left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    usable = [
        (index, row)
        for index, row in enumerate(rollouts)
        if row["finish_reason"] in (FINISHED, TRUNCATED) and row["output_token_ids"]
    ]
    shards = [usable[start : start + SHARD_ROLLOUTS] for start in range(0, len(usable), SHARD_ROLLOUTS)]
    parts = []
    for number, shard in enumerate(tqdm(shards, desc="states", unit="shard")):
        path = folder / f"{number:05d}-{len(shard)}.safetensors"
        if not path.exists():
            states = _concat(list(_shard_states(model, shard, layers, states_per_rollout, seed)))
            partial = path.with_suffix(".partial")
            save_file(vars(states), partial)
            os.replace(partial, path)
        parts.append(StateTable(**load_file(path)))
    return _concat(parts)


def _shard_states(
    model: Any, shard: Sequence[tuple[int, dict[str, Any]]], layers: Sequence[int], count: int, seed: int
) -> Iterator[StateTable]:
    ordered = sorted(shard, key=lambda item: len(item[1]["prompt_token_ids"]) + len(item[1]["output_token_ids"]))
    for batch in _batches(ordered):
        yield from _batch_states(model, batch, layers, count, seed)


def _batches(rows: Sequence[tuple[int, dict[str, Any]]]) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Consecutive rows (by rising length) of at most MAX_BATCH_TOKENS padded tokens."""
    batch: list[tuple[int, dict[str, Any]]] = []
    for item in rows:
        length = len(item[1]["prompt_token_ids"]) + len(item[1]["output_token_ids"])
        if batch and (len(batch) + 1) * length > MAX_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


@torch.inference_mode()
def _batch_states(
    model: Any, batch: Sequence[tuple[int, dict[str, Any]]], layers: Sequence[int], count: int, seed: int
) -> Iterator[StateTable]:
    sequences = [torch.tensor(row["prompt_token_ids"] + row["output_token_ids"]) for _, row in batch]
    # Right padding: under causal attention no real position sees it.
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    with capture_layers(model, layers) as captured:
        final = model.base_model(padded.to(model.device), use_cache=False).last_hidden_state.cpu()  # [B, T, d]
    middle = [captured[layer].cpu() for layer in layers]
    for i, (index, row) in enumerate(batch):
        prompt_len, length = len(row["prompt_token_ids"]), len(row["output_token_ids"])
        kept = _kept_positions(length, count, seed + index)
        rows = kept + prompt_len - 1
        yield StateTable(
            final=final[i, rows].clone(),
            layers=torch.stack([states[i, rows] for states in middle], dim=1)
            if middle
            else final[i, rows[:, None][:, :0]],
            next_token=sequences[i][rows + 1],
            position=kept,
            remaining=length - kept,
            censored=torch.full_like(kept, row["finish_reason"] == TRUNCATED, dtype=torch.bool),
            rollout=torch.full_like(kept, index),
        )


class capture_layers:
    """Collect the outputs of decoder layers during a forward: ``with capture_layers(model, [20]) as captured``."""

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        self._modules = [(layer, model.base_model.layers[layer]) for layer in layers]
        self._captured: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> dict[int, Tensor]:
        for layer, module in self._modules:
            self._handles.append(module.register_forward_hook(self._hook(layer)))
        return self._captured

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, layer: int) -> Any:
        def store(_module: Any, _inputs: Any, output: Any) -> None:
            self._captured[layer] = output[0] if isinstance(output, tuple) else output

        return store


def _kept_positions(length: int, count: int, seed: int) -> Tensor:
    """Position 0 and a random choice of the others, increasing."""
    generator = torch.Generator().manual_seed(seed)
    others = torch.randperm(length - 1, generator=generator)[: count - 1] + 1
    return torch.cat([torch.zeros(1, dtype=torch.int64), others.sort().values])


def _concat(parts: Sequence[StateTable]) -> StateTable:
    names = vars(parts[0]).keys()
    return StateTable(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
