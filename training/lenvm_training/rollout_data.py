"""From rollout files to training batches: checked rows, exact token ids, padded tensors, images."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lenvm_training.endpoints import ABORTED
from lenvm_training.prompts import parse_object
from lenvm_training.rollouts import FINISHED, TRUNCATED
from lenvm_training.targets import IGNORED, remaining_labels
from lenvm_training.tokens import tokenizer_fingerprint

REQUIRED_FIELDS = {
    "prompt_id": str,
    "sample": int,
    "prompt_token_ids": list,
    "output_token_ids": list,
    "finish_reason": str,
    "domain": str,
    "sampling": dict,
}
APART = 0.1
TOKEN_FIELDS = ("prompt_token_ids", "output_token_ids")


class RolloutFileError(ValueError):
    """A rollout file that cannot be used; the message names the file, the line and what is wrong."""


@dataclass(frozen=True)
class DataSettings:
    """Which rollouts to train on. Rows of more than ``max_tokens`` (prompt and completion) are left out.

    The figures during training are taken on at most ``max_eval_completions`` of ``eval_rollouts``.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    rollouts: tuple[str, ...]
    eval_rollouts: tuple[str, ...] = ()
    max_tokens: int = 4096
    max_prompts: int | None = None
    max_samples_per_prompt: int | None = None
    max_eval_completions: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_prompts", "max_samples_per_prompt", "max_eval_completions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name}: must be at least 1, got {value}")


def load_rollouts(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """All rows of rollout files of one tokenizer, token ids as int32 arrays, without aborted completions.

    Of a completion that was gone on with, or taken over, under a higher token limit, that row alone is kept; copies
    of rows count once (`_without_copies`). A name that stands for several prompts, as in files that each number theirs,
    is theirs in turn: the second one is called ``NAME#2``. Raises RolloutFileError.
    """
    files: list[list[dict[str, Any]]] = []
    tokenizers: dict[str, str] = {}
    prompts: dict[str, list[tuple[bytes, ...]]] = {}
    for path in (Path(path).expanduser() for path in paths):
        files.append([])
        for number, line in enumerate(_lines(path), 1):
            row = _parse_row(line, f"{path}:{number}")
            tokenizers.setdefault(row.get("tokenizer", ""), f"{path}:{number}")
            if row["finish_reason"] != ABORTED:
                row["prompt_id"] = _own_name(row, prompts.setdefault(row["prompt_id"], []))
                files[-1].append(row)
    tokenizers.pop("", None)
    if len(tokenizers) > 1:
        raise RolloutFileError(f"rollouts of different tokenizers: {' and '.join(list(tokenizers.values())[:2])}")
    if not any(files):
        raise RolloutFileError(f"no rollouts in {', '.join(map(str, paths)) or 'no file'}")
    return _without_copies(_without_beginnings(files))


def _own_name(row: dict[str, Any], known: list[tuple[bytes, ...]]) -> str:
    """The name of a row's prompt among those that have been ``known`` by its ``prompt_id``, to which it is added."""
    key = _prompt_key(row)
    if key not in known:
        known.append(key)
    number = known.index(key)
    return f"{row['prompt_id']}#{number + 1}" if number else row["prompt_id"]


def _without_beginnings(files: Sequence[Sequence[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Rows that no other row of the same prompt and sample was begun with."""
    later: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in chain.from_iterable(files):
        if "begun" in row:
            later.setdefault(_key(row), []).append(row)
    return [
        [row for row in rows if not any(_begins(row, other) for other in later.get(_key(row), ()))] for rows in files
    ]


def _without_copies(files: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of all files, without a file's copies of its own rows and of rows of the files before it.

    A file that has other completions for APART of the prompts and samples that it shares with them was sampled by
    itself. All its rows count then: that some are the same is chance, most of all for short ones, which would become
    too few.
    """
    known: dict[tuple[str, int], list[dict[str, Any]]] = {}
    kept: list[dict[str, Any]] = []
    for rows in map(_distinct, files):
        is_copy = [any(_is_same(row, other) for other in known.get(_key(row), ())) for row in rows]
        copied = {_key(row) for row, copy in zip(rows, is_copy, strict=True) if copy}
        shared = {_key(row) for row in rows} & known.keys()
        sampled_by_itself = len(shared - copied) > APART * len(shared)
        new = [row for row, copy in zip(rows, is_copy, strict=True) if sampled_by_itself or not copy]
        for row in new:
            known.setdefault(_key(row), []).append(row)
        kept += new
    return kept


def _distinct(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({(_key(row), *(row[name].tobytes() for name in TOKEN_FIELDS)): row for row in rows}.values())


def _is_same(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(row[name] == other[name] for name in TOKEN_FIELDS)


def _key(row: dict[str, Any]) -> tuple[str, int]:
    return row["prompt_id"], row["sample"]


def _begins(row: dict[str, Any], other: dict[str, Any]) -> bool:
    length = len(row["output_token_ids"])
    return bool(
        row["sampling"].get("max_new_tokens", 0) < other["sampling"]["max_new_tokens"]
        and row["prompt_token_ids"] == other["prompt_token_ids"]
        and length <= other["begun"]
        and row["output_token_ids"] == other["output_token_ids"][:length]
    )


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as stream:
            for line in stream:
                if not line.endswith(b"\n"):
                    raise RolloutFileError(f"{path}: the last line is cut off; sample again, it goes on from there")
                yield line
    except OSError as error:
        raise RolloutFileError(f"{path}: cannot be read ({error})") from None


def _parse_row(line: bytes, where: str) -> dict[str, Any]:
    row = parse_object(line, where, RolloutFileError)
    for name, kind in REQUIRED_FIELDS.items():
        if not isinstance(row.get(name), kind):
            raise RolloutFileError(f"{where}: field {name!r} is missing or not of type {kind.__name__}")
    for name in TOKEN_FIELDS:
        try:
            row[name] = array("i", row[name])
        except (TypeError, OverflowError):
            raise RolloutFileError(f"{where}: field {name!r} must hold token ids") from None
    if not row["prompt_token_ids"]:
        raise RolloutFileError(f"{where}: field 'prompt_token_ids' is empty")
    return row


def select_rollouts(rows: Sequence[dict[str, Any]], settings: DataSettings) -> list[dict[str, Any]]:
    """Rows within ``max_tokens``, of at most ``max_prompts`` prompts and so many samples each, seeded.

    Which prompts and samples are kept does not depend on the order of the rows, and fewer are a subset
    of more (so that a learning curve adds data and does not change it).
    """
    rank = {row["prompt_id"]: _draw(settings.seed, row["prompt_id"]) for row in rows}
    prompts = set(sorted(rank, key=rank.__getitem__)[: settings.max_prompts])
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["prompt_id"] in prompts and row["output_token_ids"] and row["finish_reason"] in (FINISHED, TRUNCATED):
            groups.setdefault(row["prompt_id"], []).append(row)
    kept = []
    for prompt_id, group in groups.items():
        group.sort(key=lambda row: _draw(settings.seed, prompt_id, row["sample"]))
        kept += group[: settings.max_samples_per_prompt]
    return [row for row in kept if _num_tokens(row) <= settings.max_tokens]


def select_eval_rollouts(rows: Sequence[dict[str, Any]], settings: DataSettings) -> list[dict[str, Any]]:
    """A seeded choice of ``max_eval_completions`` rows within ``max_tokens``, whatever is trained on."""
    usable = select_rollouts(rows, DataSettings((), max_tokens=settings.max_tokens))
    usable.sort(key=lambda row: _draw(settings.seed, row["prompt_id"], row["sample"]))
    return usable[: settings.max_eval_completions]


def _draw(*key: object) -> float:
    return random.Random(":".join(map(str, key))).random()


def _num_tokens(row: dict[str, Any]) -> int:
    return len(row["prompt_token_ids"]) + len(row["output_token_ids"])


def check_tokenizer(rows: Sequence[dict[str, Any]], tokenizer: Any, vocab_size: int) -> None:
    """Raise RolloutFileError unless the rows' ids are of this tokenizer (as far as the rows tell)."""
    fingerprint = tokenizer_fingerprint(tokenizer)
    for row in rows:
        if row.get("tokenizer", fingerprint) != fingerprint:
            name = f"prompt {row['prompt_id']} sample {row['sample']}"
            raise RolloutFileError(f"{name}: sampled with another tokenizer than the backbone's")
        largest = max(max(row["prompt_token_ids"]), max(row["output_token_ids"]))
        if largest >= vocab_size:
            name = f"prompt {row['prompt_id']} sample {row['sample']}"
            raise RolloutFileError(f"{name}: token id {largest}, but the backbone has {vocab_size} tokens")


def check_disjoint(train_rows: Iterable[dict[str, Any]], held_out_rows: Iterable[dict[str, Any]]) -> None:
    """Raise RolloutFileError when a prompt (its token ids and images) is on both sides."""
    trained = {_prompt_key(row): row["prompt_id"] for row in train_rows}
    for row in held_out_rows:
        name = trained.get(_prompt_key(row))
        if name is not None:
            known_as = "" if name == row["prompt_id"] else f" (as {name})"
            raise RolloutFileError(f"data.eval_rollouts: prompt {row['prompt_id']} is in data.rollouts too{known_as}")


def _prompt_key(row: dict[str, Any]) -> tuple[bytes, ...]:
    token_ids = array("i", row["prompt_token_ids"]).tobytes()
    return hashlib.blake2b(token_ids, digest_size=16).digest(), *(path.encode() for path in row.get("images", ()))


class RolloutDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """One completion an item: ``input_ids``, ``labels`` (remaining lengths), ``censored``, ``images``, ``name``.

    Censored rows (cut by the token limit) are there only ``with_censored``; their labels are the least that can remain.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], with_censored: bool = False) -> None:
        self.rows = [row for row in rows if with_censored or row["finish_reason"] == FINISHED]
        self.num_left_out = len(rows) - len(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        prompt, output = row["prompt_token_ids"], row["output_token_ids"]
        finished = row["finish_reason"] == FINISHED
        return {
            "input_ids": prompt + output,
            "labels": remaining_labels(len(prompt), len(output), finished),
            "censored": not finished,
            "images": row.get("images", []),
            "name": f"prompt {row['prompt_id']} sample {row['sample']}",
        }


class StepOrder(torch.utils.data.Dataset[dict[str, Any]]):
    """``dataset`` in a new random order each epoch, the rows of each optimizer step longest first.

    Read in sequence, a step has the rows that chance gives it, and its micro-batches hold rows of like length, with
    little padding. ``rows_per_step`` counts all devices. accelerate's loaders call ``set_epoch``.
    """

    def __init__(self, dataset: RolloutDataset, rows_per_step: int, seed: int) -> None:
        self._dataset = dataset
        self._rows_per_step = rows_per_step
        self._seed = seed
        self._lengths = torch.tensor([_num_tokens(row) for row in dataset.rows])
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of ``epoch``."""
        generator = torch.Generator().manual_seed(self._seed + epoch)
        steps = torch.randperm(len(self._dataset), generator=generator).split(self._rows_per_step)
        order = [rows[self._lengths[rows].argsort(descending=True, stable=True)] for rows in steps]
        self._order: list[int] = torch.cat(order).tolist()

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._dataset[self._order[index]]


class RolloutCollator:
    """Items of `RolloutDataset` -> ``input_ids``, ``attention_mask``, ``labels`` [B, T], padded on the right.

    ``censored`` bool [B] is there when one is.
    With an ``image_processor`` (of a vision-language backbone), also its tensors and ``mm_token_type_ids``.
    """

    def __init__(self, pad_token_id: int, image_processor: Any = None, image_token_id: int = -1) -> None:
        self._pad_token_id = pad_token_id
        self._image_processor = image_processor
        self._image_token_id = image_token_id

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [torch.tensor(item["input_ids"], dtype=torch.int64) for item in items]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self._pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence([torch.tensor(item["labels"]) for item in items], True, IGNORED),
        }
        if any(item.get("censored") for item in items):
            batch["censored"] = torch.tensor([item["censored"] for item in items])
        return batch | self._image_tensors(items, batch["input_ids"])

    def _image_tensors(self, items: Sequence[dict[str, Any]], input_ids: Tensor) -> dict[str, Tensor]:
        paths = [path for item in items for path in item["images"]]
        if self._image_processor is None:
            if paths:
                raise RolloutFileError(f"{paths[0]}: the rollouts have images, the backbone takes none")
            return {}
        is_image = input_ids.eq(self._image_token_id)
        tensors: dict[str, Tensor] = {"mm_token_type_ids": is_image.int()}
        if paths:
            tensors |= dict(self._image_processor(images=[open_image(path) for path in paths], return_tensors="pt"))
            self._check_image_tokens(items, is_image, tensors["image_grid_thw"])
        return tensors

    def _check_image_tokens(self, items: Sequence[dict[str, Any]], is_image: Tensor, grids: Tensor) -> None:
        per_image = (grids.prod(-1) // self._image_processor.merge_size**2).tolist()
        for item, found in zip(items, is_image.sum(-1).tolist(), strict=True):
            count = len(item["images"])
            expected, per_image = sum(per_image[:count]), per_image[count:]
            if found != expected:
                raise RolloutFileError(f"{item['name']}: {found} image tokens, its images stand for {expected}")


def open_image(path: str) -> Any:
    """The image file as RGB. Raises RolloutFileError."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise RolloutFileError(f"{path}: cannot be read as an image ({error})") from None
