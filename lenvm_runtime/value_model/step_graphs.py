"""CUDA graphs of the value model's steps: a few sizes, captured at the start; a batch runs in the next larger one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lenvm_runtime.value_model.packing import StepRows

_SMALL = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
NUM_ROWS = (*_SMALL, *range(320, 513, 64), *range(640, 1025, 128), *range(1280, 2049, 256))
"""Rows of the captured steps. A larger step takes a GPU longer than the host needs to launch it."""
ROWS_PER_REQUEST = (1, 4, 16)
"""Of the graphs with the same rows. Their number of requests decides how attention is cut into tiles and splits."""

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Runs a function of static tensors and returns what runs it again, with the same static result."""


def graph_sizes(max_reqs: int, max_candidates: int) -> list[tuple[int, int]]:
    """(rows, requests) of the steps to capture, in the order in which a batch looks for one that holds it.

    None is larger than a step of ``max_reqs`` requests of ``max_candidates`` candidates each.
    """
    max_rows = max_reqs * (1 + max_candidates)
    num_rows = sorted({min(rows, max_rows) for rows in NUM_ROWS})
    counts = ((rows, rows // ratio) for rows in num_rows for ratio in ROWS_PER_REQUEST)
    return sorted({(rows, min(reqs, max_reqs)) for rows, reqs in counts if reqs})


@dataclass(frozen=True)
class _Graph:
    rows: StepRows
    replay: Callable[[], Tensor]


class StepGraphs:
    """The captured steps of one value model, all on the same static rows; they must run in one stream.

    A batch of T rows of R requests runs in a graph of T' >= T rows of R' >= R requests. The requests beyond R have no
    rows, and the key that they nevertheless cache goes to slot 0, which SGLang keeps for padding. The rows beyond T
    hold tokens of earlier steps; nothing attends to them and their values are cut off.
    """

    def __init__(
        self, step: Callable[[StepRows], Tensor], capture: Capture, sizes: Sequence[tuple[int, int]], device: Any
    ) -> None:
        """Capture ``step`` (rows -> V of each row [T]) at every size, the largest first: smaller ones reuse memory."""
        self._static = _empty_rows(max(rows for rows, _ in sizes), max(reqs for _, reqs in sizes), device)
        self._graphs: dict[tuple[int, int], _Graph] = {}
        for size in sorted(sizes, reverse=True):
            rows = _cut(self._static, *size)
            self._graphs[size] = _Graph(rows, capture(partial(step, rows)))
        self._graphs = dict(sorted(self._graphs.items()))

    def run(self, rows: StepRows) -> Tensor | None:
        """V of every row of a step [T], until the next run; None when no graph is large enough."""
        num_rows, num_reqs = len(rows.input_ids), len(rows.kv_lens)
        for size, graph in self._graphs.items():
            if size[0] >= num_rows and size[1] >= num_reqs:
                _fill(graph.rows, rows)
                return graph.replay()[:num_rows]
        return None


def _empty_rows(num_rows: int, num_reqs: int, device: Any) -> StepRows:
    def zeros(length: int) -> Tensor:
        return torch.zeros(length, dtype=torch.int64, device=device)

    return StepRows(
        input_ids=zeros(num_rows),
        positions=zeros(num_rows),
        first_rows=zeros(num_reqs),
        candidate_rows=zeros(0).view(0, 0),
        slots=zeros(num_reqs),
        req_pool_indices=zeros(num_reqs),
        kv_lens=zeros(num_reqs),
        q_starts=zeros(num_reqs + 1),
    )


def _cut(rows: StepRows, num_rows: int, num_reqs: int) -> StepRows:
    """The first rows and requests: views."""
    return StepRows(
        input_ids=rows.input_ids[:num_rows],
        positions=rows.positions[:num_rows],
        first_rows=rows.first_rows[:num_reqs],
        candidate_rows=rows.candidate_rows,
        slots=rows.slots[:num_reqs],
        req_pool_indices=rows.req_pool_indices[:num_reqs],
        kv_lens=rows.kv_lens[:num_reqs],
        q_starts=rows.q_starts[: num_reqs + 1],
    )


def _fill(static: StepRows, rows: StepRows) -> None:
    """Copy a step into the static rows of a graph, without its candidates' places, which the forward does not read."""
    num_rows, num_reqs = len(rows.input_ids), len(rows.kv_lens)
    torch._foreach_copy_(
        [
            static.input_ids[:num_rows],
            static.positions[:num_rows],
            static.first_rows[:num_reqs],
            static.slots[:num_reqs],
            static.req_pool_indices[:num_reqs],
            static.kv_lens[:num_reqs],
            static.q_starts[: num_reqs + 1],
        ],
        [
            rows.input_ids,
            rows.positions,
            rows.first_rows,
            rows.slots,
            rows.req_pool_indices,
            rows.kv_lens,
            rows.q_starts,
        ],
    )
    if len(static.kv_lens) > num_reqs:
        torch._foreach_zero_([static.first_rows[num_reqs:], static.slots[num_reqs:]])
        static.q_starts[num_reqs + 1 :].copy_(rows.q_starts[-1:].expand(len(static.kv_lens) - num_reqs))
