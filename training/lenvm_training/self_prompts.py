"""Prompts that the model writes itself: its chat template up to an empty user turn, completed by sampling."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lenvm_training.prompts import Prompt
from lenvm_training.rollouts import FINISHED, template_refusals
from lenvm_training.tokens import tokenizer_fingerprint

MARKER = "LENVM-USER-TEXT"
DOMAIN = "self_made"
TURN = Prompt("user-turn", DOMAIN, [])
"""What `rollouts.sample_rollouts` is given to complete, with an `EmptyTurnEncoder`."""


class EmptyTurnEncoder:
    """Token ids of the chat template up to where the user's text would start."""

    def __init__(self, tokenizer: Any) -> None:
        self.fingerprint = tokenizer_fingerprint(tokenizer)
        messages = [{"role": "user", "content": MARKER}]
        with template_refusals("a user turn alone"):
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        before, found, _ = text.partition(MARKER)
        if not found:
            raise ValueError("the chat template does not keep the user's text: self-made prompts need it")
        self._token_ids = list(tokenizer(before, add_special_tokens=False)["input_ids"])

    def encode(self, prompt: Prompt) -> list[int]:
        return list(self._token_ids)


def prompts_from_turns(rows: Iterable[dict[str, Any]], tokenizer: Any) -> list[Prompt]:
    """One prompt for each different user turn that the model ended itself and that is not empty."""
    texts: dict[str, int] = {}
    for row in rows:
        text = tokenizer.decode(row["output_token_ids"], skip_special_tokens=True).strip()
        if row["finish_reason"] == FINISHED and text:
            texts.setdefault(text, row["sample"])
    return [Prompt(f"{DOMAIN}-{sample}", DOMAIN, [{"role": "user", "content": text}]) for text, sample in texts.items()]
