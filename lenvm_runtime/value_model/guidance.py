"""What a separate LenVM does in one step: values of the states, values of the candidates, the sampler's steering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lenvm_kernels.candidates import Candidates
from lenvm_kernels.length_control import DEFAULT_KERNEL, Mode, steer_candidates
from lenvm_kernels.length_distribution import expected_length, quantile_length
from lenvm_kernels.length_value import bin_lengths
from lenvm_kernels.value_distribution import build_value_table, distribution_from_value
from lenvm_runtime.control_batch import ControlBatch
from lenvm_runtime.head_runner import INTERVAL
from lenvm_runtime.response import PREDICTION_KEY, VALUE_KEY
from lenvm_runtime.steering import DeviceRows, ScaledTargets, just_prefilled, released, steer_rows
from lenvm_runtime.value_model.packing import StepRows, pack_step, read_candidates
from lenvm_runtime.value_model.runner import ValueModelRunner

NUM_BINS = 64


class ValueGuide:
    """Scores candidates with the value model's scalar values. One a process; no state but scaled targets.

    The natural strategy and the prediction need a distribution of the remaining length: that of
    `lenvm_kernels.value_distribution`, whose mean value is the model's and whose spread is assumed.
    """

    def __init__(self, runner: ValueModelRunner, eos_token_ids: Sequence[int], max_length: int) -> None:
        device = runner.device
        self.runner = runner
        self.gamma = runner.source.gamma
        self.eos_token_ids = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=device)
        self.scaled_targets = ScaledTargets(device)
        self._bin_lengths = bin_lengths(NUM_BINS, max_length).to(device)
        self._table = build_value_table(self._bin_lengths, self.gamma)

    def predictions(self, values: Tensor) -> Tensor:
        """Remaining length at states of these values: [rows] -> [rows, 3] expected, 10% and 90% quantile."""
        logprobs = self.distribution(values)
        low, high = (quantile_length(logprobs, self._bin_lengths, level) for level in INTERVAL)
        return torch.stack([expected_length(logprobs, self._bin_lengths), low, high], dim=1)

    def distribution(self, values: Tensor) -> Tensor:
        """Log-probabilities of the remaining length over the bins: [...] -> [..., NUM_BINS]."""
        return distribution_from_value(values, self._table)

    def reweigh(
        self, candidates: Candidates, values: Tensor, generated: Tensor, targets: Tensor, control: ControlBatch
    ) -> Tensor:
        """Steered log-probabilities of the guided rows' candidates: [G, C]. ``values`` [G, C]; the rest [G]."""
        rows = control.rows
        return steer_candidates(
            candidates.logprobs,
            self.distribution(values),
            candidates.eos_mask,
            self._bin_lengths,
            generated,
            control.mode[rows],
            control.strategy[rows],
            targets,
            control.beta[rows],
            self.gamma,
            DEFAULT_KERNEL,
        )


@dataclass(frozen=True)
class ValueStep:
    """One step of a batch. ``state_values`` [rows]: V of the states that a prefill has just run; None in decode."""

    guide: ValueGuide
    control: ControlBatch | None
    batch: Any
    state_values: Tensor | None

    def steer(self, logits_output: Any, sampling: Any, positions: Tensor) -> Any:
        """See `lenvm_runtime.steering.Step`. Also runs the value model on decode steps, and reports the values."""
        values = self._steer(logits_output, sampling, positions) if self.control is not None else self._run_states()
        info = {VALUE_KEY: DeviceRows(values)}
        if self.state_values is not None:
            info[PREDICTION_KEY] = DeviceRows(self.guide.predictions(values))
        logits_output.customized_info = info
        return sampling if self.control is None else released(sampling, self.control)

    def _run_states(self) -> Tensor:
        """V of every row's state [rows], with no candidates."""
        if self.state_values is not None:
            return self.state_values
        nothing = torch.empty(0, 1, dtype=torch.int64, device=self.batch.input_ids.device)
        every = torch.arange(len(self.batch.seq_lens), device=nothing.device)
        rows = self._pack(every, nothing[:, 0], nothing, nothing.bool())
        return self.guide.runner.step(rows)[rows.first_rows]

    def _steer(self, logits_output: Any, sampling: Any, positions: Tensor) -> Tensor:
        """Steer the guided rows; returns V of every row's state [rows]."""
        control, slots = self.control, self.batch.req_pool_indices
        assert control is not None
        generated = positions + 1 - control.prompt_len
        if self.state_values is not None:
            remaining = expected_length(self.guide.distribution(self.state_values), self.guide._bin_lengths)
            prefilled = just_prefilled(self.batch, control)
            self.guide.scaled_targets.update(control, slots, generated, remaining, prefilled)
        state_values: list[Tensor] = []

        def reweigh(candidates: Candidates) -> Tensor:
            targets, guided_generated = self.guide.scaled_targets.targets(control, slots), generated[control.rows]
            scored = needs_values(candidates, control.mode[control.rows], targets, guided_generated)
            states, values = self._run_candidates(control, candidates, scored)
            state_values.append(states)
            return self.guide.reweigh(candidates, values, guided_generated, targets, control)

        steer_rows(logits_output.next_token_logits, control.rows, sampling, self.guide.eos_token_ids, reweigh)
        return state_values[0]

    def _run_candidates(self, control: ControlBatch, candidates: Candidates, scored: Tensor) -> tuple[Tensor, Tensor]:
        """V of every row's state [rows] and of the guided rows' candidates [G, C].

        After a prefill, which has run the states, only the guided rows take part.
        """
        prefilled = self.state_values is not None
        every = torch.arange(len(self.batch.seq_lens), device=scored.device)
        taking_part = control.rows if prefilled else every
        guided = every[: len(control.rows)] if prefilled else control.rows
        rows = self._pack(taking_part, guided, candidates.ids, scored)
        values = self.guide.runner.step(rows)
        states = self.state_values if self.state_values is not None else values[rows.first_rows]
        return states, read_candidates(values, rows, scored)

    def _pack(self, taking_part: Tensor, guided: Tensor, candidate_ids: Tensor, scored: Tensor) -> StepRows:
        batch = self.batch
        tokens = batch.input_ids
        if self.state_values is not None:
            tokens = tokens[batch.extend_seq_lens.cumsum(0) - 1]
        return pack_step(
            tokens[taking_part],
            batch.seq_lens[taking_part],
            batch.req_pool_indices[taking_part],
            self.guide.runner.req_to_token_pool.req_to_token,
            guided,
            candidate_ids,
            scored,
            scored.numel() if scored.is_cuda else int(scored.sum()),
        )


def needs_values(candidates: Candidates, mode: Tensor, target: Tensor, generated: Tensor) -> Tensor:
    """Which candidates need the value of their next state: [G, C] bool. mode, target, generated [G].

    None of a row that has a single candidate left or whose bound is met; never an EOS, whose value is 0.
    ``generated`` < 0 is a prompt still being read in chunks: its sampled token is dropped.
    """
    possible = candidates.logprobs > -torch.inf
    met = (mode == Mode.AT_LEAST) & (generated + 1 >= target)
    row_needs = (possible.sum(1) > 1) & ~met & (generated >= 0)
    return possible & ~candidates.eos_mask & row_needs.unsqueeze(1)
