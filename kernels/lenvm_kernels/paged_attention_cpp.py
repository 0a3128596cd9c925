"""The CPU kernel of both attentions, paged and candidate, in ``paged_attention.cpp``."""

import ctypes
import functools
from pathlib import Path

import torch

from lenvm_kernels import cpp_library

SOURCE = Path(__file__).with_name("paged_attention.cpp")
DTYPES = (torch.bfloat16, torch.float32)


class Problem(ctypes.Structure):
    """Mirror of `Problem` in paged_attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "k_new", "v_new", "out", "req_to_token")),
        *((name, ctypes.c_void_p) for name in ("req_pool_indices", "kv_lens", "q_starts")),
        *((name, ctypes.c_int64) for name in ("num_reqs", "num_heads", "num_kv_heads", "qk_dim", "v_dim")),
        *((name, ctypes.c_int64) for name in ("req_stride", "q_stride", "out_stride", "k_stride", "v_stride")),
        *((name, ctypes.c_int64) for name in ("k_new_stride", "v_new_stride")),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("logit_cap", ctypes.c_float),
        ("causal", ctypes.c_int32),
    )


def make_problem(
    num_heads: int, k_buffer: torch.Tensor, v_buffer: torch.Tensor, req_to_token: torch.Tensor, *, scale: float
) -> Problem:
    """A causal problem over the buffers, its batch, queries and output left open."""
    problem = Problem(k=k_buffer.data_ptr(), v=v_buffer.data_ptr(), req_to_token=req_to_token.data_ptr())
    problem.num_heads, problem.num_kv_heads = num_heads, k_buffer.shape[1]
    problem.qk_dim, problem.v_dim = k_buffer.shape[2], v_buffer.shape[2]
    problem.req_stride, problem.k_stride, problem.v_stride = (t.stride(0) for t in (req_to_token, k_buffer, v_buffer))
    problem.window, problem.scale, problem.causal = -1, scale, 1
    return problem


def supports(q: torch.Tensor, *keys_and_values: torch.Tensor) -> bool:
    """Whether the kernel takes these tensors: CPU, bf16 or fp32, dense rows, an even head size."""
    return q.device.type == "cpu" and q.dtype in DTYPES and q.shape[2] % 2 == 0 and dense_rows(q, *keys_and_values)


def dense_rows(*tensors: torch.Tensor) -> bool:
    """Whether tensor[i] is contiguous for [n, heads, dim] tensors."""
    return all(tensor.stride(2) == 1 and tensor.stride(1) == tensor.shape[2] for tensor in tensors)


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
    """See `lenvm_kernels.paged_attention.paged_attention`; takes what `supports` accepts."""
    tables = (req_to_token, req_pool_indices, kv_lens, q_starts)
    return _run(q, None, k_buffer, v_buffer, tables, scale, causal, window, logit_cap)


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
    """See `lenvm_kernels.candidate_attention.candidate_attention`; takes what `supports` accepts."""
    tables = (req_to_token, req_pool_indices, kv_lens, q_starts)
    return _run(q, (k_new, v_new), k_buffer, v_buffer, tables, scale, False, window, logit_cap)


def _run(
    q: torch.Tensor,
    new: tuple[torch.Tensor, torch.Tensor] | None,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    tables: tuple[torch.Tensor, ...],
    scale: float,
    causal: bool,
    window: int | None,
    logit_cap: float,
) -> torch.Tensor:
    """One call of the library. ``new``: the candidates' keys and values; ``tables``: the four index tensors."""
    out = q.new_empty(q.shape[0], q.shape[1], v_buffer.shape[2])
    req_to_token, *rest = tables
    req_pool_indices, kv_lens, q_starts = (t.contiguous() for t in rest)
    problem = Problem(
        *(t.data_ptr() for t in (q, k_buffer, v_buffer)),
        *((t.data_ptr() for t in new) if new else (None, None)),
        *(t.data_ptr() for t in (out, req_to_token, req_pool_indices, kv_lens, q_starts)),
        req_pool_indices.shape[0],
        q.shape[1],
        k_buffer.shape[1],
        q.shape[2],
        v_buffer.shape[2],
        *(t.stride(0) for t in (req_to_token, q, out, k_buffer, v_buffer)),
        *((t.stride(0) for t in new) if new else (0, 0)),
        -1 if window is None else window,
        scale,
        logit_cap,
        causal,
    )
    load().lenvm_paged_attention(ctypes.byref(problem), q.dtype == torch.bfloat16, torch.get_num_threads())
    return out


@functools.cache
def load() -> ctypes.CDLL:
    """The kernel's library. Raises KernelUnavailableError where it cannot be had."""
    library = cpp_library.load(SOURCE)
    library.lenvm_paged_attention.argtypes = (ctypes.POINTER(Problem), ctypes.c_int32, ctypes.c_int32)
    library.lenvm_paged_attention.restype = None
    return library
