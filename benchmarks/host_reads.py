"""Counts the operators that make the host wait for a device: those that read a tensor's content or copy it over."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lenvm_kernels import torchvision_schema

torchvision_schema.declare_if_missing()

from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402

from lenvm_runtime.control_batch import ControlBatch  # noqa: E402
from lenvm_runtime.length_control import LengthControl  # noqa: E402
from lenvm_runtime.value_model.packing import StepRows  # noqa: E402
from lenvm_runtime.value_model.step import ValueGuide, ValueStep  # noqa: E402

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2")
CONTROLS = (
    None,
    LengthControl("equal", target=40),
    LengthControl("at_least", target=90, strategy="hard"),
    LengthControl("at_most", target=20),
    LengthControl("tilt", beta=8.0, min_value=-0.5),
    LengthControl("target_mean", factor=0.8),
    LengthControl("scale", factor=0.5, entropy_threshold=0.3),
)


class HostReads(TorchDispatchMode):
    """While active, counts every operator of `READS` by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class _StubRunner:
    """In place of the value model's forward, which is SGLang's own code: every state is worth -0.1."""

    device = "cpu"
    source = SimpleNamespace(gamma=0.997)

    def __init__(self, num_reqs: int) -> None:
        self.req_to_token_pool = SimpleNamespace(req_to_token=torch.zeros(num_reqs, 64, dtype=torch.int32))

    def step(self, rows: StepRows) -> Tensor:
        return torch.full((len(rows.input_ids),), -0.1)


class _DeviceStep(ValueStep):
    """Bounds the rows by what the host knows, as on an accelerator; on a CPU they are counted."""

    def _max_candidate_rows(self, _scored: Tensor) -> int:
        return sum(self.control.max_candidates) if self.control else 0


@dataclass
class _SamplingFilters:
    """The part of SGLang's SamplingBatchInfo that steering reads."""

    temperatures: Tensor
    top_ks: Tensor
    top_ps: Tensor
    min_ps: Tensor


def count_host_reads(num_reqs: int = 16, vocab: int = 1000) -> Counter[str]:
    """Host reads in this project's code for one decode step of a batch of every mode, by operator."""
    controls = [CONTROLS[row % len(CONTROLS)] for row in range(num_reqs)]
    top_ks = [5 if row % 2 else 1 << 30 for row in range(num_reqs)]
    guide = ValueGuide(_StubRunner(num_reqs), [2], torch.arange(vocab) % 7 == 0, 1000)  # type: ignore[arg-type]
    control = ControlBatch.build(controls, [4] * num_reqs, top_ks, "cpu")
    batch = SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        input_ids=torch.arange(num_reqs),
        seq_lens=torch.full((num_reqs,), 9),
        req_pool_indices=torch.arange(num_reqs),
    )
    ones = torch.ones(num_reqs)
    sampling = _SamplingFilters(ones.unsqueeze(1), torch.tensor(top_ks), ones, 0.01 * ones)
    logits = SimpleNamespace(next_token_logits=torch.randn(num_reqs, vocab), customized_info=None)
    with HostReads() as reads:
        _DeviceStep(guide, control, None, batch, None).steer(logits, sampling, batch.seq_lens - 1)
    return reads.counts
