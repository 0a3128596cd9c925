"""What the commands do with files: report, thin out, convert; and how they write and speak."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from lenvm_training.config import load_yaml
from lenvm_training.grouped_rows import GroupedReader, group_rollouts
from lenvm_training.model import TOKENIZER_FILES, load_tokenizer, resolve_folder
from lenvm_training.prompts import parse_object, read_prompts
from lenvm_training.reference_config import convert_reference
from lenvm_training.rollout_data import DataSettings, load_rollouts, select_rollouts
from lenvm_training.rollout_report import write_length_report
from lenvm_training.rollouts import ImageChatEncoder


def report(rollouts: Sequence[str], out: Path) -> None:
    """Numbers and plot of the lengths in rollout files."""
    print_figures(write_length_report(load_rollouts(rollouts), out))


def downsample(rollouts: str, out: Path, samples: int, seed: int) -> None:
    """At most ``samples`` completions of each prompt, seeded."""
    if samples < 1:
        raise ValueError(f"--samples: must be at least 1, got {samples}")
    _check_kept(out, Path(rollouts))
    settings = DataSettings((), max_samples_per_prompt=samples, max_tokens=sys.maxsize, seed=seed)
    rows = select_rollouts(load_rollouts([rollouts]), settings)
    write_lines(out, (json.dumps(row) for row in as_lists(rows)))
    say(f"{out}: {len(rows)} completions")


def group(rollouts: Path, prompts: Path, model: str, out: Path) -> None:
    """Write the public grouped format, groups in random order."""
    _check_kept(out, rollouts, prompts)
    tokenizer = load_tokenizer(resolve_folder(model, TOKENIZER_FILES))
    rows = as_lists(load_rollouts([rollouts]))
    random.Random(0).shuffle(rows)
    write_lines(out, (json.dumps(row) for row in group_rollouts(rows, read_prompts(prompts), tokenizer)))


def ungroup(grouped: Path, out: Path, model: str, assume_finished: bool) -> None:
    """Read the public grouped format; says how many rows had to be tokenised anew."""
    _check_kept(out, grouped)
    folder = resolve_folder(model, TOKENIZER_FILES)
    reader = GroupedReader(load_tokenizer(folder), assume_finished, lambda: _image_encoder(folder))
    rows = []
    with grouped.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                where = f"{grouped}:{number}"
                rows.append(reader.read(parse_object(line, where), where))
    write_lines(out, map(json.dumps, rows))
    say(f"{out}: {len(rows)} completions, {reader.num_retokenised} of them tokenised from text (not exact)")


def _image_encoder(folder: Path) -> ImageChatEncoder | None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    return ImageChatEncoder(processor) if hasattr(processor, "image_processor") else None


def convert_config(reference: Path, out: Path) -> None:
    """Convert a file of the reference; each key that is lost gets a line on standard error and in the file."""
    _check_kept(out, reference)
    content, problems = convert_reference(load_yaml(reference), str(reference))
    head = "".join(f"# {problem}\n" for problem in problems)
    write_lines(out, [head + yaml.safe_dump(content, sort_keys=False).rstrip()])
    for problem in problems:
        say(problem)


def _check_kept(out: Path, *read: Path) -> None:
    """Raise ValueError where the file to write is one that is read."""
    if out.resolve() in (path.expanduser().resolve() for path in read):
        raise ValueError(f"{out}: would replace what it is made from; name another file")


def as_lists(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with token ids as lists, which JSON can hold."""
    names = ("prompt_token_ids", "output_token_ids")
    return [row | {name: list(row[name]) for name in names} for row in rows]


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a file of lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.writelines(line + "\n" for line in lines)
    partial.replace(path)


def choose_rollouts(rows: Sequence[dict[str, Any]], settings: DataSettings, kind: str) -> list[dict[str, Any]]:
    """`select_rollouts`; says how many of this ``kind`` are left out for their length."""
    kept = select_rollouts(rows, settings)
    total = len(select_rollouts(rows, replace(settings, max_tokens=sys.maxsize)))
    if len(kept) < total:
        too_long = f"{total - len(kept)} of {total} {kind} completions are left out"
        say(f"{too_long}: more than data.max_tokens, {settings.max_tokens}")
    return kept


def say(message: str) -> None:
    """One line of progress on standard error."""
    print(f"lenvm: {message}", file=sys.stderr, flush=True)


def print_figures(figures: Any) -> None:
    """Figures on standard output, as JSON."""
    print(json.dumps(figures, indent=2))
