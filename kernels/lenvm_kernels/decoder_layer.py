"""A decoder layer on CPUs with matrix tiles (AMX), bf16, in two calls around its attention.

Stands for six operators of the serving engine's own layer and gives what they give: sums in fp32, rounded to bf16 where
the separate operators round. A row's result does not depend on the other rows or on the thread count, to the last bit.
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lenvm_kernels import cpp_library

SOURCE = Path(__file__).with_name("decoder_layer.cpp")
TILE = 16
BLOCK = 32
"""Inputs and outputs of a projection are multiples of this."""


def available() -> bool:
    """Whether the kernel is built and this CPU has matrix tiles."""
    return cpp_library.available(SOURCE) and bool(_library().lenvm_decoder_layer_runs_here())


def fits(weight: Tensor) -> bool:
    """Whether a weight [outputs, inputs] can be packed."""
    return weight.dtype == torch.bfloat16 and weight.dim() == 2 and all(size % BLOCK == 0 for size in weight.shape)


def pack(weight: Tensor) -> Tensor:
    """Lay a weight [outputs, inputs] out as tiles.

    -> [outputs / 32, inputs / 32, 2, 16 pairs of inputs, 16 outputs, 2].
    """
    outputs, inputs = weight.shape
    tiles = weight.detach().view(outputs // BLOCK, 2, TILE, inputs // BLOCK, TILE, 2)
    return tiles.permute(0, 3, 1, 4, 2, 5).contiguous()


def pack_gated(weight: Tensor) -> Tensor:
    """As `pack`, for rows ``[gate, up]``: every block of 32 outputs holds 16 of the gate, then their 16 of up."""
    outputs, inputs = weight.shape
    halves = weight.detach().view(2, outputs // BLOCK, TILE, inputs)
    return pack(halves.transpose(0, 1).reshape(outputs, inputs))


class _Projection(ctypes.Structure):
    """Mirror of `Projection` in decoder_layer.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("num_inputs", "num_outputs")),
    )


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("eps", ctypes.c_float))


class _Rotation(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("positions", "cos_sin")),
        *((name, ctypes.c_int64) for name in ("rotary_dim", "head_dim", "num_heads", "num_kv_heads")),
    )


class Projection:
    """A packed weight and its bias ([outputs] bf16, or None)."""

    def __init__(self, packed: Tensor, bias: Tensor | None = None) -> None:
        self._tensors = packed, bias  # kept alive: the structure holds addresses
        self.num_outputs, self.num_inputs = packed.shape[0] * BLOCK, packed.shape[1] * BLOCK
        bias_address = None if bias is None else bias.data_ptr()
        self.structure = _Projection(packed.data_ptr(), bias_address, self.num_inputs, self.num_outputs)


class Norm:
    """RMS norm: weight [dim] bf16, ``eps`` added to the mean square."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight = weight
        self.structure = _Norm(weight.data_ptr(), eps)


@dataclass(frozen=True)
class Heads:
    """Shape of the attention: query heads, key (and value) heads, elements of a head."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


def project_qkv(
    x: Tensor,
    residual: Tensor | None,
    norm: Norm,
    projection: Projection,
    heads: Heads,
    positions: Tensor,
    cos_sin: Tensor,
) -> Tensor:
    """``rotate(norm(s) W^T + b)`` with ``s = x + residual``: [rows, dim] -> new [rows, query, key and value heads].

    x, residual: [rows, dim] bf16, contiguous; ``residual`` becomes s, in place. positions: [rows] int64.
    cos_sin: [max_positions, rotary_dim] bf16, contiguous. The rotary embedding is that of
    `lenvm_kernels.layers.rotate`, on queries and keys.
    """
    rows = _check(x, projection.num_inputs)
    _check(x if residual is None else residual, projection.num_inputs)
    out = torch.empty(rows, projection.num_outputs, dtype=torch.bfloat16)
    positions = positions.contiguous()
    rotation = _Rotation(
        positions.data_ptr(), cos_sin.data_ptr(), cos_sin.shape[1], heads.head_dim, heads.num_heads, heads.num_kv_heads
    )
    _library().lenvm_project_qkv(
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        out.data_ptr(),
        rows,
        norm.structure,
        projection.structure,
        rotation,
        torch.get_num_threads(),
    )
    return out


def project_and_mlp(
    attention: Tensor, residual: Tensor, output: Projection, norm: Norm, gate_up: Projection, down: Projection
) -> Tensor:
    """``(silu(g) * u) D^T`` with ``[g, u] = norm(s) G^T`` and ``s = residual + attention O^T``: -> new [rows, dim].

    attention: [rows, heads] bf16, contiguous. residual: [rows, dim] bf16, contiguous; becomes s, in place.
    ``gate_up`` is packed by `pack_gated`.
    """
    rows = _check(attention, output.num_inputs)
    _check(residual, output.num_outputs)
    out = torch.empty(rows, output.num_outputs, dtype=torch.bfloat16)
    _library().lenvm_project_and_mlp(
        attention.data_ptr(),
        residual.data_ptr(),
        out.data_ptr(),
        rows,
        output.structure,
        norm.structure,
        gate_up.structure,
        down.structure,
        torch.get_num_threads(),
    )
    return out


def _check(rows: Tensor, width: int) -> int:
    """Number of rows. Raises ValueError where the kernel would read something else."""
    if rows.dtype != torch.bfloat16 or rows.dim() != 2 or rows.shape[1] != width or not rows.is_contiguous():
        raise ValueError(f"expected contiguous bf16 rows of {width}, got {rows.dtype} {tuple(rows.shape)}")
    return rows.shape[0]


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpp_library.load(SOURCE)
    library.lenvm_decoder_layer_runs_here.restype = ctypes.c_int32
    if library.lenvm_decoder_layer_runs_here():
        pointer, size, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        norm, projection, rotation = (ctypes.POINTER(s) for s in (_Norm, _Projection, _Rotation))
        library.lenvm_project_qkv.argtypes = (*[pointer] * 3, size, norm, projection, rotation, flag)
        library.lenvm_project_and_mlp.argtypes = (*[pointer] * 3, size, projection, norm, *[projection] * 2, flag)
        library.lenvm_project_qkv.restype = library.lenvm_project_and_mlp.restype = None
    return library
