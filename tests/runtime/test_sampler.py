"""Our sampler against SGLang's own: the same logits and generator state give unguided rows the same tokens and bits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lenvm_kernels import torchvision_schema
from lenvm_kernels.candidates import TOP_K_ALL
from lenvm_kernels.checkpoint import Head
from lenvm_kernels.heads import CandidateHead, HeadConfig, ValueHead
from lenvm_runtime.control_batch import ControlBatch
from lenvm_runtime.length_control import LengthControl

torchvision_schema.declare_if_missing()

VOCABULARY, HIDDEN = 500, 16
NUM_PROMPT, LAST_POSITION = 5, 12
UNGUIDED = (
    None,
    LengthControl("tilt", beta=0.0),
    LengthControl("equal", target=9, entropy_threshold=50.0),
    LengthControl("at_least", target=LAST_POSITION + 2 - NUM_PROMPT),  # met by the token that is sampled now
)
GUIDED = (
    LengthControl("equal", target=40),
    LengthControl("at_most", target=9, strategy="hard"),
    LengthControl("tilt", beta=9.0),
    LengthControl("target_mean", factor=0.8, scaling="length"),
)
CONTROLS = [control for pair in zip(GUIDED * 3, UNGUIDED * 3, strict=True) for control in pair]
NUM_ROWS = len(CONTROLS)
FILTERS = {
    "temperature": {"temperatures": torch.linspace(0.5, 1.5, NUM_ROWS)},
    "top_k": {"top_ks": torch.arange(1, NUM_ROWS + 1).int()},
    "top_p and min_p": {"top_ps": torch.linspace(0.5, 1.0, NUM_ROWS), "min_ps": torch.linspace(0, 0.1, NUM_ROWS)},
    "greedy": {"top_ks": torch.ones(NUM_ROWS).int()},
}


def make_runner() -> Any:
    from lenvm_runtime.head_runner import HeadRunner

    torch.manual_seed(0)
    config = HeadConfig("x", HIDDEN, VOCABULARY, 0.997, 32, 2048, 8, (), (3,))
    head = Head(config, ValueHead(HIDDEN).requires_grad_(False), CandidateHead(config).requires_grad_(False))
    closing = torch.arange(VOCABULARY) % 5 == 1
    return HeadRunner(head, [], torch.randn(VOCABULARY, HIDDEN), lambda rows: rows, [3], closing)


def make_sampling(**tensors: Tensor) -> Any:
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    ones = torch.ones(NUM_ROWS)
    given = {
        "temperatures": ones,
        "top_ks": torch.full((NUM_ROWS,), TOP_K_ALL).int(),
        "top_ps": ones,
        "min_ps": 0 * ones,
        **tensors,
    }
    given["temperatures"] = given["temperatures"].view(-1, 1)
    is_greedy = bool((given["top_ks"] == 1).all())
    return SamplingBatchInfo(
        **given,
        is_all_greedy=is_greedy,
        is_any_greedy=bool((given["top_ks"] == 1).any()),
        need_top_p_sampling="top_ps" in tensors,
        need_top_k_sampling="top_ks" in tensors,
        need_min_p_sampling="min_ps" in tensors,
        vocab_size=VOCABULARY,
        device="cpu",
    )


def sample(sampler: Any, sampling: Any, logits: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probabilities: [rows] each."""
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput

    output = LogitsProcessorOutput(next_token_logits=logits.clone())
    torch.manual_seed(1)
    tokens = sampler(output, sampling, True, [0] * NUM_ROWS, [None] * NUM_ROWS, positions)
    return tokens, torch.as_tensor(output.next_token_logprobs)


def sample_both(**tensors: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The same step of rows with CONTROLS by SGLang's sampler and by ours."""
    from sglang.srt.layers.sampler import Sampler

    from lenvm_runtime.engine_hooks import HeadStep
    from lenvm_runtime.sampler import LenVMSampler

    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(NUM_ROWS, VOCABULARY, generator=generator)
    features = torch.randn(NUM_ROWS, HIDDEN, generator=generator)
    positions = torch.full((NUM_ROWS,), LAST_POSITION)
    control = ControlBatch.build(CONTROLS, [NUM_PROMPT] * NUM_ROWS, [TOP_K_ALL] * NUM_ROWS, "cpu")
    assert control is not None

    stock = sample(Sampler(), make_sampling(**tensors), logits, positions)
    sampling = make_sampling(**tensors)
    sampling.lenvm_step = HeadStep(make_runner(), control, features, torch.arange(NUM_ROWS), torch.arange(NUM_ROWS))
    return stock, sample(LenVMSampler(), sampling, logits, positions)


@pytest.mark.usefixtures("served_runner")
@pytest.mark.parametrize("filters", FILTERS)
def test_unguided_rows_get_sglangs_own_tokens_beside_guided_ones(filters: str) -> None:
    unguided = torch.tensor([choice in UNGUIDED for choice in CONTROLS])
    for stock_part, our_part in zip(*sample_both(**FILTERS[filters]), strict=True):
        assert torch.equal(stock_part[unguided], our_part[unguided])
        assert not torch.equal(stock_part[~unguided], our_part[~unguided])


@pytest.mark.usefixtures("served_runner")
def test_a_greedy_guided_row_has_its_own_logprobs_beside_sampled_ones() -> None:
    """SGLang divides logits by the temperatures unless every row of the batch is greedy."""
    temperatures = torch.linspace(0.5, 1.5, NUM_ROWS)
    guided = torch.tensor([choice in GUIDED for choice in CONTROLS])
    mixed = torch.where(guided, 1, TOP_K_ALL).int()
    _, among_greedy = sample_both(temperatures=temperatures, top_ks=torch.ones(NUM_ROWS).int())
    _, among_sampled = sample_both(temperatures=temperatures, top_ks=mixed)
    _, at_temperature_1 = sample_both(top_ks=mixed)
    for one, other, plain in zip(among_greedy, among_sampled, at_temperature_1, strict=True):
        torch.testing.assert_close(one[guided], plain[guided], check_dtype=False)
        torch.testing.assert_close(other[guided], plain[guided])


@pytest.mark.usefixtures("served_runner")
def test_a_step_is_used_once() -> None:
    """A batch without a new step is not steered by the last one's."""
    from lenvm_runtime.sampler import LenVMSampler

    calls = []
    step = SimpleNamespace(steer=lambda _output, sampling, _positions: calls.append(1) or sampling)
    sampling = make_sampling()
    sampling.lenvm_step = step
    logits, positions = torch.randn(NUM_ROWS, VOCABULARY), torch.full((NUM_ROWS,), LAST_POSITION)
    for _ in range(2):
        sample(LenVMSampler(), sampling, logits, positions)
    assert len(calls) == 1
