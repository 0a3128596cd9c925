"""The backbones that a separate LenVM can have: SGLang's own model classes without the language-model head.

``forward`` returns the post-norm final states [tokens, hidden_size] instead of logits. The model runner puts two
fields into the Hugging Face configuration before it loads: ``lenvm_tied`` (the checkpoint's own
``tie_word_embeddings``; the configuration's is set so that no head is allocated) and ``lenvm_adapter`` (folder of a
LoRA adapter, or None).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sglang.srt.models.llama import LlamaForCausalLM
from sglang.srt.models.qwen2 import Qwen2ForCausalLM
from sglang.srt.models.qwen3 import Qwen3ForCausalLM
from torch import Tensor, nn

from lenvm_kernels.checkpoint_files import SERVED_BACKBONES, CheckpointError
from lenvm_runtime.value_model.weights import LoraAdapter, backbone_weights, check_complete, mark_missing


class _Backbone:
    """Mixin before a causal language model of SGLang."""

    def forward(self: Any, input_ids: Tensor, positions: Tensor, forward_batch: Any) -> Tensor:
        states: Tensor = self.model(input_ids, positions, forward_batch)
        return states

    def load_weights(self: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load the backbone from the shards of a checkpoint. Raises CheckpointError where a part is missing."""
        weights = backbone_weights(weights, self.config.lenvm_tied)
        if self.config.lenvm_adapter is not None:
            weights = LoraAdapter(Path(self.config.lenvm_adapter)).merge(weights)
        mark_missing(self)
        super().load_weights(weights)  # type: ignore[misc]
        check_complete(self)


class Qwen2ForLengthValueModel(_Backbone, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5 backbones."""


class Qwen3ForLengthValueModel(_Backbone, Qwen3ForCausalLM):
    """Qwen3 backbones (dense)."""


class LlamaForLengthValueModel(_Backbone, LlamaForCausalLM):
    """Llama backbones, SmolLM2 among them."""


_CLASSES: tuple[type[nn.Module], ...] = (Qwen2ForLengthValueModel, Qwen3ForLengthValueModel, LlamaForLengthValueModel)
ARCHITECTURES = dict(zip(SERVED_BACKBONES, _CLASSES, strict=True))
"""Model class by the backbone's ``model_type``."""


def find_architecture(model_type: str) -> str:
    """Name of the class for a backbone. Raises CheckpointError for a family that is not supported."""
    if model_type not in ARCHITECTURES:
        raise CheckpointError(
            f"a LenVM on a {model_type} backbone is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type].__name__
