"""Values of every token of a prompt, and of given next tokens after it, computed on SGLang's input-logprob path.

A request whose ``custom_params`` hold a `ValueQuery` runs with input logprobs on, so that SGLang prefills its whole
prompt, cached or not, and carries one number a prompt token through chunked prefill to the client. Here that number
becomes V of the state at the token. SGLang shifts the numbers by one token and drops the last one: V at the prompt
boundary is the value of the one sampled token instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lenvm_runtime import compat
from lenvm_runtime.length_control import ValueQuery
from lenvm_runtime.upload import upload


@dataclass(frozen=True)
class QueryBatch:
    """The value queries of a batch, one a row or None; follows SGLang's batch operations."""

    queries: tuple[ValueQuery | None, ...]

    @property
    def is_empty(self) -> bool:
        """Whether no row asks for values."""
        return not any(self.queries)

    @property
    def num_candidates(self) -> list[int]:
        """How many next tokens each row asks for."""
        return [len(query.candidate_ids) if query else 0 for query in self.queries]

    def filter(self, keep_indices: Sequence[int]) -> QueryBatch:
        """The queries of the kept rows, in that order."""
        return QueryBatch(tuple(self.queries[index] for index in keep_indices))

    def concat(self, other: QueryBatch) -> QueryBatch:
        """This batch followed by ``other``."""
        return QueryBatch(self.queries + other.queries)

    def candidate_ids(self, device: Any) -> tuple[Tensor, Tensor]:
        """The asked-for next tokens [rows, most of a row] int64, padded with 0, and which are no padding, bool."""
        ids = [query.candidate_ids if query else () for query in self.queries]
        width = max(map(len, ids), default=0)
        padded = upload([[*row, *[0] * (width - len(row))] for row in ids], torch.int64, device)
        lens = upload([len(row) for row in ids], torch.int64, device)
        return padded, torch.arange(width, device=device) < lens.unsqueeze(1)


def write_input_values(
    values: Callable[[Tensor], Tensor], hidden_states: Tensor, result: Any, metadata: Any, batch: QueryBatch
) -> None:
    """Put V of each prompt token of querying rows in place of its input logprob.

    hidden_states [tokens, d] of the model whose value head is ``values``: [rows, d] -> [rows].
    """
    wanted = [bool(query) for query in batch.queries]
    tokens, places = compat.input_logprob_rows(metadata, wanted)
    if not tokens:
        return
    device = hidden_states.device
    written = values(hidden_states[upload(tokens, torch.int64, device)])
    result.input_token_logprobs[upload(places, torch.int64, device)] = written
