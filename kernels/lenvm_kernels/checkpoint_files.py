"""The files of a LenVM folder, and which kind of LenVM they make. No torch.

==================  ==============================================================================
head                ``value_head``, ``candidate_head``, ``lenvm_config.json``: reads the served model's states
checkpoint          ``value_head`` and a Hugging Face model folder (``config.json``, tokenizer, shards)
adapter             ``value_head``, ``lenvm_config.json`` and a PEFT LoRA adapter (``adapter_config.json``)
==================  ==============================================================================
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path

CONFIG_FILE = "lenvm_config.json"
VALUE_FILE = "value_head.safetensors"
CANDIDATE_FILE = "candidate_head.safetensors"
BACKBONE_CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"

SERVED_BACKBONES = ("qwen2", "qwen3", "llama")
"""``model_type`` of the backbones that a separate LenVM can be served with."""


class CheckpointError(ValueError):
    """A LenVM folder that cannot be used; the message names the file and what is wrong."""


class LenVMKind(Enum):
    """What a LenVM folder holds. The value names the files that make it this kind."""

    HEAD = (VALUE_FILE, CANDIDATE_FILE, CONFIG_FILE)
    ADAPTER = (VALUE_FILE, ADAPTER_CONFIG_FILE, ADAPTER_FILE, CONFIG_FILE)
    CHECKPOINT = (VALUE_FILE, BACKBONE_CONFIG_FILE)


def find_kind(folder: Path) -> LenVMKind:
    """The kind of LenVM in ``folder``. Raises CheckpointError when its files make none."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    for kind in LenVMKind:
        if all((folder / name).is_file() for name in kind.value):
            return kind
    known = "; ".join(f"{kind.name.lower()}: {', '.join(kind.value)}" for kind in LenVMKind)
    raise CheckpointError(f"{folder}: its files make no LenVM ({known})")
