"""The weights of a separate LenVM's backbone as they stream from its shards: names, tied embeddings, LoRA adapters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lenvm_kernels.checkpoint import VALUE_PREFIX
from lenvm_kernels.checkpoint_files import ADAPTER_CONFIG_FILE, ADAPTER_FILE, CheckpointError

EMBEDDINGS = "model.embed_tokens.weight"
_LM_HEAD = "lm_head.weight"
_PEFT_PREFIX = "base_model.model."
_UNSUPPORTED = {
    "use_dora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "alora_invocation_tokens": None,
}
_INITS_BESIDE_THE_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
"""PEFT's ``init_lora_weights`` that leave the base's weights alone; others train beside what they make of them."""


def backbone_weights(weights: Iterable[tuple[str, Tensor]], tied: bool) -> Iterator[tuple[str, Tensor]]:
    """The backbone's weights: without a value head or ``lm_head`` among them.

    ``lm_head`` stands in for embeddings that are ``tied`` to it and not stored themselves. Raises CheckpointError
    when there are no embeddings at all.
    """
    lm_head, has_embeddings = None, False
    for name, tensor in weights:
        if name == _LM_HEAD:
            lm_head = tensor
        elif not name.startswith(VALUE_PREFIX):
            has_embeddings |= name == EMBEDDINGS
            yield name, tensor
    if not has_embeddings:
        if lm_head is None or not tied:
            raise CheckpointError(f"the LenVM's shards have no {EMBEDDINGS}")
        yield EMBEDDINGS, lm_head


class LoraAdapter:
    """A PEFT LoRA adapter: W becomes W + scaling * B A, with scaling = alpha / r (rsLoRA: alpha / sqrt(r)).

    Plain linear-layer LoRA only; anything else is refused by name (CheckpointError).
    """

    def __init__(self, folder: Path) -> None:
        config = read_adapter_config(folder)
        rank = config["r"]
        self._scaling: float = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
        self._matrices = self._read_matrices(folder / ADAPTER_FILE)

    def merge(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights with the adapter added, in their own dtype. Raises CheckpointError where one finds no weight."""
        left = set(self._matrices)
        for name, tensor in weights:
            left.discard(name)
            yield name, self._merged(name, tensor) if name in self._matrices else tensor
        if left:
            raise CheckpointError(f"the LoRA adapter's base has no {min(left)}")

    def _merged(self, name: str, weight: Tensor) -> Tensor:
        a, b = (matrix.float() for matrix in self._matrices[name])  # [r, in], [out, r]
        merged: Tensor = weight.float() + self._scaling * (b @ a)
        return merged.to(weight.dtype)

    @staticmethod
    def _read_matrices(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
        state = load_file(path)
        names = [name for name in state if ".lora_A." in name]
        if 2 * len(names) != len(state):
            raise CheckpointError(f"{path}: holds tensors other than lora_A and lora_B of linear layers")
        return {
            _backbone_name(name.partition(".lora_A.")[0]): (state[name], state[name.replace(".lora_A.", ".lora_B.")])
            for name in names
        }


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """PEFT's configuration of the adapter in ``folder``. Raises CheckpointError for what `LoraAdapter` does not do."""
    path = folder / ADAPTER_CONFIG_FILE
    config: dict[str, Any] = json.loads(path.read_text())
    for key, neutral in _UNSUPPORTED.items():
        if config.get(key, neutral) not in (neutral, None):
            raise CheckpointError(f"{path}: {key} = {config[key]} is not supported")
    initial = config.get("init_lora_weights")
    if str(initial).lower() not in _INITS_BESIDE_THE_BASE:
        raise CheckpointError(
            f"{path}: init_lora_weights = {initial} is not supported: such an adapter belongs to a base with other "
            "weights than it names (PEFT can save it as plain LoRA: path_initial_model_for_weight_conversion)"
        )
    return config


def _backbone_name(module: str) -> str:
    """PEFT's name of an adapted module -> the weight's name in a causal language model's shards."""
    name = module.removeprefix(_PEFT_PREFIX)
    return f"{name if name.startswith('model.') else 'model.' + name}.weight"


def mark_missing(model: nn.Module) -> None:
    """Fill the floating-point parameters with NaN, so that `check_complete` finds what is not loaded."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.fill_(torch.nan)


def check_complete(model: nn.Module) -> None:
    """Raise CheckpointError naming a parameter of which some part was not loaded since `mark_missing`."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and bool(parameter.data.isnan().any()):
            raise CheckpointError(f"the LenVM's shards do not fill {name}")
