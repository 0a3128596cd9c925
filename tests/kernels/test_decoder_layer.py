"""The two halves of a decoder layer against the torch expressions that they replace.

Sums of products differ from torch's in their order only, so a result that is rounded to bf16 may differ in its last bit
(2^-8 of its size), and what is computed from it by as much of its own inputs' sizes.
"""

import pytest
import torch
from torch.nn import functional

from lenvm_kernels import cpp_library, decoder_layer, layers, paged_attention_cpp

ROWS = (1, 5, 16, 17, 32, 33, 100, 600, 2049)
DIM, HEADS, KV_HEADS, HEAD_DIM, INNER = 96, 4, 2, 32, 160
EPS = 1e-5


BUILDS = {"tiles": "", "vectors": "-mno-amx-bf16", "vectors without bf16": "-mno-amx-bf16 -mno-avx512bf16"}


def load_again():
    for cached in (cpp_library.load, cpp_library.available, decoder_layer._library):
        cached.cache_clear()


@pytest.fixture(scope="module", params=BUILDS, autouse=True)
def build(request):
    """Each of the kernel's builds that this CPU runs; the first is that of its own instructions."""
    if request.param == "tiles" and "amx_bf16" not in cpp_library.cpu_flags():
        pytest.skip("needs matrix tiles (AMX)")
    with pytest.MonkeyPatch.context() as patch:
        try:
            patch.setenv("CXX", f"{cpp_library.find_compiler()[0]} {BUILDS[request.param]}")
        except cpp_library.KernelUnavailableError as error:
            pytest.skip(str(error))
        load_again()
        if not decoder_layer.available():
            pytest.skip("needs AVX-512")
        yield
    load_again()


def normal(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()


def rounded_product(x, weight, bias=None):
    """The product of inputs and weights that are rounded to a 127th of their row's greatest."""
    greatest = x.float().abs().amax(1, keepdim=True)
    weight_scales = weight.float().abs().amax(1, keepdim=True) / 127
    a = (x.float() * torch.full_like(greatest, 127.0).div(greatest.clamp_min(1e-30))).round()
    b = (weight.float() / weight_scales.clamp_min(1e-30)).round()
    sums = a.double() @ b.double().T * (greatest / 127 * weight_scales.T)
    return (sums if bias is None else sums + bias).bfloat16()


class Layer:
    """A layer's weights, and its two halves by the kernel and by torch."""

    def __init__(self, with_bias=False, rotary_dim=HEAD_DIM, in_int8=False):
        self.product = rounded_product if in_int8 else functional.linear
        self.in_int8 = in_int8
        width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        self.qkv, self.bias = normal(width, DIM, seed=1, scale=DIM**-0.5), normal(width, seed=2) if with_bias else None
        self.output = normal(DIM, HEADS * HEAD_DIM, seed=3, scale=0.1)
        self.gate_up, self.down = normal(2 * INNER, DIM, seed=4, scale=0.2), normal(DIM, INNER, seed=5, scale=0.1)
        self.norm_weight, self.cos_sin = normal(DIM, seed=6), normal(50, rotary_dim, seed=7)
        self.pack()

    def pack(self):
        weights = decoder_layer.Weights(
            self.norm_weight, self.qkv, self.bias, self.output, self.norm_weight, self.gate_up, self.down
        )
        self.packed = decoder_layer.DecoderLayer(weights, HEADS, KV_HEADS, HEAD_DIM, EPS, self.in_int8)

    def project(self, x, residual, positions):
        return self.packed.project_qkv(x, residual, positions, self.cos_sin)

    def finish(self, attention, residual):
        return self.packed.project_and_mlp(attention, residual)

    def native_norm(self, x, residual):
        total = x.float() if residual is None else x.float() + residual.float()
        normed = total * torch.rsqrt(total.pow(2).mean(dim=-1, keepdim=True) + EPS)
        return (normed * self.norm_weight).bfloat16(), total.bfloat16()

    def native_project(self, x, residual, positions):
        normed, total = self.native_norm(x, residual)
        product = self.product(normed, self.qkv, self.bias)
        rotated = product[:, : (HEADS + KV_HEADS) * HEAD_DIM].contiguous()
        layers.rotate(positions, rotated[:, : HEADS * HEAD_DIM], rotated[:, HEADS * HEAD_DIM :], self.cos_sin, HEAD_DIM)
        return torch.cat([rotated, product[:, rotated.shape[1] :]], dim=-1), total

    def native_finish(self, attention, residual):
        normed, total = self.native_norm(self.product(attention, self.output), residual)
        gate, up = self.product(normed, self.gate_up).chunk(2, dim=-1)
        return self.product(functional.silu(gate) * up, self.down), total


def inputs(rows):
    positions = torch.arange(rows) * 7 % 50
    return normal(rows, DIM, seed=8), normal(rows, DIM, seed=9, scale=3.0), positions


@pytest.fixture(params=[False, True], ids=["bf16", "int8"])
def in_int8(request):
    if request.param and not decoder_layer.runs_in_int8():
        pytest.skip("needs AVX-512 VNNI")
    return request.param


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("rotary_dim", [HEAD_DIM, 16])
def test_project_qkv(rows, with_bias, with_residual, rotary_dim, in_int8):
    layer = Layer(with_bias, rotary_dim, in_int8)
    x, residual, positions = inputs(rows)
    expected, total = layer.native_project(x, residual if with_residual else None, positions)
    before = x.clone()
    qkv = layer.project(x, residual if with_residual else None, positions)
    # an input that rounds the other way moves a sum by a 127th of the row's greatest times a weight
    torch.testing.assert_close(qkv, expected, rtol=2**-7, atol=2**-4 if in_int8 else 2**-5)
    assert torch.equal(x, before)
    if with_residual:
        assert torch.equal(residual, total)


@pytest.mark.parametrize("rows", ROWS)
def test_project_and_mlp(rows, in_int8):
    layer = Layer(in_int8=in_int8)
    attention, residual = normal(rows, HEADS * HEAD_DIM, seed=10), inputs(rows)[1]
    expected, total = layer.native_finish(attention, residual)
    out = layer.finish(attention, residual)
    torch.testing.assert_close(residual, total, rtol=2**-7, atol=2**-6)
    torch.testing.assert_close(out, expected, rtol=2**-6, atol=2**-3 if in_int8 else 2**-5)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_in_int8(rows, with_bias):
    if not decoder_layer.runs_in_int8():
        pytest.skip("needs AVX-512 VNNI")
    weight, bias = normal(320, DIM, seed=1, scale=DIM**-0.5), normal(320, seed=2) if with_bias else None
    weight[7] = 0
    x = normal(rows, DIM, seed=8)
    x[rows // 2] = 0
    out = decoder_layer.PackedLinear(weight, in_int8=True)(x, bias)
    torch.testing.assert_close(out, rounded_product(x, weight, bias), rtol=2**-7, atol=2**-8)
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert (out - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(rows, with_bias):
    weight, bias = normal(320, DIM, seed=1, scale=DIM**-0.5), normal(320, seed=2) if with_bias else None
    x = normal(rows, DIM, seed=8)
    out = decoder_layer.PackedLinear(weight)(x, bias)
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=2**-16)


def test_a_bias_that_the_kernel_would_misread_is_refused():
    product = decoder_layer.PackedLinear(normal(64, DIM))
    for bias in (torch.zeros(64), normal(32)):
        with pytest.raises(ValueError, match="expected a bf16 bias of 64"):
            product(normal(2, DIM), bias)


@pytest.mark.parametrize("size", [0.05, 3.0, 60.0])
def test_gates_of_any_size(size):
    layer = Layer()
    layer.gate_up = layer.gate_up * size
    layer.pack()
    attention, residual = normal(40, HEADS * HEAD_DIM, seed=10), inputs(40)[1]
    expected, _ = layer.native_finish(attention, residual)
    out = layer.finish(attention, residual)
    torch.testing.assert_close(out, expected, rtol=2**-6, atol=float(expected.abs().max()) * 2**-7)


def test_a_row_depends_on_no_other_row_and_on_no_thread_count(in_int8):
    layer = Layer(with_bias=True, in_int8=in_int8)
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


def test_not_a_number_stays_in_its_row(in_int8):
    layer = Layer(in_int8=in_int8)
    x, residual, positions = inputs(20)
    x[3, 5] = torch.nan
    qkv = layer.project(x, residual.clone(), positions)
    out = layer.finish(normal(20, HEADS * HEAD_DIM), residual.index_fill(0, torch.tensor([3]), torch.nan))
    for rows in (qkv, out):
        assert rows[3].isnan().all()
        assert rows[[0, 1, 2, 4, 19]].isfinite().all()


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("num_queries", [[1, 1, 1], [1, 70, 3]], ids=str)
def test_the_whole_layer_is_its_parts(with_residual, num_queries):
    layer, kv_lens, rows = Layer(with_bias=True), [5, 70, 300], sum(num_queries)
    x, residual, positions = inputs(rows)
    residual = residual if with_residual else None
    k_buffer, v_buffer = normal(400, KV_HEADS, HEAD_DIM, seed=11), normal(400, KV_HEADS, HEAD_DIM, seed=12)
    req_to_token = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:375].int()
    req_to_token = torch.stack(
        [torch.nn.functional.pad(own, (0, 300 - len(own))) for own in req_to_token.split(kv_lens)]
    )
    indices, lens, starts = torch.arange(3), torch.tensor(kv_lens), torch.tensor([0, *num_queries]).cumsum(0)
    slots = torch.cat([own[n - m : n] for own, n, m in zip(req_to_token, kv_lens, num_queries, strict=True)]).long()

    own_x, own_residual, own_k, own_v = (None if t is None else t.clone() for t in (x, residual, k_buffer, v_buffer))
    problem = paged_attention_cpp.make_problem(HEADS, own_k, own_v, req_to_token, scale=0.2)
    problem.num_reqs, problem.req_pool_indices = 3, indices.data_ptr()
    problem.kv_lens, problem.q_starts = lens.data_ptr(), starts.data_ptr()
    out = layer.packed.run(own_x, own_residual, positions, layer.cos_sin, problem, slots)

    qkv = layer.project(x, residual, positions)
    residual = x if residual is None else residual
    q, k, v = (part.reshape(rows, -1, HEAD_DIM) for part in qkv.split([128, 64, 64], dim=-1))
    k_buffer[slots], v_buffer[slots] = k, v
    attended = paged_attention_cpp.paged_attention(
        q, k_buffer, v_buffer, req_to_token, indices, lens, starts, scale=0.2
    )
    expected = layer.finish(attended.flatten(1), residual)
    assert torch.equal(own_k, k_buffer)
    assert torch.equal(own_v, v_buffer)
    assert torch.equal(out, expected)
    assert torch.equal(own_x if own_residual is None else own_residual, residual)


def test_slots_that_the_kernel_would_misread_are_refused():
    layer = Layer()
    x, _, positions = inputs(3)
    for slots in (torch.arange(2), torch.arange(3).int(), torch.arange(6)[::2]):
        with pytest.raises(ValueError, match="int64 slot a row"):
            layer.packed.run(x, None, positions, layer.cos_sin, paged_attention_cpp.Problem(), slots)


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
    for packed in (decoder_layer.pack(weight), decoder_layer.pack(decoder_layer.order_gated(weight))):
        assert torch.equal(packed.data.flatten().sort().values, weight.flatten())


def test_fits_asks_for_whole_tiles():
    assert decoder_layer.fits(normal(64, 96))
    assert not decoder_layer.fits(normal(64, 80))
    assert not decoder_layer.fits(normal(64, 96).float())


def test_a_build_without_wide_vectors_is_not_available(monkeypatch):
    monkeypatch.setenv("CXX", f"{cpp_library.find_compiler()[0]} -mno-avx512f")
    load_again()
    try:
        assert not decoder_layer.available()
    finally:
        load_again()
