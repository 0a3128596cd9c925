"""What our hooks on SGLang's API process take, refuse and answer, with events of a fake tokenizer manager."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from lenvm_kernels import torchvision_schema

torchvision_schema.declare_if_missing()

from lenvm_runtime import compat, response_hooks  # noqa: E402
from lenvm_runtime.length_control import LengthControl, LengthControlError, build_custom_params  # noqa: E402
from lenvm_runtime.response import CANDIDATES_KEY, VALUE_KEY, ResponseBuilder  # noqa: E402


def manager(preferred: dict[str, Any] | None = None) -> SimpleNamespace:
    server_args = SimpleNamespace(preferred_sampling_params=preferred)
    return SimpleNamespace(model_config=SimpleNamespace(vocab_size=96), server_args=server_args)


MANAGER = manager()
Generate = Callable[..., AsyncIterator[Any]]


def hooked(monkeypatch: pytest.MonkeyPatch, register: Callable[[], None]) -> Generate:
    """What `register` puts around `TokenizerManager.generate_request`."""
    hooks: dict[str, Generate] = {}
    monkeypatch.setattr(compat, "around", hooks.__setitem__)
    monkeypatch.setattr(compat, "after", lambda *_: None)
    register()
    return hooks[compat.GENERATE]


def request(lenvm: Any = None) -> Any:
    params = {} if lenvm is None else {"custom_params": {"lenvm": lenvm}}
    return SimpleNamespace(sampling_params=params, input_ids=[5, 6], extra_key=None, session_params=None)


def meta_info() -> dict[str, Any]:
    """Of a row that was prefilled beside a value query."""
    return {"id": "x", VALUE_KEY: [-0.5], CANDIDATES_KEY: [[-0.25, 0.0]]}


async def generate(*_: Any) -> AsyncIterator[Any]:
    yield {"meta_info": meta_info()}
    yield [{"meta_info": meta_info()}, {"meta_info": meta_info()}]  # a list of prompts


async def test_the_candidate_values_of_a_query_stay_out_of_its_neighbours_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    observe = hooked(monkeypatch, lambda: response_hooks.register(0.997, 2048, False))
    events = [event async for event in observe(generate, MANAGER, request({"values": True}))]
    kept = {"id": "x", VALUE_KEY: [-0.5]}
    assert events == [{"meta_info": kept}, [{"meta_info": kept}, {"meta_info": kept}]]


async def test_an_answer_without_values_shows_none_of_those_of_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    observe = hooked(monkeypatch, lambda: response_hooks.register(0.997, 2048, False))
    events = [event async for event in observe(generate, MANAGER, request({"values": False}))]
    assert events == [{"meta_info": {"id": "x"}}, [{"meta_info": {"id": "x"}}, {"meta_info": {"id": "x"}}]]


@pytest.mark.parametrize(
    ("params", "kept"),
    [({"temperature": 0.0, "top_k": 5}, 5), ({"top_k": -1}, None), ({}, None), ({"temperature": 0.7, "top_k": 1}, 1)],
)
async def test_the_top_k_of_a_request_under_control_outlives_sglangs_greedy_decoding(
    monkeypatch: pytest.MonkeyPatch, params: dict[str, Any], kept: int | None
) -> None:
    observe = hooked(monkeypatch, lambda: response_hooks.register(0.997, 2048, False))
    for lenvm in ({"mode": "tilt", "beta": 1.0}, {"values": True}):
        given = {"lenvm": lenvm, "lenvm_top_k": 99, "other": 1}
        asked = request()
        asked.sampling_params = {**params, "custom_params": given}
        assert [event async for event in observe(generate, MANAGER, asked)]
        if "mode" in lenvm:
            expected = {} if kept is None else {"lenvm_top_k": kept}
            assert asked.sampling_params["custom_params"] == {"lenvm": lenvm, "other": 1, **expected}
        assert given == {"lenvm": lenvm, "lenvm_top_k": 99, "other": 1}, "the request's own"


async def test_what_the_engine_prefers_counts_where_a_request_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    observe = hooked(monkeypatch, lambda: response_hooks.register(0.997, 2048, False))
    lenvm = {"mode": "tilt", "beta": 1.0}
    for own, kept in (({}, 5), ({"top_k": 7}, 7)):
        asked = request()
        asked.sampling_params = {"temperature": 0.0, "custom_params": {"lenvm": lenvm}, **own}
        assert [event async for event in observe(generate, manager({"top_k": 5}), asked)]
        assert asked.sampling_params["custom_params"] == {"lenvm": lenvm, "lenvm_top_k": kept}
    asked.sampling_params = {"custom_params": {"lenvm": lenvm}}
    with pytest.raises(ValueError, match="top_k"):
        observe(generate, manager({"top_k": 10_000}), asked)


APART = "|lenvm:without-values"
OFF, ON = ({"custom_params": {"lenvm": {"values": values}}} for values in (False, True))
GUIDED = {"custom_params": build_custom_params(LengthControl("tilt", beta=1.0), values=False)}
NEUTRAL = {"custom_params": build_custom_params(LengthControl("tilt", beta=0.0), values=False)}


@pytest.mark.parametrize(
    ("params", "given", "parted"),
    [
        (OFF, None, APART),
        (OFF, "salt", f"salt{APART}"),
        (OFF, ["a", "b"], [f"a{APART}", f"b{APART}"]),
        (NEUTRAL, None, APART),
        (ON, None, None),
        ({}, "salt", "salt"),
        (None, None, None),
        (GUIDED, None, None),
        ({"custom_params": {"lenvm": {"values": False, "input_values": True}}}, None, None),
        ([OFF, ON], None, [APART, None]),
        ([OFF, GUIDED], ["a", "b"], [f"a{APART}", "b"]),
        ([OFF, OFF], "salt", [f"salt{APART}"] * 2),
    ],
)
def test_requests_without_the_separate_lenvm_have_a_prefix_cache_of_their_own(
    monkeypatch: pytest.MonkeyPatch, params: Any, given: Any, parted: Any
) -> None:
    def keys(is_separate: bool, session: Any = None) -> Any:
        asked = SimpleNamespace(sampling_params=params, input_ids=None, extra_key=given, session_params=session)
        hooked(monkeypatch, lambda: response_hooks.register(0.997, 2048, is_separate))(generate, MANAGER, asked)
        return asked.extra_key

    assert keys(True) == parted
    assert keys(False) == given
    assert keys(True, {"id": "s"}) == given


@pytest.mark.parametrize("params", [OFF, ON])
def test_a_client_cannot_name_that_prefix_cache(monkeypatch: pytest.MonkeyPatch, params: Any) -> None:
    asked = SimpleNamespace(sampling_params=params, input_ids=None, extra_key=f"x{APART}", session_params=None)
    with pytest.raises(LengthControlError, match="extra_key: must not contain"):
        hooked(monkeypatch, lambda: response_hooks.register(0.997, 2048, True))(generate, MANAGER, asked)


def test_an_embedding_request_goes_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = SimpleNamespace(sampling_params={"max_new_tokens": 0}, input_ids=[5])
    hooked(monkeypatch, lambda: response_hooks.register(0.997, 2048, True))(generate, MANAGER, asked)
    assert not hasattr(asked, "extra_key")


async def test_each_answer_of_a_list_shows_what_its_own_request_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answers(*_: Any) -> AsyncIterator[Any]:
        yield [{"meta_info": meta_info()} for _ in range(4)]
        yield {"index": 1, "meta_info": meta_info()}
        yield {"index": 2, "meta_info": meta_info()}

    observe = hooked(monkeypatch, lambda: response_hooks.register(0.997, 2048, False))
    asked = SimpleNamespace(sampling_params=[{**ON, "n": 2}, {**OFF, "n": 2}], input_ids=None)
    batch, second, third = [event async for event in observe(answers, MANAGER, asked)]
    assert [VALUE_KEY in answer["meta_info"] for answer in batch] == [True, True, False, False]
    assert VALUE_KEY in second["meta_info"]
    assert VALUE_KEY not in third["meta_info"]


def test_as_many_cache_keys_as_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = SimpleNamespace(sampling_params=[OFF, ON], input_ids=None, extra_key=["a"], session_params=None)
    with pytest.raises(LengthControlError, match="extra_key: must be one key"):
        hooked(monkeypatch, lambda: response_hooks.register(0.997, 2048, True))(generate, MANAGER, asked)


async def test_a_choice_is_observed_and_keeps_the_values_of_a_neighbours_query_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def generate_choice(*_: Any) -> AsyncIterator[Any]:
        yield {"index": 1, "meta_info": meta_info()}

    observe = hooked(monkeypatch, lambda: response_hooks.register(0.997, 2048, False))
    asked = request({"values": True})
    asked.lenvm_builder = ResponseBuilder(None, 0.997, 2048)
    async for event in observe(generate_choice, MANAGER, asked):
        assert event == {"index": 1, "meta_info": {"id": "x", VALUE_KEY: [-0.5]}}
    assert asked.lenvm_builder.take(1, finishing=False)["values"] == [-0.5]


@pytest.mark.parametrize("with_lenvm", [True, False])
@pytest.mark.parametrize(
    ("lenvm", "field"),
    [
        ({"target": 40}, "custom_params.lenvm"),
        ({"values": True, "mod": "equal", "target": 40}, "custom_params.lenvm"),
        ({"candidates": [3]}, "custom_params.lenvm.candidates"),
        ("equal", "custom_params.lenvm"),
    ],
)
def test_what_nothing_reads_is_refused(
    monkeypatch: pytest.MonkeyPatch, with_lenvm: bool, lenvm: Any, field: str
) -> None:
    register = (
        (lambda: response_hooks.register(0.997, 2048, False)) if with_lenvm else response_hooks.register_without_lenvm
    )
    with pytest.raises(LengthControlError) as caught:
        hooked(monkeypatch, register)(generate, MANAGER, request(lenvm))
    assert caught.value.field.startswith(field)


@pytest.mark.parametrize(
    "lenvm", [build_custom_params(LengthControl("tilt", beta=1.0), True)["lenvm"], {"input_values": True}]
)
def test_an_engine_without_a_lenvm_refuses_what_needs_one(monkeypatch: pytest.MonkeyPatch, lenvm: Any) -> None:
    observe = hooked(monkeypatch, response_hooks.register_without_lenvm)
    with pytest.raises(LengthControlError, match=r"custom_params\.lenvm: .* without a LenVM"):
        observe(generate, MANAGER, request(lenvm))


@pytest.mark.parametrize("lenvm", [None, {}, {"values": False}, {"values": True}])
async def test_an_engine_without_a_lenvm_takes_other_requests(monkeypatch: pytest.MonkeyPatch, lenvm: Any) -> None:
    observe = hooked(monkeypatch, response_hooks.register_without_lenvm)
    assert len([event async for event in observe(generate, MANAGER, request(lenvm))]) == 2
