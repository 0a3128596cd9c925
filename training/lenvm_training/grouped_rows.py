"""The public data format of LenVM: one conversation a row, completions of a prompt found by ``meta_info.lenvm_idx``.

``{"conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}], "meta_info": {"lenvm_idx", ...}}``,
rows of one prompt side by side. What the text cannot hold is written into ``meta_info`` too (token ids,
finish reason, sampling), so that rows written here are read back exactly. Rows of others without token
ids are tokenised anew, which is the best that can be had from text and is counted. The reference's rows say in
``meta_info`` how long an answer was (``answer_token_length``) and may have been (``max_tokens``): as long is cut.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lenvm_training.prompt_sources import IMAGE_MARKER
from lenvm_training.prompts import Prompt
from lenvm_training.rollout_data import RolloutFileError
from lenvm_training.rollouts import FINISHED, TRUNCATED, ChatEncoder, PromptEncoder
from lenvm_training.tokens import tokenizer_fingerprint

FROM_ROLE = {"system": "system", "human": "user", "user": "user"}
EXACT_FIELDS = ("prompt_digest", "prompt_token_ids", "output_token_ids", "tokenizer", "begun")
PUBLIC_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "max_tokens": "max_new_tokens"}
KEPT_FIELDS = ("domain", "sample", "finish_reason", "sampling", *EXACT_FIELDS)


def group_rollouts(rollouts: Iterable[dict[str, Any]], prompts: Iterable[Prompt], tokenizer: Any) -> Iterator[Any]:
    """Rows in the public format, grouped by prompt in the order of first appearance.

    Raises RolloutFileError when a completion's prompt is not among ``prompts``.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rollouts:
        groups.setdefault(row["prompt_id"], []).append(row)
    for prompt_id, rows in groups.items():
        if prompt_id not in by_id:
            raise RolloutFileError(f"prompt {prompt_id} has rollouts but is not in the prompt file")
        for row in sorted(rows, key=lambda row: row["sample"]):
            yield _grouped_row(row, by_id[prompt_id], tokenizer)


def _grouped_row(row: dict[str, Any], prompt: Prompt, tokenizer: Any) -> dict[str, Any]:
    turns = [{"from": _role(message["role"]), "value": _value(message["content"])} for message in prompt.messages]
    answer = tokenizer.decode(row["output_token_ids"], skip_special_tokens=True)
    kept = {name: row[name] for name in KEPT_FIELDS if name in row}
    grouped: dict[str, Any] = {
        "conversations": [*turns, {"from": "gpt", "value": answer}],
        "meta_info": {"lenvm_idx": prompt.id, **kept},
    }
    return grouped | ({"images": prompt.images} if prompt.images else {})


def _role(role: str) -> str:
    return {"user": "human", "assistant": "gpt"}.get(role, role)


def _value(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(IMAGE_MARKER if part["type"] == "image" else part["text"] for part in content)


class GroupedReader:
    """Rollout rows of public rows. ``num_retokenised`` counts those whose token ids had to be made from text.

    A row that does not say how it ended may have been cut off: it is refused, unless ``assume_finished``.
    ``image_encoder`` makes the encoder of prompts with images, by the processor of a model that takes some, or None.
    """

    def __init__(
        self,
        tokenizer: Any,
        assume_finished: bool = False,
        image_encoder: Callable[[], PromptEncoder | None] = lambda: None,
    ) -> None:
        self._tokenizer = tokenizer
        self._text_encoder, self._image_encoder = ChatEncoder(tokenizer), functools.cache(image_encoder)
        self._prompts: dict[str, list[int]] = {}
        self._fingerprint = tokenizer_fingerprint(tokenizer)
        self._assume_finished = assume_finished
        self._samples: dict[str, int] = {}
        self.num_retokenised = 0

    def read(self, row: dict[str, Any], where: str) -> dict[str, Any]:
        """One rollout row. Raises RolloutFileError naming ``where`` and the field."""
        info, turns = _info(row, where), _turns(row, where)
        prompt_id = str(info["lenvm_idx"])
        sample = info.get("sample", self._samples.get(prompt_id, 0))
        if not isinstance(sample, int):
            raise RolloutFileError(f"{where}: field 'meta_info.sample' must be a number")
        self._samples[prompt_id] = sample + 1
        finish_reason = self._finish_reason(info, where)
        domain = str(info.get("domain", info.get("dataset_name", "")))
        images = _images(row, where)
        rollout = {"prompt_id": prompt_id, "domain": domain, "sample": sample, "finish_reason": finish_reason}
        rollout |= self._token_ids(info, turns, images, finish_reason, where)
        rollout["sampling"] = info["sampling"] if "sampling" in info else _public_sampling(info)
        return rollout | ({"images": images} if images else {})

    def _finish_reason(self, info: dict[str, Any], where: str) -> str:
        if "finish_reason" in info:
            return str(info["finish_reason"])
        length, limit = info.get("answer_token_length"), info.get("max_tokens")
        if isinstance(length, int) and isinstance(limit, int):
            return TRUNCATED if length >= limit else FINISHED
        if not self._assume_finished:
            raise RolloutFileError(f"{where}: no 'meta_info.finish_reason': it may have been cut off")
        return FINISHED

    def _token_ids(
        self, info: dict[str, Any], turns: list[dict[str, Any]], images: list[str], finish_reason: str, where: str
    ) -> dict[str, Any]:
        if "output_token_ids" in info:
            return {name: info[name] for name in EXACT_FIELDS if name in info}
        self.num_retokenised += 1
        try:
            messages = [
                {"role": FROM_ROLE[turn["from"]], "content": _parts(turn["value"]) if images else turn["value"]}
                for turn in turns[:-1]
            ]
        except KeyError as error:
            raise RolloutFileError(f"{where}: a turn from {error}, expected 'system' or 'human'") from None
        num_markers = sum(turn["value"].count(IMAGE_MARKER) for turn in turns[:-1])
        if images and num_markers != len(images):
            raise RolloutFileError(f"{where}: field 'images': {len(images)} for {num_markers} {IMAGE_MARKER} markers")
        encoder = self._image_encoder() if images else self._text_encoder
        if encoder is None:
            raise RolloutFileError(f"{where}: field 'images': the model does not take any")
        try:
            prompt = self._encode(encoder, Prompt(str(info["lenvm_idx"]), "", messages, images))
        except (ValueError, OSError) as error:
            raise RolloutFileError(f"{where}: {error}") from None
        output = list(self._tokenizer(turns[-1]["value"], add_special_tokens=False)["input_ids"])
        end = [self._tokenizer.eos_token_id] if finish_reason == FINISHED else []
        return {
            "prompt_token_ids": prompt,
            "output_token_ids": output + end,
            "tokenizer": self._fingerprint,
        }

    def _encode(self, encoder: PromptEncoder, prompt: Prompt) -> list[int]:
        """Each prompt's token ids, once: pictures above all are slow."""
        key = json.dumps([prompt.messages, prompt.images])
        if key not in self._prompts:
            self._prompts[key] = encoder.encode(prompt)
        return self._prompts[key]


def _parts(text: str) -> list[dict[str, str]]:
    """A turn's content parts: a picture for each marker."""
    first, *rest = text.split(IMAGE_MARKER)
    parts = [{"type": "text", "text": first}] if first else []
    for after in rest:
        parts += [{"type": "image"}, {"type": "text", "text": after}]
    return parts


def _images(row: dict[str, Any], where: str) -> list[str]:
    images = row.get("images") or []
    if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
        raise RolloutFileError(f"{where}: 'images' must be a list of paths")
    return images


def _public_sampling(info: dict[str, Any]) -> dict[str, Any]:
    """How the reference says that it sampled, as far as it does, by the names of `endpoints.Sampling`."""
    return {ours: info[theirs] for theirs, ours in PUBLIC_SAMPLING.items() if info.get(theirs) is not None}


def _info(row: dict[str, Any], where: str) -> dict[str, Any]:
    info = row.get("meta_info")
    if not isinstance(info, dict) or "lenvm_idx" not in info:
        raise RolloutFileError(f"{where}: no field 'meta_info.lenvm_idx'")
    return info


def _turns(row: dict[str, Any], where: str) -> list[dict[str, str]]:
    turns = row.get("conversations") or []
    if not isinstance(turns, list) or not all(map(_is_turn, turns)):
        raise RolloutFileError(f"{where}: 'conversations' must be a list of turns with 'from' and 'value'")
    if not turns or turns[-1]["from"] != "gpt":
        raise RolloutFileError(f"{where}: 'conversations' must end with a turn from 'gpt'")
    return turns


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(name), str) for name in ("from", "value"))
