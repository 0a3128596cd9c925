"""SGLang attention backend of the value model's steps: candidates of a request attend its cached prefix and themselves.

Used by the value model alone, beside the backend that SGLang builds for its prefills.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor

from lenvm_kernels.candidate_attention import candidate_attention
from lenvm_runtime.value_model.packing import StepRows


class CandidateAttentionBackend(AttentionBackend):
    """`lenvm_kernels.candidate_attention` over the value model's KV pool, for the rows set by `set_rows`.

    Keys and values of row 0 of each request are cached at its slot; those of candidates are not kept.
    """

    def __init__(self, req_to_token_pool: Any, token_to_kv_pool: Any) -> None:
        super().__init__()
        self.req_to_token_pool = req_to_token_pool
        self.token_to_kv_pool = token_to_kv_pool
        self._rows: StepRows | None = None

    def set_rows(self, rows: StepRows) -> None:
        """The rows of the next forward."""
        self._rows = rows

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **_: Any
    ) -> Tensor:
        """[T, heads * qk_dim] -> [T, heads * v_dim]."""
        rows = self._rows
        assert rows is not None
        assert save_kv_cache
        k, v = (new.view(-1, layer.tp_k_head_num, dim) for new, dim in ((k, layer.qk_head_dim), (v, layer.v_head_dim)))
        first = rows.first_rows
        self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(rows.slots, None), k[first], v[first])
        window = layer.sliding_window_size
        out = candidate_attention(
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            k,
            v,
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            self.req_to_token_pool.req_to_token,
            rows.req_pool_indices,
            rows.kv_lens,
            rows.q_starts,
            scale=layer.scaling,
            window=window if window is not None and window > 0 else None,
            logit_cap=layer.logit_cap,
        )
        return out.flatten(1)

    def support_triton(self) -> bool:
        """Said of SGLang's own Triton kernels, of which this backend uses none."""
        return False
