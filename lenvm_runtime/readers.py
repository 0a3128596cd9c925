"""Which rows of a running batch need a separate LenVM, which runs no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lenvm_runtime.upload import upload


@dataclass(frozen=True)
class Readers:
    """Whether each row of a batch reads values (`lenvm_runtime.length_control.needs_lenvm`).

    ``rows`` (device, int64, ascending) lists those that do; it is rebuilt when the batch changes, never within a step.
    """

    flags: tuple[bool, ...]
    rows: Tensor

    @classmethod
    def build(cls, flags: Sequence[bool], device: Any) -> Readers:
        """Of a batch of these rows."""
        rows = [row for row, reads in enumerate(flags) if reads]
        return cls(tuple(flags), upload(rows, torch.int64, device))

    @property
    def is_empty(self) -> bool:
        """Whether no row reads values."""
        return not any(self.flags)

    def filter(self, keep_indices: Sequence[int]) -> Readers:
        """Those of the kept rows, in that order."""
        return Readers.build([self.flags[index] for index in keep_indices], self.rows.device)

    def concat(self, other: Readers) -> Readers:
        """This batch followed by ``other``."""
        return Readers.build(self.flags + other.flags, self.rows.device)

    def find(self, batch_rows: Tensor) -> Tensor:
        """The places in ``rows`` of these rows of the batch, which are among them: [G] int64."""
        return torch.searchsorted(self.rows, batch_rows)

    def spread(self, values: Tensor) -> Tensor:
        """One element a reader -> one a row of the batch, 0 for the rest."""
        return values.new_zeros(len(self.flags)).index_copy(0, self.rows, values)
