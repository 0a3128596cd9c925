"""Whose token ids these are."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """16 hex digits of the vocabulary: equal for tokenizers that give every id the same text.

    Added tokens (control tokens mostly) do not count: models of one family differ in them and still share ids.
    """
    added = tokenizer.get_added_vocab()
    entries = sorted((index, token) for token, index in tokenizer.get_vocab().items() if token not in added)
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]
