"""Counts the operators that make the host wait for a device: those that read a tensor's content or copy it over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lenvm_kernels import torchvision_schema

torchvision_schema.declare_if_missing()

from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402

from lenvm_kernels.checkpoint import Head  # noqa: E402
from lenvm_kernels.heads import CandidateHead, HeadConfig, ValueHead  # noqa: E402
from lenvm_runtime.control_batch import ControlBatch, merge  # noqa: E402
from lenvm_runtime.engine_hooks import HeadStep  # noqa: E402
from lenvm_runtime.head_runner import HeadRunner  # noqa: E402
from lenvm_runtime.input_values import QueryBatch  # noqa: E402
from lenvm_runtime.length_control import LengthControl  # noqa: E402
from lenvm_runtime.readers import Readers  # noqa: E402
from lenvm_runtime.steering import last_token_ids  # noqa: E402
from lenvm_runtime.value_model.packing import StepRows  # noqa: E402
from lenvm_runtime.value_model.step import ValueGuide, ValueStep  # noqa: E402

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2")
COPIES = ("_to_copy", "copy_")
VOCABULARY = 1000
HEAD = HeadConfig("", 16, VOCABULARY, 0.997, 8, 1000, 8, (), (2,))
CONTROLS = (
    None,
    LengthControl("equal", target=40),
    LengthControl("at_least", target=90, strategy="hard"),
    LengthControl("at_most", target=20),
    LengthControl("tilt", beta=8.0, min_value=-0.5),
    LengthControl("target_mean", factor=0.8),
    LengthControl("scale", factor=0.5, entropy_threshold=0.3, max_mean_value=-0.1),
)


class HostReads(TorchDispatchMode):
    """While active, counts every operator of `READS` by name, and waiting copies from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        kwargs = kwargs or {}
        if name in READS or (name in COPIES and _waits(name, args, kwargs)):
            self.counts[name] += 1
        return func(*args, **kwargs)


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a copy goes to another device, and not asynchronously."""
    if name == "copy_":
        target, source = args[0].device, args[1].device
        return target != source and not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    target, source = torch.device(kwargs.get("device") or args[0].device), args[0].device
    return target != source and not kwargs.get("non_blocking", False)


class StubRunner:
    """In place of the value model's forward, which is SGLang's own code: every state is worth -0.1."""

    source = SimpleNamespace(gamma=0.997)

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.num_forwards = 0

    def step(self, rows: StepRows) -> Tensor:
        self.num_forwards += 1
        return torch.full((len(rows.input_ids),), -0.1, device=self.device)


class _DeviceStep(ValueStep):
    """Bounds the rows by what the host knows, as on an accelerator; on a CPU they are counted."""

    def _max_candidates(self, _scored: Tensor) -> list[int]:
        return [number for number in self.control.max_candidates if number] if self.control else []


@dataclass
class _SamplingFilters:
    """The part of SGLang's SamplingBatchInfo that steering reads."""

    temperatures: Tensor
    top_ks: Tensor
    top_ps: Tensor
    min_ps: Tensor


class StepBatch:
    """One decode step of a batch whose rows have every mode, some with candidates of their own number."""

    def __init__(self, num_reqs: int, device: str) -> None:
        controls = [CONTROLS[row % len(CONTROLS)] for row in range(num_reqs)]
        top_ks = [(5, 50, 1 << 30)[row % 3] for row in range(num_reqs)]
        ignore_eos = [row % 4 == 0 for row in range(num_reqs)]
        stops = [range(5, 5 + row % 3) for row in range(num_reqs)]
        control = ControlBatch.build(controls, [4] * num_reqs, top_ks, device, ignore_eos, stops)
        assert control is not None
        self.control = control
        self.readers = Readers.build([row % 5 != 0 or bool(controls[row]) for row in range(num_reqs)], device)
        self.num_reqs = num_reqs
        rows = torch.arange(num_reqs, device=device)
        self.batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            input_ids=rows,
            seq_lens=torch.full_like(rows, 9),
            req_pool_indices=rows,
            out_cache_loc=rows,
        )
        ones = torch.ones(num_reqs, device=device)
        self.sampling = _SamplingFilters(ones.unsqueeze(1), torch.tensor(top_ks, device=device), ones, 0.01 * ones)
        logits = torch.randn(num_reqs, VOCABULARY, device=device)
        self.logits_output = SimpleNamespace(next_token_logits=logits, customized_info=None)
        self.features = torch.randn(num_reqs, HEAD.hidden_size, device=device)
        self.kept = rows[1:]

    def run_value_model(self, guide: ValueGuide) -> None:
        """The step with a separate LenVM."""
        _DeviceStep(guide, self.readers, self.control, QueryBatch(()), self.batch, None).steer(
            self.logits_output, self.sampling, self.batch.seq_lens - 1
        )

    def run_head(self, runner: HeadRunner) -> None:
        """The step with a head on the served model."""
        runner.values(self.features)
        rows = self.batch.req_pool_indices
        step = HeadStep(runner, self.control, self.features, rows, last_token_ids(self.batch))
        step.steer(self.logits_output, self.sampling, self.batch.seq_lens - 1)

    def change(self) -> None:
        """What happens between steps: rows leave, others come."""
        kept = self.control.filter(range(1, self.num_reqs), self.kept)
        merge(kept, self.control, self.num_reqs - 1, self.num_reqs, self.kept.device)
        self.readers.filter(range(1, self.num_reqs)).concat(self.readers)


def closing_tokens(device: str) -> Tensor:
    """Some tokens that close a sentence: bool [vocabulary]."""
    return torch.arange(VOCABULARY, device=device) % 7 == 0


def make_head_runner(device: str) -> HeadRunner:
    """A head with random weights."""
    head = Head(HEAD, ValueHead(HEAD.hidden_size), CandidateHead(HEAD))
    embeddings = torch.randn(VOCABULARY, HEAD.hidden_size, device=device)
    return HeadRunner(head, [], embeddings, lambda rows: rows, HEAD.eos_token_ids, closing_tokens(device))


@torch.inference_mode()
def count_host_reads(num_reqs: int = 16, device: str = "cpu") -> Counter[str]:
    """Host reads in this project's code for a decode step with each kind of LenVM and a change of the batch.

    By operator. On the ``meta`` device, which stands for an accelerator, copies show too, and a read raises. On
    ``cuda`` whatever torch knows to wait for the GPU raises.
    """
    step = StepBatch(num_reqs, device)
    guide = ValueGuide(StubRunner(device), [2], closing_tokens(device), 1000)  # type: ignore[arg-type]
    runner = make_head_runner(device)

    def run() -> None:
        step.run_value_model(guide)
        step.run_head(runner)
        step.change()

    if device == "cuda":  # kernels are compiled, which waits
        run()
    with HostReads() as reads, _waits_raise(device):
        run()
    return reads.counts


@contextmanager
def _waits_raise(device: str) -> Iterator[None]:
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
