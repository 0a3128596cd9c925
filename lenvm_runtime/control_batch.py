"""The length controls of a running batch, as device tensors that follow SGLang's batch operations."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lenvm_kernels.candidates import NO_TOKEN
from lenvm_kernels.length_control import Mode, Strategy
from lenvm_kernels.value_bound import NO_MIN_VALUE
from lenvm_runtime.guidance import GuidedRows
from lenvm_runtime.length_control import MAX_TOP_K, LengthControl
from lenvm_runtime.upload import upload

_MODE_CODES = {
    "equal": Mode.EQUAL,
    "at_least": Mode.AT_LEAST,
    "at_most": Mode.AT_MOST,
    "tilt": Mode.TILT,
    "scale": Mode.EQUAL,
}
_MEAN_CODES = {None: Mode.MEAN_TARGET, "length": Mode.MEAN_LENGTH_FACTOR, "value": Mode.MEAN_VALUE_FACTOR}
_STRATEGY_CODES = {"natural": Strategy.NATURAL, "hard": Strategy.HARD}
_TENSORS = (
    "mode",
    "strategy",
    "target",
    "factor",
    "beta",
    "entropy_threshold",
    "min_value",
    "max_mean_value",
    "max_rank",
    "endless",
    "prompt_len",
)
_HOST_LISTS = ("mean", "bounded", "gated", "endings_ignored", "ranked", "max_candidates", "num_stops")

DEFAULT_CANDIDATES = 32
"""Of a row without a top-k filter."""
GREEDY_TOP_K = 1


@dataclass
class ControlBatch:
    """Controls of a batch of B rows. Invariant: every tensor is [B] and row-aligned with the batch.

    On the host: ``guided`` says which rows are under control, ``mean`` which of them ask for a mean value,
    ``bounded`` which have a ``min_value``, ``gated`` which have a ``max_mean_value`` below 0, ``endings_ignored`` which
    go on after an EOS, ``ranked`` which are greedy with a top-k of their own; ``max_candidates`` is the most candidates
    that a row has beside EOS ids, ``num_stops`` how many tokens end it beside those that end every request, each 0
    without control. ``stop_ids`` [B, S] are these tokens, then NO_TOKEN, S being the most of any row.
    ``rows`` (device, int64) lists the guided ones and is rebuilt when the batch changes, never within a step. Rows of
    mode EQUAL with ``factor`` > 0 have their ``target`` set at the prompt boundary, as factor times the predicted
    length.
    """

    guided: list[bool]
    mean: list[bool]
    bounded: list[bool]
    gated: list[bool]
    endings_ignored: list[bool]
    ranked: list[bool]
    max_candidates: list[int]
    num_stops: list[int]
    rows: Tensor
    mode: Tensor
    strategy: Tensor
    target: Tensor
    factor: Tensor
    beta: Tensor
    entropy_threshold: Tensor
    min_value: Tensor
    max_mean_value: Tensor
    max_rank: Tensor
    endless: Tensor
    prompt_len: Tensor
    stop_ids: Tensor

    @classmethod
    def build(
        cls,
        controls: Sequence[LengthControl | None],
        prompt_lens: Sequence[int],
        top_ks: Sequence[int],
        device: Any,
        ignore_eos: Sequence[bool] | None = None,
        stop_ids: Sequence[Collection[int] | None] | None = None,
        greedy_top_ks: Sequence[int | None] | None = None,
    ) -> ControlBatch | None:
        """The batch of these rows; None when no row is under control.

        ``top_ks``: SGLang's, 1 for greedy rows; ``greedy_top_ks``: what these asked for, if anything.
        """
        active = [control if control and not control.is_neutral else None for control in controls]
        guided = [control is not None for control in active]
        if not any(guided):
            return None
        asked = zip(active, top_ks, greedy_top_ks or [None] * len(active), strict=True)
        own = [k if c and top_k <= GREEDY_TOP_K else None for c, top_k, k in asked]
        max_candidates = [
            k or _max_candidates(top_k) if c else 0 for c, top_k, k in zip(active, top_ks, own, strict=True)
        ]
        ignored = [c is not None and i for c, i in zip(active, ignore_eos or [False] * len(active), strict=True)]
        given = zip(active, ignored, stop_ids or [None] * len(active), strict=True)
        stops = [sorted(ids or ()) if c and not i else [] for c, i, ids in given]  # ignored too, by ignore_eos

        def tensor(values: list[Any], dtype: torch.dtype) -> Tensor:
            return upload(values, dtype, device)

        return cls(
            guided=guided,
            mean=[control is not None and control.mode == "target_mean" for control in active],
            bounded=[control is not None and control.min_value is not None for control in active],
            gated=[control is not None and control.max_mean_value < 0 for control in active],
            endings_ignored=ignored,
            ranked=[k is not None for k in own],
            max_candidates=max_candidates,
            num_stops=[len(ids) for ids in stops],
            rows=_guided_rows(guided, device),
            mode=tensor([_mode_code(c) if c else Mode.NONE for c in active], torch.int32),
            strategy=tensor([_STRATEGY_CODES[c.strategy] if c else Strategy.NATURAL for c in active], torch.int32),
            target=tensor([float(c.target or 1) if c else 1.0 for c in active], torch.float32),
            factor=tensor([float(c.factor or 0) if c else 0.0 for c in active], torch.float32),
            beta=tensor([float(c.beta or 0) if c else 0.0 for c in active], torch.float32),
            entropy_threshold=tensor([c.entropy_threshold if c else 0.0 for c in active], torch.float32),
            min_value=tensor([_min_value(c) for c in active], torch.float32),
            max_mean_value=tensor([c.max_mean_value if c else 0.0 for c in active], torch.float32),
            max_rank=tensor(max_candidates, torch.int32),
            endless=tensor(ignored, torch.bool),
            prompt_len=tensor(list(prompt_lens), torch.int32),
            stop_ids=tensor(_pad(stops), torch.int64),
        )

    @classmethod
    def empty(cls, num_rows: int, device: Any) -> ControlBatch:
        """Rows without control, to be joined to a batch that has some."""
        zeros = torch.zeros(num_rows, device=device)
        return cls(
            guided=[False] * num_rows,
            mean=[False] * num_rows,
            bounded=[False] * num_rows,
            gated=[False] * num_rows,
            endings_ignored=[False] * num_rows,
            ranked=[False] * num_rows,
            max_candidates=[0] * num_rows,
            num_stops=[0] * num_rows,
            rows=_guided_rows([], device),
            mode=zeros.int(),
            strategy=zeros.int(),
            target=zeros + 1,
            factor=zeros,
            beta=zeros,
            entropy_threshold=zeros,
            min_value=zeros + NO_MIN_VALUE,
            max_mean_value=zeros,
            max_rank=zeros.int(),
            endless=zeros.bool(),
            prompt_len=zeros.int(),
            stop_ids=zeros.long().unsqueeze(1)[:, :0],
        )

    def filter(self, keep_indices: Sequence[int], keep_indices_device: Tensor) -> ControlBatch | None:
        """The batch of the kept rows, in that order; None when none of them is under control."""
        guided = [self.guided[index] for index in keep_indices]
        if not any(guided):
            return None
        kept: dict[str, Any] = {name: getattr(self, name)[keep_indices_device] for name in _TENSORS}
        kept |= {name: [getattr(self, name)[index] for index in keep_indices] for name in _HOST_LISTS}
        kept["stop_ids"] = self.stop_ids[keep_indices_device, : max(kept["num_stops"])]
        return ControlBatch(guided=guided, rows=_guided_rows(guided, self.rows.device), **kept)

    def concat(self, other: ControlBatch) -> ControlBatch:
        """This batch followed by ``other``."""
        guided = self.guided + other.guided
        joined: dict[str, Any] = {name: torch.cat([getattr(self, name), getattr(other, name)]) for name in _TENSORS}
        joined |= {name: getattr(self, name) + getattr(other, name) for name in _HOST_LISTS}
        width = max(joined["num_stops"])
        joined["stop_ids"] = torch.cat([_widen(self.stop_ids, width), _widen(other.stop_ids, width)])
        return ControlBatch(guided=guided, rows=_guided_rows(guided, self.rows.device), **joined)

    @property
    def num_candidates(self) -> int:
        """Candidates to select for each guided row of a step, beside EOS ids."""
        return max(DEFAULT_CANDIDATES, *self.max_candidates)

    @property
    def has_limits(self) -> bool:
        """Whether rows differ in the candidates they may have (`lenvm_kernels.candidate_limits`)."""
        return self.num_candidates > DEFAULT_CANDIDATES or any(self.endings_ignored) or any(self.ranked)

    def end_ids(self, eos_token_ids: Tensor) -> Tensor:
        """What ends the guided rows: the given EOS ids [E], or [G, E + S] where rows have stops of their own.

        A stop that is an EOS id is NO_TOKEN there: ids are distinct in a row.
        """
        if not any(self.num_stops):
            return eos_token_ids
        stops = self.stop_ids[self.rows]  # [G, S]
        stops = stops.masked_fill((stops.unsqueeze(-1) == eos_token_ids).any(-1), NO_TOKEN)
        return torch.cat([eos_token_ids.expand(len(stops), -1), stops], dim=1)

    def guided_rows(
        self, generated: Tensor, scaled_targets: Tensor, last_token_ids: Tensor, closing_tokens: Tensor
    ) -> GuidedRows:
        """The controls of the guided rows alone, for one step.

        ``generated`` [B]: tokens of each answer so far; ``scaled_targets`` [B]: the targets set at the prompt boundary;
        ``closing_tokens`` [vocab] bool: tokens that close a sentence.
        """
        rows = self.rows
        mode, factor = self.mode[rows], self.factor[rows]
        scaled = (mode == Mode.EQUAL) & (factor > 0)
        return GuidedRows(
            mode=mode,
            strategy=self.strategy[rows],
            target=torch.where(scaled, scaled_targets[rows], self.target[rows]),
            factor=factor,
            beta=self.beta[rows],
            entropy_threshold=self.entropy_threshold[rows],
            generated=generated[rows],
            after_closing=closing_tokens[last_token_ids[rows]],
            closing_tokens=closing_tokens,
            has_mean=any(self.mean),
            min_value=self.min_value[rows],
            has_min_value=any(self.bounded),
            max_mean_value=self.max_mean_value[rows],
            has_max_mean_value=any(self.gated),
        )


def merge(
    left: ControlBatch | None, right: ControlBatch | None, num_left: int, num_right: int, device: Any
) -> ControlBatch | None:
    """Join the controls of two batches of ``num_left`` and ``num_right`` rows."""
    if left is None and right is None:
        return None
    return (left or ControlBatch.empty(num_left, device)).concat(right or ControlBatch.empty(num_right, device))


def _mode_code(control: LengthControl) -> Mode:
    return _MEAN_CODES[control.scaling] if control.mode == "target_mean" else _MODE_CODES[control.mode]


def _min_value(control: LengthControl | None) -> float:
    return NO_MIN_VALUE if control is None or control.min_value is None else control.min_value


def _pad(rows: Sequence[list[int]]) -> list[list[int]]:
    """The rows at the length of the longest, with NO_TOKEN."""
    width = max(map(len, rows))
    return [row + [NO_TOKEN] * (width - len(row)) for row in rows]


def _widen(stop_ids: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(stop_ids, (0, width - stop_ids.shape[1]), value=NO_TOKEN)


def _max_candidates(top_k: int) -> int:
    return top_k if GREEDY_TOP_K < top_k <= MAX_TOP_K else DEFAULT_CANDIDATES


def _guided_rows(guided: list[bool], device: Any) -> Tensor:
    rows = [index for index, is_guided in enumerate(guided) if is_guided]
    return upload(rows, torch.int64, device)
