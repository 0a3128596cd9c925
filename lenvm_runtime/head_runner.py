"""The LenVM head of one engine process: values of every step's states, and the sampler's steering."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lenvm_kernels.candidates import Candidates
from lenvm_kernels.checkpoint import Head
from lenvm_kernels.heads import join_features
from lenvm_kernels.length_distribution import expected_length, quantile_length
from lenvm_kernels.length_value import expected_value
from lenvm_runtime.control_batch import ControlBatch
from lenvm_runtime.steering import ScaledTargets, steer_rows

INTERVAL = (0.1, 0.9)


class HeadRunner:
    """Holds a loaded head on the model's device. One a process; no state of any request but scaled targets."""

    def __init__(
        self,
        head: Head,
        layers: Sequence[nn.Module],
        embeddings: Tensor,
        gather_vocabulary: Callable[[Tensor], Tensor],
        eos_token_ids: Sequence[int],
        closing_tokens: Tensor,
    ) -> None:
        device = embeddings.device
        self.config = head.config
        self.value_head = head.value_head.to(device)
        self.candidate_head = head.candidate_head.to(device)
        with torch.inference_mode():
            self.token_table = gather_vocabulary(self.candidate_head.build_token_table(embeddings))  # [vocab, rank]
        self.eos_token_ids = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=device)
        self.closing_tokens = closing_tokens.to(device)  # [vocab] bool
        self.scaled_targets = ScaledTargets(device)
        self._layer_states: dict[int, Tensor] = {}
        for index, layer in enumerate(layers):
            layer.register_forward_hook(self._capture(index))

    def features(self, hidden_states: Tensor, rows: Tensor | None) -> Tensor:
        """Features of the sampled states of the forward just run: [tokens, d] and row indices (None: all)."""
        states = [hidden_states, *(self._layer_states[index] for index in range(len(self._layer_states)))]
        if rows is not None:
            states = [part[rows] for part in states]
        return join_features(states[0], states[1:])

    def _capture(self, index: int) -> Callable[..., None]:
        def store(_layer: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            hidden_states, residual = output
            self._layer_states[index] = hidden_states + residual

        return store

    def values(self, features: Tensor) -> Tensor:
        """V(s_t) in (-1, 0] of each row: [rows, num_features] -> [rows] fp32."""
        values: Tensor = self.value_head(features[:, : self.config.hidden_size])
        return values

    def predictions(self, features: Tensor) -> Tensor:
        """Remaining length at each state: [rows, num_features] -> [rows, 3] expected, 10% and 90% quantile."""
        logprobs = self.candidate_head.state_logprobs(features)
        lengths = self.candidate_head.bin_lengths
        low, high = (quantile_length(logprobs, lengths, level) for level in INTERVAL)
        return torch.stack([expected_length(logprobs, lengths), low, high], dim=1)

    def candidate_values(self, features: Tensor, token_ids: Tensor) -> Tensor:
        """Value after each of the given next tokens, 0 after EOS: [rows, num_features], [rows, K] -> [rows, K] fp32."""
        logprobs = self.candidate_head.candidate_logprobs(features, self.token_table[token_ids])
        values = expected_value(logprobs, self.candidate_head.bin_lengths, self.config.gamma)
        return values.masked_fill((token_ids.unsqueeze(-1) == self.eos_token_ids).any(-1), 0.0)

    def set_scaled_targets(self, features: Tensor, control: ControlBatch, slots: Tensor, generated: Tensor) -> None:
        """Of a prefill's rows, those at the end of their prompt: factor * predicted length, per request slot."""
        logprobs = self.candidate_head.state_logprobs(features)
        expected = expected_length(logprobs, self.candidate_head.bin_lengths)
        self.scaled_targets.update(control, slots, generated, expected)

    def steer(
        self,
        logits: Tensor,
        features: Tensor,
        control: ControlBatch,
        slots: Tensor,
        generated: Tensor,
        last_token_ids: Tensor,
        sampling: Any,
    ) -> Tensor:
        """Rewrite guided rows of ``logits`` [rows, vocab] in place; the bits of other rows stay.

        ``generated`` [rows]: tokens of the answer so far; ``last_token_ids`` [rows]; ``sampling``: SGLang's
        SamplingBatchInfo.
        Returns bool [rows]: the rows rewritten, which are the guided ones that need steering.
        """
        guided = control.guided_rows(generated, self.scaled_targets.read(slots), last_token_ids, self.closing_tokens)

        def reweigh(candidates: Candidates) -> tuple[Tensor, Tensor]:
            token_rows = self.token_table[candidates.ids]
            bin_logprobs = self.candidate_head.candidate_logprobs(features[control.rows], token_rows)
            lengths, gamma = self.candidate_head.bin_lengths, self.config.gamma
            values = expected_value(bin_logprobs, lengths, gamma)
            return values, guided.steer(candidates, values, bin_logprobs, lengths, gamma)

        return steer_rows(logits, control, guided, sampling, self.eos_token_ids, reweigh)
