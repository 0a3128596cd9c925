"""What the heads are trained on: features of kept states, and the loss of each head on them.

A completion cut by the token limit is ``censored``: its ``remaining`` is what it still wrote, the least that its
remaining length can be.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lenvm_kernels.heads import CandidateHead, HeadConfig, ValueHead, join_features
from lenvm_kernels.length_value import bin_edges, bin_index, value_from_length
from lenvm_training.features import StateTable


def features_of(states: StateTable, config: HeadConfig, layers: tuple[int, ...]) -> Tensor:
    """[N, num_features] of the configured layers, of a table that captured ``layers``."""
    columns = [layers.index(layer) for layer in config.feature_layers]
    return join_features(states.final, [states.layers[:, column] for column in columns])


class ValueLoss(nn.Module):
    """`value_loss` of ``head`` on final states, with dropout on them in training."""

    def __init__(self, head: ValueHead, rule: str, dropout: float) -> None:
        super().__init__()
        self.head = head
        self.dropout = nn.Dropout(dropout)
        self.rule = rule

    def forward(self, features: Tensor, labels: Tensor, censored: Tensor) -> dict[str, Tensor]:
        """``loss`` of final states [N, d] with returns ``labels`` float [N] and ``censored`` bool [N]."""
        values = self.head(self.dropout(features.float()))  # [N]
        return {"loss": value_loss(values, labels, censored, self.rule)}


class CandidateLoss(nn.Module):
    """The sum of two means of `length_nll`: over states, and over the tokens drawn from them, with dropout in training.

    A token that ended its answer is not counted: nothing remains after it. ``embeddings`` [vocab, d] are the served
    model's input embeddings.
    """

    edges: Tensor
    embeddings: Tensor

    def __init__(self, head: CandidateHead, config: HeadConfig, embeddings: Tensor, dropout: float) -> None:
        super().__init__()
        self.head = head
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("edges", bin_edges(config.num_bins, config.max_length), persistent=False)
        self.register_buffer("embeddings", embeddings, persistent=False)

    def forward(self, features: Tensor, labels: Tensor, censored: Tensor, next_token: Tensor) -> dict[str, Tensor]:
        """``loss`` of features [N, num_features], remaining lengths ``labels`` int64 [N], ``next_token`` int64 [N]."""
        features = self.dropout(features.float())
        at_state = length_nll(self.head.state_logprobs(features), labels, censored, self.edges)
        follows = labels > 1  # the drawn token did not end the answer
        token_rows = self.head.build_token_table(self.embeddings[next_token]).unsqueeze(1)  # [N, 1, rank]
        after = self.head.candidate_logprobs(features, token_rows).squeeze(1)
        after_token = length_nll(after, (labels - 1).clamp_min(1), censored, self.edges)
        return {"loss": at_state.mean() + (after_token * follows).sum() / follows.sum().clamp_min(1)}


def value_loss(values: Tensor, returns: Tensor, censored: Tensor, rule: str) -> Tensor:
    """Mean squared error between values V [N] and returns G [N]; ``censored`` bool [N] marks those not realised.

    ``rule``:

    * ``leave_out``: the mean of (V - G)^2 over the states that are not censored; 0 when all are;
    * ``bound``: G of a censored state is an upper bound, and it adds max(V - G, 0)^2, the part known to be wrong; the
      mean over all states;
    * ``impute``: the mean of (V - G)^2 over all states, G of a censored one being `imputed_returns`.
    """
    errors = values - returns
    if rule == "leave_out":
        known = ~censored
        mean: Tensor = (errors.square() * known).sum() / known.sum().clamp_min(1)
        return mean
    if rule == "bound":
        errors = torch.where(censored, errors.clamp_min(0), errors)
    return errors.square().mean()


def imputed_returns(logprobs: Tensor, remaining: Tensor, lengths: Tensor, edges: Tensor, gamma: float) -> Tensor:
    """E[-(1 - gamma ** L) | L >= remaining] under distributions over bins of remaining lengths: [N].

    ``logprobs`` [N, M] of the bins, ``remaining`` int64 [N], ``lengths`` float [M] what each bin stands for, ``edges``
    int64 [M] its least length. The return that a censored state is expected to have (Buckley and James, 1979).
    """
    later = torch.arange(logprobs.shape[-1], device=logprobs.device) >= bin_index(remaining, edges).unsqueeze(-1)
    weights = torch.softmax(logprobs.masked_fill(~later, -torch.inf), dim=-1)
    returns = value_from_length(torch.maximum(lengths, remaining.unsqueeze(-1).float()), gamma)  # [N, M]
    return (weights * returns).sum(-1)


def length_nll(logprobs: Tensor, remaining: Tensor, censored: Tensor, edges: Tensor) -> Tensor:
    """-log P of the bin of ``remaining``, or of it and all later ones where censored: [N, M], [N], [N] -> [N]."""
    index = bin_index(remaining, edges).unsqueeze(-1)  # [N, 1]
    exact = logprobs.gather(-1, index).squeeze(-1)
    later = torch.arange(logprobs.shape[-1], device=logprobs.device) >= index  # [N, M]
    survival = torch.logsumexp(logprobs.masked_fill(~later, -torch.inf), dim=-1)
    return -torch.where(censored, survival, exact)
