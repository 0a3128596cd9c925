"""Linear layers with weights packed once for the CPU's matrix instructions.

torch's bf16 matrix product on a CPU packs the weight anew at every call. Packed at load, the products are the same
to the last bit and about 1.5 times as fast (``benchmarks/bench_cpu_engine.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.base_config import LinearMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from torch import Tensor, nn

from lenvm_runtime import compat

NUM_ROWS = 32
"""The batch size that the packed layout is made for; it serves any other."""


def register() -> None:
    """Pack the weights of every model that is loaded from now on."""

    def pack(_result: Any, runner: Any, *_: Any, **__: Any) -> None:
        pack_linear_layers(runner.model)

    compat.after(compat.LOAD_MODEL, pack)


class PackedLinearMethod(LinearMethodBase):
    """SGLang linear method: ``x @ weight.T + bias`` with a weight packed by oneDNN."""

    def __init__(self, weight: Tensor) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), NUM_ROWS)

    def create_weights(self, *_: Any, **__: Any) -> None:
        """Not called: the method takes over layers that have loaded their weights."""
        raise NotImplementedError

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
        return product


def pack_linear_layers(model: Any) -> int:
    """Pack the bf16 weights of a loaded model's plain linear layers; return how many.

    The unpacked weight of a linear layer is released. An embedding that is also the output layer keeps it, for its
    look-ups, beside the packed one.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 0
    layers = [layer for layer in model.modules() if _is_plain_linear(layer)]
    for layer in layers:
        layer.quant_method = PackedLinearMethod(layer.weight)
        layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
    output = getattr(model, "lm_head", None)
    if isinstance(output, VocabParallelEmbedding) and _is_plain_output(model, output):
        output.quant_method = PackedOutputMethod(output.weight)
        layers.append(output)
    return len(layers)


class PackedOutputMethod(PackedLinearMethod):
    """The output layer's method; look-ups of a tied embedding read the unpacked weight."""

    def embedding(self, layer: Any, token_ids: Tensor) -> Tensor:
        """[...] int -> [..., hidden_size]."""
        return nn.functional.embedding(token_ids, layer.weight)


def _is_plain_output(model: Any, output: VocabParallelEmbedding) -> bool:
    return (
        type(output.quant_method) is UnquantizedEmbeddingMethod
        and output.weight.dtype == torch.bfloat16
        and not model.logits_processor.use_fp32_lm_head
    )


def _is_plain_linear(layer: Any) -> bool:
    return (
        isinstance(layer, LinearBase)
        and type(layer.quant_method) is UnquantizedLinearMethod
        and layer.weight.dtype == torch.bfloat16
    )
