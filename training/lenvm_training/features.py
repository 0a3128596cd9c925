"""States of rollouts, read off by a plain transformers forward of the served model, in a shard a forward.

Of each completion the prompt boundary is kept and, with the same probability for all, each later position: a choice
that looked at the completion's length would make states of short answers count for more than they do in decoding, and
the values learned from them too near the end. With L the completion's length (the end token counts), t a kept position
and ``remaining`` = L - t: the state's features, the token that was drawn from it and what is left. Completions cut by
the token limit are marked ``censored``: their ``remaining`` is only a lower bound.

A shard is named by the fingerprint of what its states depend on and lists the fingerprints of its completions.
Runs of other models, layers and selections of rows can share a folder: each completion is run once for each
model and setting. Shards that nothing asks for any more stay until they are deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from lenvm_kernels import decoder_layer
from lenvm_training.rollouts import FINISHED, TRUNCATED

SORTED_ROLLOUTS = 256
MAX_BATCH_TOKENS = 8192
WEIGHT_SAMPLES = 1024
ROWS_KEY = "rows"

Row = tuple[str, dict[str, Any]]
"""Fingerprint and row of a completion."""


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
    share: float,
    folder: Path,
    seed: int = 0,
) -> StateTable:
    """The states of ``rollouts`` (rows of a rollout file) in their order, computed where ``folder`` has none.

    ``layers`` are 0-based decoder layers whose outputs are captured, ``share`` the probability that a position after
    the prompt boundary is kept. Aborted completions are left out; a
    completion that is there twice counts once. Several processes share the work, and each gets all states.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {
        _row_fingerprint(row): index
        for index, row in enumerate(rollouts)
        if row["finish_reason"] in (FINISHED, TRUNCATED) and row["output_token_ids"]
    }
    fingerprint = _states_fingerprint(model, layers, share, seed)
    stored = {key for path in _shard_paths(folder, fingerprint) for key in _stored_rows(path)}
    missing = [(key, rollouts[index]) for key, index in wanted.items() if key not in stored]
    processes = PartialState()
    processes.wait_for_everyone()  # until all have seen the same files
    missing = missing[processes.process_index :: processes.num_processes]
    packed = packed_products(model.base_model) if missing else nullcontext()
    with packed, tqdm(total=len(missing), desc="states", unit="completion") as progress:
        for batch in _batches(missing):
            states = _concat(list(_batch_states(model, batch, layers, share, seed)))
            _write_shard(folder, fingerprint, states, [key for key, _ in batch])
            progress.update(len(batch))
    processes.wait_for_everyone()
    return _load_states(_shard_paths(folder, fingerprint), wanted)


def _states_fingerprint(model: Any, layers: Sequence[int], share: float, seed: int) -> str:
    """Of what decides the states of every completion; of each weight a sample is read."""
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    settings = [config, list(layers), share, seed]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, weight in model.state_dict().items():
        sample = weight.flatten()[:: max(1, weight.numel() // WEIGHT_SAMPLES)]
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _row_fingerprint(row: dict[str, Any]) -> str:
    names = ("prompt_id", "sample", "prompt_token_ids", "output_token_ids", "finish_reason")
    return hashlib.sha256(json.dumps([row[name] for name in names]).encode()).hexdigest()[:16]


def _shard_paths(folder: Path, fingerprint: str) -> list[Path]:
    return sorted(folder.glob(f"{fingerprint}-*.safetensors"))


def _stored_rows(path: Path) -> list[str]:
    with safe_open(path, "pt") as shard:
        rows: list[str] = json.loads(shard.metadata()[ROWS_KEY])
    return rows


def _write_shard(folder: Path, fingerprint: str, states: StateTable, rows: Sequence[str]) -> None:
    """``states.rollout`` are positions in ``rows``."""
    name = hashlib.sha256("".join(rows).encode()).hexdigest()[:16]
    path = folder / f"{fingerprint}-{name}.safetensors"
    partial = path.with_suffix(".partial")
    save_file(vars(states), partial, {ROWS_KEY: json.dumps(rows)})
    os.replace(partial, path)


def _load_states(paths: Sequence[Path], wanted: Mapping[str, int]) -> StateTable:
    left, parts = dict(wanted), []
    for path in paths:
        indices = torch.tensor([left.pop(key, -1) for key in _stored_rows(path)])
        shard = StateTable(**load_file(path))
        rollout = indices[shard.rollout]
        parts.append(replace(shard, rollout=rollout).select(rollout >= 0))
    if left:
        raise ValueError(
            f"heads.work: the states of {len(left)} completions are missing; do all processes see one folder?"
        )
    states = _concat(parts)
    return states.select(states.rollout.argsort(stable=True))


def _num_tokens(row: Row) -> int:
    return len(row[1]["prompt_token_ids"]) + len(row[1]["output_token_ids"])


def _batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows of like length, of at most MAX_BATCH_TOKENS padded tokens together, or a single one."""
    for start in range(0, len(rows), SORTED_ROLLOUTS):
        batch: list[Row] = []
        for row in sorted(rows[start : start + SORTED_ROLLOUTS], key=_num_tokens):
            if batch and (len(batch) + 1) * _num_tokens(row) > MAX_BATCH_TOKENS:
                yield batch
                batch = []
            batch.append(row)
        yield batch


@torch.inference_mode()
def _batch_states(
    model: Any, batch: Sequence[Row], layers: Sequence[int], share: float, seed: int
) -> Iterator[StateTable]:
    sequences = [torch.tensor(row["prompt_token_ids"] + row["output_token_ids"]) for _, row in batch]
    # Right padding: under causal attention no real position sees it.
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    with capture_layers(model, layers) as captured:
        final = model.base_model(padded.to(model.device), use_cache=False).last_hidden_state.cpu()  # [B, T, d]
    middle = [captured[layer].cpu() for layer in layers]
    for i, (key, row) in enumerate(batch):
        prompt_len, length = len(row["prompt_token_ids"]), len(row["output_token_ids"])
        kept = _kept_positions(length, share, seed + int(key[:8], 16))
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
            rollout=torch.full_like(kept, i),
        )


@contextmanager
def packed_products(model: nn.Module) -> Iterator[None]:
    """Run a model's bf16 linear layers by `lenvm_kernels.decoder_layer`, on CPUs where that runs."""
    linears = [module for module in model.modules() if type(module) is nn.Linear and _can_pack(module)]
    for linear in linears:
        linear.forward = _packed_forward(linear)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def _can_pack(linear: nn.Linear) -> bool:
    return linear.weight.device.type == "cpu" and decoder_layer.fits(linear.weight) and decoder_layer.available()


def _packed_forward(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    product = decoder_layer.PackedLinear(linear.weight)

    def forward(x: Tensor) -> Tensor:
        return product(x.reshape(-1, linear.in_features), linear.bias).view(*x.shape[:-1], linear.out_features)

    return forward


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


def _kept_positions(length: int, share: float, seed: int) -> Tensor:
    """Position 0, and each of the others with probability ``share``; increasing."""
    drawn = torch.rand(length, generator=torch.Generator().manual_seed(seed))
    drawn[0] = 0.0
    return (drawn < share).nonzero().flatten()


def _concat(parts: Sequence[StateTable]) -> StateTable:
    names = vars(parts[0]).keys()
    return StateTable(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
