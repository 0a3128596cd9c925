"""The CPU attention backend on SGLang's own KV pool, against dense attention over whole sequences."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from lenvm_kernels import torchvision_schema

torchvision_schema.declare_if_missing()

from sglang.srt.layers.radix_attention import AttentionType, RadixAttention  # noqa: E402
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402

from lenvm_runtime.cpu.attention_backend import CpuAttentionBackend, UnsupportedModelError  # noqa: E402

HEADS, KV_HEADS, DIM, LAYER = 6, 2, 16, 1
LENGTHS = (9, 70)
CHUNK = 5  # tokens of each request in the first extend
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make_runner(
    dtype: torch.dtype = torch.float32, pool_dtype: torch.dtype | None = None, **changes: object
) -> SimpleNamespace:
    pool = MHATokenToKVPool(256, 1, pool_dtype or dtype, KV_HEADS, DIM, LAYER + 1, "cpu", enable_memory_saver=False)
    slots = torch.randperm(255, generator=torch.Generator().manual_seed(0)).int() + 1
    requests = SimpleNamespace(req_to_token=slots[:240].view(3, 80).contiguous())
    return SimpleNamespace(
        **{
            "token_to_kv_pool": pool,
            "req_to_token_pool": requests,
            "use_mla_backend": False,
            "model_config": SimpleNamespace(is_encoder_decoder=False, head_dim=DIM),
            "dtype": dtype,
            **changes,
        }
    )


def make_layer(**changes: object) -> RadixAttention:
    layer = RadixAttention(HEADS, DIM, DIM**-0.5, KV_HEADS, LAYER)
    for name, value in changes.items():
        setattr(layer, name, value)
    return layer


def step(backend, layer, rows, tensors, begins, ends, mode):
    """One forward over tokens [begin, end) of every sequence: [num_tokens, heads * dim]."""
    q, k, v = (torch.cat([whole[b:e] for whole, b, e in zip(tensor, begins, ends, strict=True)]) for tensor in tensors)
    table = backend.req_to_token_pool.req_to_token
    batch = SimpleNamespace(
        forward_mode=mode,
        batch_size=len(rows),
        req_pool_indices=rows,
        seq_lens=torch.tensor(ends),
        extend_seq_lens=torch.tensor(ends) - torch.tensor(begins),
        out_cache_loc=torch.cat([table[row, b:e] for row, b, e in zip(rows, begins, ends, strict=True)]).long(),
    )
    backend.init_forward_metadata(batch)
    run = backend.forward_decode if mode is ForwardMode.DECODE else backend.forward_extend
    return run(q.flatten(1), k, v, layer, batch)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_chunked_prefill_and_decode_equal_dense_attention(dtype):
    torch.manual_seed(1)
    backend = CpuAttentionBackend(make_runner(dtype))
    rows = torch.tensor([2, 0])
    tensors = [
        [torch.randn(length, heads, DIM).to(dtype) for length in LENGTHS] for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    starts, last = [CHUNK, CHUNK], [length - 1 for length in LENGTHS]
    layer = make_layer()
    pieces = [
        step(backend, layer, rows, tensors, [0, 0], starts, ForwardMode.EXTEND),
        step(backend, layer, rows, tensors, starts, last, ForwardMode.EXTEND),
        step(backend, layer, rows, tensors, last, list(LENGTHS), ForwardMode.DECODE),
    ]
    sizes = [(CHUNK, CHUNK), tuple(end - CHUNK for end in last), (1, 1)]
    parts = [piece.split(size) for piece, size in zip(pieces, sizes, strict=True)]
    for index in range(len(LENGTHS)):
        q, k, v = (tensor[index].double().transpose(0, 1) for tensor in tensors)
        dense = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        ours = torch.cat([part[index] for part in parts]).double().view(-1, HEADS, DIM)
        torch.testing.assert_close(ours, dense.transpose(0, 1), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_mla_backend": True}, "MLA"),
        ({"model_config": SimpleNamespace(is_encoder_decoder=True, head_dim=DIM)}, "encoder-decoder"),
        ({"pool_dtype": torch.bfloat16}, "--kv-cache-dtype"),
        (
            {
                "token_to_kv_pool": SimpleNamespace(kv_cache_layout="nhd", is_quantized_kv_cache=False),
                "req_to_token_pool": None,
            },
            "plain KV pool, got SimpleNamespace",
        ),
    ],
)
def test_models_that_it_does_not_serve_are_refused_at_the_start(changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        CpuAttentionBackend(make_runner(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"is_cross_attention": True},
        {"attn_type": AttentionType.DECODER_BIDIRECTIONAL},
        {"logit_cap": 30.0, "logit_capping_method": "sigmoid"},
        {"xai_temperature_len": 8},
    ],
)
def test_layers_of_another_formula_are_refused(changes):
    backend = CpuAttentionBackend(make_runner())
    tensors = [[torch.randn(3, heads, DIM)] for heads in (HEADS, KV_HEADS, KV_HEADS)]
    with pytest.raises(UnsupportedModelError):
        step(backend, make_layer(**changes), torch.tensor([0]), tensors, [0], [3], ForwardMode.EXTEND)


def test_speculative_decoding_is_refused():
    backend = CpuAttentionBackend(make_runner())
    with pytest.raises(UnsupportedModelError, match="speculative"):
        backend.init_forward_metadata(SimpleNamespace(forward_mode=ForwardMode.TARGET_VERIFY))


def test_a_model_without_a_kernel_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        CpuAttentionBackend(make_runner(torch.float16))
    assert "several times slower" in caplog.text
