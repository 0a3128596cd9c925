"""Which decoder layers run as two kernel calls, and that they give what the layer's own forward gives."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from lenvm_kernels import decoder_layer, layers, torchvision_schema
from lenvm_kernels.checkpoint_files import CheckpointError

torchvision_schema.declare_if_missing()

from sglang.srt.layers.activation import SiluAndMul  # noqa: E402
from sglang.srt.layers.linear import LinearBase  # noqa: E402
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod  # noqa: E402
from sglang.srt.layers.radix_attention import AttentionType  # noqa: E402
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding  # noqa: E402
from sglang.srt.models.llama import LlamaDecoderLayer  # noqa: E402
from sglang.srt.models.qwen2 import Qwen2DecoderLayer  # noqa: E402

from lenvm_runtime import compat  # noqa: E402
from lenvm_runtime.cpu.decoder_layer import can_fuse, fuse_decoder_layers  # noqa: E402
from lenvm_runtime.cpu.linear import pack_linear_layers  # noqa: E402

DIM, HEADS, KV_HEADS, HEAD_DIM, INNER = 64, 4, 2, 32, 96

pytestmark = pytest.mark.skipif(not decoder_layer.available(), reason="needs a C++ compiler and AVX-512")


def bare(module_class, **attributes):
    """A module of a class of SGLang without its constructor, which wants a running engine."""
    module = module_class.__new__(module_class)
    nn.Module.__init__(module)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def linear(outputs, inputs, bias=None):
    weight = nn.Parameter((torch.randn(outputs, inputs) * inputs**-0.5).bfloat16(), requires_grad=False)
    return bare(LinearBase, weight=weight, bias=bias, tp_size=1, quant_method=UnquantizedLinearMethod())


def norm():
    weight = nn.Parameter(torch.rand(DIM).bfloat16(), requires_grad=False)
    return bare(
        nn.Module,
        weight=weight,
        variance_epsilon=1e-5,
        hidden_size=DIM,
        variance_size_override=None,
        override_orig_dtype=None,
        cast_x_before_out_mul=False,
        fp32_residual=False,
    )


class Attend(nn.Module):
    """Stands for the attention: reads all that it gets."""

    attn_type = AttentionType.DECODER

    def forward(self, q, k, v, forward_batch):
        own = (k * v).view(-1, KV_HEADS, 1, HEAD_DIM)
        return (q.view(-1, KV_HEADS, 2, HEAD_DIM) + own + forward_batch).flatten(1)


@pytest.fixture(autouse=True)
def another_backend(monkeypatch):
    monkeypatch.setattr(compat, "attention_backend", object)


def make_layer(layer_class=LlamaDecoderLayer, with_bias=False):
    torch.manual_seed(0)
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    attention = bare(
        nn.Module,
        qkv_proj=linear(width, DIM, torch.randn(width).bfloat16() if with_bias else None),
        o_proj=linear(DIM, HEADS * HEAD_DIM),
        rotary_emb=bare(RotaryEmbedding, is_neox_style=True, cos_sin_cache=torch.randn(50, HEAD_DIM).bfloat16()),
        attn=Attend(),
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        q_size=HEADS * HEAD_DIM,
        kv_size=KV_HEADS * HEAD_DIM,
    )
    mlp = bare(nn.Module, gate_up_proj=linear(2 * INNER, DIM), down_proj=linear(DIM, INNER), act_fn=bare(SiluAndMul))
    return bare(layer_class, self_attn=attention, mlp=mlp, input_layernorm=norm(), post_attention_layernorm=norm())


def make_model(*decoder_layers):
    return nn.ModuleList(decoder_layers)


def native_forward(layer, positions, x, forward_batch, residual):
    """The layer's formula with torch's products, and the kernels that have tests of their own for the rest."""
    attention, mlp, rotary = layer.self_attn, layer.mlp, layer.self_attn.rotary_emb
    residual = torch.zeros_like(x) if residual is None else residual.clone()
    x = layers.rms_norm(x, layer.input_layernorm.weight, 1e-5, residual)
    qkv = functional.linear(x, attention.qkv_proj.weight, attention.qkv_proj.bias)
    q, k, v = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
    layers.rotate(positions, q, k, rotary.cos_sin_cache, HEAD_DIM)
    x = functional.linear(attention.attn(q, k, v, forward_batch), attention.o_proj.weight)
    x = layers.rms_norm(x, layer.post_attention_layernorm.weight, 1e-5, residual)
    gated = layers.silu_and_mul(functional.linear(x, mlp.gate_up_proj.weight))
    return functional.linear(gated, mlp.down_proj.weight), residual


@pytest.mark.parametrize("layer_class", [LlamaDecoderLayer, Qwen2DecoderLayer])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("is_first", [True, False])
def test_fused_layer_gives_what_the_layer_gives(layer_class, rows, is_first):
    layer = make_layer(layer_class, with_bias=layer_class is Qwen2DecoderLayer)
    x, positions = torch.randn(rows, DIM).bfloat16(), torch.arange(rows)
    residual = None if is_first else torch.randn(rows, DIM).bfloat16()
    expected, total = native_forward(layer, positions, x, 0.5, residual)
    fuse_decoder_layers(make_model(layer))
    out, residual = layer(positions, x, 0.5, residual)
    torch.testing.assert_close(residual, total, rtol=2**-7, atol=2**-6)
    torch.testing.assert_close(out, expected, rtol=2**-6, atol=2**-5)


@pytest.fixture
def int8():
    if not decoder_layer.runs_in_int8():
        pytest.skip("needs AVX-512 VNNI")


@pytest.mark.usefixtures("int8")
@pytest.mark.parametrize("layer_class", [LlamaDecoderLayer, Qwen2DecoderLayer])
def test_a_fused_layer_in_int8_is_near_the_layer(layer_class):
    layer = make_layer(layer_class, with_bias=layer_class is Qwen2DecoderLayer)
    x, positions = torch.randn(40, DIM).bfloat16(), torch.arange(40)
    expected, total = native_forward(layer, positions, x, 0.5, None)
    fuse_decoder_layers(make_model(layer), in_int8=True)
    out, residual = layer(positions, x, 0.5, None)
    for found, exact in ((residual, total), (out, expected)):
        assert 0 < (found.float() - exact.float()).norm() < 0.03 * exact.float().norm()


@pytest.mark.usefixtures("int8")
def test_every_linear_layer_is_rounded_or_none():
    layer = make_layer(OtherLayer)
    x = torch.randn(3, DIM).bfloat16()
    expected = functional.linear(x, layer.self_attn.qkv_proj.weight)
    pack_linear_layers(make_model(layer), in_int8=True)
    out = layer.self_attn.qkv_proj.quant_method.apply(layer.self_attn.qkv_proj, x)
    assert 0 < (out - expected).float().norm() < 0.03 * expected.float().norm()

    layer = make_layer(OtherLayer)
    layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.float()
    with pytest.raises(CheckpointError, match=r"mlp\.down_proj: only plain bf16 layers"):
        pack_linear_layers(make_model(layer), in_int8=True)


def test_unpacked_weights_are_released_and_not_packed_again():
    layer = make_layer()
    model = make_model(layer)
    fuse_decoder_layers(model)
    pack_linear_layers(model)
    linears = [module for module in model.modules() if isinstance(module, LinearBase)]
    assert len(linears) == 4
    for module in linears:
        assert module.weight.numel() == 0
        assert type(module.quant_method) is UnquantizedLinearMethod


class OtherLayer(LlamaDecoderLayer):
    """A subclass may compute something else."""


CHANGES = {
    "another class": lambda layer: setattr(layer, "__class__", OtherLayer),
    "quantized": lambda layer: setattr(layer.mlp.down_proj, "quant_method", object()),
    "tensor parallel": lambda layer: setattr(layer.self_attn.o_proj, "tp_size", 2),
    "output bias": lambda layer: setattr(layer.self_attn.o_proj, "bias", torch.zeros(DIM)),
    "wrapped": lambda layer: setattr(layer.self_attn, "qkv_proj", bare(nn.Module, inner=layer.self_attn.qkv_proj)),
    "fp32": lambda layer: layer.float(),
    "odd size": lambda layer: setattr(layer.mlp, "down_proj", linear(DIM, INNER - 8)),
    "another activation": lambda layer: setattr(layer.mlp, "act_fn", nn.SiLU()),
    "pairs of neighbours": lambda layer: setattr(layer.self_attn.rotary_emb, "is_neox_style", False),
    "another rotary embedding": lambda layer: setattr(layer.self_attn, "rotary_emb", bare(nn.Module)),
    "fp32 angles": lambda layer: setattr(layer.self_attn.rotary_emb, "cos_sin_cache", torch.zeros(50, HEAD_DIM)),
    "encoder attention": lambda layer: setattr(layer.self_attn.attn, "attn_type", AttentionType.ENCODER_ONLY),
    "two epsilons": lambda layer: setattr(layer.post_attention_layernorm, "variance_epsilon", 1e-6),
    "norm with an option": lambda layer: setattr(layer.post_attention_layernorm, "fp32_residual", True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_layer_that_is_not_the_known_one_keeps_its_forward(change):
    layer = make_layer()
    assert can_fuse(layer)
    changed = copy.deepcopy(layer)
    change(changed)
    assert not can_fuse(changed)
    fuse_decoder_layers(make_model(changed))
    assert "forward" not in vars(changed)
