"""Where a separate LenVM comes from: folder or hub name, backbone, gamma, vocabulary. No torch, no SGLang."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lenvm_kernels.checkpoint_files import (
    ADAPTER_CONFIG_FILE,
    BACKBONE_CONFIG_FILE,
    CONFIG_FILE,
    SERVED_BACKBONES,
    CheckpointError,
    LenVMKind,
    find_kind,
)

FAMILY_GAMMAS = {"qwen2": 0.997, "qwen3": 0.9998}
"""Gamma of published checkpoints, which do not store it, by the backbone's ``model_type``."""

VALUE_SPACE = "discounted_return"
"""What a value head must predict, where ``lenvm_config.json`` says it (``target.space``)."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ValueModelSource:
    """A separate LenVM on disk.

    * ``folder``: where ``value_head.safetensors`` lies; for kind CHECKPOINT the backbone too;
    * ``gamma``: discount of its values, from ``lenvm_config.json`` or the default of the backbone's family.
    """

    folder: Path
    kind: LenVMKind
    gamma: float

    @property
    def adapter(self) -> Path | None:
        """Folder of the LoRA adapter, or None."""
        return self.folder if self.kind is LenVMKind.ADAPTER else None

    def find_backbone(self, served_model: str, served_name: str) -> str:
        """Path or hub name of the backbone's weights.

        That of an adapter is ``base_model`` of its ``lenvm_config.json``, else ``base_model_name_or_path`` of its
        own configuration; ``served_name`` stands for the served model itself.
        """
        if self.adapter is None:
            return str(self.folder)
        own = _read_json(self.adapter / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
        base = _read_json(self.adapter / CONFIG_FILE).get("base_model") or own
        if not isinstance(base, str) or not base:
            raise CheckpointError(f"{self.adapter / ADAPTER_CONFIG_FILE}: base_model_name_or_path is missing")
        return served_model if base == served_name else base


def find_folder(name: str) -> Path:
    """The folder of a LenVM given by path or hub name; a hub name is downloaded into the hub's cache.

    Raises CheckpointError.
    """
    folder = Path(name)
    if folder.is_dir() or not _HUB_NAME.fullmatch(name):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{name}: no such folder, and not to be had from the hub ({reason})") from None


def read_source(folder: Path) -> ValueModelSource:
    """Describe the separate LenVM in ``folder``. Raises CheckpointError when it holds none, or one without a gamma."""
    kind = find_kind(folder)
    if kind is LenVMKind.HEAD:
        raise CheckpointError(f"{folder}: holds a head on the served model, not a separate LenVM")
    return ValueModelSource(folder, kind, _read_gamma(folder))


def check_vocabulary(lenvm: Mapping[str, int], served: Mapping[str, int], num_embeddings: int) -> None:
    """Raise CheckpointError unless every token of the served model has the same id in the LenVM.

    ``lenvm``, ``served``: token -> id of the two tokenizers. More tokens in the LenVM, and a vocabulary padded
    to a larger ``num_embeddings``, are no hindrance.
    """
    for token, token_id in served.items():
        if lenvm.get(token) != token_id:
            found = f"id {lenvm[token]}" if token in lenvm else "no such token"
            raise CheckpointError(
                f"the LenVM's tokenizer is not the served model's: {token!r} is {token_id} there, the LenVM has {found}"
            )
    largest = max(served.values())
    if largest >= num_embeddings:
        raise CheckpointError(f"the LenVM embeds {num_embeddings} tokens, the served model has ids up to {largest}")


def check_family(model_type: str) -> None:
    """Raise CheckpointError for a backbone of a family that cannot be served."""
    if model_type not in SERVED_BACKBONES:
        supported = ", ".join(SERVED_BACKBONES)
        raise CheckpointError(f"a LenVM on a {model_type} backbone is not supported; supported: {supported}")


def check_context_length(served: int, lenvm: int) -> None:
    """Raise CheckpointError where the served model's contexts may be longer than the LenVM's, both in tokens."""
    if served > lenvm:
        raise CheckpointError(
            f"the served model's context is {served} tokens, the LenVM's {lenvm}; give --context-length {lenvm} or less"
        )


def check_tensor_parallelism(num_ranks: int, num_heads: int, num_kv_heads: int) -> None:
    """Raise CheckpointError unless SGLang can share the LenVM's attention among so many ranks.

    Each must have as many heads as the others, and as many KV heads, or one that as many others have too.
    """
    if num_heads % num_ranks:
        raise CheckpointError(f"--tp-size {num_ranks}: cannot share the LenVM's {num_heads} attention heads")
    if num_kv_heads % num_ranks and num_ranks % num_kv_heads:
        raise CheckpointError(f"--tp-size {num_ranks}: cannot share the LenVM's {num_kv_heads} KV heads")


def _read_gamma(folder: Path) -> float:
    path = folder / CONFIG_FILE
    if path.is_file():
        config = _read_json(path)
        space = config.get("target", {}).get("space", VALUE_SPACE)
        if space != VALUE_SPACE:
            raise CheckpointError(f"{path}: predicts {space}; only {VALUE_SPACE} can be served")
        gamma = config.get("gamma")
        if isinstance(gamma, bool) or not isinstance(gamma, int | float) or not 0 < gamma < 1:
            raise CheckpointError(f"{path}: gamma must be a number between 0 and 1, got {gamma!r}")
        return float(gamma)
    family = _read_json(folder / BACKBONE_CONFIG_FILE).get("model_type")
    if family not in FAMILY_GAMMAS:
        raise CheckpointError(f'{path}: is needed: {family} has no default gamma; write {{"gamma": 0.997}} or alike')
    return FAMILY_GAMMAS[family]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return content
