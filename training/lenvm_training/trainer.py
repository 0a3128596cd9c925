"""Trains the value head and the candidate head on kept states (heads only; the served model is frozen).

Value head: mean squared error between V(s_t) and the realised return G_t over states (token mean).
Candidate head: negative log-likelihood of the remaining length's bin, at the state and after the drawn
token; a censored completion contributes the probability of its bin or a later one. Censored states are
left out of the value loss: their return is unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lenvm_kernels.checkpoint import Head
from lenvm_kernels.heads import CandidateHead, HeadConfig, ValueHead, join_features
from lenvm_kernels.length_value import bin_edges, bin_index, value_from_length
from lenvm_training.features import StateTable


@dataclass(frozen=True)
class TrainSettings:
    """Optimisation of the heads: AdamW, cosine schedule after a short warm-up."""

    epochs: int = 8
    batch_size: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    dropout: float = 0.1
    warmup_steps: int = 50
    seed: int = 0


def features_of(states: StateTable, config: HeadConfig, layers: tuple[int, ...]) -> Tensor:
    """[N, num_features] of the configured layers, of a table that captured ``layers``."""
    columns = [layers.index(layer) for layer in config.feature_layers]
    return join_features(states.final, [states.layers[:, column] for column in columns])


def train_head(
    config: HeadConfig,
    train: StateTable,
    validation: StateTable,
    layers: tuple[int, ...],
    embeddings: Tensor,
    settings: TrainSettings,
) -> Head:
    """Train both heads on ``train``, a table that captured ``layers``.

    For each head on its own, the epoch with the least loss on ``validation`` is kept: other prompts
    than those of ``train``, and than those it is evaluated on.
    """
    torch.manual_seed(settings.seed)
    value_head, candidate_head = ValueHead(config.hidden_size), CandidateHead(config)
    embeddings = embeddings.float()
    train_features = features_of(train, config, layers)
    validation_features = features_of(validation, config, layers)
    edges = bin_edges(config.num_bins, config.max_length)

    def value_loss(features: Tensor, states: StateTable) -> Tensor:
        known = ~states.censored
        returns = value_from_length(states.remaining.float(), config.gamma)
        errors = (value_head(features[:, : config.hidden_size].float()) - returns).square()
        mean: Tensor = (errors * known).sum() / known.sum().clamp_min(1)
        return mean

    def candidate_loss(features: Tensor, states: StateTable) -> Tensor:
        features = features.float()
        at_state = length_nll(candidate_head.state_logprobs(features), states.remaining, states.censored, edges)
        follows = states.remaining > 1  # the drawn token did not end the answer
        token_rows = candidate_head.build_token_table(embeddings[states.next_token]).unsqueeze(1)
        after = candidate_head.candidate_logprobs(features, token_rows).squeeze(1)
        after_token = length_nll(after, (states.remaining - 1).clamp_min(1), states.censored, edges)
        return at_state.mean() + (after_token * follows).sum() / follows.sum().clamp_min(1)

    for name, module, loss in (("value", value_head, value_loss), ("candidate", candidate_head, candidate_loss)):
        _fit(name, module, loss, train, train_features, validation, validation_features, settings)
    return Head(config, value_head.eval(), candidate_head.eval())


def length_nll(logprobs: Tensor, remaining: Tensor, censored: Tensor, edges: Tensor) -> Tensor:
    """-log P of the bin of ``remaining``, or of it and all later ones where censored: [N, M], [N], [N] -> [N]."""
    index = bin_index(remaining, edges).unsqueeze(-1)  # [N, 1]
    exact = logprobs.gather(-1, index).squeeze(-1)
    later = torch.arange(logprobs.shape[-1]) >= index  # [N, M]
    survival = torch.logsumexp(logprobs.masked_fill(~later, -torch.inf), dim=-1)
    return -torch.where(censored, survival, exact)


def _fit(
    name: str,
    module: nn.Module,
    loss: Callable[[Tensor, StateTable], Tensor],
    train: StateTable,
    train_features: Tensor,
    validation: StateTable,
    validation_features: Tensor,
    settings: TrainSettings,
) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    num_states = len(train.position)
    steps = settings.epochs * ((num_states + settings.batch_size - 1) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=steps, pct_start=min(0.3, settings.warmup_steps / steps)
    )
    generator = torch.Generator().manual_seed(settings.seed)
    best, best_state = float("inf"), {}
    with tqdm(range(settings.epochs), desc=name, unit="epoch") as epochs:
        for _ in epochs:
            module.train()
            for rows in torch.randperm(num_states, generator=generator).split(settings.batch_size):
                features = nn.functional.dropout(train_features[rows].float(), settings.dropout)
                optimizer.zero_grad(set_to_none=True)
                step_loss = loss(features, train.select(rows))
                step_loss.backward()
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()
                schedule.step()
            validated = _validation_loss(module, loss, validation, validation_features)
            epochs.set_postfix(train=f"{step_loss.item():.4f}", validation=f"{validated:.4f}")
            if validated < best:
                best, best_state = validated, {key: tensor.clone() for key, tensor in module.state_dict().items()}
    module.load_state_dict(best_state)


@torch.inference_mode()
def _validation_loss(
    module: nn.Module, loss: Callable[[Tensor, StateTable], Tensor], states: StateTable, features: Tensor
) -> float:
    module.eval()
    return loss(features, states).item()
