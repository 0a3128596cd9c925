"""Value queries: their place in the batch, in SGLang's input logprobs, and in the answer."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from lenvm_runtime.length_control import LengthControlError, ValueQuery
from lenvm_runtime.response import describe_input

GAMMA = 0.997


def test_an_answer_holds_the_value_of_every_prompt_token_and_candidate() -> None:
    """SGLang's list is shifted by one token: its first entry has no number, the last state's V is the output's."""
    meta_info = {
        "input_token_logprobs": [(None, 11, None), (-0.1, 12, None), (-0.2, 13, None)],
        "lenvm_value": [-0.3],
        "lenvm_candidate_values": [[-0.25, 0.0, -0.9]],  # padded to the batch's widest row
    }
    described = describe_input(meta_info, (7, 2), GAMMA, 2048)
    assert described["token_ids"] == [11, 12, 13]
    assert described["values"] == [-0.1, -0.2, -0.3]
    assert described["remaining"] == [35.1, 74.3, 118.7]
    assert described["candidates"] == [
        {"token_id": 7, "value": -0.25, "remaining": 95.8},
        {"token_id": 2, "value": 0.0, "remaining": 0.0},
    ]
    assert math.copysign(1.0, described["candidates"][1]["remaining"]) == 1.0  # 0, not -0


def test_ids_that_were_given_are_given_back() -> None:
    """SGLang reports the vocabulary's last id as 0 beside its log-probabilities."""
    meta_info = {"input_token_logprobs": [(None, 11, None), (-0.1, 0, None)], "lenvm_value": [-0.3]}
    assert describe_input(meta_info, (), GAMMA, 2048, [11, 49151])["token_ids"] == [11, 49151]


def test_an_answer_without_candidates() -> None:
    meta_info = {"input_token_logprobs": [(None, 11, None)], "lenvm_value": [-1.0]}
    assert describe_input(meta_info, (), GAMMA, 2048) == {
        "token_ids": [11],
        "values": [-1.0],
        "remaining": [2048.0],
        "candidates": [],
    }


@pytest.mark.parametrize("candidates", ["x", [1.5], [-1], 3])
def test_malformed_candidates_are_refused(candidates: object) -> None:
    with pytest.raises(LengthControlError, match="candidates"):
        ValueQuery.from_custom_params({"lenvm": {"input_values": True, "candidates": candidates}})


def test_queries_follow_their_rows() -> None:
    pytest.importorskip("sglang")
    from lenvm_runtime.input_values import QueryBatch

    first, second = ValueQuery((1,)), ValueQuery((2, 3))
    batch = QueryBatch((None, first, None)).concat(QueryBatch((second,)))
    assert batch.filter([3, 0]).queries == (second, None)
    assert batch.filter([0, 2]).is_empty
    assert not batch.is_empty


def test_rows_of_a_query_are_found_among_those_of_other_sequences() -> None:
    """SGLang's own example: 4, 5 and 6 extended tokens whose logprobs start at 0, 5 (none) and 3."""
    pytest.importorskip("sglang")
    from lenvm_runtime.compat import input_logprob_rows

    metadata = SimpleNamespace(extend_seq_lens_cpu=[4, 5, 6], extend_logprob_start_lens_cpu=[0, 5, 3])
    assert input_logprob_rows(metadata, [True, False, False]) == ([0, 1, 2, 3], [0, 1, 2, 3])
    assert input_logprob_rows(metadata, [False, True, True]) == ([12, 13, 14], [4, 5, 6])
