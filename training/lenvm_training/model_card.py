"""The model card of a head, written from the figures of the run that made it.

Its front matter is what the hub reads: the license is that of the base model's own card, ``unknown`` without one.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from lenvm_kernels.heads import HeadConfig
from lenvm_training.rollout_data import RolloutDataset
from lenvm_training.rollouts import FINISHED

CARD_FILE = "README.md"
FIGURES_FILE = "figures.json"
TAGS = ["lenvm", "length-prediction"]
LIBRARIES = {"full": "transformers", "lora": "peft", "head": "lenvm"}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_EVALUATION_MARK = "<!-- lenvm evaluate -->"
_CENSORED = {
    "leave_out": "left out of the value targets",
    "bound": 'at most the return of "at least this long" for the value',
    "impute": "given the return that the distribution expects of a longer answer for the value",
}
_ROWS = (
    ("value_mse", "value head: MSE of V(s_t) against the realised return"),
    ("value_mse_distribution", "the same for the mean of the predicted distribution"),
    ("value_mse_constant", "best constant"),
    ("value_mse_position", "best function of the position alone"),
    ("value_mse_over_constant", "value head / constant"),
    ("value_mse_over_position", "value head / position only"),
    ("distribution_mse_over_position", "distribution / position only"),
    ("early_mse", "all completions, first quarter of the token limit: MSE of V(s_t)"),
    ("early_mse_unknown", "of which what is not known of cut completions can be at most"),
    ("early_mse_constant", "best constant there"),
    ("early_mse_position", "best function of the position alone there"),
    ("early_mse_over_position", "value head / position only there"),
    ("boundary_tau", "prompt boundary, value head: Kendall tau against the mean of the samples (return space)"),
    ("boundary_mre", "prompt boundary, value head: mean relative error (return space)"),
    ("boundary_tau_expected", "prompt boundary, mean of the distribution cut at the limit: Kendall tau"),
    ("boundary_mre_expected", "the same: mean relative error"),
    ("remaining_mre_25", "median relative error of the remaining length that V stands for, at 25% of the answer"),
    ("remaining_mre_50", "at 50%"),
    ("remaining_mre_75", "at 75%"),
    ("interval_coverage", "share of answers inside the 80% interval given at the prompt boundary"),
)


def write_model_card(
    folder: Path,
    config: HeadConfig,
    settings: dict[str, Any],
    rollouts: Sequence[dict[str, Any]],
    held_rollouts: Sequence[dict[str, Any]],
    figures: dict[str, float],
    backbone: Path,
    start: str = "",
) -> None:
    """Write ``README.md`` and ``figures.json`` beside the weights.

    ``settings``: how the heads were trained, ``censored`` among them; ``backbone``: the served model's folder;
    ``start``: what the card of the head that they started from says of its data.
    """
    (folder / FIGURES_FILE).write_text(json.dumps(figures, indent=2) + "\n")
    table = "\n".join(f"| {label} | {figures[name]:.4f} |" for name, label in _ROWS if name in figures)
    _write_card(
        folder / CARD_FILE,
        f"""{front_matter("head", config.base_model, backbone)}# LenVM head for {config.base_model}

Predicts, from the frozen model's hidden states, how much of its answer is still to come: a value head
(published LenVM form) and a candidate head (distribution of the remaining length after each candidate
token). It describes this model sampled as below; other sampling settings or prompts shift the lengths.

## Data

{_describe(rollouts)}
{f"Trained ({' and '.join(settings['train'])}) from a head that had learned from: {start}" if start else ""}

Held out (other prompts): {_describe(held_rollouts)} Sampling: {_describe_sampling(held_rollouts)}.

Sampling: {_describe_sampling(rollouts)}. Completions cut by the token limit are censored:
{_CENSORED[settings["censored"]]}, and "at least this long" for the distribution.

## Settings

{json.dumps(asdict(config))}

{json.dumps(settings)}

## Figures on the held-out prompts

{figures["num_completions"]:.0f} finished completions, {figures["num_states"]:.0f} states;
{figures["num_prompts"]:.0f} prompts with {figures["samples_per_prompt"]:.1f} samples each at the prompt boundary,
where a cut sample counts at the token limit.

| figure | |
| --- | --- |
{table}
""",
    )


def write_lenvm_card(
    folder: Path,
    settings: dict[str, Any],
    train: RolloutDataset,
    held_out: RolloutDataset | None,
    figures: dict[str, float],
    backbone: Path,
    serving_obstacle: str,
) -> None:
    """Write ``README.md`` of a LenVM folder: what it predicts, from what data, with what settings and figures.

    ``backbone``: the folder it was trained from; ``serving_obstacle``: why it cannot be served; empty when it can.
    """
    table = "\n".join(f"| `{name}` | {value:.4f} |" for name, value in figures.items())
    held = f"Held out (other prompts): {_describe(held_out.rows)}" if held_out else "Nothing was held out."
    front = front_matter(settings["model"]["kind"], settings["model"]["backbone"], backbone)
    use = f"Only for comparison: {serving_obstacle}." if serving_obstacle else "Served by `lenvm serve --lenvm FOLDER`."
    _write_card(
        folder / CARD_FILE,
        f"""{front}# LenVM for {settings["model"]["served_model"]}

Length Value Model ({settings["model"]["kind"]}, backbone {settings["model"]["backbone"]}): predicts at every token how
much of the answer is still to come. It describes the served model sampled as below. {use}

## Data

{_describe(train.rows)} {_describe_cut(train, settings["target"]["censored"])}

{held}

Sampling: {_describe_sampling(train.rows)}.

## Settings

{json.dumps(settings)}

## Figures on the held-out completions

Positions (0 to 90) are the share of the answer that is written, in percent; errors are relative to the remaining
length in tokens; `mse` and `calibration_error` are in the target space.

| figure | |
| --- | --- |
{table}
""",
    )


def _write_card(path: Path, card: str) -> None:
    """The figures of ``lenvm evaluate`` stay where they are those of the same result."""
    there = path.read_text(encoding="utf-8") if path.is_file() else ""
    if there.partition(_EVALUATION_MARK)[0].rstrip() != card.rstrip():
        path.write_text(card, encoding="utf-8")


def _describe_cut(train: RolloutDataset, rule: str) -> str:
    if rule == "leave_out":
        return f"{train.num_left_out} more of this length were cut by the token limit and have no target."
    return (
        "Of those cut by the token limit, what they still had is the least that their states' remaining length can be."
    )


def described_data(card: Path) -> str:
    """The first paragraph of a card's data section; empty where there is none."""
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    return text.partition("## Data")[2].strip().partition("\n\n")[0].replace("\n", " ")


def add_evaluation(folder: Path, evaluation: str) -> None:
    """Put the figures of ``lenvm evaluate`` (Markdown) at the end of the card in ``folder``, in place of older ones."""
    path = folder / CARD_FILE
    card, _, _ = path.read_text(encoding="utf-8").partition(_EVALUATION_MARK)
    section = re.sub("^#", "##", evaluation, flags=re.MULTILINE)
    path.write_text(f"{card.rstrip()}\n\n{_EVALUATION_MARK}\n{section}", encoding="utf-8")


def front_matter(kind: str, base_model: str, backbone: Path) -> str:
    """The card's YAML block. A ``base_model`` that is no hub name is left out: the hub refuses it."""
    is_hub_name = _HUB_NAME.fullmatch(base_model) and not Path(base_model).exists()
    data = ModelCardData(
        library_name=LIBRARIES[kind],
        base_model=base_model if is_hub_name else None,
        license=_license(backbone / CARD_FILE),
        tags=TAGS,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _license(card: Path) -> str:
    try:
        return str(ModelCard.load(card).data.license or "unknown")
    except (OSError, ValueError, yaml.YAMLError):
        return "unknown"


def _describe_sampling(rollouts: Sequence[dict[str, Any]]) -> str:
    counts = Counter(json.dumps(row["sampling"]) for row in rollouts)
    return "; ".join(f"{sampling} ({count} completions)" for sampling, count in counts.most_common())


def _describe(rollouts: Sequence[dict[str, Any]]) -> str:
    finished = Counter(row["domain"] for row in rollouts if row["finish_reason"] == FINISHED)
    total = Counter(row["domain"] for row in rollouts)
    prompts = len({row["prompt_id"] for row in rollouts})
    domains = ", ".join(f"{domain} {finished[domain]} of {total[domain]}" for domain in sorted(total))
    longest = max(len(row["prompt_token_ids"]) + len(row["output_token_ids"]) for row in rollouts)
    counts = f"{sum(finished.values())} finished of {len(rollouts)} completions of {prompts} prompts ({domains})"
    return f"{counts}, none of more than {longest} tokens with its prompt."
