"""Prompts by name or from any data set: columns mapped, images kept as files, duplicates dropped, split by prompt.

`NAMED` holds the four data sets of the LenVM paper. Any other one is given by its ``path`` (a JSONL or
Parquet file, or a hub name) and a `ColumnMap`.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import random
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from lenvm_training.prompts import Prompt, PromptFileError

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
ROLES = {"human": "user", "user": "user", "system": "system", "gpt": "assistant", "assistant": "assistant"}
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
IMAGE_MARKER = "<image>"
OPERATORS = "-#*/%&\\()[]{}"
"""Punctuation, by Unicode's categories, that tells prompts apart."""


@dataclass(frozen=True)
class ColumnMap:
    """Where a row holds its prompt: ``text`` (one column), or ``conversation`` (a list of turns, cut before the
    first answer; turns are ``{role, content}`` or ``{from, value}``). ``image`` holds a picture (bytes, base64,
    path, or as `datasets` decodes it). Only rows where each column of ``where`` has the given value are taken.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    text: str = ""
    conversation: str = ""
    image: str = ""
    where: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.text) == bool(self.conversation):
            raise ValueError("columns: give either 'text' or 'conversation'")


@dataclass(frozen=True)
class PromptSource:
    """At most ``count`` prompts of a data set: a ``name`` of `NAMED`, or a ``path`` with its ``columns``."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    count: int
    name: str = ""
    path: str = ""
    split: str = "train"
    subset: str | None = None
    domain: str = ""
    columns: ColumnMap | None = None

    def __post_init__(self) -> None:
        if bool(self.name) == bool(self.path):
            raise ValueError("prompts.sources: give either 'name' or 'path'")
        if self.name and self.name not in NAMED:
            raise ValueError(f"prompts.sources.name: must be one of {', '.join(NAMED)}, got {self.name!r}")
        if self.path and not (self.columns and self.domain):
            raise ValueError(f"prompts.sources: {self.path} needs 'columns' and 'domain'")
        if self.count < 1:
            raise ValueError(f"prompts.sources.count: must be at least 1, got {self.count}")

    def resolve(self) -> PromptSource:
        """With the fields that its name stands for."""
        return replace(NAMED[self.name], count=self.count) if self.name else self


NAMED: dict[str, PromptSource] = {}
NAMED |= {
    "deepmath": PromptSource(1, path="zwhe99/DeepMath-103K", domain="math", columns=ColumnMap(text="question")),
    "opencodereasoning": PromptSource(
        1, path="nvidia/OpenCodeReasoning-2", split="python", domain="code", columns=ColumnMap(text="question")
    ),
    "wildchat": PromptSource(
        1, path="allenai/WildChat", domain="instructions", columns=ColumnMap(conversation="conversation")
    ),
    "r1-onevision": PromptSource(
        1,
        path="Fancy-MLLM/R1-Onevision",
        domain="images",
        columns=ColumnMap(conversation="conversations", image="image"),
    ),
}
HUB_FILES = "hf://datasets"
QUESTION_SETS = {
    "taco": ("BAAI/TACO/ALL/{split}-*.parquet", ("question",)),
    "apps": ("codeparrot/apps/{split}.jsonl", ("question",)),
    "code_contests": ("deepmind/code_contests", ("description",)),
    "open-r1/codeforces": ("open-r1/codeforces", ("description", "input_format", "output_format")),
}
"""Where OpenCodeReasoning-2, whose ``question`` column is only "-", says that its questions lie: data sets, or files of
data sets with a script of their own, which `datasets` does not run.
"""


def load_prompts(source: PromptSource, image_folder: Path, seed: int) -> list[Prompt]:
    """A random sample of a source, without duplicates; a prompt's id depends on its content.

    Raises PromptFileError naming file and column.
    """
    source = source.resolve()
    assert source.columns is not None
    rows = load_rows(source.path, source.split, source.subset)
    _check_columns(rows, source.columns, source.path)
    order = list(range(len(rows)))
    random.Random(f"{seed}:{source.path}").shuffle(order)
    prompts: dict[str, Prompt] = {}
    questions = _QuestionJoin()
    for index in order:
        if len(prompts) == source.count:
            break
        prompt = _to_prompt(questions.fill(rows[index]), index, source, image_folder)
        if prompt is not None:
            key = prompt_key(prompt)
            prompts.setdefault(key, replace(prompt, id=f"{Path(source.path).stem}-{key[:12]}"))
    return list(prompts.values())


def split_prompts(prompts: list[Prompt], eval_fraction: float, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Train and evaluation prompts, each prompt once. A prompt's side depends on its own text and ``seed`` only."""
    unique = {prompt_key(prompt): prompt for prompt in reversed(prompts)}
    sides: tuple[list[Prompt], list[Prompt]] = ([], [])
    for key, prompt in reversed(unique.items()):
        sides[random.Random(f"{seed}:{key}").random() < eval_fraction].append(prompt)
    return sides


def prompt_key(prompt: Prompt) -> str:
    """Equal for prompts that differ in case, white space and punctuation at most, with the same images.

    Symbols count, and the punctuation that is an operator or part of a name (``-``, ``C#``, ``5!``); not the white
    space around them.
    """
    text = unicodedata.normalize("NFKC", prompt.text).casefold()
    words = " ".join("".join(_counted(text, at) for at in range(len(text))).split())
    words = re.sub(r" ?([^\w ]) ?", r"\1", words) or prompt.text
    return hashlib.sha256("\0".join([words, *(Path(image).name for image in prompt.images)]).encode()).hexdigest()


def _counted(text: str, at: int) -> str:
    """What `prompt_key` makes of a character: a space of one that it takes no notice of, a hyphen of every dash."""
    character = text[at]
    category = unicodedata.category(character)
    if category == "Pd":
        return "-"
    is_factorial = character == "!" and at > 0 and (text[at - 1].isdigit() or text[at - 1] == ")")
    return character if category[0] in "LMNS" or character in OPERATORS or is_factorial else " "


def load_rows(path: str, split: str, subset: str | None) -> Any:
    """A file or hub data set as `datasets.Dataset`. Raises PromptFileError."""
    import datasets

    file_format = FILE_FORMATS.get(Path(path).suffix)
    try:
        if file_format:
            return datasets.load_dataset(file_format, data_files=path, split="train")
        return datasets.load_dataset(path, subset, split=split)
    except Exception as error:  # the library raises errors of many kinds: its loaders', the hub's, Arrow's
        for full in (error, error.__cause__):
            if isinstance(full, OSError) and full.errno in FULL_DISK:
                raise full from None
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise PromptFileError(f"{path}: cannot be loaded ({reason})") from error


def _check_columns(rows: Any, columns: ColumnMap, path: str) -> None:
    for column in (columns.text, columns.conversation, columns.image, *columns.where):
        if column and column not in rows.column_names:
            raise PromptFileError(f"{path}: no column {column!r}; there are {', '.join(rows.column_names)}")


class _QuestionJoin:
    """Fills in the questions that OpenCodeReasoning-2 only points to (``dataset``, ``split``, ``index``)."""

    def __init__(self) -> None:
        self._sets: dict[tuple[str, str], Any] = {}

    def fill(self, row: dict[str, Any]) -> dict[str, Any]:
        if row.get("question") != "-" or row.get("dataset") not in QUESTION_SETS:
            return row
        name, columns = QUESTION_SETS[row["dataset"]]
        key = (name, row["split"])
        if key not in self._sets:
            files = f"{HUB_FILES}/{name.format(split=row['split'])}"
            self._sets[key] = load_rows(files if "{split}" in name else name, row["split"], None)
        found = self._sets[key][int(row["index"])]
        return {**row, "question": "\n\n".join(found[column] for column in columns if found[column])}


def _to_prompt(row: dict[str, Any], index: int, source: PromptSource, image_folder: Path) -> Prompt | None:
    """None for a row that ``where`` leaves out, or that holds no text."""
    columns = source.columns
    assert columns is not None
    if any(row[column] != value for column, value in columns.where.items()):
        return None
    name = f"{source.path}: row {index}"
    if columns.text:
        messages = [{"role": "user", "content": _text(row[columns.text], name)}]
    else:
        messages = _before_first_answer(row[columns.conversation], name)
    if not any(message["content"].strip() for message in messages):
        return None
    if not columns.image or row[columns.image] in (None, []):
        return Prompt(name, source.domain, messages)
    image = save_image(row[columns.image], image_folder, f"{name}: column {columns.image!r}")
    return Prompt(name, source.domain, _with_image(messages, name), [image])


def _text(value: Any, where: str) -> str:
    if isinstance(value, (list, dict)):
        raise PromptFileError(f"{where}: no text: {str(value)[:80]}")
    return str(value or "")


def _content(value: Any, where: str) -> str:
    """A turn's text: a string, or parts that each hold some."""
    if not isinstance(value, list):
        return _text(value, where)
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        raise PromptFileError(f"{where}: a turn's content is not text alone: {str(value)[:80]}")
    return "".join(part["text"] for part in value)


def _before_first_answer(turns: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(turns, list) and turns is not None:
        raise PromptFileError(f"{where}: no conversation (a list of turns): {str(turns)[:80]}")
    messages = []
    for turn in turns or []:
        role = ROLES.get(str(turn.get("role") or turn.get("from"))) if isinstance(turn, dict) else None
        if role is None:
            raise PromptFileError(f"{where}: a turn of a conversation has no known role: {str(turn)[:80]}")
        if role == "assistant":
            break
        messages.append({"role": role, "content": _content(turn.get("content") or turn.get("value"), where)})
    return messages


def _with_image(messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The image stands first in the first user message; a marker for it in the text goes."""
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise PromptFileError(f"{where}: an image, and no user turn that it belongs to")
    text = messages[first]["content"].replace(IMAGE_MARKER, "").strip()
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return [*messages[:first], {"role": "user", "content": content}, *messages[first + 1 :]]


def save_image(value: Any, folder: Path, where: str) -> str:
    """Write a picture as PNG, named by its pixels, once. A list of one stands for it. Raises PromptFileError."""
    from PIL import Image

    try:
        if isinstance(value, list):
            (value,) = value
        image = value if isinstance(value, Image.Image) else Image.open(io.BytesIO(_image_bytes(value)))
        image = image.convert("RGB")
    except (OSError, ValueError, TypeError, LookupError, Image.DecompressionBombError) as error:
        raise PromptFileError(f"{where}: not a usable image ({error!r})") from None
    digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
    path = folder / f"{digest[:24]}.png"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        image.save(partial, format="PNG")
        partial.replace(path)
    return str(path)


def _image_bytes(value: Any) -> bytes:
    if isinstance(value, dict):
        return value["bytes"] or Path(value["path"]).read_bytes()
    if isinstance(value, bytes):
        return value
    if _is_file(value):
        return Path(value).read_bytes()
    return base64.b64decode(value.rpartition(",")[2], validate=True)


def _is_file(value: str) -> bool:
    try:
        return Path(value).is_file()
    except OSError:  # too long for a path
        return False
