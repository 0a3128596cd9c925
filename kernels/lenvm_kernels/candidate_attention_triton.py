"""``candidate_attention`` in Triton. Needs CUDA, or Triton's interpreter.

A program takes a request, a KV head and a split of the keys. Its tile holds all query heads of the group and as many
rows of the request as fit, so that the prefix is read once for all of them.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl

MAX_TILE_ROWS = 128
MAX_SPLITS = 16
MIN_SPLIT_KEYS = 256
PROGRAMS_PER_PROCESSOR = 2
_NO_WINDOW = 1 << 30
_MASKED = tl.constexpr(-1.0e30)
_LOG2E = tl.constexpr(math.log2(math.e))


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
    """See `lenvm_kernels.candidate_attention.candidate_attention`."""
    num_programs = req_pool_indices.shape[0] * k_buffer.shape[1]
    wanted = PROGRAMS_PER_PROCESSOR * _num_processors(q.device)
    num_splits = choose_num_splits(num_programs, wanted, req_to_token.shape[1])
    tensors = (q, k_new, v_new, k_buffer, v_buffer, req_to_token, req_pool_indices, kv_lens, q_starts)
    return attend_in_splits(*tensors, scale=scale, window=window, logit_cap=logit_cap, num_splits=num_splits)


@cache
def _num_processors(device: torch.device) -> int:
    processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return processors


def choose_num_splits(num_programs: int, wanted: int, max_context: int) -> int:
    """A power of two: how often the keys of each request are split for about ``wanted`` programs to run."""
    limit = min(MAX_SPLITS, triton.next_power_of_2(max_context // MIN_SPLIT_KEYS + 1))
    num_splits: int = min(limit, triton.next_power_of_2(max(1, wanted // max(1, num_programs))))
    return num_splits


def attend_in_splits(
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
    window: int | None,
    logit_cap: float,
    num_splits: int,
) -> torch.Tensor:
    """`candidate_attention` with each request's keys cut into ``num_splits`` parts of about equal size."""
    num_rows, num_heads, qk_dim = q.shape
    num_reqs, num_kv_heads, v_dim = req_pool_indices.shape[0], k_buffer.shape[1], v_buffer.shape[2]
    out = q.new_empty(num_rows, num_heads, v_dim)
    if num_rows == 0 or num_reqs == 0:
        return out
    partials = out if num_splits == 1 else q.new_empty(num_splits, num_rows, num_heads, v_dim, dtype=torch.float32)
    maxima = q.new_empty(num_splits, num_rows, num_heads, dtype=torch.float32)
    sums = torch.empty_like(maxima)
    group = num_heads // num_kv_heads
    block_m = tile_rows(triton.cdiv(num_rows, num_reqs), group)
    strided = (q, k_new, v_new, k_buffer, v_buffer, req_to_token)
    _attend_split[(num_reqs, num_kv_heads, num_splits)](
        *strided,
        *(table.contiguous() for table in (req_pool_indices, kv_lens, q_starts)),
        partials,
        maxima,
        sums,
        *(tensor.stride(0) for tensor in strided),
        num_rows,
        num_heads,
        qk_dim,
        v_dim,
        scale,
        logit_cap,
        _NO_WINDOW if window is None else window,
        IS_CAPPED=logit_cap > 0,
        GROUP=group,
        NUM_SPLITS=num_splits,
        BLOCK_M=block_m,
        BLOCK_N=32 if q.dtype == torch.float32 else 64,
        BLOCK_D=max(16, triton.next_power_of_2(qk_dim)),
        BLOCK_V=max(16, triton.next_power_of_2(v_dim)),
        num_warps=8 if block_m > 64 else 4,
    )
    if num_splits > 1:
        _merge_splits[(num_rows, num_heads)](
            partials, maxima, sums, out, v_dim, NUM_SPLITS=num_splits, BLOCK_V=triton.next_power_of_2(v_dim)
        )
    return out


def tile_rows(rows_per_request: int, group: int) -> int:
    """Rows of the score tile (request's rows x heads of a group): a power of two from 16 to MAX_TILE_ROWS, or
    the group's own size where that is more."""
    rows: int = triton.next_power_of_2(min(max(16, rows_per_request * group), max(MAX_TILE_ROWS, group)))
    return rows


@triton.jit  # type: ignore[untyped-decorator]
def _capped(scores, logit_cap, IS_CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores in units of log 2, soft-capped: tanh(x) = 2 sigmoid(2 x) - 1."""
    if IS_CAPPED:
        scores = logit_cap * (2.0 * tl.sigmoid(2.0 * scores / logit_cap) - 1.0)
    return scores * _LOG2E


@triton.jit  # type: ignore[untyped-decorator]
def _start_from_new_keys(q, k_new_ptrs, v_new_ptrs, own, k_mask, v_mask, scale, logit_cap, IS_CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Online softmax after the rows' own keys, of the rows where ``own`` [M]; of no key elsewhere."""
    k_new = tl.load(k_new_ptrs, mask=k_mask, other=0.0)  # [M, D]
    score = _capped(tl.sum(q.to(tl.float32) * k_new.to(tl.float32), axis=1) * scale, logit_cap, IS_CAPPED)
    acc = tl.load(v_new_ptrs, mask=v_mask, other=0.0).to(tl.float32)  # [M, V]
    return tl.where(own, score, _MASKED), tl.where(own, 1.0, 0.0), acc


@triton.jit  # type: ignore[untyped-decorator]
def _attend_block(q, k, v, seen, highest, total, acc, scale, logit_cap, IS_CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The online softmax after one more block of keys: q [M, D], k [D, N], v [N, V], seen [M, N]."""
    scores = _capped(tl.dot(q, k, input_precision="ieee") * scale, logit_cap, IS_CAPPED)  # [M, N]
    scores = tl.where(seen, scores, _MASKED)
    new_highest = tl.maximum(highest, tl.max(scores, axis=1))  # [M]
    weights = tl.where(seen, tl.exp2(scores - new_highest[:, None]), 0.0)
    rescale = tl.exp2(highest - new_highest)
    acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return new_highest, total * rescale + tl.sum(weights, axis=1), acc


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _attend_split(  # type: ignore[no-untyped-def]
    q_ptr,
    k_new_ptr,
    v_new_ptr,
    k_ptr,
    v_ptr,
    req_to_token_ptr,
    req_pool_indices_ptr,
    kv_lens_ptr,
    q_starts_ptr,
    out_ptr,
    maxima_ptr,
    sums_ptr,
    q_stride,
    k_new_stride,
    v_new_stride,
    k_stride,
    v_stride,
    req_stride,
    num_rows,
    num_heads,
    qk_dim,
    v_dim,
    scale,
    logit_cap,
    window,
    IS_CAPPED: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    request, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_len = tl.load(kv_lens_ptr + request).to(tl.int32)
    slots_ptr = req_to_token_ptr + tl.load(req_pool_indices_ptr + request) * req_stride
    lowest = tl.maximum(kv_len - 1 - window, 0)
    split_len = tl.cdiv(tl.cdiv(kv_len - lowest, NUM_SPLITS), BLOCK_N) * BLOCK_N
    begin = lowest + split * split_len
    end = tl.minimum(begin + split_len, kv_len)
    first_row = tl.load(q_starts_ptr + request).to(tl.int32)
    last_row = tl.load(q_starts_ptr + request + 1).to(tl.int32)

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    in_d, in_e = d < qk_dim, e < v_dim
    for tile in range(first_row, last_row, BLOCK_M // GROUP):
        row = (tile + m // GROUP).to(tl.int64)
        valid = (row < last_row) & (m < BLOCK_M // GROUP * GROUP)
        head = kv_head * GROUP + m % GROUP
        q = tl.load(
            q_ptr + row[:, None] * q_stride + head[:, None] * qk_dim + d[None, :],
            mask=valid[:, None] & in_d[None, :],
            other=0.0,
        )  # [M, D]
        own = valid & (row > first_row) & (split == 0)
        highest, total, acc = _start_from_new_keys(
            q,
            k_new_ptr + row[:, None] * k_new_stride + kv_head * qk_dim + d[None, :],
            v_new_ptr + row[:, None] * v_new_stride + kv_head * v_dim + e[None, :],
            own,
            own[:, None] & in_d[None, :],
            own[:, None] & in_e[None, :],
            scale,
            logit_cap,
            IS_CAPPED,
        )
        first_key = kv_len - 1 + (row > first_row).to(tl.int32) - window  # [M]
        for start in range(begin, end, BLOCK_N):
            key = start + n
            slot = tl.load(slots_ptr + key, mask=key < end, other=0).to(tl.int64)
            k = tl.load(
                k_ptr + slot[None, :] * k_stride + kv_head * qk_dim + d[:, None],
                mask=(key < end)[None, :] & in_d[:, None],
                other=0.0,
            )  # [D, N]
            v = tl.load(
                v_ptr + slot[:, None] * v_stride + kv_head * v_dim + e[None, :],
                mask=(key < end)[:, None] & in_e[None, :],
                other=0.0,
            )  # [N, V]
            seen = (key < end)[None, :] & (key[None, :] >= first_key[:, None])
            highest, total, acc = _attend_block(q, k, v, seen, highest, total, acc, scale, logit_cap, IS_CAPPED)

        result = (split.to(tl.int64) * num_rows + row) * num_heads + head  # [M]
        if NUM_SPLITS == 1:
            acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        else:
            tl.store(maxima_ptr + result, highest, mask=valid)
            tl.store(sums_ptr + result, total, mask=valid)
        tl.store(
            out_ptr + result[:, None] * v_dim + e[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=valid[:, None] & in_e[None, :],
        )


@triton.jit  # type: ignore[untyped-decorator]
def _merge_splits(  # type: ignore[no-untyped-def]
    partials_ptr, maxima_ptr, sums_ptr, out_ptr, v_dim, NUM_SPLITS: tl.constexpr, BLOCK_V: tl.constexpr
):
    num_heads = tl.num_programs(1)
    result = tl.program_id(0).to(tl.int64) * num_heads + tl.program_id(1)
    s = tl.arange(0, NUM_SPLITS)
    e = tl.arange(0, BLOCK_V)
    rows = s.to(tl.int64) * tl.num_programs(0) * num_heads + result  # [S]
    maxima = tl.load(maxima_ptr + rows)
    weights = tl.exp2(maxima - tl.max(maxima, axis=0))
    total = tl.sum(weights * tl.load(sums_ptr + rows), axis=0)
    parts = tl.load(partials_ptr + rows[:, None] * v_dim + e[None, :], mask=(e < v_dim)[None, :], other=0.0)  # [S, V]
    merged = tl.sum(weights[:, None] * parts, axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + result * v_dim + e, merged.to(out_ptr.dtype.element_ty), mask=e < v_dim)
