"""Every private name of SGLang that the plugin touches, and the versions it is known to work with.

Hooks go through SGLang's own registry (``sglang.srt.plugins.hook_registry``). The registry only logs
a hook that could not be applied, so ``check_hooks_applied`` is called when the sampler is made: a
missing seam stops the start.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from sglang.srt.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from sglang.srt.layers.sampler import register_sampler_backend
from sglang.srt.managers.utils import _async_d2h
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import Tensor, nn

from lenvm_kernels.checkpoint_files import CheckpointError
from lenvm_kernels.heads import HeadConfig

KNOWN_VERSIONS = ("0.5.17",)

STOCK_SAMPLING_BACKENDS = ("pytorch", "flashinfer")

LOGITS_FORWARD = "sglang.srt.layers.logits_processor.LogitsProcessor.forward"
SAMPLE = "sglang.srt.model_executor.model_runner.ModelRunner.sample"
LOAD_MODEL = "sglang.srt.model_executor.model_runner.ModelRunner.load_model"
COPY_TO_CPU = "sglang.srt.managers.utils.GenerationBatchResult.copy_to_cpu"
BATCH_BUILD = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.adjusted_from_schedule_batch"
BATCH_FILTER = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.adjusted_filter_batch"
BATCH_MERGE = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.adjusted_merge_batch"
BATCH_COPY = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.copy_for_forward"
GENERATE = "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request"
CHAT_STREAM = "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._generate_chat_stream"
CHAT_RESPONSE = "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._build_chat_response"
COMPLETION_STREAM = (
    "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion._generate_completion_stream"
)
COMPLETION_RESPONSE = (
    "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion._build_completion_response"
)

_registered: list[str] = []


class IncompatibleEngineError(RuntimeError):
    """SGLang is not a known version, or one of its seams is gone."""


def check_version() -> None:
    """Raise IncompatibleEngineError unless the installed SGLang is a known one."""
    found = version("sglang")
    if found not in KNOWN_VERSIONS:
        raise IncompatibleEngineError(f"SGLang {found} is not known to work; known: {', '.join(KNOWN_VERSIONS)}")


def register_sampler(backend: str, factory: Callable[[], Any]) -> None:
    """Make the sampler of a sampling backend. The stock names are kept: SGLang's sampler branches on them."""
    register_sampler_backend(backend, factory)


def after(target: str, hook: Callable[..., Any]) -> None:
    """Call ``hook(result, *args, **kwargs)`` after ``target``; None keeps the result."""
    _register(target, hook, HookType.AFTER)


def before(target: str, hook: Callable[..., Any]) -> None:
    """Call ``hook(*args, **kwargs)`` before ``target``."""
    _register(target, hook, HookType.BEFORE)


def around(target: str, hook: Callable[..., Any]) -> None:
    """Call ``hook(original, *args, **kwargs)`` in place of ``target``."""
    _register(target, hook, HookType.AROUND)


def check_hooks_applied() -> None:
    """Raise IncompatibleEngineError if SGLang could not apply one of our hooks."""
    missing = [target for target in _registered if target not in HookRegistry._patched]
    if missing:
        raise IncompatibleEngineError(f"SGLang did not apply the hooks on {', '.join(missing)}")


def decoder_layers(model: Any) -> nn.ModuleList:
    """The decoder layers of a causal language model of SGLang, each returning (hidden_states, residual)."""
    layers: nn.ModuleList = model.model.layers
    return layers


def input_embeddings(model: Any) -> Tensor:
    """This rank's rows of the input embeddings: [vocab / tp, hidden_size]."""
    weight: Tensor = model.model.embed_tokens.weight
    return weight


def gather_vocabulary(rows: Tensor) -> Tensor:
    """Join the vocabulary shards of all tensor-parallel ranks: [vocab / tp, n] -> [vocab, n]."""
    if get_tensor_model_parallel_world_size() == 1:
        return rows
    gathered: Tensor = tensor_model_parallel_all_gather(rows, dim=0)
    return gathered


def sampled_rows(metadata: Any) -> Tensor | None:
    """Indices of the states that are sampled from: the last of each extended sequence, or None for all."""
    if not metadata.forward_mode.is_extend():
        return None
    last: Tensor = metadata.extend_seq_lens.cumsum(0) - 1
    return last


def copy_to_host(tensor: Tensor) -> Tensor:
    """Begin SGLang's own asynchronous copy of a device tensor to pinned host memory."""
    host: Tensor = _async_d2h(tensor)
    return host


def check_head_fits(config: HeadConfig, model_config: Any) -> None:
    """Raise CheckpointError when a head was trained for a model of another shape."""
    for name, found in (("hidden_size", model_config.hidden_size), ("vocab_size", model_config.vocab_size)):
        expected = getattr(config, name)
        if expected != found:
            raise CheckpointError(
                f"the LenVM head is for {config.base_model} with {name} {expected}, the served model has {found}"
            )
    num_layers = model_config.num_hidden_layers
    if any(layer >= num_layers for layer in config.feature_layers):
        raise CheckpointError(f"the LenVM head reads layers {config.feature_layers}, the model has {num_layers}")


def _register(target: str, hook: Callable[..., Any], kind: HookType) -> None:
    HookRegistry.register(target, hook, kind)
    _registered.append(target)
