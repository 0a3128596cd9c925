"""A grammar that cannot be followed to its end is an error with its reason, instead of an answer that just stops.

Some grammars compile and fail at a token, such as ``root ::= "a" root``, which no answer ends. SGLang logs why, and
ends the request with the finish reason ``abort`` and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lenvm_runtime import compat


def register() -> None:
    """Give the reason to requests that SGLang aborts while it takes their tokens into their grammar."""
    compat.around(compat.ACCEPT_FIRST_TOKEN, _accept_first)
    compat.around(compat.ACCEPT_TOKENS, _accept)


def _accept_first(original: Callable[..., None], processor: Any, *, req: Any, **arguments: Any) -> None:
    before = req.to_finish
    original(processor, req=req, **arguments)
    if req.to_finish is not before:
        compat.explain_grammar_abort(req)


def _accept(original: Callable[..., list[int]], processor: Any, req: Any, tokens: Any) -> list[int]:
    before = req.to_finish
    retained = original(processor, req, tokens)
    if req.to_finish is not before:
        compat.explain_grammar_abort(req)
    return retained
