"""Steered rows are sampled from the given distribution over their candidates; every other row keeps its bits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lenvm_kernels.candidates import TOP_K_ALL, Candidates
from lenvm_runtime.control_batch import ControlBatch
from lenvm_runtime.length_control import LengthControl
from lenvm_runtime.steering import ScaledTargets, steer_rows

EOS = torch.tensor([3])
CONTROL = LengthControl("tilt", beta=1.0)
SURE = LengthControl("tilt", beta=1.0, entropy_threshold=20.0)  # no step is this unsure: never steered
AT_MEAN, NEAR_END = (LengthControl("tilt", beta=1.0, max_mean_value=bound) for bound in (-0.25, -0.26))


@pytest.mark.parametrize(
    "controls",
    [
        [CONTROL],
        [CONTROL, CONTROL, CONTROL],
        [None, CONTROL, None, SURE, CONTROL],
        [SURE, SURE],
        [NEAR_END, None, AT_MEAN, CONTROL, SURE],
    ],
)
def test_only_scored_rows_are_rewritten(controls: list[LengthControl | None]) -> None:
    num_rows, vocab = len(controls), 60
    logits = torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(num_rows))
    before = logits.clone()
    temperatures = torch.linspace(0.5, 1.5, num_rows).unsqueeze(1)
    ones = torch.ones(num_rows)
    filters = {"top_ks": torch.full((num_rows,), TOP_K_ALL), "top_ps": ones, "min_ps": 0 * ones}
    sampling = SimpleNamespace(temperatures=temperatures, **filters)
    control = ControlBatch.build(controls, [0] * num_rows, [TOP_K_ALL] * num_rows, "cpu")
    assert control is not None
    guided = control.guided_rows(
        torch.ones(num_rows), torch.ones(num_rows), torch.zeros(num_rows).long(), torch.zeros(vocab).bool()
    )
    kept: list[Candidates] = []
    wanted: list[Tensor] = []

    def reweigh(candidates: Candidates) -> tuple[Tensor, Tensor]:
        kept.append(candidates)
        wanted.append(torch.log_softmax(2 * candidates.logprobs, -1))
        going_on = candidates.logprobs.exp().masked_fill(candidates.eos_mask, 0.0).sum(-1, keepdim=True)
        return (-0.25 / going_on).expand_as(candidates.logprobs) * (1 + 1e-6), wanted[0]  # a mean value of -0.25

    steered = steer_rows(logits, control, guided, sampling, EOS, reweigh)
    assert steered.tolist() == [choice in (CONTROL, AT_MEAN) for choice in controls]
    assert torch.equal(logits[~steered], before[~steered])
    guided_rows = control.rows.tolist()
    for row in steered.nonzero().flatten().tolist():
        place = guided_rows.index(row)
        expected = torch.zeros(vocab).scatter_reduce(0, kept[0].ids[place], wanted[0][place].exp(), "amax")
        torch.testing.assert_close(torch.softmax(logits[row] / temperatures[row], -1), expected)


def test_scaled_targets_are_set_at_the_end_of_the_prompt_alone() -> None:
    """Not in a chunk before it, nor for the decode rows of a mixed batch."""
    targets = ScaledTargets("cpu")
    control = ControlBatch.build([LengthControl("scale", factor=0.5)] * 4, [4] * 4, [1] * 4, "cpu")
    assert control is not None
    slots, generated = torch.tensor([7, 2, 3, 5]), torch.tensor([0, 6, -3, 0])
    targets.update(control, slots, generated, torch.tensor([100.0, 100.0, 100.0, 0.5]))
    assert targets.read(slots).tolist() == [50.0, 1.0, 1.0, 1.0]
