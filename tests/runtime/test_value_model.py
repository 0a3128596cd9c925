"""The value model on SGLang's slots: its values are those of a plain transformers forward on the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lenvm_kernels import torchvision_schema
from lenvm_kernels.checkpoint_files import CheckpointError

torchvision_schema.declare_if_missing()

from lenvm_runtime import compat  # noqa: E402
from lenvm_runtime.length_control import MAX_TOP_K  # noqa: E402
from lenvm_runtime.value_model.step_graphs import NUM_ROWS, StepGraphs, graph_sizes  # noqa: E402
from tiny_lenvm import offline_values, rename_weight, save_adapter, save_lenvm  # noqa: E402

PROMPTS = ([5, 17, 33, 8, 60, 21, 7], [40, 3, 9, 71])
CANDIDATES = torch.tensor([[11, 50, 90], [6, 12, 0]])
SCORED = torch.tensor([[True, True, True], [False, True, False]])
EMBEDDINGS = "model.embed_tokens.weight"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 2e-5 if DEVICE == "cpu" else 2e-3  # fp32 sums in another order; SGLang's Triton prefill multiplies in tf32


@pytest.fixture(
    params=["qwen2", "qwen2 lm_head only", "qwen2 untied", "qwen3", "qwen3 sharded", "llama", "adapter", "rslora"]
)
def lenvm(request: pytest.FixtureRequest, served_runner: Any, tmp_path: Path) -> SimpleNamespace:
    """A loaded value model beside its transformers twin."""
    family, _, variant = request.param.partition(" ")
    if family in ("adapter", "rslora"):
        base = Path(served_runner.server_args.model_path)
        model, head = save_adapter(tmp_path, base, use_rslora=family == "rslora")
    else:
        model, head = save_lenvm(
            tmp_path, family, tied=variant != "untied", max_shard_size="40KB" if variant == "sharded" else "1GB"
        )
    if variant == "lm_head only":
        rename_weight(tmp_path, EMBEDDINGS, "lm_head.weight")
    return SimpleNamespace(runner=load(tmp_path, served_runner), model=model, head=head)


def load(folder: Path, served_runner: Any) -> Any:
    from lenvm_runtime.value_model.runner import ValueModelRunner
    from lenvm_runtime.value_model.source import read_source

    runner = ValueModelRunner(read_source(folder), served_runner)
    runner.share_slots(served_runner)
    runner.build_attention()
    return runner


class Requests:
    """Two requests whose tokens lie at scattered slots of the served model's pools."""

    def __init__(self, runner: Any) -> None:
        self.slots = runner.req_to_token_pool.req_to_token
        self.rows = torch.tensor([4, 2], device=DEVICE)
        scattered = torch.randperm(400, generator=torch.Generator().manual_seed(0)).int() + 1
        for row, prompt, first in zip(self.rows, PROMPTS, (0, 100), strict=True):
            self.slots[row, : len(prompt)] = scattered[first : first + len(prompt)].to(DEVICE)

    def extend(self, begins: list[int], ends: list[int]) -> Any:
        """The batch of a prefill of the tokens begin .. end - 1 of each request."""
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

        spans = list(zip(self.rows, PROMPTS, begins, ends, strict=True))
        seq_lens, prefix_lens = torch.tensor(ends, device=DEVICE), torch.tensor(begins, device=DEVICE)
        tokens = [token for _, prompt, begin, end in spans for token in prompt[begin:end]]
        return ForwardBatch(
            forward_mode=ForwardMode.EXTEND,
            batch_size=len(spans),
            input_ids=torch.tensor(tokens, device=DEVICE),
            req_pool_indices=self.rows,
            seq_lens=seq_lens,
            out_cache_loc=torch.cat([self.slots[row, begin:end].long() for row, _, begin, end in spans]),
            seq_lens_sum=sum(ends),
            positions=torch.cat([torch.arange(begin, end, device=DEVICE) for *_, begin, end in spans]),
            extend_seq_lens=seq_lens - prefix_lens,
            extend_prefix_lens=prefix_lens,
            extend_prefix_lens_cpu=begins,
            extend_seq_lens_cpu=[end - begin for begin, end in zip(begins, ends, strict=True)],
        )

    def step(self, guided: Tensor, candidate_ids: Tensor, scored: Tensor) -> Any:
        """The rows of a step that consumes the last token of each prompt."""
        from lenvm_runtime.value_model.packing import pack_step

        last = torch.tensor([prompt[-1] for prompt in PROMPTS], device=DEVICE)
        lens = torch.tensor([len(prompt) for prompt in PROMPTS], device=DEVICE)
        slots = self.slots[self.rows, lens - 1]
        rows = (part.to(DEVICE) for part in (guided, candidate_ids, scored))
        return pack_step(last, lens, self.rows, slots, *rows, int(scored.sum()))


def test_values_of_states_and_candidates_equal_a_plain_forward(lenvm: SimpleNamespace) -> None:
    """Prefilled in two chunks, then one step that scores candidates."""
    requests = Requests(lenvm.runner)
    lenvm.runner.extend(requests.extend([0, 0], [3, 2]))
    states = lenvm.runner.extend(requests.extend([3, 2], [6, 3]))
    chunk = lenvm.runner.values(states[[2, 3]]).cpu()  # three tokens, then one
    expected = [
        offline_values(lenvm.model, lenvm.head, prompt[:end])[-1] for prompt, end in zip(PROMPTS, (6, 3), strict=True)
    ]
    torch.testing.assert_close(chunk, torch.stack(expected), atol=TOLERANCE, rtol=0)

    rows = requests.step(torch.tensor([0, 1]), CANDIDATES, SCORED)
    values, first_rows = lenvm.runner.step(rows).cpu(), rows.first_rows.cpu()
    states = [offline_values(lenvm.model, lenvm.head, prompt)[-1] for prompt in PROMPTS]
    torch.testing.assert_close(values[first_rows], torch.stack(states), atol=TOLERANCE, rtol=0)
    for request, column in SCORED.nonzero().tolist():
        expected_value = offline_values(lenvm.model, lenvm.head, [*PROMPTS[request], int(CANDIDATES[request, column])])[
            -1
        ]
        found = values[rows.candidate_rows[request, column]]
        torch.testing.assert_close(found, expected_value, atol=TOLERANCE, rtol=0)


def rerun(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """In place of a CUDA graph's capture: a replay writes its result where the capture's lies."""
    result = function()
    return lambda: result.copy_(function())


@pytest.mark.parametrize("sizes", [[(7, 2)], [(6, 2), (9, 3), (16, 16)], [(4, 2)]])
def test_a_captured_step_gives_the_values_of_the_step(
    served_runner: Any, tmp_path: Path, sizes: list[tuple[int, int]]
) -> None:
    """In a graph of the step's size or larger, if there is one; and its keys lie where the step's do."""
    save_lenvm(tmp_path, "llama")
    runner = load(tmp_path, served_runner)
    requests = Requests(runner)
    runner.extend(requests.extend([0, 0], [6, 3]))
    wide, narrow = (requests.step(torch.tensor([0, 1]), CANDIDATES, mask) for mask in (SCORED, SCORED & False))
    last_slots = wide.slots
    expected = {id(rows): runner.step(rows).clone() for rows in (wide, narrow)}
    cached = [buffer[last_slots].clone() for buffer in runner.token_to_kv_pool.k_buffer]
    with torch.inference_mode(), compat.graph_capture() if DEVICE == "cuda" else nullcontext(rerun) as capture:
        graphs = StepGraphs(runner._run_step, capture, sizes, DEVICE)
    for rows in (wide, narrow, wide):
        for buffer in runner.token_to_kv_pool.k_buffer:
            buffer[last_slots] = 0.0
        with torch.inference_mode():
            values = graphs.run(rows)
        if len(rows.input_ids) > max(num_rows for num_rows, _ in sizes):
            assert values is None
            continue
        torch.testing.assert_close(values, expected[id(rows)], atol=1e-5, rtol=0)
        for before, buffer in zip(cached, runner.token_to_kv_pool.k_buffer, strict=True):
            torch.testing.assert_close(buffer[last_slots], before, atol=1e-5, rtol=0)


def test_every_batch_finds_a_graph_with_few_idle_rows() -> None:
    sizes = graph_sizes(300, MAX_TOP_K)
    assert max(reqs for _, reqs in sizes) == 300
    for num_rows in range(1, NUM_ROWS[-1] + 1):
        for num_reqs in {min(num_rows, 300), min(-(-num_rows // 6), 300), -(-num_rows // 33)}:
            rows, _ = next(size for size in sizes if size[0] >= num_rows and size[1] >= num_reqs)
            assert rows <= max(2 * num_rows, num_rows + 8)
            assert rows <= 1.26 * num_rows or num_rows < 128


@pytest.mark.parametrize("max_reqs", [1, 2, 7, 15, 48])
@pytest.mark.parametrize("max_candidates", [0, 3, MAX_TOP_K])
def test_graphs_reach_as_far_as_the_steps(max_reqs: int, max_candidates: int) -> None:
    sizes = graph_sizes(max_reqs, max_candidates)
    largest = min(max_reqs * (1 + max_candidates), NUM_ROWS[-1])
    assert max(sizes) == (largest, min(max_reqs, largest))
    assert len(sizes) == len(set(sizes))
    for num_reqs in range(1, max_reqs + 1):
        for num_rows in range(num_reqs, min(num_reqs * (1 + max_candidates), largest) + 1):
            assert any(rows >= num_rows and reqs >= num_reqs for rows, reqs in sizes)


def test_the_graphs_are_those_of_the_engines_requests(
    served_runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lenvm_runtime.value_model import runner as module

    save_lenvm(tmp_path, "llama")
    runner = load(tmp_path, served_runner)
    monkeypatch.setattr(compat, "captures_decodes", lambda _: True)
    monkeypatch.setattr(compat, "graph_capture", nullcontext)
    monkeypatch.setattr(module, "StepGraphs", lambda _step, _capture, sizes, _device: sizes)
    runner.capture_steps()
    assert runner._step_graphs == graph_sizes(served_runner.max_running_requests, MAX_TOP_K)


def test_candidates_leave_nothing_behind(served_runner: Any, tmp_path: Path) -> None:
    """A step with candidates caches what a step without them caches; the served model's buffers stay."""
    save_lenvm(tmp_path, "llama")
    runner = load(tmp_path, served_runner)
    requests = Requests(runner)
    runner.extend(requests.extend([0, 0], [6, 3]))
    served = [buffer.clone() for buffer in served_runner.token_to_kv_pool.k_buffer]
    nothing = torch.empty(0, 1, dtype=torch.int64)
    runner.step(requests.step(nothing[:, 0], nothing, nothing.bool()))
    plain = [buffer.clone() for buffer in runner.token_to_kv_pool.k_buffer]
    runner.step(requests.step(torch.tensor([0, 1]), CANDIDATES, SCORED))
    for before, after in zip(plain, runner.token_to_kv_pool.k_buffer, strict=True):
        torch.testing.assert_close(after, before, atol=TOLERANCE, rtol=0)
    for before, after in zip(served, served_runner.token_to_kv_pool.k_buffer, strict=True):
        assert torch.equal(after, before)


def test_kv_bytes_are_those_of_the_buffers(served_runner: Any, tmp_path: Path) -> None:
    save_lenvm(tmp_path, "qwen3")
    runner = load(tmp_path, served_runner)
    pool = runner.token_to_kv_pool
    num_slots = served_runner.token_to_kv_pool.size + served_runner.page_size
    assert kv_bytes(pool) == num_slots * runner.kv_bytes_per_token


def kv_bytes(pool: Any) -> int:
    return sum(buffer.nbytes for buffer in [*pool.k_buffer, *pool.v_buffer])


def test_sglangs_memory_budget_counts_both_models(served_runner: Any, tmp_path: Path) -> None:
    from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator

    from lenvm_runtime import compat
    from lenvm_runtime.value_model.hooks import ValueModelHooks
    from lenvm_runtime.value_model.source import read_source

    save_lenvm(tmp_path, "qwen3")
    hooks = ValueModelHooks(read_source(tmp_path), 1000)
    worker = SimpleNamespace(model_runner=served_runner)
    scheduler = SimpleNamespace(tp_worker=worker, model_config=served_runner.model_config, tokenizer=None)
    hooks._load(None, scheduler)
    hooks._share_slots(None, scheduler)
    assert compat.KV_BYTES_PER_TOKEN.endswith("DefaultPoolConfigurator._compute_cell_size")
    configurator = DefaultPoolConfigurator(served_runner.kv_cache_configurator)
    served = configurator._compute_cell_size(served_runner.kv_cache_configurator, num_layers=2)
    counted = hooks._count_kv_bytes(served, configurator, served_runner.kv_cache_configurator, 2)
    both = kv_bytes(served_runner.token_to_kv_pool) + kv_bytes(hooks._guide.runner.token_to_kv_pool)
    assert counted * (served_runner.token_to_kv_pool.size + served_runner.page_size) == both


def test_the_served_models_configuration_comes_back(served_runner: Any, tmp_path: Path) -> None:
    from sglang.srt.runtime_context import get_model

    save_lenvm(tmp_path, "qwen2")
    load(tmp_path, served_runner)
    assert get_model().model_path == served_runner.server_args.model_path


@pytest.mark.parametrize(
    ("tied", "weight", "message"),
    [
        (True, EMBEDDINGS, "no model.embed_tokens.weight"),
        (True, "model.layers.1.mlp.up_proj.weight", "do not fill model.layers.1.mlp.gate_up_proj.weight"),
        (False, "model.norm.weight", "do not fill model.norm.weight"),
    ],
)
def test_a_missing_weight_is_named(served_runner: Any, tmp_path: Path, tied: bool, weight: str, message: str) -> None:
    save_lenvm(tmp_path, "llama", tied=tied)
    rename_weight(tmp_path, weight, None)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, served_runner)


def test_another_tokenizer_is_refused(served_runner: Any, tmp_path: Path) -> None:
    save_lenvm(tmp_path, "llama")
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"w7"', '"x7"'))
    with pytest.raises(CheckpointError, match="'w7' is 7 there, the LenVM has no such token"):
        load(tmp_path, served_runner)


def test_an_option_that_does_not_work_with_it_is_named(served_runner: Any) -> None:
    from lenvm_runtime import compat

    server_args = SimpleNamespace(**compat._UNSUPPORTED_WITH_VALUE_MODEL)
    compat.check_value_model_supported(server_args)
    server_args.enable_dp_attention = True
    with pytest.raises(CheckpointError, match="--enable-dp-attention"):
        compat.check_value_model_supported(server_args)


def test_an_option_that_does_not_work_with_a_head_is_named() -> None:
    server_args = SimpleNamespace(**compat._UNSUPPORTED_WITH_HEAD)
    compat.check_head_supported(server_args)
    server_args.speculative_algorithm = "EAGLE"
    with pytest.raises(CheckpointError, match="--speculative-algorithm EAGLE: does not work with a LenVM head"):
        compat.check_head_supported(server_args)


@pytest.mark.parametrize(
    ("field", "switch"),
    [("use_hnd", "SGLANG_USE_HND_KVCACHE"), ("post_capture_active", "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING")],
)
def test_a_kv_pool_of_another_form_is_refused(
    served_runner: Any, monkeypatch: pytest.MonkeyPatch, field: str, switch: str
) -> None:
    compat.check_plain_pool(served_runner)
    monkeypatch.setattr(served_runner.token_to_kv_pool, field, True)
    with pytest.raises(CheckpointError, match=switch):
        compat.check_plain_pool(served_runner)


def test_a_prefix_cache_without_keys_apart_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_EXPERIMENTAL_CPP_RADIX_TREE", "1")
    with pytest.raises(CheckpointError, match="SGLANG_EXPERIMENTAL_CPP_RADIX_TREE"):
        compat.check_value_model_supported(SimpleNamespace(**compat._UNSUPPORTED_WITH_VALUE_MODEL))
