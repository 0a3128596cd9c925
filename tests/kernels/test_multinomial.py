"""The fast draw gives torch's own draws and leaves torch's generator as torch does."""

import pytest
import torch

from lenvm_kernels.multinomial import kernel_usable, multinomial


@pytest.fixture(autouse=True)
def kernel():
    torch.manual_seed(11)
    if not kernel_usable():
        pytest.skip("no C++ compiler")


def drawn_by_both(probs):
    """Draws of torch and ours from the same generator state, each with the generator's next number."""
    state = torch.get_rng_state()
    expected = torch.multinomial(probs, 1), torch.rand(3)
    torch.set_rng_state(state)
    return expected, (multinomial(probs), torch.rand(3))


@pytest.mark.parametrize("vocab_size", [1, 2, 63, 64, 65, 311, 312, 313, 5000, 49152])
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("sharpness", [0.1, 3.0, 30.0])
def test_draws_are_those_of_torch(vocab_size, rows, sharpness):
    probs = torch.softmax(sharpness * torch.randn(rows, vocab_size), dim=-1)
    for _ in range(3):
        torch.testing.assert_close(*drawn_by_both(probs), rtol=0, atol=0)


def test_unnormalised_rows_with_zeros_and_gaps_between_rows():
    probs = torch.rand(5, 3000)[:, 100:2900] * 17
    probs[:, ::3] = 0
    for _ in range(20):
        expected, ours = drawn_by_both(probs)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
        assert (probs.gather(1, ours[0]) > 0).all()


def test_generator_may_stand_anywhere():
    probs = torch.softmax(torch.randn(2, 100), dim=-1)
    for consumed in range(0, 1300, 31):
        torch.manual_seed(consumed)
        torch.rand(consumed)
        torch.testing.assert_close(*drawn_by_both(probs), rtol=0, atol=0)


def test_frequencies():
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2]).repeat(20_000, 1)
    frequencies = torch.bincount(multinomial(probs).flatten(), minlength=4) / 20_000
    assert (frequencies - probs[0]).abs().max() < 0.02


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -0.1])
def test_invalid_rows_are_refused(bad):
    probs = torch.full((2, 200), 0.01)
    probs[1, 150] = bad
    with pytest.raises(RuntimeError, match="probabilit"):
        multinomial(probs)


def test_rows_without_chance_are_refused():
    with pytest.raises(RuntimeError, match="positive"):
        multinomial(torch.zeros(1, 200))


def test_other_types_go_to_torch():
    torch.testing.assert_close(*drawn_by_both(torch.rand(2, 50, dtype=torch.float64)), rtol=0, atol=0)
