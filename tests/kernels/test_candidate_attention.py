"""`candidate_attention`: every backend against a dense softmax, one row at a time, in fp64, over a grid of shapes.

The allowed error of an output is a share of sum_t weight[t] |v[t]|, as in test_paged_attention.py: bf16 rounds the
result and the weights of cached keys by at most 2^-8 each (fp16: 2^-11), fp32 loses 2^-24 an operation.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lenvm_kernels import candidate_attention as contract
from lenvm_kernels import candidate_attention_torch, cpp_library, paged_attention_cpp

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DTYPES = [torch.bfloat16, torch.float32]
INTERPRETED_DTYPES = [torch.float16, torch.float32]  # the interpreter multiplies bf16 as integers
BACKENDS = {
    "torch": candidate_attention_torch.candidate_attention,
    "cpp": paged_attention_cpp.candidate_attention,
}
HEADS = [(3, 3), (9, 3), (7, 1)]
DIMS = [64, 80, 128]
ROWS = [[1], [16], [6, 1, 2, 16, 0, 3], [2] * 17]
OPTIONS: list[dict[str, Any]] = [
    dict(window=0),
    dict(window=1),
    dict(window=100),
    dict(logit_cap=2.0),
    dict(window=70, logit_cap=30.0),
]
INTERPRETED: list[tuple[list[int], tuple[int, int], int, dict[str, Any], int]] = [
    ([1], (3, 3), 64, {}, 1),
    ([6, 1, 2, 16, 0, 3], (9, 3), 64, {}, 1),
    ([6, 1, 2, 16, 0, 3], (9, 3), 64, {}, 4),
    ([16, 5], (7, 1), 80, {}, 2),
    ([2, 40], (12, 2), 128, {}, 2),
    *(([1, 6, 3], (4, 2), 64, options, 2) for options in OPTIONS),
]


@dataclass
class Batch:
    """The tensor arguments of ``candidate_attention``."""

    q: torch.Tensor
    k_new: torch.Tensor
    v_new: torch.Tensor
    k_buffer: torch.Tensor
    v_buffer: torch.Tensor
    req_to_token: torch.Tensor
    req_pool_indices: torch.Tensor
    kv_lens: torch.Tensor
    q_starts: torch.Tensor

    def arguments(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def rows(self, r: int) -> slice:
        return slice(int(self.q_starts[r]), int(self.q_starts[r + 1]))

    def request(self, r: int) -> Batch:
        """Request ``r`` alone."""
        rows = self.rows(r)
        return replace(
            self,
            q=self.q[rows],
            k_new=self.k_new[rows],
            v_new=self.v_new[rows],
            req_pool_indices=self.req_pool_indices[r : r + 1],
            kv_lens=self.kv_lens[r : r + 1],
            q_starts=torch.tensor([0, rows.stop - rows.start]),
        )

    def to(self, device: str) -> Batch:
        return Batch(**{name: tensor.to(device) for name, tensor in self.arguments().items()})


def make_batch(
    num_rows: list[int], heads: tuple[int, int], dim: int, dtype: torch.dtype, kv_lens: list[int] | None = None
) -> Batch:
    """Requests of odd lengths in a scattered pool, with this many rows each. Unused keys are NaN."""
    generator = torch.Generator().manual_seed(len(num_rows) + dim)
    lens = kv_lens or [1 + 157 * i % 611 for i in range(len(num_rows))]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    num_slots = sum(lens) + 7
    slots = torch.randperm(num_slots, generator=generator).int()
    pool_rows = torch.randperm(len(lens) + 3, generator=generator)[: len(lens)]
    req_to_token = torch.full((len(lens) + 3, max(lens) + 5), -1, dtype=torch.int32)
    k_buffer, v_buffer = normal(num_slots, heads[1], dim), normal(num_slots, heads[1], dim)
    k_buffer[slots[sum(lens) :].long()] = math.nan
    for row, own in zip(pool_rows, slots[: sum(lens)].split(lens), strict=True):
        req_to_token[row, : own.numel()] = own
    q_starts = torch.tensor([0, *num_rows]).cumsum(0)
    total = int(q_starts[-1])
    batch = Batch(
        normal(total, heads[0], dim),
        normal(total, heads[1], dim),
        normal(total, heads[1], dim),
        k_buffer,
        v_buffer,
        req_to_token,
        pool_rows,
        torch.tensor(lens),
        q_starts,
    )
    consumed = q_starts[:-1][torch.tensor(num_rows) > 0]  # their keys are cached: these copies are never read
    batch.k_new[consumed] = batch.v_new[consumed] = math.nan
    return batch


def dense_attention(
    batch: Batch, scale: float, window: int | None = None, logit_cap: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, one row and head at a time: outputs [T, Hq, D] in fp64, and the same with |v|."""
    out = torch.zeros_like(batch.q, dtype=torch.float64)
    magnitude = torch.zeros_like(out)
    group = batch.q.shape[1] // batch.k_buffer.shape[1]
    for r, length in enumerate(batch.kv_lens.tolist()):
        slots = batch.req_to_token[batch.req_pool_indices[r], :length].long()
        for offset, row in enumerate(range(*batch.rows(r).indices(len(out)))):
            is_candidate = offset > 0
            position = length if is_candidate else length - 1
            first_key = 0 if window is None else max(0, position - window)
            for head in range(batch.q.shape[1]):
                keys = batch.k_buffer[slots[first_key:], head // group]
                values = batch.v_buffer[slots[first_key:], head // group]
                if is_candidate:
                    keys = torch.cat([keys, batch.k_new[row, head // group][None]])
                    values = torch.cat([values, batch.v_new[row, head // group][None]])
                scores = keys.double() @ batch.q[row, head].double() * scale
                if logit_cap:
                    scores = logit_cap * torch.tanh(scores / logit_cap)
                weights = scores.softmax(-1)
                out[row, head], magnitude[row, head] = weights @ values.double(), weights @ values.double().abs()
    return out, magnitude


def check(out: torch.Tensor, batch: Batch, tolerance: float | None = None, **options: Any) -> None:
    expected, magnitude = dense_attention(batch, batch.q.shape[2] ** -0.5, **options)
    assert out.dtype == batch.q.dtype
    assert ((out.double() - expected).abs() <= (tolerance or TOLERANCE[out.dtype]) * magnitude).all()


def attend(backend: str, batch: Batch, **options: Any) -> torch.Tensor:
    out: torch.Tensor = BACKENDS[backend](**batch.arguments(), scale=batch.q.shape[2] ** -0.5, **options)
    return out


@pytest.fixture
def compiler() -> None:
    try:
        cpp_library.find_compiler()
    except cpp_library.KernelUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(params=sorted(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpp":
        request.getfixturevalue("compiler")
    name: str = request.param
    return name


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    value: torch.dtype = request.param
    return value


@pytest.mark.parametrize("num_rows", ROWS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_rows_follow_the_definition(
    backend: str, dtype: torch.dtype, dim: int, heads: tuple[int, int], num_rows: list[int]
) -> None:
    batch = make_batch(num_rows, heads, dim, dtype)
    check(attend(backend, batch), batch)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    batch = make_batch([1, 6, 3, 2], (6, 2), 64, dtype, kv_lens=[5, 150, 1, 700])
    check(attend(backend, batch, **options), batch, **options)


def test_many_candidates_and_a_large_group(backend: str, dtype: torch.dtype) -> None:
    batch = make_batch([33, 50], (16, 2), 64, dtype, kv_lens=[70, 600])
    check(attend(backend, batch), batch)


def test_strided_rows(backend: str, dtype: torch.dtype) -> None:
    batch = make_batch([4, 6], (4, 2), 64, dtype)
    fused = torch.cat((batch.q, batch.k_new, batch.v_new), dim=1)  # as a model's qkv projection makes them
    strided = replace(batch, q=fused[:, :4], k_new=fused[:, 4:6], v_new=fused[:, 6:])
    assert torch.equal(attend(backend, strided), attend(backend, batch))


def test_large_scores_do_not_overflow(backend: str) -> None:
    batch = make_batch([6, 6], (4, 2), 64, torch.float32, kv_lens=[300, 20])
    batch.q *= 30  # scores of up to 150, rounded by up to 1e-5
    check(attend(backend, batch), batch, tolerance=1e-3)


def test_request_without_cached_keys_sees_only_its_own(backend: str, dtype: torch.dtype) -> None:
    batch = make_batch([3, 2], (4, 2), 64, dtype, kv_lens=[5, 9])
    batch.kv_lens[0] = 0
    out = attend(backend, batch)
    assert (out[0] == 0).all()
    assert torch.equal(out[1:3], batch.v_new[1:3].repeat_interleave(2, dim=1))


@pytest.mark.parametrize("dim", DIMS)
def test_requests_do_not_influence_each_other_bitwise(backend: str, dtype: torch.dtype, dim: int) -> None:
    batch = make_batch([6, 1, 2, 16, 3, 33], (9, 3), dim, dtype, kv_lens=[65, 1, 300, 777, 64, 512])
    together = attend(backend, batch)
    for r in range(6):
        assert torch.equal(attend(backend, batch.request(r)), together[batch.rows(r)])


def test_candidates_do_not_see_each_other(backend: str, dtype: torch.dtype) -> None:
    batch = make_batch([6], (9, 3), 64, dtype, kv_lens=[300])
    before = attend(backend, batch)
    batch.k_new[3] += 1
    batch.v_new[3] = math.nan
    after = attend(backend, batch)
    others = torch.arange(6) != 3
    assert torch.equal(after[others], before[others])
    assert after[3].isnan().all()


def test_result_does_not_depend_on_the_number_of_threads(compiler: None, dtype: torch.dtype) -> None:
    batch = make_batch([6, 1, 16], (9, 3), 64, dtype, kv_lens=[700, 300, 65])
    together = attend("cpp", batch)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(attend("cpp", batch), together)
    finally:
        torch.set_num_threads(threads)


def test_dispatch_takes_the_kernel_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(cpp_library, "available", lambda _source: True)
    monkeypatch.setattr(paged_attention_cpp, "candidate_attention", lambda *_, **__: calls.append("cpp"))
    monkeypatch.setattr(candidate_attention_torch, "candidate_attention", lambda *_, **__: calls.append("torch"))
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        contract.candidate_attention(**make_batch([2], (2, 1), 64, dtype).arguments(), scale=1.0)
    assert calls == ["cpp", "cpp", "torch"]


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("q", torch.zeros(4, 3, 64), "no multiple"),
        ("k_new", torch.zeros(3, 2, 64), "k_new"),
        ("k_new", torch.zeros(4, 2, 64, dtype=torch.bfloat16), "dtype of k_new"),
        ("v_new", torch.zeros(4, 1, 64), "v_new"),
        ("req_to_token", torch.zeros(4, 4, dtype=torch.int64), "int32"),
        ("q_starts", torch.zeros(3), "int64"),
    ],
)
def test_wrong_arguments_are_named(name: str, wrong: torch.Tensor, message: str) -> None:
    batch = replace(make_batch([2, 2], (2, 2), 64, torch.float32), **{name: wrong})
    with pytest.raises(ValueError, match=message):
        contract.candidate_attention(**batch.arguments(), scale=1.0)


def test_scale_must_be_positive() -> None:
    with pytest.raises(ValueError, match="scale"):
        contract.candidate_attention(**make_batch([2], (2, 2), 64, torch.float32).arguments(), scale=0.0)


def make_interpreted(num_rows: list[int], heads: tuple[int, int], dim: int, dtype: torch.dtype) -> Batch:
    return make_batch(num_rows, heads, dim, dtype, kv_lens=[(65, 1, 130, 40, 77, 64)[i] for i in range(len(num_rows))])


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """The Triton kernels' answers, from a process in which Triton interprets them: one a case and dtype."""
    folder: Path = tmp_path_factory.mktemp("interpreted")
    cases = []
    for dtype in INTERPRETED_DTYPES:
        for num_rows, heads, dim, options, num_splits in INTERPRETED:
            batch = make_interpreted(num_rows, heads, dim, dtype)
            options = {"window": None, "logit_cap": 0.0} | options
            cases.append(batch.arguments() | options | {"scale": dim**-0.5, "num_splits": num_splits})
    torch.save(cases, folder / "cases.pt")
    script = """
import torch
from lenvm_kernels.candidate_attention_triton import attend_in_splits
torch.save([attend_in_splits(**case) for case in torch.load("cases.pt")], "out.pt")
"""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=folder, env=env, check=True, timeout=300)
    out: list[torch.Tensor] = torch.load(folder / "out.pt")
    return out


@pytest.mark.parametrize("index", range(len(INTERPRETED)))
@pytest.mark.parametrize("position", range(len(INTERPRETED_DTYPES)), ids=lambda i: str(INTERPRETED_DTYPES[i]))
def test_triton_kernel_follows_the_definition(position: int, index: int, interpreted: list[torch.Tensor]) -> None:
    num_rows, heads, dim, options, _ = INTERPRETED[index]
    out = interpreted[position * len(INTERPRETED) + index]
    check(out, make_interpreted(num_rows, heads, dim, INTERPRETED_DTYPES[position]), **options)


@pytest.mark.parametrize(("num_splits", "storage"), [(1, "bf16"), (4, "fp32")])
def test_triton_kernels_compile_for_a_gpu_without_one(num_splits: int, storage: str) -> None:
    """The interpreter accepts what the compiler refuses: compile to machine code for compute capability 9.0."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from lenvm_kernels.candidate_attention_triton import _attend_split, _merge_splits

    sizes = {"NUM_SPLITS": num_splits, "BLOCK_V": 128}
    constants = sizes | {"IS_CAPPED": True, "GROUP": 6, "BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 128}
    for kernel, constexprs in ((_attend_split, constants), (_merge_splits, sizes)):
        types = {name: f"*{storage}" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
        types |= dict.fromkeys(types.keys() & {"scale", "logit_cap"}, "fp32") | dict.fromkeys(constexprs, "constexpr")
        types |= dict.fromkeys(types.keys() & {"maxima_ptr", "sums_ptr", "partials_ptr"}, "*fp32")
        types |= dict.fromkeys(types.keys() & {"req_pool_indices_ptr", "kv_lens_ptr", "q_starts_ptr"}, "*i64")
        types |= dict.fromkeys(types.keys() & {"req_to_token_ptr"}, "*i32")
        source = ASTSource(fn=kernel, signature=types, constexprs=constexprs)
        assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


def test_splits_fill_the_processors_and_never_outnumber_the_keys() -> None:
    from lenvm_kernels.candidate_attention_triton import choose_num_splits

    assert choose_num_splits(num_programs=1600, wanted=264, max_context=4096) == 1
    assert choose_num_splits(num_programs=100, wanted=264, max_context=4096) == 2
    assert choose_num_splits(num_programs=2, wanted=264, max_context=32768) == 16
    assert choose_num_splits(num_programs=2, wanted=264, max_context=200) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=str)
@pytest.mark.parametrize("heads", [*HEADS, (12, 2)], ids=str)
@pytest.mark.parametrize("num_rows", [*ROWS, [6] * 200], ids=lambda rows: f"{len(rows)}x{max(rows)}")
def test_triton_kernel_on_the_device_equals_the_reference(
    dtype: torch.dtype, num_rows: list[int], heads: tuple[int, int], options: dict[str, Any]
) -> None:
    batch = make_batch(num_rows, heads, 128, dtype).to("cuda")
    out = contract.candidate_attention(**batch.arguments(), scale=128**-0.5, **options)
    check(out.cpu(), batch.to("cpu"), **options)
