"""The one-pass layer kernels against the torch expressions that they replace."""

import pytest
import torch

from lenvm_kernels import cpp_library, layers

ROWS = (1, 3, 4, 33)
DIMS = (32, 64, 72, 576, 1001)
# the last bit of the storage type: the sums inside are in another order
TOLERANCE = {torch.bfloat16: 2**-7, torch.float32: 1e-6}


@pytest.fixture(autouse=True)
def kernels_built():
    if not cpp_library.available(layers.SOURCE):
        pytest.skip("no C++ compiler")


@pytest.fixture(params=sorted(TOLERANCE, key=str), ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


def strided(rows, dim, dtype, seed=0, scale=1.0):
    """A view with gaps between its rows, as a split of a joint projection has."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, dim + 24, generator=generator) * scale).to(dtype)[:, 8 : 8 + dim]


def native_norm(x, weight, eps, residual=None):
    total = x.float() if residual is None else x.float() + residual.float()
    normed = total * torch.rsqrt(total.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (normed * weight).to(x.dtype), total.to(x.dtype)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_rms_norm(rows, dim, dtype, scale):
    x, weight = strided(rows, dim, dtype, scale=scale), strided(1, dim, dtype, seed=1)[0].contiguous()
    expected, _ = native_norm(x, weight, 1e-5)
    torch.testing.assert_close(layers.rms_norm(x, weight, 1e-5), expected, rtol=TOLERANCE[dtype], atol=1e-30)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dim", DIMS)
def test_rms_norm_with_residual_replaces_it_by_the_sum(rows, dim, dtype):
    x, residual = strided(rows, dim, dtype), strided(rows, dim, dtype, seed=1, scale=5.0)
    weight = strided(1, dim, dtype, seed=2)[0].contiguous()
    expected, total = native_norm(x, weight, 1e-5, residual)
    out = layers.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(residual, total)
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=1e-30)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("scale", [0.1, 4.0, 200.0])
def test_silu_and_mul(rows, dim, dtype, scale):
    x = strided(rows, 2 * dim, dtype, scale=scale)
    expected = torch.nn.functional.silu(x[:, :dim]) * x[:, dim:]
    torch.testing.assert_close(layers.silu_and_mul(x), expected, rtol=TOLERANCE[dtype], atol=1e-30)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (128, 128), (256, 64)])
def test_rotate(rows, head_dim, rotary_dim, dtype):
    q, k = strided(rows, 9 * head_dim, dtype), strided(rows, 3 * head_dim, dtype, seed=1)
    cos_sin = torch.randn(50, rotary_dim, generator=torch.Generator().manual_seed(2)).to(dtype)
    positions = torch.arange(rows) * 7 % 50

    def native(x):
        heads = x.reshape(rows, -1, head_dim).clone()
        cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
        first, second = heads[..., :rotary_dim].chunk(2, dim=-1)
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return torch.cat([rotated, heads[..., rotary_dim:]], dim=-1).reshape(rows, -1)

    expected = native(q), native(k)
    layers.rotate(positions, q, k, cos_sin, head_dim)
    if dtype == torch.bfloat16:
        assert torch.equal(q, expected[0])
        assert torch.equal(k, expected[1])
    else:  # a fused multiply-add keeps more
        torch.testing.assert_close((q, k), expected, rtol=1e-6, atol=1e-6)


def test_store_rows(dtype):
    buffer, rows = torch.zeros(9, 3, 64, dtype=dtype), strided(4, 3 * 64, dtype).view(4, 3, 64)
    slots = torch.tensor([7, 0, 3, 8])
    layers.store_rows(rows, buffer, slots)
    expected = torch.zeros_like(buffer)
    expected[slots] = rows
    assert torch.equal(buffer, expected)
    layers.store_rows(rows[:0], buffer, slots[:0])
    assert torch.equal(buffer, expected)


def test_rows_do_not_depend_on_each_other(dtype):
    x, residual, weight = (strided(40, 576, dtype, seed) for seed in range(3))
    together = layers.rms_norm(x, weight[0].contiguous(), 1e-5, residual.clone())
    gated = layers.silu_and_mul(x)
    for row in range(0, 40, 13):
        one = slice(row, row + 1)
        assert torch.equal(
            layers.rms_norm(x[one], weight[0].contiguous(), 1e-5, residual[one].clone())[0], together[row]
        )
        assert torch.equal(layers.silu_and_mul(x[one])[0], gated[row])


def test_not_a_number_stays_one(dtype):
    x = torch.ones(2, 64, dtype=dtype)
    x[1, 5] = torch.nan
    normed = layers.rms_norm(x, torch.ones(64, dtype=dtype), 1e-5)
    assert normed[0].isfinite().all()
    assert normed[1].isnan().all()
    assert layers.silu_and_mul(x)[1, 5].isnan()


def test_supports_asks_for_one_dense_type():
    x = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert layers.supports(x, x)
    assert not layers.supports(x, x.float())
    assert not layers.supports(x.half())
    assert not layers.supports(x.t())
