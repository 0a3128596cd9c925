"""The two halves of a decoder layer against the torch expressions that they replace.

Sums of products differ from torch's in their order only, so a result that is rounded to bf16 may differ in its last bit
(2^-8 of its size), and what is computed from it by as much of its own inputs' sizes.
"""

import pytest
import torch
from torch.nn import functional

from lenvm_kernels import cpp_library, decoder_layer, layers

ROWS = (1, 5, 16, 17, 32, 33, 100, 600)
DIM, HEADS, KV_HEADS, HEAD_DIM, INNER = 96, 4, 2, 32, 160
EPS = 1e-5


def runs_here():
    return decoder_layer.available()


pytestmark = pytest.mark.skipif(not runs_here(), reason="needs a C++ compiler and matrix tiles (AMX)")


def normal(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()


class Layer:
    """A layer's weights, and its two halves by the kernel and by torch."""

    def __init__(self, with_bias=False, rotary_dim=HEAD_DIM):
        width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        self.qkv, self.bias = normal(width, DIM, seed=1, scale=DIM**-0.5), normal(width, seed=2) if with_bias else None
        self.output = normal(DIM, HEADS * HEAD_DIM, seed=3, scale=0.1)
        self.gate_up, self.down = normal(2 * INNER, DIM, seed=4, scale=0.2), normal(DIM, INNER, seed=5, scale=0.1)
        self.norm_weight, self.cos_sin = normal(DIM, seed=6), normal(50, rotary_dim, seed=7)
        self.heads = decoder_layer.Heads(HEADS, KV_HEADS, HEAD_DIM)
        self.norm = decoder_layer.Norm(self.norm_weight, EPS)
        self.packed = [
            decoder_layer.Projection(decoder_layer.pack(self.qkv), self.bias),
            decoder_layer.Projection(decoder_layer.pack(self.output)),
            decoder_layer.Projection(decoder_layer.pack_gated(self.gate_up)),
            decoder_layer.Projection(decoder_layer.pack(self.down)),
        ]

    def project(self, x, residual, positions):
        return decoder_layer.project_qkv(x, residual, self.norm, self.packed[0], self.heads, positions, self.cos_sin)

    def finish(self, attention, residual):
        _, output, gate_up, down = self.packed
        return decoder_layer.project_and_mlp(attention, residual, output, self.norm, gate_up, down)

    def native_norm(self, x, residual):
        total = x.float() if residual is None else x.float() + residual.float()
        normed = total * torch.rsqrt(total.pow(2).mean(dim=-1, keepdim=True) + EPS)
        return (normed * self.norm_weight).bfloat16(), total.bfloat16()

    def native_project(self, x, residual, positions):
        normed, total = self.native_norm(x, residual)
        product = functional.linear(normed, self.qkv, self.bias)
        rotated = product[:, : (HEADS + KV_HEADS) * HEAD_DIM].contiguous()
        layers.rotate(positions, rotated[:, : HEADS * HEAD_DIM], rotated[:, HEADS * HEAD_DIM :], self.cos_sin, HEAD_DIM)
        return torch.cat([rotated, product[:, rotated.shape[1] :]], dim=-1), total

    def native_finish(self, attention, residual):
        normed, total = self.native_norm(functional.linear(attention, self.output), residual)
        gate, up = functional.linear(normed, self.gate_up).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * up, self.down), total


def inputs(rows):
    positions = torch.arange(rows) * 7 % 50
    return normal(rows, DIM, seed=8), normal(rows, DIM, seed=9, scale=3.0), positions


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("rotary_dim", [HEAD_DIM, 16])
def test_project_qkv(rows, with_bias, with_residual, rotary_dim):
    layer = Layer(with_bias, rotary_dim)
    x, residual, positions = inputs(rows)
    expected, total = layer.native_project(x, residual if with_residual else None, positions)
    before = x.clone()
    qkv = layer.project(x, residual if with_residual else None, positions)
    torch.testing.assert_close(qkv, expected, rtol=2**-7, atol=2**-5)
    assert torch.equal(x, before)
    if with_residual:
        assert torch.equal(residual, total)


@pytest.mark.parametrize("rows", ROWS)
def test_project_and_mlp(rows):
    layer = Layer()
    attention, residual = normal(rows, HEADS * HEAD_DIM, seed=10), inputs(rows)[1]
    expected, total = layer.native_finish(attention, residual)
    out = layer.finish(attention, residual)
    torch.testing.assert_close(residual, total, rtol=2**-7, atol=2**-6)
    torch.testing.assert_close(out, expected, rtol=2**-6, atol=2**-5)


@pytest.mark.parametrize("size", [0.05, 3.0, 60.0])
def test_gates_of_any_size(size):
    layer = Layer()
    layer.packed[2] = decoder_layer.Projection(decoder_layer.pack_gated(layer.gate_up * size))
    layer.gate_up = layer.gate_up * size
    attention, residual = normal(40, HEADS * HEAD_DIM, seed=10), inputs(40)[1]
    expected, _ = layer.native_finish(attention, residual)
    out = layer.finish(attention, residual)
    torch.testing.assert_close(out, expected, rtol=2**-6, atol=float(expected.abs().max()) * 2**-7)


def test_a_row_depends_on_no_other_row_and_on_no_thread_count():
    layer = Layer(with_bias=True)
    x, residual, positions = inputs(600)
    attention = normal(600, HEADS * HEAD_DIM, seed=10)
    qkv, out = layer.project(x, residual.clone(), positions), layer.finish(attention, residual.clone())
    threads = torch.get_num_threads()
    try:
        for begin, end in ((0, 1), (16, 17), (31, 36), (100, 350), (511, 514), (599, 600)):
            torch.set_num_threads(1 + begin % 3)
            own = slice(begin, end)
            assert torch.equal(layer.project(x[own], residual[own].clone(), positions[own]), qkv[own])
            assert torch.equal(layer.finish(attention[own], residual[own].clone()), out[own])
    finally:
        torch.set_num_threads(threads)


def test_not_a_number_stays_in_its_row():
    layer = Layer()
    x, residual, positions = inputs(20)
    x[3, 5] = torch.nan
    qkv = layer.project(x, residual.clone(), positions)
    out = layer.finish(normal(20, HEADS * HEAD_DIM), residual.index_fill(0, torch.tensor([3]), torch.nan))
    for rows in (qkv, out):
        assert rows[3].isnan().all()
        assert rows[[0, 1, 2, 4, 19]].isfinite().all()


def test_no_rows():
    layer = Layer()
    x, residual, positions = inputs(0)
    assert layer.project(x, residual, positions).shape == (0, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    assert layer.finish(torch.empty(0, HEADS * HEAD_DIM).bfloat16(), residual).shape == (0, DIM)


@pytest.mark.parametrize("rows", [torch.zeros(4, DIM), normal(4, DIM + 32), normal(4, 2 * DIM)[:, ::2]], ids=str)
def test_rows_that_the_kernel_would_misread_are_refused(rows):
    with pytest.raises(ValueError, match="expected contiguous bf16 rows of 96"):
        Layer().project(rows, None, torch.arange(4))


def test_packing_keeps_every_weight_once():
    weight = torch.arange(64 * 96).view(64, 96).to(torch.int32)
    for packed in (decoder_layer.pack(weight), decoder_layer.pack_gated(weight)):
        assert torch.equal(packed.flatten().sort().values, weight.flatten())


def test_fits_asks_for_whole_tiles():
    assert decoder_layer.fits(normal(64, 96))
    assert not decoder_layer.fits(normal(64, 80))
    assert not decoder_layer.fits(normal(64, 96).float())


def test_a_build_without_matrix_tiles_is_not_available(monkeypatch):
    monkeypatch.setenv("CXX", f"{cpp_library.find_compiler()[0]} -mno-amx-bf16")
    caches = (cpp_library.load, cpp_library.available, decoder_layer._library)
    for cached in caches:
        cached.cache_clear()
    assert not decoder_layer.available()
    for cached in caches:
        cached.cache_clear()
