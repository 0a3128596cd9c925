"""Evaluation of a LenVM on prompts it was not trained on: at the prompt boundary, and over all states.

The truth at the prompt boundary comes from N samples of each prompt (paper, equations 13 to 15), in return
space: mean target G = mean_i target(L_i), L* = length(G); and in plain tokens: mean_i L_i. Comparison rows
are fitted on other prompts (``fit``): a constant, the prompt's length alone, a ridge probe on the
prompt's last hidden state of the untrained backbone, and, over all states, the position alone.
Intervals are judged by the finished samples: the one that is served, and one refitted on half of the prompts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lenvm_kernels.checkpoint import Head
from lenvm_kernels.heads import join_features
from lenvm_kernels.length_distribution import quantile_length
from lenvm_kernels.length_value import bin_lengths, length_from_value, value_from_length
from lenvm_kernels.value_distribution import build_value_table, distribution_from_value
from lenvm_training import plots
from lenvm_training.comparison_rows import PromptSample, comparison_predictions, group_samples
from lenvm_training.features import capture_layers
from lenvm_training.metrics import Floats, calibration_curve, rank_agreement, state_metrics
from lenvm_training.model import LenVM
from lenvm_training.rollout_data import RolloutCollator, RolloutDataset
from lenvm_training.rollout_files import write_lines
from lenvm_training.targets import IGNORED, TargetSpace

MAX_BATCH_TOKENS = 8192
INTERVAL_LEVELS = (0.1, 0.9)
SERVED_BINS = 64
"""Length bins that the engine spreads a LenVM's value over (``lenvm_runtime.value_model.step.NUM_BINS``)."""
POSITION_BINS = 40
MARKDOWN_FILE = "evaluation.md"


@torch.inference_mode()
def predict_boundary(model: LenVM, prompts: Sequence[PromptSample], collator: RolloutCollator) -> Floats:
    """Predicted total length of each prompt's answer, in tokens (the length that V(s_0) stands for): [P]."""
    model.eval()

    def last_prediction(batch: dict[str, Any], last: torch.Tensor) -> torch.Tensor:
        predictions = model(**batch).predictions
        return model.space.length(predictions[torch.arange(len(last), device=last.device), last].double())

    return _over_prompts(prompts, collator, model, last_prediction)


@torch.inference_mode()
def boundary_states(model: Any, prompts: Sequence[PromptSample], collator: RolloutCollator) -> Floats:
    """Final hidden state of each prompt's last token, of a plain language model: [P, d]."""
    model.eval()

    def last_state(batch: dict[str, Any], last: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = model.base_model(**batch, use_cache=False).last_hidden_state
        return states[torch.arange(len(last), device=last.device), last].double()

    return _over_prompts(prompts, collator, model, last_state)


def _over_prompts(
    prompts: Sequence[PromptSample],
    collator: RolloutCollator,
    model: Any,
    compute: Callable[[dict[str, Any], torch.Tensor], torch.Tensor],
) -> Floats:
    device = next(model.parameters()).device
    items = [_prompt_item(prompt.row) for prompt in prompts]
    results: list[torch.Tensor] = [torch.empty(0)] * len(items)
    for rows in _batches([len(item["input_ids"]) for item in items]):
        batch = collator([items[row] for row in rows])
        del batch["labels"]
        last = (batch["attention_mask"].sum(-1) - 1).to(device)
        values = compute({name: tensor.to(device) for name, tensor in batch.items()}, last).cpu()
        for row, value in zip(rows, values, strict=True):
            results[row] = value
    stacked: Floats = torch.stack(results).numpy()
    return stacked


def _prompt_item(row: dict[str, Any]) -> dict[str, Any]:
    ids = list(row["prompt_token_ids"])
    name = f"prompt {row['prompt_id']}"
    return {"input_ids": ids, "labels": [IGNORED] * len(ids), "images": row.get("images", []), "name": name}


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows by rising length, at most MAX_BATCH_TOKENS padded tokens together."""
    batch: list[int] = []
    for row in tqdm(sorted(range(len(lengths)), key=lengths.__getitem__), desc="evaluating", unit="row"):
        if batch and (len(batch) + 1) * lengths[row] > MAX_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def boundary_figures(predicted: Floats, prompts: Sequence[PromptSample], space: TargetSpace) -> dict[str, float]:
    """Agreement of predicted lengths [P] with the samples.

    ``tau``, ``mre``: Kendall's tau and mean relative error against L* (return space); ``mse``: against the
    mean target; ``tau_tokens``, ``mre_tokens``: against the mean length; ``tau_single``, ``mre_single``:
    against every single sample.
    """
    means = np.array([_target(space, prompt.lengths).mean() for prompt in prompts])
    truth = space.length(torch.from_numpy(means)).numpy()
    tokens = np.array([prompt.lengths.mean() for prompt in prompts])
    singles = np.concatenate([prompt.lengths for prompt in prompts])
    repeated = np.repeat(predicted, [len(prompt.lengths) for prompt in prompts])
    return {
        "tau": rank_agreement(predicted, truth),
        "mre": _mre(predicted, truth),
        "mse": float(np.mean((_target(space, predicted) - means) ** 2)),
        "tau_tokens": rank_agreement(predicted, tokens),
        "mre_tokens": _mre(predicted, tokens),
        "tau_single": rank_agreement(repeated, singles),
        "mre_single": _mre(repeated, singles),
    }


def interval_coverage(predicted: Floats, prompts: Sequence[PromptSample]) -> dict[str, float]:
    """Share of finished samples inside [low, high] * prediction, overall and by domain.

    The two factors are the 10% and 90% quantiles of length / prediction of the other half of the prompts,
    so that no prompt is judged by factors that it took part in.
    """
    halves = np.arange(len(prompts)) % 2
    inside: dict[str, list[bool]] = {"all": []}
    for half in (0, 1):
        ratios = [prompt.lengths / value for prompt, value in _pairs(prompts, predicted, halves != half)]
        low, high = np.quantile(np.concatenate(ratios), INTERVAL_LEVELS)
        for prompt, value in _pairs(prompts, predicted, halves == half):
            hits = ((prompt.lengths >= low * value) & (prompt.lengths <= high * value)).tolist()
            inside["all"] += hits
            inside.setdefault(prompt.domain, []).extend(hits)
    return {name: float(np.mean(hits)) for name, hits in inside.items()}


def served_intervals(
    model: LenVM, head: Head | None, prompts: Sequence[PromptSample], predicted: Floats, collator: RolloutCollator
) -> Floats | None:
    """The 80% interval that the engine gives with each prompt, in tokens: [P, 2]; None for what cannot be served."""
    if head is not None:
        return head_intervals(head, model.causal_model, prompts, collator)
    if model.serving_obstacle:
        return None
    return assumed_intervals(predicted, model.lenvm_config.target.gamma)


@torch.inference_mode()
def head_intervals(head: Head, model: Any, prompts: Sequence[PromptSample], collator: RolloutCollator) -> Floats:
    """Quantiles of the candidate head's own distribution at each prompt's last token: [P, 2]."""
    candidate_head = head.candidate_head.to(model.device)
    layers = head.config.feature_layers

    def interval(batch: dict[str, Any], last: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(last), device=last.device)
        with capture_layers(model, layers) as captured:
            final = model.base_model(**batch, use_cache=False).last_hidden_state
        features = join_features(final[rows, last], [captured[layer][rows, last] for layer in layers])
        return _interval(candidate_head.state_logprobs(features), candidate_head.bin_lengths)

    return _over_prompts(prompts, collator, model, interval)


def assumed_intervals(predicted: Floats, gamma: float) -> Floats:
    """Quantiles of the distribution assumed around the value that each predicted length [P] stands for: [P, 2]."""
    lengths = bin_lengths(SERVED_BINS, int(length_from_value(-1.0, gamma)))
    values = value_from_length(torch.from_numpy(predicted), gamma)
    intervals: Floats = _interval(distribution_from_value(values, build_value_table(lengths, gamma)), lengths).numpy()
    return intervals


def _interval(logprobs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """In whole tokens, as responses carry it: [P, M] -> [P, 2]."""
    return torch.stack([quantile_length(logprobs, lengths, level).round() for level in INTERVAL_LEVELS], dim=1)


def interval_figures(intervals: Floats, prompts: Sequence[PromptSample]) -> dict[str, dict[str, float]]:
    """Of [P, 2] bounds, overall and by domain: ``coverage``, the share of finished samples from low to high
    (both included), and ``mean_width``, the mean of high - low over prompts, in tokens.
    """
    inside = [
        (low <= prompt.lengths) & (prompt.lengths <= high)
        for prompt, (low, high) in zip(prompts, intervals, strict=True)
    ]
    widths = intervals[:, 1] - intervals[:, 0]
    groups = {"all": list(range(len(prompts)))} | _rows_by_domain(prompts)
    return {
        name: {
            "coverage": float(np.mean(np.concatenate([inside[row] for row in rows]))),
            "mean_width": float(np.mean(widths[rows])),
        }
        for name, rows in groups.items()
    }


def _pairs(
    prompts: Sequence[PromptSample], predicted: Floats, mask: np.ndarray[Any, np.dtype[np.bool_]]
) -> list[tuple[PromptSample, float]]:
    return [(prompts[index], float(predicted[index])) for index in np.flatnonzero(mask)]


@torch.inference_mode()
def evaluate_states(
    model: LenVM,
    rows: Sequence[dict[str, Any]],
    fit: Sequence[dict[str, Any]],
    collator: RolloutCollator,
    space: TargetSpace,
) -> dict[str, float]:
    """`metrics.state_metrics` over finished completions, and the MSE of a constant and of the position alone."""
    model.eval()
    dataset = RolloutDataset(rows)
    device = next(model.parameters()).device
    lengths = [len(row["prompt_token_ids"]) + len(row["output_token_ids"]) for row in dataset.rows]
    predictions = np.zeros((len(dataset), max(lengths)), dtype=np.float32)
    labels = np.full(predictions.shape, IGNORED, dtype=np.int32)
    for chosen in _batches(lengths):
        batch = collator([dataset[row] for row in chosen])
        target = batch.pop("labels").numpy()
        output = model(**{name: tensor.to(device) for name, tensor in batch.items()}).predictions.cpu()
        labels[chosen, : target.shape[1]] = target
        predictions[chosen, : target.shape[1]] = space.target(model.space.length(output)).numpy()
    return state_metrics(predictions, labels, space) | _position_figures(dataset, RolloutDataset(fit), space)


def _position_figures(dataset: RolloutDataset, fit: RolloutDataset, space: TargetSpace) -> dict[str, float]:
    positions, targets = _states(dataset, space)
    fit_positions, fit_targets = _states(fit, space)
    edges = np.quantile(fit_positions, np.linspace(0, 1, POSITION_BINS + 1)[1:-1])
    bins = np.digitize(fit_positions, edges)
    sums = np.bincount(bins, fit_targets, minlength=POSITION_BINS)
    means = sums / np.maximum(np.bincount(bins, minlength=POSITION_BINS), 1)
    return {
        "mse_constant": float(np.mean((targets - fit_targets.mean()) ** 2)),
        "mse_position": float(np.mean((targets - means[np.digitize(positions, edges)]) ** 2)),
    }


def _states(dataset: RolloutDataset, space: TargetSpace) -> tuple[Floats, Floats]:
    """Position and target of every state."""
    counted = [len(row["output_token_ids"]) for row in dataset.rows]
    positions = np.concatenate([np.arange(length + 1) for length in counted])
    remaining = np.concatenate([np.arange(length, -1, -1) for length in counted])
    return positions.astype(np.float64), _target(space, remaining)


def _target(space: TargetSpace, lengths: Any) -> Floats:
    targets: Floats = space.target(torch.as_tensor(np.asarray(lengths, dtype=np.float64))).numpy()
    return targets


def _mre(predicted: Floats, actual: Floats) -> float:
    return float(np.mean(np.abs(predicted - actual) / actual))


@dataclass(frozen=True)
class Evaluation:
    """All figures: of the prompt boundary by predictor, and by domain and predictor; of intervals; of the states.

    ``served``: `interval_figures` of the interval that the engine gives, empty for what cannot be served;
    ``coverage``: of the refitted one.
    """

    num_prompts: int
    num_samples: int
    censored_share: float
    boundary: dict[str, dict[str, float]]
    domains: dict[str, dict[str, dict[str, float]]]
    served: dict[str, dict[str, float]]
    coverage: dict[str, float]
    states: dict[str, float]


def evaluate_prompts(
    model: LenVM,
    probe_model: Any,
    rows: Sequence[dict[str, Any]],
    fit_rows: Sequence[dict[str, Any]],
    collator: RolloutCollator,
    min_samples: int,
    space: TargetSpace,
    folder: Path,
    head: Head | None = None,
) -> Evaluation:
    """Evaluate on ``rows``, fit the comparison rows on ``fit_rows``; writes figures and plots into ``folder``.

    ``space`` is the scale that truths are averaged and errors squared in, whatever the model was trained on.
    ``head``: that of a head on the served model, whose value head is ``model``'s.
    Raises ValueError when no prompt has ``min_samples`` finished samples.
    """
    prompts, fit = group_samples(rows, min_samples), group_samples(fit_rows, 1)
    if len(prompts) < 2 or len(fit) < 2:
        raise ValueError(f"evaluation: fewer than two prompts with {min_samples} finished samples (evaluation or data)")
    predicted = predict_boundary(model, prompts, collator)
    states, fit_states = (boundary_states(probe_model, part, collator) for part in (prompts, fit))
    predictors = {"lenvm": predicted, **comparison_predictions(fit, fit_states, prompts, states)}
    intervals = served_intervals(model, head, prompts, predicted, collator)
    evaluation = Evaluation(
        num_prompts=len(prompts),
        num_samples=sum(len(prompt.lengths) for prompt in prompts),
        censored_share=_censored_share(prompts),
        boundary={name: boundary_figures(row, prompts, space) for name, row in predictors.items()},
        domains=_by_domain(predictors, prompts, space),
        served={} if intervals is None else interval_figures(intervals, prompts),
        coverage=interval_coverage(predicted, prompts),
        states=evaluate_states(model, rows, fit_rows, collator, space),
    )
    tokens = np.array([prompt.lengths.mean() for prompt in prompts])
    plots.plot_calibration(folder / "calibration.png", *calibration_curve(predicted, tokens))
    _write(evaluation, folder)
    return evaluation


def _censored_share(prompts: Sequence[PromptSample]) -> float:
    censored = sum(prompt.censored for prompt in prompts)
    return censored / (censored + sum(len(prompt.lengths) for prompt in prompts))


def _rows_by_domain(prompts: Sequence[PromptSample]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {domain: [] for domain in sorted({prompt.domain for prompt in prompts})}
    for row, prompt in enumerate(prompts):
        rows[prompt.domain].append(row)
    return rows


def _by_domain(
    predictors: dict[str, Floats], prompts: Sequence[PromptSample], space: TargetSpace
) -> dict[str, dict[str, dict[str, float]]]:
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for domain, rows in _rows_by_domain(prompts).items():
        own = [prompts[row] for row in rows]
        figures[domain] = {
            name: {"prompts": len(rows), **boundary_figures(predicted[rows], own, space)}
            for name, predicted in predictors.items()
        }
    return figures


def _write(evaluation: Evaluation, folder: Path) -> None:
    write_lines(folder / MARKDOWN_FILE, [_as_markdown(evaluation)])
    write_lines(folder / "evaluation.json", [json.dumps(vars(evaluation), indent=2)])  # the last: a sweep looks for it


def _as_markdown(evaluation: Evaluation) -> str:
    domains = {f"{domain}, {name}": row for domain, rows in evaluation.domains.items() for name, row in rows.items()}
    served = _table("domain", evaluation.served) if evaluation.served else "None: this LenVM cannot be served."
    return f"""# Evaluation

{evaluation.num_prompts} prompts, {evaluation.num_samples} finished samples of them; {evaluation.censored_share:.1%} of
their samples were cut by the token limit and are left out.

## Prompt boundary

{_table("predictor", evaluation.boundary)}

## Prompt boundary by domain

{_table("domain, predictor", domains)}

## 80% interval as it is served

{served}

## 80% interval refitted on the other half of the prompts

{_table("domain", {name: {"coverage": share} for name, share in evaluation.coverage.items()})}

## All states

{_table("figure", {name: {"value": value} for name, value in evaluation.states.items()})}"""


def _table(first: str, rows: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(rows.values())))
    lines = [f"| {first} | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{row[column]:.4g}' for column in columns)} |" for name, row in rows.items()]
    return "\n".join(lines)
