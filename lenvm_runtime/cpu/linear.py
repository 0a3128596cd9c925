"""Linear layers with weights packed once, at load, for the product of `lenvm_kernels.decoder_layer`.

torch's own bf16 product on a CPU packs the weight anew at every call (``docs/experiments.md`` has the times).
"""

from __future__ import annotations

import ctypes
from typing import Any

from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from torch import Tensor, nn

from lenvm_kernels import decoder_layer
from lenvm_kernels.checkpoint_files import CheckpointError
from lenvm_runtime import compat
from lenvm_runtime.cpu.decoder_layer import fuse_decoder_layers


def register() -> None:
    """Pack the weights of every model that is loaded from now on."""

    def pack(_result: Any, runner: Any, *_: Any, **__: Any) -> None:
        in_int8 = getattr(runner, "in_int8", False)  # of a value model
        if not runner.server_args.enable_lora:  # SGLang's adapters wrap the linear layers
            fuse_decoder_layers(runner.model, in_int8)
        pack_linear_layers(runner.model, in_int8)
        ctypes.CDLL(None).malloc_trim(0)  # what loading and packing freed, back to the system

    compat.after(compat.LOAD_MODEL, pack)


class PackedWeight:
    """The product of a layer whose weight is packed."""

    def __init__(self, weight: Tensor, in_int8: bool = False) -> None:
        super().__init__()
        self._product = decoder_layer.PackedLinear(weight, in_int8)

    def apply(self, _layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        product = self._product(x.reshape(-1, x.shape[-1]).contiguous(), bias)
        return product.view(*x.shape[:-1], product.shape[-1])


class PackedLinearMethod(PackedWeight, UnquantizedLinearMethod):
    """SGLang's method of a plain linear layer, with the product of a packed weight."""


class PackedOutputMethod(PackedWeight, UnquantizedEmbeddingMethod):
    """SGLang's method of an output layer; look-ups of a tied embedding read the unpacked weight."""


def pack_linear_layers(model: Any, in_int8: bool = False) -> None:
    """Pack the bf16 weights of a loaded model's plain linear layers, where the kernel runs and they fit it.

    ``in_int8``: every linear layer is rounded; raises CheckpointError for one that cannot be. The unpacked weight of a
    linear layer is released. An embedding that is also the output layer keeps it, for its look-ups, beside the packed
    one.
    """
    if not decoder_layer.available():
        return
    for layer in filter(_is_plain_linear, model.modules()):
        layer.quant_method = PackedLinearMethod(layer.weight, in_int8)
        layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
    if in_int8:
        _check_all_are_packed(model)
    output = getattr(model, "lm_head", None)
    if isinstance(output, VocabParallelEmbedding) and _is_plain_output(model, output):
        output.quant_method = PackedOutputMethod(output.weight)


def _check_all_are_packed(model: Any) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, LinearBase) and layer.weight.numel() > 0:
            raise CheckpointError(f"{name}: only plain bf16 layers of multiples of {decoder_layer.BLOCK} run in int8")


def _is_plain_output(model: Any, output: VocabParallelEmbedding) -> bool:
    return (
        type(output.quant_method) is UnquantizedEmbeddingMethod
        and decoder_layer.fits(output.weight)
        and not model.logits_processor.use_fp32_lm_head
    )


def _is_plain_linear(layer: Any) -> bool:
    return (
        isinstance(layer, LinearBase)
        and type(layer.quant_method) is UnquantizedLinearMethod
        and layer.weight.numel() > 0  # else part of a fused decoder layer
        and decoder_layer.fits(layer.weight)
    )
