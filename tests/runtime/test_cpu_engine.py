"""What replaces SGLang's own layers on a CPU, against what it replaces."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from lenvm_kernels import cpp_library, decoder_layer, layers, torchvision_schema

torchvision_schema.declare_if_missing()

from sglang.srt.layers.layernorm import RMSNorm  # noqa: E402

from lenvm_runtime.cpu.layers import _rms_norm, _rotate, _silu_and_mul  # noqa: E402
from lenvm_runtime.cpu.linear import PackedLinearMethod, PackedOutputMethod  # noqa: E402


@pytest.fixture
def bf16_products():
    if not decoder_layer.available():
        pytest.skip("needs a C++ compiler and AVX-512")


@pytest.mark.usefixtures("bf16_products")
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 32, 100])
@pytest.mark.parametrize("with_bias", [False, True])
def test_packed_products_are_those_of_torch(rows, with_bias):
    torch.manual_seed(rows)
    weight, bias = torch.randn(960, 576).bfloat16(), torch.randn(960).bfloat16() if with_bias else None
    x = torch.randn(rows, 576).bfloat16()
    packed = PackedLinearMethod(weight).apply(None, x, bias)
    torch.testing.assert_close(packed, functional.linear(x, weight, bias), rtol=2**-7, atol=2**-7)
    assert packed.shape == (rows, 960)


@pytest.mark.usefixtures("bf16_products")
def test_packed_output_layer_still_looks_tokens_up():
    weight = torch.randn(320, 64).bfloat16()
    token_ids = torch.tensor([[4, 299], [0, 4]])
    rows = PackedOutputMethod(weight).embedding(SimpleNamespace(weight=weight), token_ids)
    assert torch.equal(rows, weight[token_ids])


def norm_layer(**options):
    layer = SimpleNamespace(
        hidden_size=64,
        weight=torch.randn(64).bfloat16(),
        variance_epsilon=1e-5,
        has_weight=True,
        variance_size_override=None,
        override_orig_dtype=None,
        cast_x_before_out_mul=False,
        fp32_residual=False,
        **options,
    )
    layer.forward_native = lambda *args: RMSNorm.forward_native(layer, *args)
    return layer


@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 64), (0, 64)])
def test_norm_is_the_native_one(shape):
    layer, x, residual = norm_layer(), torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
    expected = layer.forward_native(x, residual.clone())
    torch.testing.assert_close(_rms_norm(layer, x, residual), expected, rtol=2**-7, atol=0)
    torch.testing.assert_close(_rms_norm(layer, x), layer.forward_native(x), rtol=2**-7, atol=0)


def test_norm_with_an_option_stays_native(monkeypatch):
    monkeypatch.setattr(layers, "rms_norm", lambda *_: pytest.fail("the kernel has no such option"))
    x = torch.randn(3, 64).bfloat16()
    layer = norm_layer()
    layer.fp32_residual = True
    assert _rms_norm(layer, x, x)[1].dtype == torch.float32
    layer = norm_layer()
    layer.weight = layer.weight.float()
    assert _rms_norm(layer, x).dtype == torch.bfloat16


def test_without_a_compiler_everything_stays_native(monkeypatch):
    monkeypatch.setattr(cpp_library, "available", lambda _source: False)
    native = SimpleNamespace(forward_native=lambda *args: args, is_neox_style=True, cos_sin_cache=torch.zeros(4, 64))
    x = torch.randn(3, 64)
    assert _silu_and_mul(native, x) == (x,)
    assert _rotate(native, torch.arange(3), x, x)[1] is x
    assert _rms_norm(norm_layer(), x.bfloat16()).dtype == torch.bfloat16
