"""What a separate LenVM does in one step: values of the states, values of the candidates, the sampler's steering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lenvm_kernels.candidates import Candidates
from lenvm_kernels.length_distribution import expected_length, quantile_length
from lenvm_kernels.length_value import bin_lengths
from lenvm_kernels.value_distribution import build_value_table, distribution_from_value
from lenvm_runtime.control_batch import ControlBatch
from lenvm_runtime.guidance import GuidedRows
from lenvm_runtime.head_runner import INTERVAL
from lenvm_runtime.input_values import QueryBatch
from lenvm_runtime.readers import Readers
from lenvm_runtime.response import CANDIDATES_KEY, PREDICTION_KEY, VALUE_KEY
from lenvm_runtime.steering import (
    DeviceRows,
    ScaledTargets,
    last_slots,
    last_token_ids,
    released,
    steer_rows,
)
from lenvm_runtime.upload import upload
from lenvm_runtime.value_model.packing import StepRows, pack_step, read_candidates, split_requests
from lenvm_runtime.value_model.runner import ValueModelRunner
from lenvm_runtime.value_model.step_graphs import NUM_ROWS

NUM_BINS = 64
MAX_ROWS = NUM_ROWS[-1]
"""Of one forward of a step, whose activations need memory, unless prefills are larger."""


class ValueGuide:
    """The value model of a process and what turns its values into guidance. No state but scaled targets.

    ``max_rows``: the most rows of one forward of a step, unless a single request has more.

    The natural strategy and the prediction need a distribution of the remaining length: that of
    `lenvm_kernels.value_distribution`, whose mean value is the model's and whose spread is assumed.
    """

    def __init__(
        self,
        runner: ValueModelRunner,
        eos_token_ids: Sequence[int],
        closing_tokens: Tensor,
        max_length: int,
        max_rows: int = MAX_ROWS,
    ) -> None:
        device = runner.device
        self.runner = runner
        self.max_rows = max_rows
        self.gamma = runner.source.gamma
        self.eos_token_ids = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=device)
        self.closing_tokens = closing_tokens.to(device)  # [vocab] bool
        self.scaled_targets = ScaledTargets(device)
        lengths = bin_lengths(NUM_BINS, max_length)
        self.bin_lengths = lengths.to(device)
        self._table = build_value_table(lengths, self.gamma).to(device)

    def begin_step(self, forward_batch: Any, state_values: Tensor | None) -> ValueStep:
        """What the sampler does with the batch of this step; ``state_values`` as in `ValueStep`."""
        sampling = forward_batch.sampling_info
        readers, control, queries = sampling.lenvm_readers, sampling.lenvm_control, sampling.lenvm_queries
        return ValueStep(self, readers, control, queries, forward_batch, state_values)

    def distribution(self, values: Tensor) -> Tensor:
        """Log-probabilities of the remaining length over the bins: [...] -> [..., NUM_BINS]."""
        return distribution_from_value(values, self._table)

    def expected_lengths(self, values: Tensor) -> Tensor:
        """Mean remaining length, in tokens: [...] -> [...]."""
        return expected_length(self.distribution(values), self.bin_lengths)

    def predictions(self, values: Tensor) -> Tensor:
        """Remaining length at states of these values: [rows] -> [rows, 3] expected, 10% and 90% quantile."""
        logprobs = self.distribution(values)
        low, high = (quantile_length(logprobs, self.bin_lengths, level) for level in INTERVAL)
        return torch.stack([expected_length(logprobs, self.bin_lengths), low, high], dim=1)


@dataclass
class ValueStep:
    """One step of a batch. ``state_values`` [rows]: V of the readers' states; None until the value model has run them.

    A prefill has run every row's before; a decode step runs those here, in one forward with the candidates.
    """

    guide: ValueGuide
    readers: Readers
    control: ControlBatch | None
    queries: QueryBatch
    batch: Any
    state_values: Tensor | None
    prefilled: bool = field(init=False)

    def __post_init__(self) -> None:
        self.prefilled = self.state_values is not None

    def steer(self, logits_output: Any, sampling: Any, positions: Tensor) -> Any:
        """See `lenvm_runtime.steering.Step`. Also lays the values beside the logits, for the response."""
        if self.control is not None:
            steered = self._steer(self.control, logits_output.next_token_logits, sampling, positions)
            sampling = released(sampling, steered)
        elif self.state_values is None:
            self._run_states()
        assert self.state_values is not None
        logits_output.customized_info = {VALUE_KEY: DeviceRows(self.state_values)}
        if self.prefilled:
            logits_output.customized_info |= self._answers(self.state_values)
        return sampling

    def _answers(self, state_values: Tensor) -> dict[str, DeviceRows]:
        """What a prefill adds to the values: the prediction, and the values of asked-for next tokens."""
        answers = {PREDICTION_KEY: DeviceRows(self.guide.predictions(state_values))}
        counts = self.queries.num_candidates
        asking = [row for row, count in enumerate(counts) if count]
        if not asking:
            return answers
        device = state_values.device
        ids, asked = self.queries.candidate_ids(device)
        rows = upload(asking, torch.int64, device)
        scored = asked & (ids.unsqueeze(-1) != self.guide.eos_token_ids).all(-1)
        values = self._score(rows, ids[rows], scored[rows], [counts[row] for row in asking])
        answers[CANDIDATES_KEY] = DeviceRows(values.new_zeros(ids.shape).index_copy(0, rows, values))
        return answers

    def _steer(self, control: ControlBatch, logits: Tensor, sampling: Any, positions: Tensor) -> Tensor:
        guide, slots = self.guide, self.batch.req_pool_indices
        generated = positions + 1 - control.prompt_len
        if self.state_values is not None:
            remaining = guide.expected_lengths(self.state_values)
            guide.scaled_targets.update(control, slots, generated, remaining)
        guided = control.guided_rows(
            generated, guide.scaled_targets.read(slots), last_token_ids(self.batch), guide.closing_tokens
        )

        def reweigh(candidates: Candidates) -> tuple[Tensor, Tensor]:
            values = self._run_candidates(control.rows, candidates.ids, scored_candidates(candidates, guided))
            distribution = guide.distribution(values)
            return values, guided.steer(candidates, values, distribution, guide.bin_lengths, guide.gamma)

        return steer_rows(logits, control, guided, sampling, guide.eos_token_ids, reweigh)

    def _run_candidates(self, guided: Tensor, candidate_ids: Tensor, scored: Tensor) -> Tensor:
        """V of the guided rows' candidates [G, C], and of the readers' states where they are still to be run."""
        if self.state_values is None:
            max_rows = sum(self._max_candidates(scored))
            if len(self.readers.rows) + max_rows <= self.guide.max_rows:
                return self._run_with_states(guided, candidate_ids, scored, max_rows)
            self._run_states()
        return self._score(guided, candidate_ids, scored, self._max_candidates(scored))

    def _run_states(self) -> None:
        nothing = torch.empty(0, 1, dtype=torch.int64, device=self.batch.input_ids.device)
        self._run_with_states(nothing[:, 0], nothing, nothing.bool(), 0)

    def _run_with_states(self, guided: Tensor, candidate_ids: Tensor, scored: Tensor, max_rows: int) -> Tensor:
        """V of the candidates [G, C], in one forward with the readers' states."""
        rows = self._pack(self.readers.rows, self.readers.find(guided), candidate_ids, scored, max_rows)
        values = self.guide.runner.step(rows)
        self.state_values = self.readers.spread(values[rows.first_rows])
        return read_candidates(values, rows, scored)

    def _score(self, requests: Tensor, candidate_ids: Tensor, scored: Tensor, max_candidates: Sequence[int]) -> Tensor:
        """V of the candidates [G, C] of these requests [G], whose states run once more.

        In as many forwards as it takes for none to have more than the guide's ``max_rows`` rows.
        """
        parts = [torch.zeros_like(scored[:0], dtype=torch.float32)]
        for part in split_requests(max_candidates, self.guide.max_rows):
            chosen, num_rows = scored[part], sum(max_candidates[part])
            if not num_rows:
                parts.append(torch.zeros_like(chosen, dtype=torch.float32))
                continue
            every = torch.arange(len(chosen), device=chosen.device)
            rows = self._pack(requests[part], every, candidate_ids[part], chosen, num_rows)
            parts.append(read_candidates(self.guide.runner.step(rows), rows, chosen))
        return torch.cat(parts)

    def _pack(
        self, taking_part: Tensor, guided: Tensor, candidate_ids: Tensor, scored: Tensor, max_rows: int
    ) -> StepRows:
        batch = self.batch
        return pack_step(
            last_token_ids(batch)[taking_part],
            batch.seq_lens[taking_part],
            batch.req_pool_indices[taking_part],
            last_slots(batch)[taking_part],
            guided,
            candidate_ids,
            scored,
            max_rows,
        )

    def _max_candidates(self, scored: Tensor) -> list[int]:
        """A bound on each guided row's candidates to score.

        On a CPU their number, elsewhere what the host knows without asking.
        """
        if scored.device.type == "cpu":
            counts: list[int] = scored.sum(1).tolist()
            return counts
        assert self.control is not None
        return [number for number in self.control.max_candidates if number]


def scored_candidates(candidates: Candidates, guided: GuidedRows) -> Tensor:
    """Which candidates need the value of their next state: bool [G, C].

    Those of the rows that need scoring, but no EOS, whose value is 0; none of a row whose prompt is still being read in
    chunks (``generated`` < 0: its sampled token is dropped).
    """
    row_needs = guided.needs_scoring(candidates) & (guided.generated >= 0)
    return (candidates.logprobs > -torch.inf) & ~candidates.eos_mask & row_needs.unsqueeze(1)
