"""One step of the value model: which rows run, what they are worth, and that nothing waits for the device."""

from __future__ import annotations

import pytest
import torch

from host_reads import HostReads, StepBatch, StubRunner, closing_tokens, count_host_reads
from lenvm_kernels.candidate_limits import limit_candidates
from lenvm_kernels.candidates import TOP_K_ALL, Candidates, select_candidates
from lenvm_runtime.control_batch import ControlBatch
from lenvm_runtime.input_values import QueryBatch
from lenvm_runtime.length_control import LengthControl, ValueQuery
from lenvm_runtime.readers import Readers
from lenvm_runtime.response import CANDIDATES_KEY, VALUE_KEY
from lenvm_runtime.value_model.packing import StepRows, pack_step, read_candidates, split_requests
from lenvm_runtime.value_model.step import ValueGuide, ValueStep, scored_candidates

EOS = 2


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("guided", [[], [0], [1, 3], [0, 1, 2, 3]])
def test_packed_rows_are_those_of_a_loop(guided: list[int], padding: int) -> None:
    generator = torch.Generator().manual_seed(len(guided))
    num_reqs, num_candidates = 4, 5
    tokens, seq_lens = torch.tensor([10, 11, 12, 13]), torch.tensor([3, 1, 7, 4])
    pool_indices = torch.tensor([6, 0, 3, 2])
    slots = torch.randperm(80, generator=generator)[:num_reqs]
    ids = torch.randint(20, 90, (len(guided), num_candidates), generator=generator)
    scored = torch.rand(ids.shape, generator=generator) < 0.5
    bound = int(scored.sum()) + padding
    rows = pack_step(tokens, seq_lens, pool_indices, slots, torch.tensor(guided).long(), ids, scored, bound)

    expected, starts = [], [0]
    for request in range(num_reqs):
        expected.append((int(tokens[request]), int(seq_lens[request]) - 1))
        if request in guided:
            chosen = ids[guided.index(request)][scored[guided.index(request)]]
            expected += [(int(token), int(seq_lens[request])) for token in chosen]
        starts.append(len(expected))
    assert list(zip(rows.input_ids.tolist(), rows.positions.tolist(), strict=True)) == expected + [(0, 0)] * padding
    assert rows.q_starts.tolist() == starts
    assert rows.first_rows.tolist() == starts[:-1]
    assert rows.slots.tolist() == slots.tolist()
    assert rows.req_pool_indices.tolist() == pool_indices.tolist()

    values = -torch.arange(1.0, num_reqs + bound + 1)
    for row, (token_ids, is_scored) in enumerate(zip(ids.tolist(), scored.tolist(), strict=True)):
        for column, token in enumerate(token_ids):
            found = read_candidates(values, rows, scored)[row, column]
            if is_scored[column]:
                assert rows.input_ids[int(-found) - 1] == token
            else:
                assert found == 0


def no_closing(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Last tokens of rows in a vocabulary in which no token closes a sentence."""
    return torch.zeros(num_rows, dtype=torch.int64), torch.zeros(200, dtype=torch.bool)


def make_candidates(logprobs: list[list[float]]) -> Candidates:
    weights = torch.tensor(logprobs)
    ids = torch.arange(weights.shape[1]).expand_as(weights)
    return Candidates(ids, torch.log_softmax(weights, -1), ids == EOS)


def test_only_candidates_that_can_matter_are_scored() -> None:
    no = -torch.inf
    cases: list[tuple[LengthControl, list[float], int, list[bool]]] = [
        (LengthControl("tilt", beta=1.0), [0.0, -1.0, -1.0], 3, [True, True, False]),
        (LengthControl("tilt", beta=1.0), [0.0, no, -1.0], 3, [True, False, False]),
        (LengthControl("tilt", beta=1.0), [0.0, no, no], 3, [False, False, False]),  # one candidate
        (LengthControl("at_least", target=9), [0.0, -1.0, -1.0], 7, [True, True, False]),
        (LengthControl("at_least", target=9), [0.0, -1.0, -1.0], 8, [False, False, False]),  # met
        (LengthControl("at_least", target=9, min_value=-0.5), [0.0, -1.0, -1.0], 8, [True, True, False]),
        (LengthControl("tilt", beta=0.0, min_value=-0.5), [0.0, -1.0, -1.0], 8, [True, True, False]),
        (LengthControl("equal", target=9), [0.0, -1.0, -1.0], -4, [False, False, False]),  # a prompt's first chunk
        (LengthControl("equal", target=9, entropy_threshold=1.0), [0.0, -9.0, -9.0], 3, [False, False, False]),
    ]
    batch = ControlBatch.build([case[0] for case in cases], [0] * len(cases), [50] * len(cases), "cpu")
    assert batch is not None
    guided = batch.guided_rows(
        torch.tensor([case[2] for case in cases]), torch.ones(len(cases)), *no_closing(len(cases))
    )
    candidates = make_candidates([case[1] for case in cases])
    assert scored_candidates(candidates, guided).tolist() == [case[3] for case in cases]


def test_the_hosts_bound_holds_every_scored_candidate() -> None:
    """On an accelerator the rows of a step are as many as the requests' top-k allow, whatever is scored."""
    top_ks = [1, 5, 31, 32, 50, TOP_K_ALL] * 4
    control = ControlBatch.build([LengthControl("tilt", beta=1.0)] * len(top_ks), [0] * len(top_ks), top_ks, "cpu")
    assert control is not None
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(top_ks), 200, generator=generator)
    logits[:, EOS] += 3  # among the likeliest
    ones = torch.ones(len(top_ks))
    filters = torch.tensor(top_ks), torch.rand(len(top_ks), generator=generator) / 2 + 0.5, 0 * ones
    assert control.num_candidates == 50
    assert control.has_limits
    candidates = select_candidates(logits, ones, *filters, torch.tensor([EOS]), control.num_candidates, ones.bool())
    candidates = limit_candidates(candidates, control.max_rank, control.endless, ones.bool())
    scored = scored_candidates(candidates, control.guided_rows(ones, ones, *no_closing(len(ones))))
    assert (scored.sum(1) <= torch.tensor(control.max_candidates)).all()
    assert control.max_candidates[:6] == [32, 5, 31, 32, 50, 32]


@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_decode_step_reads_nothing_on_the_host(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert not count_host_reads(device=device)


def test_the_counter_sees_a_read() -> None:
    with HostReads() as reads:
        int(torch.ones(3).sum())
        torch.ones(3).nonzero()
    assert reads.counts == {"_local_scalar_dense": 1, "nonzero": 1}


def test_the_counter_sees_a_copy_that_waits() -> None:
    here, there = torch.ones(3), torch.ones(3, device="meta")
    with HostReads() as reads:
        here.to(torch.float64).to("cpu")
        here.to("meta", non_blocking=True)
        there.copy_(there)
        there.copy_(here, non_blocking=True)
    assert not reads.counts
    with HostReads() as reads:
        here.to("meta")
        there.copy_(here)
    assert reads.counts == {"_to_copy": 1, "copy_": 1}


@pytest.mark.parametrize("controls", [[None, None], [None, LengthControl("tilt", beta=1.0)]])
@pytest.mark.parametrize("prefilled", [False, True])
def test_the_value_model_runs_once_a_decode_step(controls: list[LengthControl | None], prefilled: bool) -> None:
    """After a prefill, whose own forward has given the states' values, only for candidates."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    num_reqs = len(controls)
    runner = StubRunner()
    guide = ValueGuide(runner, [EOS], closing_tokens("cpu"), 1000)  # type: ignore[arg-type]
    step = StepBatch(num_reqs, "cpu")
    step.batch.forward_mode = ForwardMode.EXTEND if prefilled else ForwardMode.DECODE
    step.batch.extend_seq_lens = torch.ones(num_reqs, dtype=torch.int64)
    control = ControlBatch.build(controls, [4] * num_reqs, [5] * num_reqs, "cpu")
    states = torch.full((num_reqs,), -0.1) if prefilled else None
    readers = Readers.build([True] * num_reqs, "cpu")
    ValueStep(guide, readers, control, QueryBatch(()), step.batch, states).steer(
        step.logits_output, step.sampling, step.batch.seq_lens - 1
    )
    assert runner.num_forwards == (control is not None if prefilled else 1)


class DeviceStep(ValueStep):
    """Bounds the candidates of each request by what the host knows, as on an accelerator; on a CPU they are counted."""

    def _max_candidates(self, _scored: torch.Tensor) -> list[int]:
        assert self.control is not None
        return [number for number in self.control.max_candidates if number]


class TokenRunner(StubRunner):
    """Values by token and position alone, as those of a model are by a row's own sequence."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device)
        self.num_rows: list[int] = []

    def step(self, rows: StepRows) -> torch.Tensor:
        self.num_rows.append(len(rows.input_ids))
        return -((rows.input_ids * 31 + rows.positions * 7) % 97 + 1).float() / 100


@pytest.mark.parametrize("prefilled", [False, True])
@pytest.mark.parametrize("step_type", [ValueStep, DeviceStep])
def test_a_step_in_several_forwards_is_the_step_in_one(step_type: type[ValueStep], prefilled: bool) -> None:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    logits, values, num_rows = [], [], []
    for max_rows in (10_000, 70):
        torch.manual_seed(0)
        runner, step = TokenRunner(), StepBatch(16, "cpu")
        guide = ValueGuide(runner, [EOS], closing_tokens("cpu"), 1000, max_rows)  # type: ignore[arg-type]
        step.batch.forward_mode = ForwardMode.EXTEND if prefilled else ForwardMode.DECODE
        step.batch.extend_seq_lens = torch.ones(16, dtype=torch.int64)
        states = torch.full((16,), -0.1) if prefilled else None
        step_type(guide, step.readers, step.control, QueryBatch(()), step.batch, states).steer(
            step.logits_output, step.sampling, step.batch.seq_lens - 1
        )
        logits.append(step.logits_output.next_token_logits)
        rows = step.logits_output.customized_info[VALUE_KEY]
        values.append([rows[row] for row in range(16)])
        num_rows.append(runner.num_rows)
    assert torch.equal(*logits)
    assert values[0] == values[1]
    assert len(num_rows[0]) == 1 < len(num_rows[1])
    assert max(num_rows[1]) <= 70 < num_rows[0][0]


@pytest.mark.parametrize("max_rows", [10_000, 70])
def test_only_rows_that_need_the_lenvm_run_and_what_they_get_depends_on_no_other(max_rows: int) -> None:
    def run(readers: Readers) -> tuple[torch.Tensor, list[float], int]:
        torch.manual_seed(0)
        runner, step = TokenRunner(), StepBatch(16, "cpu")
        guide = ValueGuide(runner, [EOS], closing_tokens("cpu"), 1000, max_rows)  # type: ignore[arg-type]
        ValueStep(guide, readers, step.control, QueryBatch(()), step.batch, None).steer(
            step.logits_output, step.sampling, step.batch.seq_lens - 1
        )
        values = step.logits_output.customized_info[VALUE_KEY]
        return step.logits_output.next_token_logits, [values[row] for row in range(16)], sum(runner.num_rows)

    some = StepBatch(16, "cpu").readers
    num_others = some.flags.count(False)
    assert num_others > 0
    logits, values, num_rows = run(some)
    expected_logits, expected, all_rows = run(Readers.build([True] * 16, "cpu"))
    assert torch.equal(logits, expected_logits)
    assert values == [value if reads else 0.0 for value, reads in zip(expected, some.flags, strict=True)]
    assert num_rows == all_rows - num_others


def test_a_query_costs_rows_of_its_own_candidates_alone() -> None:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    def run(queries: QueryBatch) -> tuple[list[list[float]], int]:
        runner, step = TokenRunner(), StepBatch(4, "cpu")
        guide = ValueGuide(runner, [EOS], closing_tokens("cpu"), 1000)  # type: ignore[arg-type]
        step.batch.forward_mode = ForwardMode.EXTEND
        step.batch.extend_seq_lens = torch.ones(4, dtype=torch.int64)
        ValueStep(guide, step.readers, None, queries, step.batch, torch.full((4,), -0.1)).steer(
            step.logits_output, step.sampling, step.batch.seq_lens - 1
        )
        answers = step.logits_output.customized_info[CANDIDATES_KEY]
        return [answers[row] for row in range(4)], sum(runner.num_rows)

    short, long = ValueQuery((5, EOS, 7)), ValueQuery(tuple(range(10, 90)))
    rows, num_rows = run(QueryBatch((None, short, long, ValueQuery())))
    assert num_rows == 1 + 3 + 1 + 80
    alone, _ = run(QueryBatch((None, short, None, None)))
    assert rows[1][:3] == alone[1][:3]
    assert alone[1][1] == 0.0
    assert rows[2] == run(QueryBatch((None, None, long, None)))[0][2]
    assert run(QueryBatch((None, long, long, None)))[1] == 2 * (1 + 80)


def test_readers_follow_the_batch() -> None:
    readers = Readers.build([True, False, True, True], "cpu")
    assert not readers.is_empty
    assert readers.find(torch.tensor([2, 3])).tolist() == [1, 2]
    assert readers.spread(torch.tensor([0.5, 0.25, 0.125])).tolist() == [0.5, 0.0, 0.25, 0.125]
    kept = readers.filter([3, 1])
    assert kept.flags == (True, False)
    assert kept.rows.tolist() == [0]
    assert kept.concat(readers).rows.tolist() == [0, 2, 4, 5]
    nobody = readers.filter([1])
    assert nobody.is_empty
    assert nobody.spread(torch.empty(0)).tolist() == [0.0]


def test_a_step_in_several_forwards_reads_nothing_on_the_host() -> None:
    runner, step = TokenRunner("meta"), StepBatch(16, "meta")
    guide = ValueGuide(runner, [EOS], closing_tokens("meta"), 1000, 70)  # type: ignore[arg-type]
    with HostReads() as reads:
        ValueStep(guide, step.readers, step.control, QueryBatch(()), step.batch, None).steer(
            step.logits_output, step.sampling, step.batch.seq_lens - 1
        )
    assert len(runner.num_rows) > 2
    assert not reads.counts


def test_requests_are_split_into_runs_of_at_most_so_many_rows() -> None:
    assert split_requests([], 9) == []
    assert split_requests([4, 3, 0, 20, 2, 2, 2], 9) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 7)]
