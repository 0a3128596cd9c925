"""Attention of candidate next tokens: K continuations of a request share its cached prefix and see themselves.

Rows ``q_starts[r] .. q_starts[r + 1] - 1`` belong to request ``r``, whose keys ``0 .. kv_lens[r] - 1`` are cached, key
``t`` at slot ``req_to_token[req_pool_indices[r], t]``. The first row is the token just consumed: its key is cached,
the last of them. Every other row is a candidate for the position after it, with a key and value of its own
(``k_new``, ``v_new``) that nothing else sees and that is not kept::

    s[t]   = scale * q . k_buffer[slot(t), head // group]            (logit_cap c > 0: s = c * tanh(s / c))
    s[own] = scale * q . k_new[row, head // group]                   capped likewise; candidates only
    out    = sum_t softmax(s)[t] * v_buffer[slot(t), head // group] + softmax(s)[own] * v_new[row, head // group]
    over t with t >= p - window (window not None); p = kv_lens[r] - 1 for the first row, kv_lens[r] for a candidate

Sums are fp32 whatever the storage type; the softmax weights of cached keys may be rounded to it. A request's keys and
values are read once for all of its rows. Rows of other requests never influence a row; on a CPU, to the last bit and
whatever the batch. On a GPU the number of rows and of requests decides how the work is cut, hence the last bits.
"""

from __future__ import annotations

import torch

from lenvm_kernels import candidate_attention_torch, cpp_library, paged_attention_cpp
from lenvm_kernels.paged_attention import check_shapes


def candidate_attention(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    kv_lens: torch.Tensor,
    q_starts: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """Attention output of every row: Triton on CUDA, the C++ kernel on a CPU that can build it, else torch.

    Args:
        q: [num_rows, num_heads, qk_dim] bf16 or fp32 (Triton: fp16 too), requests one after the other; rows dense.
        k_new, v_new: [num_rows, num_kv_heads, qk_dim or v_dim], dtype of q; a request's first row is not read.
        k_buffer, v_buffer: [num_slots, num_kv_heads, qk_dim or v_dim], dtype of q; a slot must be dense.
        req_to_token: [max_reqs, max_context] int32 slot ids.
        req_pool_indices: [num_reqs] int64, rows of req_to_token.
        kv_lens: [num_reqs] int64, cached keys of each request, that of its first row included.
        q_starts: [num_reqs + 1] int64, first row of each request in q; a request may have none.
        scale: factor of q . k, positive.
        window: number of keys before its own position that a row sees; None: all.
        logit_cap: soft cap of the scores; 0: none.

    Returns:
        [num_rows, num_heads, v_dim], dtype of q, contiguous; rows from ``q_starts[-1]`` on (a CUDA graph's padding)
        are undefined. No host synchronisation on CUDA.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or a scale that is not positive.
    """
    check_shapes(q, k_buffer, v_buffer, req_to_token, req_pool_indices, kv_lens, q_starts)
    check_new_keys(q, k_new, v_new, k_buffer, v_buffer)
    if scale <= 0:
        raise ValueError(f"scale must be positive, not {scale}")
    if q.is_cuda:
        from lenvm_kernels.candidate_attention_triton import candidate_attention as backend
    elif paged_attention_cpp.supports(q, k_new, v_new, k_buffer, v_buffer) and cpp_library.available(
        paged_attention_cpp.SOURCE
    ):
        backend = paged_attention_cpp.candidate_attention
    else:
        backend = candidate_attention_torch.candidate_attention
    return backend(
        q,
        k_new,
        v_new,
        k_buffer,
        v_buffer,
        req_to_token,
        req_pool_indices,
        kv_lens,
        q_starts,
        scale=scale,
        window=window,
        logit_cap=logit_cap,
    )


def check_new_keys(
    q: torch.Tensor, k_new: torch.Tensor, v_new: torch.Tensor, k_buffer: torch.Tensor, v_buffer: torch.Tensor
) -> None:
    """Raise ValueError where the candidates' keys and values do not fit the queries and the cache."""
    for name, new, buffer in (("k_new", k_new, k_buffer), ("v_new", v_new, v_buffer)):
        if new.shape != (q.shape[0], *buffer.shape[1:]):
            raise ValueError(f"shape of {name} {tuple(new.shape)} does not fit {(q.shape[0], *buffer.shape[1:])}")
        if new.dtype != q.dtype:
            raise ValueError(f"dtype of {name} is {new.dtype}, that of q {q.dtype}")
