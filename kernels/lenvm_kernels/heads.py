"""The learned parts of a LenVM head on a served model: pure functions of its hidden states.

``features`` are the served model's post-norm final hidden states h_t, optionally joined with
normalised states of middle layers: [rows, num_features].
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lenvm_kernels.length_value import bin_lengths, value_from_raw


@dataclass(frozen=True)
class HeadConfig:
    """What a head was trained for; stored beside its weights as ``lenvm_config.json``.

    * ``gamma``: discount of the value map; ``num_bins`` and ``max_length``: the remaining-length bins;
    * ``feature_layers``: outputs of these decoder layers (0-based) are joined to the final state;
    * ``eos_token_ids``: tokens that ended the answers it learned from;
    * ``sampling``: settings that all answers it learned from were sampled with (temperature, top_p, ...): its lengths
      are those of answers sampled so.
    """

    base_model: str
    hidden_size: int
    vocab_size: int
    gamma: float
    num_bins: int
    max_length: int
    rank: int
    feature_layers: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    sampling: dict[str, float] = field(default_factory=dict)

    @property
    def num_features(self) -> int:
        return self.hidden_size * (1 + len(self.feature_layers))


class ValueHead(nn.Module):
    """V(s_t) = -sigmoid(W2 silu(W1 h_t + b1) + b2), the published form (LenVM paper, eq. of V).

    Reads the final state alone: [rows, hidden_size] -> [rows] fp32 in (-1, 0).
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.fc = nn.Linear(hidden_size, hidden_size)
        self.summary = nn.Linear(hidden_size, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return value_from_raw(self.raw_value(hidden_states))

    def raw_value(self, hidden_states: Tensor) -> Tensor:
        """The output of the last linear layer, before the sigmoid: [..., hidden_size] -> [...] fp32."""
        hidden = nn.functional.silu(self.fc(hidden_states.to(self.fc.weight.dtype)))  # [..., hidden_size]
        raw: Tensor = self.summary(hidden).squeeze(-1).float()
        return raw


class CandidateHead(nn.Module):
    """q(m | s_t, x): distribution of the remaining length after candidate token x, over log-spaced bins.

    log q = log_softmax(W_out silu(W_h f_t + T[x])), T = E W_x^T with E the served model's input
    embeddings; ``null`` stands in for T[x] to give the distribution at s_t itself. One small matrix
    product a candidate; no second forward. Bins are ``length_value.bin_lengths(num_bins, max_length)``.
    """

    bin_lengths: Tensor

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.state = nn.Linear(config.num_features, config.rank)
        self.token = nn.Linear(config.hidden_size, config.rank, bias=False)
        self.null = nn.Parameter(torch.zeros(config.rank))
        self.out = nn.Linear(config.rank, config.num_bins)
        self.register_buffer("bin_lengths", bin_lengths(config.num_bins, config.max_length), persistent=False)

    def build_token_table(self, embeddings: Tensor) -> Tensor:
        """T = E W_x^T of the whole vocabulary: [vocab, hidden_size] -> [vocab, rank]."""
        table: Tensor = self.token(embeddings.to(self.token.weight.dtype))
        return table

    def state_logprobs(self, features: Tensor) -> Tensor:
        """Distribution of the remaining length at the state: [rows, num_features] -> [rows, num_bins]."""
        return self._logprobs(self.state(features.to(self.state.weight.dtype)) + self.null)

    def candidate_logprobs(self, features: Tensor, token_rows: Tensor) -> Tensor:
        """[rows, num_features], T of the candidates [rows, K, rank] -> [rows, K, num_bins]."""
        state = self.state(features.to(self.state.weight.dtype))  # [rows, rank]
        return self._logprobs(state.unsqueeze(1) + token_rows)

    def _logprobs(self, hidden: Tensor) -> Tensor:
        return torch.log_softmax(self.out(nn.functional.silu(hidden)).float(), dim=-1)


def join_features(final_states: Tensor, layer_states: list[Tensor]) -> Tensor:
    """[rows, d] post-norm final states and raw outputs of middle layers -> [rows, d * (1 + layers)].

    Each layer's row is divided by its root mean square, so that all parts have unit scale.
    """
    parts = [final_states]
    for states in layer_states:
        scale = states.float().pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()
        parts.append((states.float() * scale).to(final_states.dtype))
    return torch.cat(parts, dim=-1) if layer_states else final_states
