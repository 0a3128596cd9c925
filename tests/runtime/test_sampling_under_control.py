"""SGLang's penalties, biases and endings under control: candidates are what its own functions leave of the logits."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lenvm_kernels.candidates import Candidates
from lenvm_runtime.control_batch import DEFAULT_CANDIDATES, ControlBatch
from lenvm_runtime.length_control import LengthControl
from lenvm_runtime.steering import steer_rows

VOCABULARY = 200
EOS = 3
CONTROL = LengthControl("tilt", beta=1.0)


@dataclass
class Batch:
    """What SGLang's penalizers read of a ScheduleBatch."""

    reqs: list[Any]
    device: str = "cpu"


def sampling_info(rows: list[dict[str, Any]], output: list[list[int]]) -> Any:
    """SGLang's own SamplingBatchInfo of rows with these parameters, after these output tokens."""
    from sglang.srt.sampling import penaltylib
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
    from sglang.srt.sampling.sampling_params import SamplingParams

    tokenizer = SimpleNamespace(eos_token_id=EOS, additional_stop_token_ids=None)
    params = [SamplingParams(**row) for row in rows]
    batch = Batch([SimpleNamespace(sampling_params=one, eos_token_ids={EOS}, tokenizer=tokenizer) for one in params])
    penalizers = {
        penaltylib.BatchedFrequencyPenalizer,
        penaltylib.BatchedMinNewTokensPenalizer,
        penaltylib.BatchedPresencePenalizer,
        penaltylib.BatchedRepetitionPenalizer,
    }
    orchestrator = penaltylib.BatchedPenalizerOrchestrator(VOCABULARY, batch, penalizers)
    for tokens in zip(*output, strict=True):
        orchestrator.cumulate_output_tokens(torch.tensor(tokens))
    bias = torch.zeros(len(rows), VOCABULARY)
    for row, one in enumerate(params):
        for token, value in (one.logit_bias or {}).items():
            bias[row, int(token)] = value
    return SamplingBatchInfo(
        temperatures=torch.tensor([[one.temperature] for one in params]),
        top_ps=torch.tensor([one.top_p for one in params]),
        top_ks=torch.tensor([one.top_k for one in params]),
        min_ps=torch.tensor([one.min_p for one in params]),
        is_all_greedy=False,
        is_any_greedy=False,
        need_top_p_sampling=True,
        need_top_k_sampling=True,
        need_min_p_sampling=True,
        vocab_size=VOCABULARY,
        penalizer_orchestrator=orchestrator,
        logit_bias=bias,
        device="cpu",
    )


def candidates_of(
    rows: list[dict[str, Any]], output: list[list[int]], logits: Tensor, controls: list[LengthControl | None]
) -> tuple[Candidates, Tensor]:
    """The candidates that controlled rows are steered over, and the logits that SGLang's sampler gets in the end."""
    info = sampling_info(rows, output)
    logits = logits.clone()
    info.apply_logits_bias(logits)
    ignore_eos = [row.get("ignore_eos", False) for row in rows]
    stops = [row.get("stop_token_ids") for row in rows]
    top_ks, asked = info.top_ks.tolist(), [row.get("top_k") for row in rows]
    control = ControlBatch.build(controls, [4] * len(rows), top_ks, "cpu", ignore_eos, stops, asked)
    assert control is not None
    generated = torch.full((len(rows),), len(output[0]))
    kept: list[Candidates] = []

    def reweigh(candidates: Candidates) -> tuple[Tensor, Tensor]:
        kept.append(candidates)
        return torch.full_like(candidates.logprobs, -0.5), candidates.logprobs

    no_closing = torch.zeros(len(rows), dtype=torch.int64), torch.zeros(VOCABULARY, dtype=torch.bool)
    guided = control.guided_rows(generated, torch.ones(len(rows)), *no_closing)
    steer_rows(logits, control, guided, info, torch.tensor([EOS]), reweigh)
    return kept[0], logits


def penalized(logits: Tensor, tokens: list[int], row: dict[str, Any]) -> Tensor:
    """The definition, token by token."""
    logits = logits.clone()
    for token in set(tokens):
        logits[token] -= row.get("frequency_penalty", 0.0) * tokens.count(token) + row.get("presence_penalty", 0.0)
        repeated = row.get("repetition_penalty", 1.0)
        logits[token] = logits[token] * repeated if logits[token] < 0 else logits[token] / repeated
    for token, bias in row.get("logit_bias", {}).items():
        logits[int(token)] += bias
    return logits


ROWS: list[dict[str, Any]] = [
    {"frequency_penalty": 1.5},
    {"presence_penalty": -1.0, "top_k": 9},
    {"repetition_penalty": 1.7, "temperature": 0.6},
    {"logit_bias": {"11": 9.0, "12": -float("inf")}},
    {"frequency_penalty": 0.5, "repetition_penalty": 0.7, "logit_bias": {"13": 4.0}, "min_p": 0.02},
    {},
]


@pytest.mark.parametrize("controlled", [[0, 1, 2, 3, 4, 5], [1, 3, 4]])
def test_candidates_have_the_chances_of_penalized_and_biased_logits(controlled: list[int]) -> None:
    logits = 2 * torch.randn(len(ROWS), VOCABULARY, generator=torch.Generator().manual_seed(0))
    output = [[11, 12, 11, 40 + row] for row in range(len(ROWS))]
    controls = [CONTROL if row in controlled else None for row in range(len(ROWS))]
    candidates, sampled = candidates_of(ROWS, output, logits, controls)
    for row, (params, tokens) in enumerate(zip(ROWS, output, strict=True)):
        temperature = params.get("temperature", 1.0)
        wanted = penalized(logits[row], tokens, params)
        if row not in controlled:
            torch.testing.assert_close(sampled[row], wanted)
            continue
        place = controlled.index(row)
        chosen = candidates.logprobs[place] > -torch.inf
        ids = candidates.ids[place][chosen]
        among = torch.full_like(wanted, -torch.inf).index_copy(0, ids, wanted[ids])
        torch.testing.assert_close(
            torch.softmax(sampled[row] / temperature, -1), torch.softmax(among / temperature, -1)
        )
        likeliest = wanted.index_fill(0, torch.tensor([EOS]), -torch.inf).topk(min(params.get("top_k", 8), 8)).indices
        assert set(likeliest.tolist()) <= set(ids.tolist()) or "min_p" in params
        assert 12 not in ids.tolist() or row != 3


def test_greedy_rows_have_the_candidates_that_their_top_k_allows() -> None:
    rows: list[dict[str, Any]] = [
        {"temperature": 0.0, "top_k": 5},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 1},
        {"temperature": 0.7, "top_k": 5},
    ]
    logits = torch.randn(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(0))
    control = LengthControl("at_least", target=90, strategy="hard")
    candidates, _ = candidates_of(rows, [[11]] * len(rows), logits, [control] * len(rows))
    chosen = [set(candidates.ids[row][candidates.logprobs[row] > -torch.inf].tolist()) for row in range(len(rows))]
    for row, number in enumerate((5, DEFAULT_CANDIDATES, 1, 5)):
        assert chosen[row] == set(logits[row].topk(number).indices.tolist())


def test_an_eos_that_min_tokens_forbids_is_no_candidate() -> None:
    rows = [{"min_new_tokens": 5}, {"min_new_tokens": 2}, {}]
    logits = torch.zeros(3, VOCABULARY)
    logits[:, EOS] = 5.0
    candidates, sampled = candidates_of(rows, [[7, 7, 7]] * 3, logits, [CONTROL] * 3)
    assert (candidates.logprobs[:, -1] > -torch.inf).tolist() == [False, True, True]
    assert (sampled[:, EOS] > -torch.inf).tolist() == [False, True, True]


def test_an_ignored_eos_is_no_candidate_in_its_row_alone() -> None:
    rows = [{"ignore_eos": True}, {}, {"ignore_eos": True}]
    logits = torch.zeros(3, VOCABULARY)
    logits[:, EOS] = 5.0
    logits[2] = -torch.inf
    logits[2, EOS] = 0.0  # a grammar that is at its end
    candidates, sampled = candidates_of(rows, [[7]] * 3, logits, [CONTROL] * 3)
    assert (candidates.logprobs[:, -1] > -torch.inf).tolist() == [False, True, True]
    torch.testing.assert_close(candidates.logprobs.exp().sum(-1), torch.ones(3))
    assert (sampled[:, EOS] > -torch.inf).tolist() == [False, True, True]


def test_a_stop_token_is_an_end_in_its_row_alone() -> None:
    """An end whatever its chance, forbidden as EOS is; a token like any in other rows, and with ignore_eos."""
    rows = [
        {"stop_token_ids": [40, 41]},
        {},
        {"stop_token_ids": [EOS, 42]},
        {"stop_token_ids": [40], "ignore_eos": True},
        {"stop_token_ids": [40], "min_new_tokens": 5},
    ]
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(3))
    logits[:, 40] = 5.0
    logits[:, 41] = logits[:, 42] = -20.0  # no candidates but as ends
    control = LengthControl("equal", target=9)
    together, sampled = candidates_of(rows, [[7]] * 5, logits, [control] * 5)

    def ids(columns: Tensor) -> list[set[int]]:
        columns = columns & (together.logprobs > -torch.inf)
        return [set(row[kept].tolist()) for row, kept in zip(together.ids, columns, strict=True)]

    assert ids(together.eos_mask) == [{EOS, 40, 41}, {EOS}, {EOS, 42}, set(), set()]
    assert [40 in row for row in ids(~together.eos_mask)] == [False, True, True, True, False]
    for row in range(5):
        one = slice(row, row + 1)
        _, alone = candidates_of(rows[one], [[7]], logits[one], [control])
        torch.testing.assert_close(sampled[row], alone[0])


def test_a_large_top_k_is_honoured_and_widens_no_other_row() -> None:
    rows = [{"top_k": 100}, {}, {"top_k": 5}, {"temperature": 0.0}]
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(1))
    logits[:, EOS] = -torch.inf
    together, _ = candidates_of(rows, [[7]] * 4, logits, [CONTROL] * 4)
    number = (together.logprobs > -torch.inf).sum(-1)
    assert number.tolist() == [100, DEFAULT_CANDIDATES, 5, DEFAULT_CANDIDATES]
    for row in range(4):
        one = slice(row, row + 1)
        alone, _ = candidates_of(rows[one], [[7]], logits[one], [CONTROL])
        width = number[row]
        torch.testing.assert_close(together.logprobs[row, :width], alone.logprobs[0, :width])
    assert together.ids.shape[1] == 101
