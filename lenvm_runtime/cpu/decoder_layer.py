"""Decoder layers of SGLang's Llama and Qwen2 models in one kernel call each, or two around another attention backend.

The layers keep their modules, their signature and their results; the operators between their parts go, which cost more
than the arithmetic of a decode step (``docs/experiments.md`` has the times).
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.rotary_embedding.rope_variant import Llama3RotaryEmbedding
from sglang.srt.models.llama import LlamaDecoderLayer
from sglang.srt.models.qwen2 import Qwen2DecoderLayer
from torch import Tensor, nn

from lenvm_kernels import decoder_layer
from lenvm_runtime import compat
from lenvm_runtime.cpu.attention_backend import CpuAttentionBackend
from lenvm_runtime.cpu.layers import is_plain_norm

CLASSES = (LlamaDecoderLayer, Qwen2DecoderLayer)
ROTARY_CLASSES = (RotaryEmbedding, Llama3RotaryEmbedding)


def fuse_decoder_layers(model: Any, in_int8: bool = False) -> None:
    """Let every decoder layer that the kernel can stand for run it; the unpacked weights of those are released.

    ``in_int8``: with weights rounded to int8.
    """
    if not decoder_layer.available():
        return
    for layer in filter(can_fuse, model.modules()):
        layer.forward = FusedDecoderLayer(layer, in_int8).forward


def can_fuse(layer: Any) -> bool:
    """Whether a decoder layer is of a known class, in bf16, on one device, with nothing added to its parts."""
    if type(layer) not in CLASSES:
        return False
    rotary = layer.self_attn.rotary_emb
    return (
        all(_is_plain(linear) for linear in _linears(layer))
        and all(linear.bias is None for linear in _linears(layer)[1:])
        and all(is_plain_norm(norm, norm.weight) for norm in (layer.input_layernorm, layer.post_attention_layernorm))
        and layer.input_layernorm.weight.dtype == torch.bfloat16
        and layer.input_layernorm.variance_epsilon == layer.post_attention_layernorm.variance_epsilon
        and layer.self_attn.attn.attn_type == AttentionType.DECODER
        and type(layer.mlp.act_fn) is SiluAndMul
        and type(rotary) in ROTARY_CLASSES
        and rotary.is_neox_style
        and rotary.cos_sin_cache.dtype == torch.bfloat16
    )


def _linears(layer: Any) -> tuple[Any, Any, Any, Any]:
    attention, mlp = layer.self_attn, layer.mlp
    return attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj


def _is_plain(linear: Any) -> bool:
    return (
        isinstance(linear, LinearBase)
        and type(linear.quant_method) is UnquantizedLinearMethod
        and linear.tp_size == 1
        and decoder_layer.fits(linear.weight)
    )


class FusedDecoderLayer:
    """The forward of one decoder layer, from its modules' weights."""

    def __init__(self, layer: Any, in_int8: bool = False) -> None:
        qkv, output, gate_up, down = _linears(layer)
        attention, norm, mlp_norm = layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm
        self._rotary, self._attention = attention.rotary_emb, attention.attn
        self._sizes = [attention.q_size, attention.kv_size, attention.kv_size]
        self._layer = decoder_layer.DecoderLayer(
            decoder_layer.Weights(
                norm.weight, qkv.weight, qkv.bias, output.weight, mlp_norm.weight, gate_up.weight, down.weight
            ),
            attention.num_heads,
            attention.num_kv_heads,
            attention.head_dim,
            norm.variance_epsilon,
            in_int8,
        )
        for linear in _linears(layer):
            linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)

    def forward(
        self, positions: Tensor, hidden_states: Tensor, forward_batch: Any, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """[tokens, hidden_size] and the residual stream (None before the first layer) -> both, one layer on."""
        layer, cos_sin, backend = self._layer, self._rotary.cos_sin_cache, compat.attention_backend()
        if isinstance(backend, CpuAttentionBackend):
            problem = backend.step_problem(self._attention)
            out = layer.run(hidden_states, residual, positions, cos_sin, problem, forward_batch.out_cache_loc)
            return out, hidden_states if residual is None else residual
        qkv = layer.project_qkv(hidden_states, residual, positions, cos_sin)
        residual = hidden_states if residual is None else residual
        attended = self._attention(*qkv.split(self._sizes, dim=-1), forward_batch)
        return layer.project_and_mlp(attended, residual), residual
