"""What predicts lengths without a LenVM: a constant, the prompt's length, a ridge probe on a hidden state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lenvm_training.metrics import Floats
from lenvm_training.rollouts import FINISHED

RIDGE_STRENGTHS = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)


@dataclass(frozen=True)
class PromptSample:
    """A prompt and the lengths of its samples. ``censored``: how many more were cut by the token limit."""

    row: dict[str, Any]
    lengths: Floats
    censored: int

    @property
    def domain(self) -> str:
        return str(self.row["domain"])


def group_samples(rows: Sequence[dict[str, Any]], min_samples: int) -> list[PromptSample]:
    """The prompts with at least ``min_samples`` finished samples."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)
    samples = []
    for group in groups.values():
        lengths = [len(row["output_token_ids"]) for row in group if row["finish_reason"] == FINISHED]
        if len(lengths) >= min_samples:
            samples.append(PromptSample(group[0], np.array(lengths, dtype=np.float64), len(group) - len(lengths)))
    return samples


def comparison_predictions(
    fit: Sequence[PromptSample], fit_states: Floats, prompts: Sequence[PromptSample], states: Floats
) -> dict[str, Floats]:
    """Lengths predicted by what needs no LenVM, fitted to the logarithm of the geometric mean length of ``fit``."""
    logs = np.array([np.log(prompt.lengths).mean() for prompt in fit])
    constant = np.full(len(prompts), logs.mean())
    by_length = ridge_predict(_length_features(fit), logs, _length_features(prompts))
    probe = ridge_predict(fit_states, logs, states)
    bounds = (logs.min(), logs.max())
    rows = {"constant": constant, "prompt_length": by_length, "ridge_probe": probe}
    return {name: np.exp(np.clip(row, *bounds)) for name, row in rows.items()}


def _length_features(prompts: Sequence[PromptSample]) -> Floats:
    logs = np.log([len(prompt.row["prompt_token_ids"]) for prompt in prompts])
    return np.stack([logs, logs**2], axis=1)


def ridge_predict(features: Floats, targets: Floats, new_features: Floats) -> Floats:
    """Ridge regression on standardised features; the strength is chosen on a fifth of the rows: [N, d] -> [M]."""
    mean, scale = features.mean(0), features.std(0) + 1e-9
    known, new = (features - mean) / scale, (new_features - mean) / scale
    held = np.arange(len(known)) % 5 == 0

    def error(strength: float) -> float:
        fitted = _ridge(known[~held], targets[~held], known[held], strength)
        return float(np.mean((fitted - targets[held]) ** 2))

    return _ridge(known, targets, new, min(RIDGE_STRENGTHS, key=error))


def _ridge(features: Floats, targets: Floats, new_features: Floats, strength: float) -> Floats:
    offset = targets.mean()
    gram = features.T @ features + strength * len(features) * np.eye(features.shape[1])
    weights = np.linalg.solve(gram, features.T @ (targets - offset))
    predicted: Floats = new_features @ weights + offset
    return predicted
