"""Attention of new tokens over a paged KV cache: one contract, a torch reference and a C++ kernel for CPUs.

For request ``r`` with keys ``0 .. kv_lens[r]-1``, key ``t`` stored at slot ``req_to_token[req_pool_indices[r], t]``,
and its ``i``-th of ``n`` new tokens at position ``p = kv_lens[r] - n + i``::

    s[t]   = scale * q . k_buffer[slot(t), head // group]            (logit_cap c > 0: s = c * tanh(s / c))
    out    = sum_t softmax(s)[t] * v_buffer[slot(t), head // group]
    over t with t <= p (causal) and t >= p - window (window not None)

Sums are fp32 whatever the storage type; the softmax weights may be rounded to it. A request without keys gives
zeros. A row's result does not depend on the other requests of the batch (C++ kernel: to the last bit). Keys of the
new tokens must be in the cache already.
"""

import torch

from lenvm_kernels import cpp_library, paged_attention_cpp, paged_attention_torch


def paged_attention(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    kv_lens: torch.Tensor,
    q_starts: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """Attention output of all new tokens; the C++ kernel where it can run, else the torch reference.

    Args:
        q: [num_tokens, num_heads, qk_dim] bf16 or fp32, requests one after the other; a row must be dense.
        k_buffer: [num_slots, num_kv_heads, qk_dim], same dtype as q; a slot must be dense.
        v_buffer: [num_slots, num_kv_heads, v_dim], same dtype as q; a slot must be dense.
        req_to_token: [max_reqs, max_context] int32 slot ids.
        req_pool_indices: [num_reqs] int64, rows of req_to_token.
        kv_lens: [num_reqs] int64, keys of each request, its new tokens included.
        q_starts: [num_reqs + 1] int64, first row of each request in q; decode is ``arange(num_reqs + 1)``.
        scale: factor of q . k, positive.
        causal: a query sees keys up to its own position; False: all keys of its request.
        window: number of keys before its own position that a query sees; None: all.
        logit_cap: soft cap of the scores; 0: none.

    Returns:
        [num_tokens, num_heads, v_dim], dtype of q, contiguous.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or a scale that is not positive.
    """
    check_shapes(q, k_buffer, v_buffer, req_to_token, req_pool_indices, kv_lens, q_starts)
    if scale <= 0:
        raise ValueError(f"scale must be positive, not {scale}")
    backend = paged_attention_torch.paged_attention
    if paged_attention_cpp.supports(q, k_buffer, v_buffer) and cpp_library.available(paged_attention_cpp.SOURCE):
        backend = paged_attention_cpp.paged_attention
    return backend(
        q,
        k_buffer,
        v_buffer,
        req_to_token,
        req_pool_indices,
        kv_lens,
        q_starts,
        scale=scale,
        causal=causal,
        window=window,
        logit_cap=logit_cap,
    )


def check_shapes(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    kv_lens: torch.Tensor,
    q_starts: torch.Tensor,
) -> None:
    """Raise ValueError where the arguments of `paged_attention` do not fit together."""
    num_reqs = req_pool_indices.shape[0]
    if q.dim() != 3 or k_buffer.dim() != 3 or v_buffer.dim() != 3:
        raise ValueError("q, k_buffer and v_buffer must have 3 dimensions: tokens or slots, heads, head size")
    if k_buffer.shape[:2] != v_buffer.shape[:2] or q.shape[2] != k_buffer.shape[2]:
        raise ValueError(
            f"shapes of q {tuple(q.shape)}, k {tuple(k_buffer.shape)}, v {tuple(v_buffer.shape)} do not fit"
        )
    if q.shape[1] % k_buffer.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {k_buffer.shape[1]} KV heads")
    if not q.dtype == k_buffer.dtype == v_buffer.dtype:
        raise ValueError(f"dtypes of q, k and v differ: {q.dtype}, {k_buffer.dtype}, {v_buffer.dtype}")
    if kv_lens.shape != (num_reqs,) or q_starts.shape != (num_reqs + 1,):
        raise ValueError(f"{num_reqs} requests, but kv_lens {tuple(kv_lens.shape)}, q_starts {tuple(q_starts.shape)}")
    if req_to_token.dtype != torch.int32:
        raise ValueError(f"req_to_token must be int32, not {req_to_token.dtype}")
    if not req_pool_indices.dtype == kv_lens.dtype == q_starts.dtype == torch.int64:
        raise ValueError("req_pool_indices, kv_lens and q_starts must be int64")
