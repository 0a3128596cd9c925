"""A linear layer on CPUs with AVX-512, bf16, and a decoder layer in one call, or in two around its attention.

The decoder layer stands for six operators of the serving engine's own and gives what they give: sums in fp32, rounded
to bf16 where the separate operators round. A row's result does not depend on the other rows or on the thread count, to
the last bit.

Weights may be rounded to int8 (`quantize`), the rows that meet them too: x q by its row's greatest, w by that of its
output, ``y = s_x s_w sum(q_x q_w)`` with ``s = max|.| / 127``; everything else stays as it is.
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lenvm_kernels import cpp_library, paged_attention_cpp
from lenvm_kernels.paged_attention_cpp import Problem

SOURCE = Path(__file__).with_name("decoder_layer.cpp")
TILE = 16
BLOCK = 32
"""Inputs and outputs of a projection are multiples of this."""


def available() -> bool:
    """Whether the kernel is built, for a CPU with AVX-512, and may use its matrix tiles where it has them."""
    return cpp_library.available(SOURCE) and bool(_library().lenvm_decoder_layer_runs_here())


def runs_in_int8() -> bool:
    """Whether the kernel is built for a CPU that multiplies bytes (AVX-512 VNNI)."""
    return available() and bool(_library().lenvm_decoder_layer_runs_in_int8())


def fits(weight: Tensor) -> bool:
    """Whether a weight [outputs, inputs] can be packed."""
    return weight.dtype == torch.bfloat16 and weight.dim() == 2 and all(size % BLOCK == 0 for size in weight.shape)


@dataclass(frozen=True)
class PackedWeight:
    """A weight [outputs, inputs] as the kernel reads it; ``scales``, ``sums`` [outputs]: of one in int8."""

    data: Tensor
    scales: Tensor | None
    sums: Tensor | None
    num_inputs: int
    num_outputs: int


def pack(weight: Tensor) -> PackedWeight:
    """Lay a bf16 weight [outputs, inputs] out as tiles.

    -> [outputs / 32, inputs / 32, 2, 16 pairs of inputs, 16 outputs, 2].
    """
    outputs, inputs = weight.shape
    tiles = weight.detach().view(outputs // BLOCK, 2, TILE, inputs // BLOCK, TILE, 2)
    return PackedWeight(tiles.permute(0, 3, 1, 4, 2, 5).contiguous(), None, None, inputs, outputs)


def quantize(weight: Tensor) -> PackedWeight:
    """Round a bf16 weight [outputs, inputs] to int8, each output by its greatest: -> [outputs / 32, inputs / 4, 32, 4].

    ``sums`` are 128 times those over the inputs: what inputs that lie 128 higher add.
    """
    outputs, inputs = weight.shape
    wide = weight.detach().float()
    scales = wide.abs().amax(1) / 127
    rounded = (wide / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)).round().to(torch.int8)
    blocks = rounded.view(outputs // BLOCK, BLOCK, inputs // 4, 4).transpose(1, 2).contiguous()
    return PackedWeight(blocks, scales, 128 * rounded.sum(1, dtype=torch.int32), inputs, outputs)


def order_gated(weight: Tensor) -> Tensor:
    """Reorder rows ``[gate, up]``: every 32 outputs are 16 of the gate, then their 16 of up."""
    outputs, inputs = weight.shape
    halves = weight.detach().view(2, outputs // BLOCK, TILE, inputs)
    return halves.transpose(0, 1).reshape(outputs, inputs)


class _Projection(ctypes.Structure):
    """Mirror of `Projection` in decoder_layer.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "scales", "sums")),
        *((name, ctypes.c_int64) for name in ("num_inputs", "num_outputs")),
    )


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("eps", ctypes.c_float))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Norm) for name in ("norm", "mlp_norm")),
        *((name, _Projection) for name in ("qkv", "output", "gate_up", "down")),
    )


class _Rotation(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("positions", "cos_sin")),
        *((name, ctypes.c_int64) for name in ("rotary_dim", "head_dim", "num_heads", "num_kv_heads")),
    )


@dataclass(frozen=True)
class Weights:
    """The parameters of a layer: bf16, contiguous; the projections are [outputs, inputs], and `fits` them."""

    norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class PackedLinear:
    """``x W^T + b`` of a weight [outputs, inputs] that `fits`, packed once; ``in_int8``: rounded (`quantize`)."""

    def __init__(self, weight: Tensor, in_int8: bool = False) -> None:
        self._packed = quantize(weight) if in_int8 else pack(weight)
        self._outputs, self._inputs = weight.shape

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[rows, inputs] bf16, contiguous; bias [outputs] bf16, contiguous -> new [rows, outputs], rounded once."""
        if bias is not None and (bias.dtype != torch.bfloat16 or bias.shape != (self._outputs,)):
            raise ValueError(f"expected a bf16 bias of {self._outputs}, got {bias.dtype} {tuple(bias.shape)}")
        out = torch.empty(_check(x, self._inputs), self._outputs, dtype=torch.bfloat16)
        projection = _projection(self._packed, bias)
        _library().lenvm_linear(x.data_ptr(), out.data_ptr(), len(x), projection, torch.get_num_threads())
        return out


class DecoderLayer:
    """One layer with its weights packed. ``eps`` is added to the mean square in both norms; ``in_int8``: `quantize`."""

    def __init__(
        self, weights: Weights, num_heads: int, num_kv_heads: int, head_dim: int, eps: float, in_int8: bool = False
    ) -> None:
        projections = weights.qkv, weights.output, order_gated(weights.gate_up), weights.down
        packed = [quantize(weight) if in_int8 else pack(weight) for weight in projections]
        self._kept = weights.norm, weights.mlp_norm, weights.qkv_bias, packed  # the structure holds addresses
        self._shape = head_dim, num_heads, num_kv_heads
        self._dim, self._width, self._attended = weights.qkv.shape[1], weights.qkv.shape[0], weights.output.shape[1]
        biases = weights.qkv_bias, None, None, None
        qkv, output, gate_up, down = (_projection(*pair) for pair in zip(packed, biases, strict=True))
        norms = (_Norm(norm.data_ptr(), eps) for norm in (weights.norm, weights.mlp_norm))
        self._layer = _Layer(*norms, qkv, output, gate_up, down)

    def run(
        self,
        x: Tensor,
        residual: Tensor | None,
        positions: Tensor,
        cos_sin: Tensor,
        problem: Problem,
        slots: Tensor,
    ) -> Tensor:
        """The whole layer: [rows, dim] -> new [rows, dim].

        As `project_qkv`, paged attention, `project_and_mlp`; without ``residual``, x becomes it, in place. ``problem``
        is that of the attention, q and out left open; the keys and values of the rows are written to its buffers first,
        at ``slots`` [rows] int64.
        """
        _check(x if residual is None else residual, self._dim)
        if slots.dtype != torch.int64 or slots.shape != x.shape[:1] or not slots.is_contiguous():
            raise ValueError(f"expected a contiguous int64 slot a row, got {slots.dtype} {tuple(slots.shape)}")
        out = torch.empty_like(x)
        _library().lenvm_decoder_layer(
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            out.data_ptr(),
            _check(x, self._dim),
            self._layer,
            self._rotation(positions, cos_sin),
            problem,
            slots.data_ptr(),
            _attention_kernel(),
            torch.get_num_threads(),
        )
        return out

    def project_qkv(self, x: Tensor, residual: Tensor | None, positions: Tensor, cos_sin: Tensor) -> Tensor:
        """``rotate(norm(s) W^T + b)`` with ``s = x + residual``: [rows, dim] -> new [rows, query, key, value heads].

        x, residual: [rows, dim] bf16, contiguous; ``residual`` becomes s, in place. positions: [rows] int64.
        cos_sin: [max_positions, rotary_dim] bf16, contiguous. The rotary embedding is that of
        `lenvm_kernels.layers.rotate`, on queries and keys.
        """
        _check(x if residual is None else residual, self._dim)
        out = torch.empty(_check(x, self._dim), self._width, dtype=torch.bfloat16)
        _library().lenvm_project_qkv(
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            self._layer.norm,
            self._layer.qkv,
            self._rotation(positions, cos_sin),
            torch.get_num_threads(),
        )
        return out

    def project_and_mlp(self, attention: Tensor, residual: Tensor) -> Tensor:
        """``(silu(g) * u) D^T`` with ``[g, u] = norm(s) G^T`` and ``s = residual + attention O^T``: -> new [rows, dim].

        attention: [rows, heads] bf16, contiguous. residual: [rows, dim] bf16, contiguous; becomes s, in place.
        """
        rows = _check(attention, self._attended)
        _check(residual, self._dim)
        out = torch.empty(rows, self._dim, dtype=torch.bfloat16)
        layer = self._layer
        _library().lenvm_project_and_mlp(
            attention.data_ptr(),
            residual.data_ptr(),
            out.data_ptr(),
            rows,
            layer.output,
            layer.mlp_norm,
            layer.gate_up,
            layer.down,
            torch.get_num_threads(),
        )
        return out

    def _rotation(self, positions: Tensor, cos_sin: Tensor) -> _Rotation:
        if positions.dtype != torch.int64 or not positions.is_contiguous():
            raise ValueError(f"expected contiguous int64 positions, got {positions.dtype}")
        return _Rotation(positions.data_ptr(), cos_sin.data_ptr(), cos_sin.shape[1], *self._shape)


def _projection(packed: PackedWeight, bias: Tensor | None) -> _Projection:
    tensors = (packed.data, bias, packed.scales, packed.sums)
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    return _Projection(*addresses, packed.num_inputs, packed.num_outputs)


def _check(rows: Tensor, width: int) -> int:
    """Number of rows. Raises ValueError where the kernel would read something else."""
    if rows.dtype != torch.bfloat16 or rows.dim() != 2 or rows.shape[1] != width or not rows.is_contiguous():
        raise ValueError(f"expected contiguous bf16 rows of {width}, got {rows.dtype} {tuple(rows.shape)}")
    return rows.shape[0]


@functools.cache
def _attention_kernel() -> ctypes.c_void_p:
    return ctypes.cast(paged_attention_cpp.load().lenvm_paged_attention, ctypes.c_void_p)


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpp_library.load(SOURCE)
    library.lenvm_decoder_layer_runs_here.restype = ctypes.c_int32
    library.lenvm_decoder_layer_runs_in_int8.restype = ctypes.c_int32
    if library.lenvm_decoder_layer_runs_here():
        address, size, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        structures = (_Norm, _Projection, _Rotation, _Layer, Problem)
        norm, projection, rotation, layer, problem = (ctypes.POINTER(structure) for structure in structures)
        rows = (address, address, address, size)
        library.lenvm_linear.argtypes = (address, address, size, projection, flag)
        library.lenvm_project_qkv.argtypes = (*rows, norm, projection, rotation, flag)
        library.lenvm_project_and_mlp.argtypes = (*rows, projection, norm, *[projection] * 2, flag)
        library.lenvm_decoder_layer.argtypes = (*rows, layer, rotation, problem, address, address, flag)
        for name in ("linear", "project_qkv", "project_and_mlp", "decoder_layer"):
            getattr(library, f"lenvm_{name}").restype = None
    return library
