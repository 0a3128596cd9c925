"""What our hooks do around CUDA graphs and streams, whose order a CPU does not have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from lenvm_kernels import torchvision_schema

torchvision_schema.declare_if_missing()

from sglang.srt.layers.logits_processor import LogitsProcessorOutput  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402
from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import PrefillCudaGraphRunner  # noqa: E402

from lenvm_runtime import compat, engine_hooks  # noqa: E402
from lenvm_runtime.response import VALUE_KEY  # noqa: E402
from lenvm_runtime.value_model.hooks import ValueModelHooks  # noqa: E402


def test_the_values_of_a_prefill_in_a_cuda_graph_are_kept() -> None:
    spec_algorithm = SimpleNamespace(is_speculative=lambda: False)
    runner: Any = SimpleNamespace(
        model_runner=SimpleNamespace(spec_algorithm=spec_algorithm), _is_full_backend=False, raw_num_tokens=3, raw_bs=2
    )
    output = LogitsProcessorOutput(next_token_logits=torch.zeros(2, 5), customized_info={VALUE_KEY: torch.zeros(2)})
    trimmed = PrefillCudaGraphRunner._trim_logits_output(runner, output)
    assert trimmed is not output
    engine_hooks._keep_values(trimmed, runner, output)
    assert trimmed.customized_info is output.customized_info


def test_values_on_their_way_to_the_host_are_not_those_of_the_next_replay() -> None:
    static = torch.tensor([-0.1, -0.2, -0.9])  # two rows and a graph's padding
    info = {VALUE_KEY: static, engine_hooks._FEATURES_KEY: torch.zeros(3, 4)}
    batch = SimpleNamespace(
        req_pool_indices=torch.tensor([4, 7]), sampling_info=SimpleNamespace(), forward_mode=ForwardMode.DECODE
    )
    output = SimpleNamespace(customized_info=info)
    engine_hooks._prepare_sampling(SimpleNamespace(), output, batch)
    static.fill_(-0.5)
    rows = output.customized_info[VALUE_KEY]
    assert [round(rows[row], 6) for row in range(2)] == [-0.1, -0.2]
    assert output.customized_info.keys() == {VALUE_KEY}


def test_the_request_table_is_held_until_the_value_model_has_run() -> None:
    """Of a decode step; and when its sampling was delayed for a grammar, on the scheduler's stream."""
    served = SimpleNamespace(war_fastpath_read_done_event="taken before the step has read the table")
    hooks = ValueModelHooks(SimpleNamespace(), 1000)  # type: ignore[arg-type]
    hooks._extend(None, served, SimpleNamespace(forward_mode=ForwardMode.DECODE))
    assert served.war_fastpath_read_done_event is None

    waited: list[str] = []
    scheduler = SimpleNamespace(
        enable_overlap=True,
        device="cuda",
        schedule_stream=SimpleNamespace(wait_stream=waited.append),
        forward_stream="forward",
    )
    compat.hold_request_table_of_delayed_sample(None, scheduler, None, None)
    scheduler.device = "cpu"
    compat.hold_request_table_of_delayed_sample(None, scheduler, None, None)
    assert waited == ["forward"]
