"""One-pass RMS norm, SiLU gate and rotary embedding in SGLang's models, through its registry of out-of-tree forwards.

A layer with an option that the kernels do not have keeps SGLang's own native forward.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.rotary_embedding.rope_variant import Llama3RotaryEmbedding
from sglang.srt.layers.utils import MultiPlatformOp
from sglang.srt.platforms import current_platform

from lenvm_kernels import layers


def register() -> None:
    """Make layers that are built from now on run the kernels."""
    forwards = {
        RMSNorm: _rms_norm,
        SiluAndMul: _silu_and_mul,
        RotaryEmbedding: _rotate,
        Llama3RotaryEmbedding: _rotate,
    }
    for layer_class, forward in forwards.items():
        MultiPlatformOp.register_oot_forward(layer_class, forward, current_platform.get_dispatch_key_name())


def _rms_norm(
    layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None, post_residual_addition: Any = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    summands = (x,) if residual is None else (x, residual)
    if post_residual_addition is not None or not is_plain_norm(layer, x) or not layers.supports(*summands):
        native: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
        native = layer.forward_native(x, residual, post_residual_addition)
        return native
    rows = x.reshape(-1, layer.hidden_size)
    if residual is None:
        return layers.rms_norm(rows, layer.weight, layer.variance_epsilon).view(x.shape)
    residual = residual.contiguous()
    normed = layers.rms_norm(rows, layer.weight, layer.variance_epsilon, residual.view(rows.shape))
    return normed.view(x.shape), residual


def is_plain_norm(layer: Any, x: torch.Tensor) -> bool:
    """Whether the norm is over all of the row, with roundings as in the kernel."""
    return (
        layer.variance_size_override is None
        and layer.override_orig_dtype is None
        and not layer.cast_x_before_out_mul
        and not layer.fp32_residual
        and layer.weight.dtype == x.dtype
        and x.shape[-1] == layer.hidden_size
    )


def _silu_and_mul(layer: Any, x: torch.Tensor) -> torch.Tensor:
    if not layers.supports(x):
        native: torch.Tensor = layer.forward_native(x)
        return native
    return layers.silu_and_mul(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def _rotate(
    layer: Any,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: torch.Tensor | None = None,
    fused_set_kv_buffer_arg: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    plain = offsets is None and fused_set_kv_buffer_arg is None and layer.is_neox_style and query.dim() == 2
    if not plain or not layers.supports(query, key, layer.cos_sin_cache):
        rotated: tuple[torch.Tensor, torch.Tensor]
        rotated = layer.forward_native(positions, query, key, offsets, fused_set_kv_buffer_arg)
        return rotated
    layers.rotate(positions.contiguous(), query, key, layer.cos_sin_cache, layer.head_size)
    return query, key
