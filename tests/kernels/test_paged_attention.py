"""`paged_attention`: both backends against an independent dense computation in fp64, over a grid of shapes.

The allowed error of an output is a share of sum_t weight[t] |v[t]|, which every rounding scales with. bf16 rounds the
result and (in the kernel) the weights, each by at most 2^-8; inputs are exact in fp64. fp32 loses 2^-24 an operation,
and the scores' own rounding, which grows with their size, shifts the weights.
"""

import math
from pathlib import Path

import pytest
import torch

from lenvm_kernels import cpp_library, paged_attention_cpp, paged_attention_torch
from lenvm_kernels import paged_attention as contract

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
BACKENDS = {"torch": paged_attention_torch.paged_attention, "cpp": paged_attention_cpp.paged_attention}
HEADS = [(3, 3), (9, 3), (7, 1), (16, 2)]
MIXED_LENS = [1, 2, 63, 64, 65, 257, 511, 1025]


def make_batch(kv_lens, num_queries, num_heads, num_kv_heads, qk_dim, dtype, v_dim=None, seed=0):
    """A scattered pool with all keys of all requests, and the queries of each request's last tokens."""
    generator = torch.Generator().manual_seed(seed)
    num_slots = sum(kv_lens) + 7

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    k = normal(num_slots, num_kv_heads, qk_dim)
    v = normal(num_slots, num_kv_heads, v_dim or qk_dim)
    rows = torch.randperm(len(kv_lens) + 3, generator=generator)[: len(kv_lens)]
    req_to_token = torch.full((len(kv_lens) + 3, max(kv_lens) + 5), -1, dtype=torch.int32)
    slots = torch.randperm(num_slots, generator=generator).int()[: sum(kv_lens)].split(kv_lens)
    for row, own in zip(rows, slots, strict=True):
        req_to_token[row, : own.numel()] = own
    q_starts = torch.tensor([0, *num_queries]).cumsum(0)
    q = normal(int(q_starts[-1]), num_heads, qk_dim)
    return q, k, v, req_to_token, rows, torch.tensor(kv_lens), q_starts


def dense_attention(
    q, k_buffer, v_buffer, req_to_token, req_pool_indices, kv_lens, q_starts, *, scale, causal, window, logit_cap
):
    """The contract's formula, one request and head at a time, in fp64: outputs, and the same with |v|."""
    group = q.shape[1] // k_buffer.shape[1]
    out = torch.empty(q.shape[0], q.shape[1], v_buffer.shape[2], dtype=torch.float64)
    magnitude = torch.empty_like(out)
    for r, length in enumerate(kv_lens.tolist()):
        slots = req_to_token[req_pool_indices[r], :length].long()
        first, last = q_starts[r : r + 2].tolist()
        distance = torch.arange(length - (last - first), length)[:, None] - torch.arange(length)
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if causal:
            hidden |= distance < 0
        if window is not None:
            hidden |= distance > window
        for head in range(q.shape[1]):
            scores = q[first:last, head].double() @ k_buffer[slots, head // group].double().T * scale
            if logit_cap:
                scores = logit_cap * torch.tanh(scores / logit_cap)
            weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
            values = v_buffer[slots, head // group].double()
            out[first:last, head] = weights @ values
            magnitude[first:last, head] = weights @ values.abs()
    return out, magnitude


def check(backend, batch, *, tolerance=None, causal=True, window=None, logit_cap=0.0):
    options = dict(scale=batch[0].shape[2] ** -0.5, causal=causal, window=window, logit_cap=logit_cap)
    out = BACKENDS[backend](*batch, **options)
    expected, magnitude = dense_attention(*batch, **options)
    assert out.dtype == batch[0].dtype
    assert ((out.double() - expected).abs() <= (tolerance or TOLERANCE[out.dtype]) * magnitude).all()


@pytest.fixture
def compiler():
    try:
        return cpp_library.find_compiler()
    except cpp_library.KernelUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(params=sorted(BACKENDS))
def backend(request):
    if request.param == "cpp":
        request.getfixturevalue("compiler")
    return request.param


@pytest.fixture(params=sorted(TOLERANCE, key=str), ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
@pytest.mark.parametrize("dim", [64, 72, 80, 96, 128, 256])
def test_decode(backend, dtype, dim, num_heads, num_kv_heads):
    check(backend, make_batch(MIXED_LENS, [1] * len(MIXED_LENS), num_heads, num_kv_heads, dim, dtype))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
@pytest.mark.parametrize("dim", [64, 72, 80, 96, 128, 256])
def test_extend_with_and_without_prefix(backend, dtype, dim, num_heads, num_kv_heads):
    kv_lens, num_queries = [1, 65, 90, 130, 400, 333], [1, 65, 3, 129, 20, 1]
    check(backend, make_batch(kv_lens, num_queries, num_heads, num_kv_heads, dim, dtype))


@pytest.mark.parametrize("num_reqs", [1, 2, 33, 128])
def test_batch_sizes(backend, dtype, num_reqs):
    kv_lens = [1 + 37 * i % 300 for i in range(num_reqs)]
    check(backend, make_batch(kv_lens, [1] * num_reqs, 9, 3, 64, dtype))
    check(backend, make_batch(kv_lens, [1 + 5 * i % n for i, n in enumerate(kv_lens)], 3, 1, 64, dtype))


@pytest.mark.parametrize("dim", [32, 64, 128, 256])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [*HEADS, (28, 4), (18, 2)])
def test_decode_with_slots_in_order(backend, dtype, num_heads, num_kv_heads, dim):
    q, k, v, req_to_token, rows, kv_lens, q_starts = make_batch(
        [1, 17, 300, 900], [1] * 4, num_heads, num_kv_heads, dim, dtype
    )
    for start, row, length in zip((900, 40, 600, 0), rows, kv_lens, strict=True):
        req_to_token[row, :length] = torch.arange(start, start + length)  # the cache of one prefill
    req_to_token[rows[3], 500:503] = torch.tensor([1200, 3, 1210])
    check(backend, (q, k, v, req_to_token, rows, kv_lens, q_starts))


@pytest.fixture
def kernel_without_matrix_tiles(compiler, monkeypatch):
    monkeypatch.setenv("CXX", f"{compiler[0]} -mno-amx-bf16")
    for cached in (cpp_library.load, paged_attention_cpp.load):
        cached.cache_clear()
    yield
    for cached in (cpp_library.load, paged_attention_cpp.load):
        cached.cache_clear()


@pytest.mark.usefixtures("kernel_without_matrix_tiles")
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)
def test_without_matrix_tiles(num_heads, num_kv_heads):
    check("cpp", make_batch(MIXED_LENS, [1] * len(MIXED_LENS), num_heads, num_kv_heads, 64, torch.bfloat16))
    check("cpp", make_batch([65, 333], [65, 20], num_heads, num_kv_heads, 64, torch.bfloat16))


@pytest.mark.parametrize("num_queries", [1, 5, 100, 700])
def test_long_context(backend, dtype, num_queries):
    check(backend, make_batch([4096, 3], [num_queries, 1], 3, 1, 64, dtype))


@pytest.mark.parametrize(
    "options",
    [dict(window=1), dict(window=100), dict(logit_cap=2.0), dict(causal=False), dict(window=70, logit_cap=30.0)],
    ids=str,
)
@pytest.mark.parametrize("num_queries", [[1, 1, 1], [1, 150, 40]], ids=str)
def test_options(backend, dtype, num_queries, options):
    check(backend, make_batch([5, 150, 700], num_queries, 6, 2, 64, dtype), **options)


def test_different_value_size(backend, dtype):
    check(backend, make_batch([70, 200], [1, 90], 4, 2, 96, dtype, v_dim=72))


def test_strided_queries(backend, dtype):
    q, *rest = make_batch([70, 200], [1, 90], 4, 2, 64, dtype)
    fused = torch.cat((q, q + 1), dim=1)
    check(backend, (fused[:, :4], *rest))


def test_large_scores_do_not_overflow(backend):
    q, *rest = make_batch([300, 300], [1, 100], 4, 2, 64, torch.float32)
    check(backend, (q * 30, *rest), tolerance=1e-3)  # scores of up to 150, so rounded by up to 1e-5


def test_request_without_keys_gives_zeros(backend, dtype):
    batch = list(make_batch([5, 9], [1, 1], 4, 2, 64, dtype))
    batch[5] = torch.tensor([0, 9])
    out = BACKENDS[backend](*batch, scale=0.125)
    assert (out[0] == 0).all()
    assert out[1].isfinite().all()


def test_nan_is_not_hidden(backend, dtype):
    batch = make_batch([90], [1], 4, 2, 64, dtype)
    batch[1][batch[3][batch[4][0], 40]] = math.nan
    assert BACKENDS[backend](*batch, scale=0.125).isnan().all()


@pytest.mark.parametrize("num_queries", [[1] * 5, [1, 20, 64, 100, 1]], ids=str)
def test_result_does_not_depend_on_neighbours_or_threads(compiler, dtype, num_queries):
    q, k, v, req_to_token, rows, kv_lens, q_starts = make_batch([2, 300, 64, 1000, 777], num_queries, 9, 3, 64, dtype)
    together = paged_attention_cpp.paged_attention(q, k, v, req_to_token, rows, kv_lens, q_starts, scale=0.125)
    threads = torch.get_num_threads()
    try:
        for r in range(5):
            torch.set_num_threads(1 + r % 3)
            own = slice(int(q_starts[r]), int(q_starts[r + 1]))
            starts = torch.tensor([0, num_queries[r]])
            alone = paged_attention_cpp.paged_attention(
                q[own], k, v, req_to_token, rows[r : r + 1], kv_lens[r : r + 1], starts, scale=0.125
            )
            assert torch.equal(alone, together[own])
    finally:
        torch.set_num_threads(threads)


def test_dispatch_takes_the_kernel_where_it_can(monkeypatch):
    calls = []
    monkeypatch.setattr(cpp_library, "available", lambda _source: True)
    monkeypatch.setattr(paged_attention_cpp, "paged_attention", lambda *args, **options: calls.append("cpp"))
    monkeypatch.setattr(paged_attention_torch, "paged_attention", lambda *args, **options: calls.append("torch"))
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        contract.paged_attention(*make_batch([5], [1], 2, 1, 64, dtype), scale=1.0)
    assert calls == ["cpp", "cpp", "torch"]


@pytest.fixture
def no_library_loaded():
    """No library is remembered from before, and none is left behind."""
    caches = (cpp_library.load, cpp_library.available, paged_attention_cpp.load)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("no_library_loaded")
def test_missing_compiler_is_logged_and_torch_runs(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    batch = make_batch([5, 70], [1, 1], 2, 1, 64, torch.float32)
    out = contract.paged_attention(*batch, scale=0.125)
    contract.paged_attention(*batch, scale=0.125)
    assert torch.equal(out, paged_attention_torch.paged_attention(*batch, scale=0.125))
    assert [record.message.count("no-such-compiler") for record in caplog.records] == [1]


@pytest.mark.usefixtures("compiler")
def test_failed_build_says_why(monkeypatch, tmp_path):
    source = tmp_path / "broken.cpp"
    source.write_text("this is not C++")
    monkeypatch.setenv("LENVM_CACHE_DIR", str(tmp_path))
    with pytest.raises(cpp_library.KernelUnavailableError, match=r"broken\.cpp"):
        cpp_library.load(source)
    assert not list(Path(tmp_path).rglob("*.so"))


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(2, 3, 64), "no multiple"),
        (0, torch.zeros(2, 2, 32), "do not fit"),
        (0, torch.zeros(2, 2, 64, dtype=torch.bfloat16), "dtypes"),
        (1, torch.zeros(2, 64), "3 dimensions"),
        (3, torch.zeros(4, 4, dtype=torch.int64), "int32"),
        (5, torch.zeros(3, dtype=torch.int64), "kv_lens"),
        (6, torch.zeros(3), "int64"),
    ],
)
def test_wrong_arguments_are_named(position, wrong, message):
    batch = list(make_batch([5, 6], [1, 1], 2, 2, 64, torch.float32))
    batch[position] = wrong
    with pytest.raises(ValueError, match=message):
        contract.paged_attention(*batch, scale=1.0)


def test_scale_must_be_positive():
    with pytest.raises(ValueError, match="scale"):
        contract.paged_attention(*make_batch([5], [1], 2, 2, 64, torch.float32), scale=0.0)
