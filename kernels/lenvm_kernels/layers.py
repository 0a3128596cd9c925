"""The elementwise parts of a decoder layer on CPUs, each in one pass: RMS norm, SiLU gate, rotary embedding.

Only the C++ kernels stand here: their torch reference is the serving engine's own native forward, which runs where
`supports` says no. Computed in fp32, rounded to the storage type where the native expressions round. A row's result
does not depend on the other rows, to the last bit.
"""

import ctypes
import functools
from pathlib import Path

import torch

from lenvm_kernels import cpp_library

SOURCE = Path(__file__).with_name("layers.cpp")
DTYPES = (torch.bfloat16, torch.float32)


def supports(*tensors: torch.Tensor) -> bool:
    """Whether the kernels take these tensors: built, all on the CPU, one dtype (bf16 or fp32), dense last dimension."""
    dtype = tensors[0].dtype
    fitting = all(t.device.type == "cpu" and t.dtype == dtype and t.stride(-1) == 1 for t in tensors)
    return fitting and dtype in DTYPES and cpp_library.available(SOURCE)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> torch.Tensor:
    """``y = s / sqrt(mean(s ** 2) + eps) * weight`` with ``s = x + residual``: [rows, dim] -> new [rows, dim].

    ``residual`` [rows, dim] becomes s, in place. weight: [dim].
    """
    out = torch.empty(x.shape, dtype=x.dtype)
    _library().lenvm_rms_norm(
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        x.shape[1],
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        x.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of rows ``[gate, up]``: [rows, 2 * dim] -> new [rows, dim]."""
    out = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype)
    _library().lenvm_silu_and_mul(
        x.data_ptr(),
        out.data_ptr(),
        *out.shape,
        x.stride(0),
        x.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return out


def rotate(positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, cos_sin: torch.Tensor, head_dim: int) -> None:
    """Rotary embedding of the heads of q and k, in place (halves paired, as in GPT-NeoX).

    With c, s = cos_sin[position] in halves, each pair (a, b) = (x[j], x[j + rotary_dim / 2]) of a head becomes
    (a c[j] - b s[j], b c[j] + a s[j]); elements from rotary_dim on stay.

    positions: [rows] int64, dense. q: [rows, num_heads * head_dim]. k: [rows, num_kv_heads * head_dim].
    cos_sin: [max_positions, rotary_dim], contiguous; rotary_dim even, at most head_dim.
    """
    _library().lenvm_rotate(
        positions.data_ptr(),
        q.data_ptr(),
        k.data_ptr(),
        cos_sin.data_ptr(),
        positions.shape[0],
        q.shape[1] // head_dim,
        k.shape[1] // head_dim,
        head_dim,
        cos_sin.shape[1],
        q.stride(0),
        k.stride(0),
        q.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )


def store_rows(rows: torch.Tensor, buffer: torch.Tensor, slots: torch.Tensor) -> None:
    """``buffer[slots[i]] = rows[i]``: rows [n, ...] to buffer [num_slots, ...], of one dtype, dense but for the first
    dimension; slots: [n] int64, dense, in range.
    """
    itemsize = rows.dtype.itemsize
    _library().lenvm_store_rows(
        rows.data_ptr(),
        buffer.data_ptr(),
        slots.data_ptr(),
        slots.shape[0],
        rows.shape[1:].numel() * itemsize,
        rows.stride(0) * itemsize,
        buffer.stride(0) * itemsize,
    )


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpp_library.load(SOURCE)
    pointer, size, flag, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
    library.lenvm_rms_norm.argtypes = (*[pointer] * 4, *[size] * 4, real, flag, flag)
    library.lenvm_silu_and_mul.argtypes = (*[pointer] * 2, *[size] * 3, flag, flag)
    library.lenvm_rotate.argtypes = (*[pointer] * 4, *[size] * 7, flag, flag)
    library.lenvm_store_rows.argtypes = (*[pointer] * 3, *[size] * 4)
    for name in ("rms_norm", "silu_and_mul", "rotate", "store_rows"):
        getattr(library, f"lenvm_{name}").restype = None
    return library
