"""``/v1/length/values``: from a client's body to SGLang's own ``/generate``, and from its answers to one response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from lenvm_runtime.length_control import ValueQuery

from .config import GatewayConfig
from .errors import EngineBroken, InvalidField
from .fields import VALUES
from .validation import EngineProfile, read_body, require

ENGINE_PATH = "/generate"


@dataclass(frozen=True, slots=True)
class ValueRequest:
    """A validated request for the values of ``inputs``: all texts or all lists of token ids.

    ``candidates``: the next tokens to value after each input, one list an input; None: none were asked for.
    """

    model: str
    inputs: tuple[str | list[int], ...]
    candidates: tuple[tuple[int, ...], ...] | None

    def engine_body(self) -> bytes:
        """The JSON that SGLang gets: one greedy token for each input, which is dropped."""
        kind = "text" if isinstance(self.inputs[0], str) else "input_ids"
        sampling = [
            {"max_new_tokens": 1, "temperature": 0, "custom_params": ValueQuery(candidates).to_custom_params()}
            for candidates in self.candidates or ((),) * len(self.inputs)
        ]
        return orjson.dumps({kind: self.inputs, "sampling_params": sampling})

    def response(self, answers: object, profile: EngineProfile) -> dict[str, Any]:
        """The client's answer from the engine's. Raises EngineBroken where that holds no values."""
        try:
            if not isinstance(answers, list) or len(answers) != len(self.inputs):
                raise TypeError
            data = [self._describe(index, answer["lenvm"]) for index, answer in enumerate(answers)]
        except (KeyError, TypeError):
            raise EngineBroken("The engine's answer has no length values") from None
        num_tokens = sum(len(one["token_ids"]) for one in data)
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return {"object": "list", "model": profile.model_id, "data": data, "usage": usage}

    def _describe(self, index: int, lenvm: Mapping[str, Any]) -> dict[str, Any]:
        names = ("token_ids", "values", "remaining", *(["candidates"] if self.candidates is not None else []))
        return {"object": "length.values", "index": index, **{name: lenvm[name] for name in names}}


def read_value_request(raw: bytes, config: GatewayConfig) -> ValueRequest:
    """Validate a body of ``/v1/length/values``, as far as that needs no engine."""
    body = read_body(VALUES, raw)
    require(body, "model", "input")
    given = body["input"]
    is_single = isinstance(given, str) or isinstance(given[0], int)
    inputs = (given,) if is_single else tuple(given)
    if len(inputs) > config.max_choices:
        raise InvalidField("input", f"must be at most {config.max_choices} inputs")
    return ValueRequest(body["model"], inputs, _read_candidates(body.get("candidates"), is_single, len(inputs)))


def _read_candidates(given: list[Any] | None, is_single: bool, num_inputs: int) -> tuple[tuple[int, ...], ...] | None:
    if given is None:
        return None
    is_flat = isinstance(given[0], int)
    if is_flat and not is_single:
        raise InvalidField("candidates", "must be one list of token ids for each input")
    candidates = (given,) if is_flat else given
    if len(candidates) != num_inputs:
        raise InvalidField("candidates", f"must be {num_inputs} lists of token ids, one for each input")
    return tuple(tuple(ids) for ids in candidates)
