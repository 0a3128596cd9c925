"""Puts ``lenvm`` objects into SGLang's OpenAI responses (API process).

Streams: every event that a request's generator takes from the tokenizer manager is observed, and
what it brought rides on the next chunk of its choice, spliced in without decoding the chunk.
Non-streamed answers: each choice gets the whole object. Value queries on SGLang's own ``/generate``: each
answer gets a ``lenvm`` object with the values of its prompt.

Beside a separate LenVM, requests that do not need it share no prefix cache with those that do: their tokens lack the
value model's keys.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable
from typing import Any

import orjson
from fastapi.responses import ORJSONResponse

from lenvm_runtime import compat
from lenvm_runtime.length_control import (
    TOP_K_KEY,
    WITHOUT_LENVM,
    LengthControl,
    LengthControlError,
    ValueQuery,
    check_sampling,
    needs_lenvm,
    wants_values,
)
from lenvm_runtime.response import CANDIDATES_KEY, PREDICTION_KEY, VALUE_KEY, ResponseBuilder, describe_input

_BUILDER = "lenvm_builder"
_CHOICE = re.compile(r'"choices":\[\{"index":(\d+),')
_FINISHING = '"finish_reason":"'


def register(gamma: float, max_length: int, is_separate: bool) -> None:
    """Hook the chat and completion handlers.

    ``gamma`` is the LenVM's, ``max_length`` bounds ``remaining``; ``is_separate``: it is a model of its own.
    """

    def new_builder(custom_params: Any) -> ResponseBuilder:
        return ResponseBuilder(custom_params, gamma, max_length)

    def stream(
        original: Callable[..., AsyncGenerator[str, None]], handler: Any, adapted: Any, request: Any, *args: Any
    ) -> AsyncGenerator[str, None]:
        builder = new_builder(request.custom_params)
        setattr(adapted, _BUILDER, builder)
        return _splice(original(handler, adapted, request, *args), builder)

    def respond(response: Any, _handler: Any, request: Any, results: list[dict[str, Any]], *_: Any) -> Any:
        if not hasattr(response, "choices"):  # an error response
            return None
        body = response.model_dump()
        builder = new_builder(request.custom_params)
        for index, (choice, result) in enumerate(zip(body["choices"], results, strict=True)):
            builder.observe(index, result["meta_info"])
            choice["lenvm"] = builder.take(index, finishing=True)
        return ORJSONResponse(body)

    def observe(
        original: Callable[..., AsyncGenerator[Any, None]], manager: Any, obj: Any, *args: Any
    ) -> AsyncGenerator[Any, None]:
        params = getattr(obj, "sampling_params", None)
        _fill_preferred(params, compat.preferred_sampling_params(manager))
        vocab_size = compat.vocab_size(manager)
        _check_stop_ids(params, vocab_size)
        _check_controls(params)
        _keep_top_ks(params)
        queries = _read_queries(params, vocab_size)
        _check_input_ids(obj.input_ids, vocab_size, "input" if queries else "prompt")
        if is_separate:
            _part_prefix_caches(obj)
        if queries:
            if hasattr(obj, _BUILDER):
                raise LengthControlError("custom_params.lenvm.input_values", "is taken by /generate only")
            obj.return_logprob, obj.logprob_start_len = True, 0
            events = original(manager, obj, *args)
            return _answer_queries(events, queries, _input_ids(obj.input_ids, len(queries)), gamma, max_length)
        shown = _shown_values(params)
        return _observe_events(original(manager, obj, *args), getattr(obj, _BUILDER, None), shown)

    compat.around(compat.GENERATE, observe)
    for target in (compat.CHAT_STREAM, compat.COMPLETION_STREAM):
        compat.around(target, stream)
    for target in (compat.CHAT_RESPONSE, compat.COMPLETION_RESPONSE):
        compat.after(target, respond)


def register_without_lenvm() -> None:
    """Hook an engine that serves without a LenVM: it refuses what it could not do."""

    def check(
        original: Callable[..., AsyncGenerator[Any, None]], manager: Any, obj: Any, *args: Any
    ) -> AsyncGenerator[Any, None]:
        for params in _each(getattr(obj, "sampling_params", None)):
            custom_params = params.get("custom_params")
            if LengthControl.from_custom_params(custom_params) or ValueQuery.from_custom_params(custom_params):
                raise LengthControlError("custom_params.lenvm", "this engine runs without a LenVM")
        return original(manager, obj, *args)

    compat.around(compat.GENERATE, check)


def _each(sampling_params: Any) -> list[dict[str, Any]]:
    """A request's sampling parameters, of which there may be a list."""
    each = sampling_params if isinstance(sampling_params, list) else [sampling_params]
    return [params for params in each if isinstance(params, dict)]


def _fill_preferred(sampling_params: Any, preferred: dict[str, Any]) -> None:
    """Take over what the engine prefers where a request says nothing, as SGLang does later: it has to be checked."""
    for params in _each(sampling_params):
        for name, value in preferred.items():
            params.setdefault(name, value)


def _check_controls(sampling_params: Any) -> None:
    """Refuse an unusable control here (ValueError: HTTP 400), before it reaches the scheduler."""
    for params in _each(sampling_params):
        check_sampling(LengthControl.from_custom_params(params.get("custom_params")), params)


def _keep_top_ks(sampling_params: Any) -> None:
    """Write the top-k of requests under control where SGLang does not change it; see `TOP_K_KEY`."""
    for params in _each(sampling_params):
        given, top_k = params.get("custom_params"), params.get("top_k")
        if not isinstance(given, dict) or LengthControl.from_custom_params(given) is None:
            continue
        kept = {key: value for key, value in given.items() if key != TOP_K_KEY}
        has_filter = isinstance(top_k, int) and top_k >= 1
        params["custom_params"] = kept | ({TOP_K_KEY: top_k} if has_filter else {})


def _check_stop_ids(sampling_params: Any, vocab_size: int) -> None:
    """Refuse a stop token that the model does not have (ValueError: HTTP 400): it can end the scheduler."""
    for given in (params.get("stop_token_ids") or () for params in _each(sampling_params)):
        if not isinstance(given, list | tuple | set):
            raise LengthControlError("stop_token_ids", f"must be a list of token ids, got {given!r}")
        for token in given:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise LengthControlError("stop_token_ids", f"{token!r} is not a token id from 0 to {vocab_size - 1}")


def _check_input_ids(input_ids: list[int] | list[list[int]] | None, vocab_size: int, field: str) -> None:
    """Refuse a token that the model does not have (ValueError: HTTP 400): its embedding would end the scheduler."""
    for given in input_ids or ():
        worst = max(given, default=0) if isinstance(given, list) else given
        if worst >= vocab_size:
            raise LengthControlError(field, f"token id {worst} is not below the vocabulary's size {vocab_size}")


def _read_queries(sampling_params: Any, vocab_size: int) -> list[ValueQuery]:
    """The value queries of a request, one a sampling parameters; none, or an error where only some are."""
    found = [ValueQuery.from_custom_params(params.get("custom_params")) for params in _each(sampling_params)]
    queries = [query for query in found if query]
    if queries and len(queries) != len(found):
        raise LengthControlError("custom_params.lenvm.input_values", "must be given for all inputs or for none")
    for token in (token for query in queries for token in query.candidate_ids):
        if token >= vocab_size:
            raise LengthControlError("candidates", f"token id {token} is not below the vocabulary's size {vocab_size}")
    return queries


def _input_ids(given: list[int] | list[list[int]] | None, count: int) -> list[Any]:
    """The token ids of each of ``count`` inputs; None for each where text was given."""
    if not given:
        return [None] * count
    return list(given) if isinstance(given[0], list) else [given]


async def _answer_queries(
    events: AsyncGenerator[Any, None],
    queries: list[ValueQuery],
    input_ids: list[list[int] | None],
    gamma: float,
    max_length: int,
) -> AsyncGenerator[Any, None]:
    async for event in events:
        answers = _answers(event)
        each = queries if len(queries) == len(answers) else queries * len(answers)
        ids = input_ids if len(input_ids) == len(answers) else input_ids * len(answers)
        for answer, query, given in zip(answers, each, ids, strict=True):
            meta_info = answer["meta_info"]
            answer["lenvm"] = describe_input(meta_info, query.candidate_ids, gamma, max_length, given)
            for key in ("input_token_logprobs", "output_token_logprobs", VALUE_KEY, CANDIDATES_KEY):
                meta_info.pop(key, None)
        yield event


def _part_prefix_caches(obj: Any) -> None:
    """Give requests that do not need the LenVM a namespace of their own in SGLang's prefix cache.

    Those of a session share their keys and values without it, and an embedding request has no such cache.
    """
    if not hasattr(obj, "extra_key") or obj.session_params is not None:
        return
    apart = [not needs_lenvm(params.get("custom_params")) for params in _each(obj.sampling_params)]
    given = obj.extra_key
    keys = given if isinstance(given, list) else [given] * len(apart)
    if any(WITHOUT_LENVM in (key or "") for key in keys):
        raise LengthControlError("extra_key", f"must not contain {WITHOUT_LENVM!r}")
    if not any(apart):
        return
    if len(apart) == 1:
        apart = apart * len(keys)
    if len(apart) != len(keys):
        raise LengthControlError("extra_key", "must be one key, or one for each input")
    parted = [f"{key or ''}|{WITHOUT_LENVM}" if own else key for key, own in zip(keys, apart, strict=True)]
    obj.extra_key = parted if isinstance(given, list) or len(parted) > 1 else parted[0]


def _shown_values(sampling_params: Any) -> Callable[[int], bool]:
    """Whether the answer of an index shows values: the ``n`` answers of an input follow each other."""
    each = _each(sampling_params)
    if len(each) < 2:  # one for all inputs
        shown = all(wants_values(params.get("custom_params")) for params in each)
        return lambda _: shown
    wanted = [wants_values(params.get("custom_params")) for params in each for _ in range(params.get("n") or 1)]
    return wanted.__getitem__


async def _observe_events(
    events: AsyncGenerator[Any, None], builder: ResponseBuilder | None, shows_values: Callable[[int], bool]
) -> AsyncGenerator[Any, None]:
    """Drops what an answer did not ask for: SGLang gives every row of a batch what one of them asked for."""
    async for event in events:
        for index, answer in enumerate(_answers(event), start=0 if isinstance(event, list) else event.get("index", 0)):
            hidden = (CANDIDATES_KEY,) if shows_values(index) else (CANDIDATES_KEY, VALUE_KEY, PREDICTION_KEY)
            for key in hidden:
                answer["meta_info"].pop(key, None)
        if builder is not None:
            builder.observe(event.get("index", 0), event["meta_info"])
        yield event


def _answers(event: Any) -> list[dict[str, Any]]:
    return event if isinstance(event, list) else [event]


async def _splice(chunks: AsyncGenerator[str, None], builder: ResponseBuilder) -> AsyncGenerator[str, None]:
    async for chunk in chunks:
        match = _CHOICE.search(chunk)
        if match is None:
            yield chunk
            continue
        lenvm = builder.take(int(match[1]), finishing=_FINISHING in chunk)
        if lenvm:
            encoded = orjson.dumps(lenvm).decode()
            chunk = f'{chunk[: match.end()]}"lenvm":{encoded},{chunk[match.end() :]}'
        yield chunk
