"""The one owner of the head format on disk.

A head folder holds ``value_head.safetensors`` in the published format (``v_head.fc.weight`` [d, d],
``v_head.fc.bias`` [d], ``v_head.summary.weight`` [1, d], ``v_head.summary.bias`` [1]),
``candidate_head.safetensors`` (the state dict of ``heads.CandidateHead``), and ``lenvm_config.json``
(the fields of ``heads.HeadConfig``).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from lenvm_kernels.checkpoint_files import CANDIDATE_FILE, CONFIG_FILE, VALUE_FILE, CheckpointError
from lenvm_kernels.heads import CandidateHead, HeadConfig, ValueHead

VALUE_PREFIX = "v_head."


@dataclass(frozen=True)
class Head:
    """A head as loaded: configuration and modules, on the CPU, fp32 whatever precision is stored."""

    config: HeadConfig
    value_head: ValueHead
    candidate_head: CandidateHead


def read_config(folder: Path) -> HeadConfig:
    """Read ``lenvm_config.json``. Raises CheckpointError."""
    path = folder / CONFIG_FILE
    try:
        fields = json.loads(path.read_text())
        fields["feature_layers"] = tuple(fields["feature_layers"])
        fields["eos_token_ids"] = tuple(fields["eos_token_ids"])
        return HeadConfig(**fields)
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a head configuration ({error})") from None


def load_head(folder: Path) -> Head:
    """Load a head folder. Raises CheckpointError naming the file."""
    config = read_config(folder)
    candidate_head = CandidateHead(config)
    _load(candidate_head, folder / CANDIDATE_FILE, "")
    value_head = load_value_head(folder, config.hidden_size)
    return Head(config, value_head, candidate_head.eval().requires_grad_(False))


def load_value_head(folder: Path, hidden_size: int) -> ValueHead:
    """Load the value head of any kind of LenVM for states of ``hidden_size``. Raises CheckpointError."""
    head = ValueHead(hidden_size)
    _load(head, folder / VALUE_FILE, VALUE_PREFIX)
    return head.eval().requires_grad_(False)


def save_value_head(head: ValueHead, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write ``value_head.safetensors`` in the published format."""
    _save(head, folder / VALUE_FILE, VALUE_PREFIX, dtype)


def save_head(head: Head, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a head folder, its weights as ``dtype``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_value_head(head.value_head, folder, dtype)
    _save(head.candidate_head, folder / CANDIDATE_FILE, "", dtype)
    (folder / CONFIG_FILE).write_text(json.dumps(dataclasses.asdict(head.config), indent=2) + "\n")


def _save(module: ValueHead | CandidateHead, path: Path, prefix: str, dtype: torch.dtype) -> None:
    state = {prefix + name: tensor.to(dtype).contiguous() for name, tensor in module.state_dict().items()}
    path.write_bytes(save(state))  # save_file gives no one else leave to read it


def _load(module: ValueHead | CandidateHead, path: Path, prefix: str) -> None:
    try:
        state = load_file(path)
        module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {str(error).splitlines()[0]}") from None
