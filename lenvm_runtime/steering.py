"""What every way of scoring candidates shares: rows under control, candidates, targets, SGLang's filters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from lenvm_kernels.candidate_limits import limit_candidates
from lenvm_kernels.candidates import (
    Candidates,
    release_filters,
    release_temperatures,
    scatter_candidates,
    select_candidates,
)
from lenvm_runtime import compat
from lenvm_runtime.control_batch import ControlBatch
from lenvm_runtime.guidance import GuidedRows

MAX_REQUEST_SLOTS = 65536


class Step(Protocol):
    """What the hooks lay beside the sampling info of one step, for our sampler."""

    def steer(self, logits_output: Any, sampling: Any, positions: Tensor) -> Any:
        """Rewrite the logits of rows under control, after SGLang's masks, biases and penalties.

        ``positions`` [rows]: index of each row's last token. Returns the sampling info to sample with.
        """


class DeviceRows:
    """One Python object a row of a device tensor, converted in one transfer when the first is read."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._rows: list[Any] | None = None

    def __getitem__(self, row: int) -> Any:
        if self._rows is None:
            self._rows = self._tensor.tolist()
        return self._rows[row]

    def start_copy(self) -> None:
        """Begin an asynchronous copy to pinned host memory; the caller's event says when it is complete."""
        if self._tensor.is_cuda:
            self._tensor = compat.copy_to_host(self._tensor)


class ScaledTargets:
    """Targets of ``scale`` rows, set when a prompt has been read; indexed by SGLang's request slot.

    Written on the forward stream only, so overlap scheduling cannot reorder it against batch filtering.
    """

    def __init__(self, device: Any) -> None:
        self._targets = torch.ones(MAX_REQUEST_SLOTS, device=device)

    def update(self, control: ControlBatch, slots: Tensor, generated: Tensor, remaining: Tensor) -> None:
        """Of a prefill's rows, those at the end of their prompt: factor * predicted ``remaining`` length. All [rows].

        The others are rows in a chunk before it, decode rows of a mixed batch, and rows prefilled again after a
        retraction, whose target is in their control by then.
        """
        targets = (control.factor * remaining).clamp_min(1.0)
        self._targets[slots] = torch.where(generated == 0, targets, self._targets[slots])

    def read(self, slots: Tensor) -> Tensor:
        """The targets at these request slots: [rows]."""
        return self._targets[slots]


def last_token_ids(forward_batch: Any) -> Tensor:
    """The token that each row's state ends with: [rows] int64."""
    return _last(forward_batch.input_ids, forward_batch)


def last_slots(forward_batch: Any) -> Tensor:
    """The KV slot of that token: [rows] int64.

    SGLang's request table may belong to another request by the time that the step runs: with overlap scheduling the
    row of a finished request is given away meanwhile.
    """
    return _last(forward_batch.out_cache_loc, forward_batch)


def _last(tokens: Tensor, forward_batch: Any) -> Tensor:
    """Of [tokens] in the forward, the last one of each row."""
    if forward_batch.forward_mode.is_extend():
        return tokens[forward_batch.extend_seq_lens.cumsum(0) - 1]
    return tokens


def steer_rows(
    logits: Tensor,
    control: ControlBatch,
    guided: GuidedRows,
    sampling: Any,
    eos_token_ids: Tensor,
    reweigh: Callable[[Candidates], tuple[Tensor, Tensor]],
) -> Tensor:
    """Rewrite the guided rows of ``logits`` [rows, vocab] in place; the bits of other rows stay.

    ``sampling``: SGLang's SamplingBatchInfo, whose temperatures and filters choose the candidates; ``eos_token_ids``
    [E] int64: the tokens that end every request; ``reweigh`` maps the candidates of the G guided rows to their values
    and steered log-probabilities, each [G, C].
    Returns bool [rows]: the rows rewritten, which are the guided ones that need steering.
    """
    rows = control.rows
    candidates = select_candidates(
        logits if all(control.guided) else logits[rows],  # [G, vocab]
        sampling.temperatures.view(-1)[rows],
        sampling.top_ks[rows],
        sampling.top_ps[rows],
        sampling.min_ps[rows],
        control.end_ids(eos_token_ids),
        min(control.num_candidates, logits.shape[-1]),
        guided.may_end_anywhere,
    )
    if control.has_limits:
        candidates = limit_candidates(
            candidates, control.max_rank[rows], control.endless[rows], guided.may_end_anywhere
        )
    values, steered = reweigh(candidates)

    def spread(part: Tensor, other: float) -> Tensor:
        """[G, ...] of the guided rows -> [rows, ...] with ``other`` in the rest."""
        return part.new_full((len(logits), *part.shape[1:]), other).index_copy(0, rows, part)

    rewritten = spread(guided.needs_steering(candidates, values), False)
    temperatures = release_temperatures(sampling.temperatures, sampling.top_ks, rewritten)
    scatter_candidates(logits, spread(candidates.ids, 0), spread(steered, -torch.inf), temperatures, rewritten)
    return rewritten


def released(sampling: Any, steered: Tensor) -> Any:
    """A copy of SGLang's SamplingBatchInfo whose filters leave ``steered`` rows alone (bool [rows]).

    Their filters were applied before steering; greedy ones are sampled at the temperature 1 that they are steered at.
    """
    temperatures = release_temperatures(sampling.temperatures, sampling.top_ks, steered)
    top_ks, top_ps, min_ps = release_filters(sampling.top_ks, sampling.top_ps, sampling.min_ps, steered)
    return dataclasses.replace(sampling, temperatures=temperatures, top_ks=top_ks, top_ps=top_ps, min_ps=min_ps)
