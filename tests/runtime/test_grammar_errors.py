"""A request whose grammar fails at a token ends with an error that says why; SGLang's own classes, no engine."""

from __future__ import annotations

from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest
from llguidance import LLTokenizer, grammar_from

from lenvm_kernels import torchvision_schema

torchvision_schema.declare_if_missing()

from sglang.srt.constrained.llguidance_backend import GuidanceGrammar  # noqa: E402
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject  # noqa: E402
from sglang.srt.managers.schedule_batch import FINISH_ABORT  # noqa: E402
from sglang.srt.managers.scheduler_components.batch_result_processor import (  # noqa: E402
    SchedulerBatchResultProcessor as Processor,
)

from lenvm_runtime.grammar_errors import _accept, _accept_first  # noqa: E402

ENDLESS = 'root ::= "a" root'
ENDING = 'root ::= "a" root | "b"'


def make_request(ebnf: str, *, reasons: bool = False) -> Any:
    """A request whose next token has been sampled under its grammar's mask."""
    grammar: Any = GuidanceGrammar(LLTokenizer("byte"), grammar_from("ebnf", ebnf))
    grammar.ll_matcher.compute_bitmask()
    if reasons:
        grammar = ReasonerGrammarObject(grammar, [7])
        grammar.maybe_init_reasoning(False)
    params = SimpleNamespace(json_schema=None, regex=None, ebnf=ebnf)
    return SimpleNamespace(rid="x", grammar=grammar, sampling_params=params, to_finish=None, finished=lambda: False)


def accept_first(request: Any, token: int) -> None:
    _accept_first(
        lambda processor, **arguments: Processor._apply_prefill_grammar(processor, **arguments),
        SimpleNamespace(),
        req=request,
        next_token_id=token,
    )


def accept(request: Any, token: int) -> None:
    _accept(
        lambda processor, req, tokens: Processor._accept_grammar_tokens(processor, req, tokens),
        SimpleNamespace(),
        request,
        token,
    )


@pytest.mark.parametrize("accept_token", [accept_first, accept])
@pytest.mark.parametrize("reasons", [False, True])
def test_a_grammar_without_an_end_says_so(accept_token: Any, reasons: bool) -> None:
    request = make_request(ENDLESS, reasons=reasons)
    accept_token(request, ord("a"))
    finish = request.to_finish.to_json()
    assert (finish["type"], finish["status_code"]) == ("abort", HTTPStatus.BAD_REQUEST)
    assert finish["message"].startswith("Failed to follow ebnf grammar: parser error: Too many items (limit")
    assert "\n" not in finish["message"]


@pytest.mark.parametrize("accept_token", [accept_first, accept])
def test_a_grammar_that_is_followed_ends_nothing(accept_token: Any) -> None:
    request = make_request(ENDING)
    accept_token(request, ord("a"))
    assert request.to_finish is None


def test_an_abort_for_another_reason_keeps_it() -> None:
    request = make_request(ENDING)
    gone = request.to_finish = FINISH_ABORT("the client left")
    accept(request, ord("a"))
    assert request.to_finish is gone
