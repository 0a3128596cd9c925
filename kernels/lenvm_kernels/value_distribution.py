"""From a scalar length value to a distribution of the remaining length over bins, for models that predict V alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lenvm_kernels.length_value import value_from_length

DEFAULT_SPREAD = 0.5
"""Standard deviation of log(remaining length): two thirds of the mass within a factor of 1.65 of its median."""
_NUM_MEDIANS = 512
_TAIL = 4.0


@dataclass(frozen=True)
class ValueTable:
    """Distributions over M length bins by their expected value, increasing: from the last bin alone to the first."""

    values: Tensor  # [N] float32, increasing
    probs: Tensor  # [N, M] float32

    def to(self, device: torch.device | str) -> ValueTable:
        """The same table on ``device``."""
        return ValueTable(self.values.to(device), self.probs.to(device))


def build_value_table(bin_lengths: Tensor, gamma: float, spread: float = DEFAULT_SPREAD) -> ValueTable:
    """The table of log-normal remaining lengths with log-deviation ``spread`` > 0, for ``distribution_from_value``.

    Bin m, of representative length bin_lengths[m] (increasing), gets the log-normal's mass between the
    geometric means with its neighbours. Medians are spaced evenly in log(length), from well below the
    first bin to well above the last one; the two ends are the first and the last bin alone.
    """
    lengths = bin_lengths.double().cpu()
    log_lengths = lengths.log()
    bounds = (log_lengths[1:] + log_lengths[:-1]) / 2  # [M - 1]
    first, last = float(log_lengths[0]) - _TAIL * spread, float(log_lengths[-1]) + _TAIL * spread
    medians = torch.linspace(last, first, _NUM_MEDIANS, dtype=torch.float64)
    below = torch.special.ndtr((bounds - medians[:, None]) / spread)  # [N, M - 1]
    edges = [torch.zeros(_NUM_MEDIANS, 1, dtype=torch.float64), below, torch.ones(_NUM_MEDIANS, 1, dtype=torch.float64)]
    one_bin = torch.eye(len(lengths), dtype=torch.float64)
    probs = torch.cat([one_bin[-1:], torch.cat(edges, dim=1).diff(dim=1), one_bin[:1]])  # [N, M]
    values = probs @ value_from_length(lengths, gamma)
    return ValueTable(values.float().to(bin_lengths.device), probs.float().to(bin_lengths.device))


def distribution_from_value(values: Tensor, table: ValueTable) -> Tensor:
    """Log-probabilities over the length bins whose expected value is ``values``: [...] -> float32 [..., M].

    The mixture of the two neighbouring distributions of the table: its expected value is ``values``
    exactly, to rounding, and it moves steadily to longer lengths as the value falls. Values beyond the
    table (less than a token to come, or more than the last bin) get its first or last bin alone.
    """
    values = values.float()
    upper = torch.searchsorted(table.values, values.contiguous()).clamp(1, table.values.numel() - 1)
    low, high = table.values[upper - 1], table.values[upper]
    share = ((values - low) / (high - low).clamp_min(1e-30)).clamp(0.0, 1.0).unsqueeze(-1)
    return torch.lerp(table.probs[upper - 1], table.probs[upper], share).log()
