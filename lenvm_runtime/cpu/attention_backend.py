"""SGLang attention backend ``lenvm_cpu``: paged attention on CPUs through `lenvm_kernels.paged_attention`.

Serves decoder-only models with SGLang's plain KV pool (one slot a token). Anything else is refused by name when the
engine starts, or at the first layer that needs it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool
from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices

from lenvm_kernels import cpp_library, layers, paged_attention_cpp
from lenvm_kernels.paged_attention import paged_attention
from lenvm_kernels.paged_attention_cpp import Problem
from lenvm_runtime import compat

logger = logging.getLogger(__name__)

NAME = "lenvm_cpu"


class UnsupportedModelError(ValueError):
    """The model or a server option needs what this attention backend does not have."""


def register() -> None:
    """Make ``--attention-backend lenvm_cpu`` known; call before SGLang parses its arguments."""
    if NAME in ATTENTION_BACKEND_CHOICES:
        return
    register_attention_backend(NAME)(CpuAttentionBackend)
    add_attention_backend_choices([NAME])
    compat.around(compat.SUPPORT_TRITON, _support_triton)


def _support_triton(original: Callable[[str], bool], backend: str) -> bool:
    """SGLang decides by the backend's name whether its Triton kernels run; they do not on a CPU."""
    return backend != NAME and original(backend)


@dataclass(frozen=True)
class BatchMetadata:
    """What the kernel needs to know about a batch; the same for all layers.

    req_pool_indices, kv_lens: [num_reqs] int64; q_starts: [num_reqs + 1] int64.
    """

    req_pool_indices: torch.Tensor
    kv_lens: torch.Tensor
    q_starts: torch.Tensor


class CpuAttentionBackend(AttentionBackend):
    """Extend (causal, with cached prefix) and decode over the paged KV cache."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__()
        check_model(model_runner)
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self._row_indices = torch.arange(self.req_to_token_pool.req_to_token.shape[0] + 1)
        self._metadata: BatchMetadata | None = None
        self._problems: dict[int, Problem] = {}
        _build_kernel(model_runner)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Lengths and row offsets of the batch, once a step."""
        mode = forward_batch.forward_mode
        if mode.is_idle():
            self._metadata = None
            return
        if mode.is_decode():
            q_starts = self._row_indices[: forward_batch.batch_size + 1]
        elif mode.is_context_parallel_extend():
            q_starts = torch.nn.functional.pad(forward_batch.extend_seq_lens.long().cumsum(0), (1, 0))
        else:
            raise UnsupportedModelError(f"attention backend {NAME} does not do {mode.name}; no speculative decoding")
        indices, kv_lens = forward_batch.req_pool_indices.long(), forward_batch.seq_lens.long()
        self._metadata = BatchMetadata(indices.contiguous(), kv_lens.contiguous(), q_starts)

    def step_problem(self, layer: Any) -> Problem:
        """The kernel's problem of this step for a bf16 decoder attention layer, its queries and output left open."""
        metadata = self._metadata
        assert metadata is not None
        pool = self.token_to_kv_pool
        k_buffer, v_buffer = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        problem = self._problems.get(layer.layer_id)
        if problem is None:
            req_to_token = self.req_to_token_pool.req_to_token
            problem = paged_attention_cpp.make_problem(
                layer.tp_q_head_num, k_buffer, v_buffer, req_to_token, scale=layer.scaling
            )
            check_layer(layer)
            window = layer.sliding_window_size
            problem.window, problem.logit_cap = window if window > 0 else -1, layer.logit_cap
            self._problems[layer.layer_id] = problem
        problem.k, problem.v = k_buffer.data_ptr(), v_buffer.data_ptr()
        problem.num_reqs = len(metadata.kv_lens)
        problem.req_pool_indices = metadata.req_pool_indices.data_ptr()
        problem.kv_lens, problem.q_starts = metadata.kv_lens.data_ptr(), metadata.q_starts.data_ptr()
        return problem

    def forward_extend(
        self, q: torch.Tensor, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        """[num_tokens, heads * qk_dim] -> [num_tokens, heads * v_dim]; new keys and values are cached first."""
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(
        self, q: torch.Tensor, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        """As `forward_extend`, with one token a request."""
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache)

    def support_triton(self) -> bool:
        """No Triton on a CPU."""
        return False

    def _forward(
        self, q: torch.Tensor, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool
    ) -> torch.Tensor:
        check_layer(layer)
        metadata = self._metadata
        assert metadata is not None
        if save_kv_cache and k is not None and v is not None:
            self._store(layer, forward_batch.out_cache_loc, k, v)
        window = layer.sliding_window_size
        out = paged_attention(
            q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim),
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            self.req_to_token_pool.req_to_token,
            metadata.req_pool_indices,
            metadata.kv_lens,
            metadata.q_starts,
            scale=layer.scaling,
            causal=layer.attn_type == AttentionType.DECODER,
            window=window if window > 0 else None,
            logit_cap=layer.logit_cap,
        )
        return out.flatten(1)

    def _store(self, layer: Any, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Cache new keys and values: [num_tokens, kv_heads, dim] at slots [num_tokens]."""
        pool = self.token_to_kv_pool
        buffers = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        if not (layers.supports(k, v, *buffers) and paged_attention_cpp.dense_rows(k, v)):
            pool.set_kv_buffer(layer, KVWriteLoc(slots, None), k, v)
            return
        for rows, buffer in zip((k, v), buffers, strict=True):
            layers.store_rows(rows, buffer, slots)


def _build_kernel(model_runner: Any) -> None:
    """Build now, not inside the first request; say once where plain torch will run instead."""
    head_dim, dtype = model_runner.model_config.head_dim, model_runner.dtype
    if dtype not in paged_attention_cpp.DTYPES or head_dim % 2:
        logger.warning("attention runs in plain torch, several times slower: no kernel for %s, %d", dtype, head_dim)
        return
    cpp_library.available(paged_attention_cpp.SOURCE)


def check_model(model_runner: Any) -> None:
    """Raise UnsupportedModelError unless the model's attention and KV pool are of the plain kind."""
    pool = model_runner.token_to_kv_pool
    if model_runner.use_mla_backend or model_runner.model_config.is_encoder_decoder:
        raise UnsupportedModelError(f"attention backend {NAME} does not do MLA or encoder-decoder models")
    if type(pool) is not MHATokenToKVPool or pool.kv_cache_layout != "nhd" or pool.is_quantized_kv_cache:
        raise UnsupportedModelError(
            f"attention backend {NAME} needs SGLang's plain KV pool, got {type(pool).__name__}; "
            "for a model with sliding windows try --disable-hybrid-swa-memory"
        )
    if pool.dtype != model_runner.dtype:
        raise UnsupportedModelError(
            f"--kv-cache-dtype: attention backend {NAME} needs the model's {model_runner.dtype}, got {pool.dtype}"
        )


def check_layer(layer: Any) -> None:
    """Raise UnsupportedModelError for an attention layer whose formula is not the kernel's."""
    if layer.is_cross_attention or layer.attn_type == AttentionType.DECODER_BIDIRECTIONAL:
        raise UnsupportedModelError(f"attention backend {NAME} does not do cross or bidirectional decoder attention")
    if layer.logit_cap > 0 and layer.logit_capping_method != "tanh":
        raise UnsupportedModelError(f"attention backend {NAME} caps logits with tanh, not {layer.logit_capping_method}")
    if layer.xai_temperature_len > 0:
        raise UnsupportedModelError(f"attention backend {NAME} does not do length-dependent temperature")
