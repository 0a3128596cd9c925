"""What our hooks do around CUDA graphs and streams, whose order a CPU does not have, and around retractions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lenvm_kernels import torchvision_schema

torchvision_schema.declare_if_missing()

from sglang.srt.layers.logits_processor import LogitsProcessorOutput  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402
from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import PrefillCudaGraphRunner  # noqa: E402

from lenvm_kernels.length_control import Mode, Strategy  # noqa: E402
from lenvm_kernels.value_bound import NO_MIN_VALUE  # noqa: E402
from lenvm_runtime import compat, engine_hooks  # noqa: E402
from lenvm_runtime.length_control import LengthControl, build_custom_params  # noqa: E402
from lenvm_runtime.readers import Readers  # noqa: E402
from lenvm_runtime.response import PREDICTION_KEY, VALUE_KEY  # noqa: E402
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
    for reads in (False, True):
        sampling = SimpleNamespace(lenvm_readers=Readers.build([reads], "cpu"))
        hooks._extend(None, served, SimpleNamespace(forward_mode=ForwardMode.DECODE, sampling_info=sampling))
        assert (served.war_fastpath_read_done_event is None) == reads

    events: list[str] = []
    scheduler = SimpleNamespace(
        enable_overlap=True,
        device="cuda",
        schedule_stream=SimpleNamespace(wait_stream=events.append),
        forward_stream="forward",
    )

    def launch(_scheduler: Any, result: Any, _batch: Any) -> None:
        events.append("sampled")
        if result is not None:
            result.delay_sample_func = None

    def iteration(result: Any) -> list[str]:
        events.clear()
        compat.hold_request_table_of_delayed_sample(launch, scheduler, result, None)
        return list(events)

    delayed = SimpleNamespace(delay_sample_func=lambda: None)
    assert iteration(delayed) == ["sampled", "forward"]
    assert iteration(delayed) == iteration(None) == ["sampled"], "nothing was delayed"
    scheduler.device = "cpu"
    assert iteration(SimpleNamespace(delay_sample_func=lambda: None)) == ["sampled"]


def request(control: LengthControl, predictions: list[list[float]] | None) -> Any:
    """What `_build_control` reads of a request of SGLang's, whose results so far hold these predictions."""
    params = build_custom_params(control, values=True)
    sampling = SimpleNamespace(custom_params=params, top_k=-1, ignore_eos=False, stop_token_ids=None)
    info = None if predictions is None else {VALUE_KEY: [-0.5], PREDICTION_KEY: predictions}
    return SimpleNamespace(sampling_params=sampling, origin_input_ids=[5, 6], customized_info=info, extra_key=None)


@pytest.mark.parametrize("key", [None, "salt", "|lenvm:without-values", "salt|lenvm:without-valueslora"])
@pytest.mark.parametrize("values", [False, True])
def test_the_lenvm_runs_for_all_but_those_that_lie_apart_in_the_prefix_cache(key: str | None, values: bool) -> None:
    params = SimpleNamespace(custom_params=build_custom_params(None, values))
    reads = compat.needs_lenvm(SimpleNamespace(sampling_params=params, extra_key=key))
    assert reads == (values or "without-values" not in (key or ""))


def test_a_retracted_scale_row_keeps_the_target_of_its_first_prefill() -> None:
    """SGLang keeps a request's results over a retraction, and builds its row anew when it is prefilled again."""
    scale = LengthControl("scale", factor=0.5, strategy="hard", min_value=-0.25)
    first = [[81.0, 9.0, 300.0]]
    reqs = [
        request(scale, first),
        request(scale, [*first, [7.0, 1.0, 9.0]]),  # retracted twice
        request(scale, [[0.5, 1.0, 1.0]]),
        request(scale, None),
        request(LengthControl("target_mean", factor=0.5, scaling="length"), first),
    ]
    info = SimpleNamespace(device="cpu")
    engine_hooks._build_control(None, info, SimpleNamespace(reqs=reqs), 96)
    generated, slot_targets = torch.ones(5), torch.full((5,), 999.0)  # left in the slots by other requests
    no_closing = torch.zeros(5, dtype=torch.int64), torch.zeros(96, dtype=torch.bool)
    rows = info.lenvm_control.guided_rows(generated, slot_targets, *no_closing)
    assert rows.target.tolist() == [40.5, 40.5, 1.0, 999.0, 1.0]
    assert rows.mode.tolist() == [Mode.EQUAL] * 4 + [Mode.MEAN_LENGTH_FACTOR]
    assert rows.strategy.tolist() == [Strategy.HARD] * 4 + [Strategy.NATURAL]
    assert rows.min_value.tolist() == [-0.25] * 4 + [NO_MIN_VALUE]
