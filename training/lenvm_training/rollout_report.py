"""What a rollout file holds: how long completions are, how many ended, how much the prompt decides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lenvm_training import plots
from lenvm_training.rollouts import FINISHED

LEVELS = (10, 25, 50, 75, 90, 99)
COLUMNS = ("prompts", "completions", "finished", "mean", "std", *(f"p{level}" for level in LEVELS), "max", "explained")


def length_report(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Figures of each domain and of ``all``.

    ``finished``: share that ended by themselves. Mean, standard deviation and quantiles are of the tokens
    sampled, those of cut completions counted as they are (a lower bound). ``explained``: share of the
    variance of finished lengths that lies between prompts, 1 - within / total; left out where there is none to explain.
    """
    groups: dict[str, list[dict[str, Any]]] = {"all": list(rows)}
    for row in rows:
        groups.setdefault(row["domain"], []).append(row)
    return {name: _figures(group) for name, group in groups.items()}


def _figures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    lengths = np.array([len(row["output_token_ids"]) for row in rows])
    figures = {
        "prompts": len({row["prompt_id"] for row in rows}),
        "completions": len(rows),
        "finished": float(np.mean([row["finish_reason"] == FINISHED for row in rows])),
        "mean": float(lengths.mean()),
        "std": float(lengths.std()),
    }
    figures |= {f"p{level}": float(np.percentile(lengths, level)) for level in LEVELS}
    explained = _explained(rows)
    return figures | {"max": float(lengths.max())} | ({} if explained is None else {"explained": explained})


def _explained(rows: Sequence[dict[str, Any]]) -> float | None:
    groups: dict[str, list[int]] = {}
    for row in rows:
        if row["finish_reason"] == FINISHED:
            groups.setdefault(row["prompt_id"], []).append(len(row["output_token_ids"]))
    several = [np.array(group, dtype=float) for group in groups.values() if len(group) > 1]
    if not several:
        return None
    within = sum(group.var(ddof=1) * (len(group) - 1) for group in several) / sum(len(group) - 1 for group in several)
    total = np.concatenate(several).var(ddof=1)
    return float(1 - within / total) if total else None


def write_length_report(rows: Sequence[dict[str, Any]], folder: Path) -> dict[str, dict[str, float]]:
    """Write ``lengths.md`` and ``lengths.png`` into ``folder``; returns the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    report = length_report(rows)
    lines = [f"| domain | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    lines += [
        f"| {domain} | {' | '.join(f'{figures[column]:.4g}' if column in figures else '' for column in COLUMNS)} |"
        for domain, figures in report.items()
    ]
    (folder / "lengths.md").write_text("\n".join(lines) + "\n")
    lengths: dict[str, list[int]] = {}
    for row in rows:
        lengths.setdefault(row["domain"], []).append(len(row["output_token_ids"]))
    plots.plot_lengths(folder / "lengths.png", lengths)
    return report
