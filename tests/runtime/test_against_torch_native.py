"""The CPU attention backend against SGLang's own `torch_native` on the same pool: batch sizes, lengths, prefixes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lenvm_kernels import torchvision_schema

torchvision_schema.declare_if_missing()

from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend  # noqa: E402
from sglang.srt.layers.radix_attention import RadixAttention  # noqa: E402
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402

from lenvm_runtime.cpu.attention_backend import CpuAttentionBackend  # noqa: E402

MAX_LEN, LAYER = 4096, 0
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SHAPES = [(9, 3, 64), (4, 4, 80), (6, 1, 128), (2, 1, 256)]  # query heads, key heads, head size


def mixed_lengths(num_reqs: int) -> list[int]:
    """From 1 to MAX_LEN, mostly short, odd ones among them."""
    generator = torch.Generator().manual_seed(num_reqs)
    lengths = torch.randint(1, 300, (num_reqs,), generator=generator).tolist()
    return [*lengths[:-2], 1, MAX_LEN][-num_reqs:]


def make_runner(shape: tuple[int, int, int], dtype: torch.dtype, lengths: list[int]) -> SimpleNamespace:
    """A pool filled with random keys and values, and a scattered row of slots a request."""
    _, kv_heads, dim = shape
    size = sum(lengths) + 1
    pool = MHATokenToKVPool(size, 1, dtype, kv_heads, dim, 1, "cpu", enable_memory_saver=False)
    generator = torch.Generator().manual_seed(1)
    for buffer in (pool.get_key_buffer(LAYER), pool.get_value_buffer(LAYER)):
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    table = torch.zeros(len(lengths), MAX_LEN, dtype=torch.int32)
    slots = (torch.randperm(size - 1, generator=generator) + 1).int()
    for row, own in zip(table, slots.split(lengths), strict=True):
        row[: len(own)] = own
    return SimpleNamespace(
        token_to_kv_pool=pool,
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        use_mla_backend=False,
        model_config=SimpleNamespace(is_encoder_decoder=False, head_dim=dim),
        dtype=dtype,
        device="cpu",
    )


def make_batch(table: torch.Tensor, lengths: list[int], new: list[int], mode: ForwardMode) -> SimpleNamespace:
    """The last ``new`` tokens of every request, the others cached; requests in reverse order of their rows."""
    rows = torch.arange(len(lengths)).flip(0)
    lengths, new = lengths[::-1], new[::-1]
    slots = [table[row, n - m : n] for row, n, m in zip(rows.tolist(), lengths, new, strict=True)]
    return SimpleNamespace(
        forward_mode=mode,
        batch_size=len(lengths),
        req_pool_indices=rows,
        seq_lens=torch.tensor(lengths),
        extend_seq_lens=torch.tensor(new),
        extend_prefix_lens=torch.tensor(lengths) - torch.tensor(new),
        out_cache_loc=torch.cat(slots).long(),
        encoder_lens=None,
    )


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("mode", [ForwardMode.DECODE, ForwardMode.EXTEND], ids=lambda mode: mode.name)
@pytest.mark.parametrize(
    ("num_reqs", "shape"), [(128, SHAPES[0]), *((n, shape) for n in (1, 3, 16) for shape in SHAPES)], ids=str
)
def test_the_same_attention_as_torch_native(num_reqs, mode, shape, dtype):
    heads, kv_heads, dim = shape
    lengths = mixed_lengths(num_reqs)
    runner = make_runner(shape, dtype, lengths)
    new = (
        [1] * num_reqs if mode is ForwardMode.DECODE else [max(1, n // (2 + row % 3)) for row, n in enumerate(lengths)]
    )
    batch = make_batch(runner.req_to_token_pool.req_to_token, lengths, new, mode)
    layer = RadixAttention(heads, dim, dim**-0.5, kv_heads, LAYER)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(sum(new), n * dim, generator=generator).to(dtype) for n in (heads, kv_heads, kv_heads))
    outputs = []
    for backend in (TorchNativeAttnBackend(runner), CpuAttentionBackend(runner)):
        backend.init_forward_metadata(batch)
        run = backend.forward_decode if mode is ForwardMode.DECODE else backend.forward_extend
        keys, values = (rows.view(-1, kv_heads, dim).clone() for rows in (k, v))
        outputs.append(run(q.clone(), keys, values, layer, batch))
    torch.testing.assert_close(outputs[1], outputs[0], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
