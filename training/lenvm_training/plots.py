"""Plots of a run, as PNG files: loss curves, error by position, calibration, lengths, curves of a sweep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl

from lenvm_training.metrics import POSITIONS, Floats

mpl.use("Agg")  # no display is needed

import matplotlib.pyplot as plt

SWEEP_COLUMNS = 4


@contextmanager
def _axes(path: Path, title: str, x_label: str, y_label: str) -> Iterator[Any]:
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    yield axes
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_loss(
    path: Path,
    log_history: Sequence[Mapping[str, Any]],
    held_out: str = "eval_mse",
    y_label: str = "mean squared error",
) -> None:
    """Training loss and the held-out figure ``held_out`` over steps, from the Trainer's log."""
    with _axes(path, "Loss", "step", y_label) as axes:
        for key, label in (("loss", "training"), (held_out, "held out")):
            points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=label)
        axes.set_yscale("log")


def plot_error_by_position(path: Path, figures: Mapping[str, float]) -> None:
    """Relative error of the remaining length over the share of the answer that is written."""
    with _axes(path, "Error by position", "answer written, %", "relative error of the remaining length") as axes:
        for key, label in (("mre", "mean"), ("median_re", "median")):
            axes.plot(POSITIONS, [figures[f"{key}_{position}"] for position in POSITIONS], marker="o", label=label)
        axes.set_ylim(bottom=0)


def plot_calibration(path: Path, predicted: Floats, actual: Floats) -> None:
    """Mean truth over mean prediction of equally filled bins, in tokens."""
    with _axes(path, "Calibration at the prompt boundary", "predicted, tokens", "sampled, tokens") as axes:
        axes.plot(predicted, actual, marker="o", label="bins of prompts")
        highest = max(predicted.max(), actual.max())
        axes.plot([0, highest], [0, highest], linestyle="--", color="gray", label="equal")


def plot_lengths(path: Path, lengths: Mapping[str, Sequence[int]]) -> None:
    """Histogram of completion lengths, one line a group."""
    with _axes(path, "Completion lengths", "tokens", "completions") as axes:
        highest = max(max(group) for group in lengths.values())
        bins = [highest * edge / 40 for edge in range(41)]
        for name, group in lengths.items():
            axes.hist(group, bins=bins, histtype="step", label=name)


def plot_sweep(path: Path, name: str, settings: Sequence[str], figures: Mapping[str, Sequence[float]]) -> None:
    """Each figure over the settings of a sweep, in their order: a panel a figure, since their scales differ."""
    rows = -(-len(figures) // SWEEP_COLUMNS)
    figure, panels = plt.subplots(
        rows, SWEEP_COLUMNS, figsize=(4 * SWEEP_COLUMNS, 2.5 * rows), squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(figures) :]:
        panel.remove()
    for panel, (label, values) in zip(panels.flat, figures.items(), strict=False):
        panel.plot(range(len(values)), values, marker="o")
        panel.set_xticks(range(len(settings)), settings)
        panel.set_title(label)
    figure.suptitle(name)
    figure.savefig(path, dpi=100)
    plt.close(figure)
