"""Every private name of SGLang that the plugin touches, and the versions it is known to work with.

Hooks go through SGLang's own registry (``sglang.srt.plugins.hook_registry``). The registry only logs
a hook that could not be applied, so ``check_hooks_applied`` is called when the sampler is made: a
missing seam stops the start.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

import torch
from sglang.srt import platforms
from sglang.srt.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from sglang.srt.environ import envs
from sglang.srt.layers.sampler import SGLANG_RETURN_ORIGINAL_LOGPROB, register_sampler_backend
from sglang.srt.managers.utils import _async_d2h
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, check_cuda_graph_backend
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context, get_attn_backend
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_context
from torch import Tensor, nn

from lenvm_kernels.checkpoint_files import CheckpointError
from lenvm_kernels.heads import HeadConfig
from lenvm_runtime import length_control

KNOWN_VERSIONS = ("0.5.17",)

STOCK_SAMPLING_BACKENDS = ("pytorch", "flashinfer")

LOGITS_FORWARD = "sglang.srt.layers.logits_processor.LogitsProcessor.forward"
SAMPLE = "sglang.srt.model_executor.model_runner.ModelRunner.sample"
LOAD_MODEL = "sglang.srt.model_executor.model_runner.ModelRunner.load_model"
SUPPORT_TRITON = "sglang.srt.utils.common.support_triton"
DRAW_FILTERED = "sglang.srt.layers.sampler.top_k_top_p_min_p_sampling_from_probs_torch"
DRAW = "sglang.srt.layers.sampler.sampling_from_probs_torch"
FORWARD = "sglang.srt.model_executor.model_runner.ModelRunner.forward"
CHECK_ARGUMENTS = "sglang.srt.server_args.ServerArgs.check_server_args"
INIT_TARGET_WORKER = "sglang.srt.managers.scheduler.Scheduler.init_tp_model_worker"
INIT_MEMORY_POOLS = "sglang.srt.managers.scheduler.Scheduler.init_memory_pools"
INIT_ATTENTION_BACKENDS = "sglang.srt.managers.scheduler.Scheduler.init_all_attention_backends"
PREFILL_GRAPH_OUTPUT = (
    "sglang.srt.model_executor.runner.prefill_cuda_graph_runner.PrefillCudaGraphRunner._trim_logits_output"
)
LAUNCH_DELAYED_SAMPLE = "sglang.srt.managers.scheduler.Scheduler.launch_batch_sample_if_needed"
INIT_CUDA_GRAPHS = "sglang.srt.managers.scheduler.Scheduler.init_all_cuda_graphs"
KV_BYTES_PER_TOKEN = "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size"
COPY_TO_CPU = "sglang.srt.managers.utils.GenerationBatchResult.copy_to_cpu"
BATCH_BUILD = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.adjusted_from_schedule_batch"
BATCH_FILTER = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.adjusted_filter_batch"
BATCH_MERGE = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.adjusted_merge_batch"
BATCH_COPY = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.copy_for_forward"
GENERATE = "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request"
CHAT_STREAM = "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._generate_chat_stream"
CHAT_RESPONSE = "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._build_chat_response"
TOOL_CONSTRAINT = "sglang.srt.function_call.function_call_parser.FunctionCallParser.get_structure_constraint"
_RESULTS = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
ACCEPT_FIRST_TOKEN = f"{_RESULTS}._apply_prefill_grammar"
ACCEPT_TOKENS = f"{_RESULTS}._accept_grammar_tokens"
COMPLETION_STREAM = (
    "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion._generate_completion_stream"
)
COMPLETION_RESPONSE = (
    "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion._build_completion_response"
)

_UNSUPPORTED_WITH_HEAD = {
    "speculative_algorithm": None,
    "pp_size": 1,
    "disaggregation_mode": "null",
    "dllm_algorithm": None,
}
_UNSUPPORTED_WITH_VALUE_MODEL = {
    **_UNSUPPORTED_WITH_HEAD,
    "enable_dp_attention": False,
    "dcp_size": 1,
    "enable_hierarchical_cache": False,
    "enable_lmcache": False,
    "enable_flexkv": False,
    "prefill_only_disable_kv_cache": False,
    "enable_two_batch_overlap": False,
    "enable_pdmux": False,
}

_registered: list[str] = []


class IncompatibleEngineError(RuntimeError):
    """SGLang is not a known version, or one of its seams is gone."""


def check_version() -> None:
    """Raise IncompatibleEngineError unless the installed SGLang is a known one."""
    found = version("sglang")
    if found not in KNOWN_VERSIONS:
        raise IncompatibleEngineError(f"SGLang {found} is not known to work; known: {', '.join(KNOWN_VERSIONS)}")


def check_platform(platform: type, name: str) -> None:
    """Raise IncompatibleEngineError unless SGLang runs on this platform, whose entry point is ``name``.

    ``SGLANG_PLUGINS`` chooses among platforms too: one that names the plugin alone leaves none for a CPU.
    """
    if not isinstance(platforms.current_platform, platform):
        found = type(platforms.current_platform).__name__
        given = os.environ.get("SGLANG_PLUGINS", "")
        raise IncompatibleEngineError(
            f"there is no accelerator, and SGLang runs on {found} instead of the platform '{name}'; "
            f"name both in SGLANG_PLUGINS={given!r}, or leave it unset"
        )


def check_returned_logprobs() -> None:
    """Raise IncompatibleEngineError where SGLang would return log-probabilities from before the temperature.

    Those of a row under control are scaled by its temperature then, and mean nothing.
    """
    if SGLANG_RETURN_ORIGINAL_LOGPROB:
        raise IncompatibleEngineError("SGLANG_RETURN_ORIGINAL_LOGPROB does not work with a LenVM; unset it")


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


def hold_request_table(runner: Any) -> None:
    """Let the scheduler's next writes to the request table wait for the whole step, its sampling included.

    SGLang lets them go on once a decode graph has taken what it needs (``Scheduler._apply_war_barrier``); a row of a
    finished request may then belong to another one.
    """
    runner.war_fastpath_read_done_event = None


def hold_request_table_of_delayed_sample(
    launch: Callable[..., None], scheduler: Any, batch_result: Any, cur_batch: Any
) -> None:
    """The same for a sampling that waits for a grammar: it is launched after the scheduler's barrier.

    Around ``LAUNCH_DELAYED_SAMPLE``, which the scheduler calls in every iteration.
    """
    is_delayed = batch_result is not None and batch_result.delay_sample_func is not None
    launch(scheduler, batch_result, cur_batch)
    if is_delayed and scheduler.enable_overlap and scheduler.device == "cuda":
        scheduler.schedule_stream.wait_stream(scheduler.forward_stream)


def disable_prefill_graphs(server_args: Any) -> None:
    """Run prefills without CUDA graphs: a replay calls no hook on a layer. Call before graphs are captured."""
    server_args.cuda_graph_config.prefill.backend = Backend.DISABLED
    if not check_cuda_graph_backend(Phase.PREFILL, Backend.DISABLED):
        raise IncompatibleEngineError("SGLang's prefill CUDA graphs could not be turned off")


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


def input_logprob_rows(metadata: Any, wanted: list[bool]) -> tuple[list[int], list[int]]:
    """Where the input logprobs of the ``wanted`` sequences of an extend come from and lie.

    Indices of their tokens among all extended ones, and of their entries in ``input_token_logprobs``, which
    holds for each sequence those of its tokens from its logprob start on.
    """
    tokens: list[int] = []
    places: list[int] = []
    first_token = first_place = 0
    lens = zip(metadata.extend_seq_lens_cpu, metadata.extend_logprob_start_lens_cpu, wanted, strict=True)
    for extend_len, start, is_wanted in lens:
        num_places = extend_len - start
        if is_wanted:
            tokens += range(first_token + start, first_token + extend_len)
            places += range(first_place, first_place + num_places)
        first_token, first_place = first_token + extend_len, first_place + num_places
    return tokens, places


def copy_to_host(tensor: Tensor) -> Tensor:
    """Begin SGLang's own asynchronous copy of a device tensor to pinned host memory."""
    host: Tensor = _async_d2h(tensor)
    return host


def check_head_fits(config: HeadConfig, model_config: Any, eos_ids: list[int]) -> None:
    """Raise CheckpointError when a head was trained for a model of another shape, or with other ends."""
    for name, found in (("hidden_size", model_config.hidden_size), ("vocab_size", model_config.vocab_size)):
        expected = getattr(config, name)
        if expected != found:
            raise CheckpointError(
                f"the LenVM head is for {config.base_model} with {name} {expected}, the served model has {found}"
            )
    num_layers = model_config.num_hidden_layers
    if any(layer >= num_layers for layer in config.feature_layers):
        raise CheckpointError(f"the LenVM head reads layers {config.feature_layers}, the model has {num_layers}")
    if not set(config.eos_token_ids) <= set(eos_ids):
        ended = list(config.eos_token_ids)
        raise CheckpointError(f"the LenVM head's answers end with tokens {ended}, the served model's with {eos_ids}")


def explain_grammar_abort(req: Any) -> None:
    """Make an abort by a request's grammar an error of the request (HTTP 400), with the reason where there is one."""
    from sglang.srt.constrained.llguidance_backend import GuidanceGrammar
    from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    grammar = req.grammar.grammar if isinstance(req.grammar, ReasonerGrammarObject) else req.grammar
    reason = grammar.ll_matcher.get_error() if isinstance(grammar, GuidanceGrammar) else ""
    told = reason.split("\n", 1)[0] or "a token was not accepted"
    params = req.sampling_params
    given = {"json": params.json_schema, "regex": params.regex, "ebnf": params.ebnf}
    kind = next((kind for kind, grammar in given.items() if grammar is not None), "structural_tag")
    message = f"Failed to follow {kind} grammar: {told}"
    req.to_finish = FINISH_ABORT(message, HTTPStatus.BAD_REQUEST, "BadRequestError")


def preferred_sampling_params(manager: Any) -> dict[str, Any]:
    """The sampling parameters of ``--preferred-sampling-params``, which requests that do not say otherwise get."""
    preferred: dict[str, Any] | None = manager.server_args.preferred_sampling_params
    return preferred or {}


def vocab_size(manager: Any) -> int:
    """Size of the served model's vocabulary, as the tokenizer manager knows it."""
    size: int = manager.model_config.vocab_size
    return size


def target_runner(scheduler: Any) -> Any:
    """The model runner of the served model."""
    return scheduler.tp_worker.model_runner


def random_state_kept(runner: Any) -> AbstractContextManager[None]:
    """Give torch's random generators of this rank their states back at the end."""
    context: AbstractContextManager[None] = torch.random.fork_rng([runner.gpu_id] if runner.device == "cuda" else [])
    return context


def eos_token_ids(scheduler: Any) -> list[int]:
    """The tokens at which SGLang ends every request, by the sources of its own check (`Req._check_token_based_finish`).

    Those of the served model's configuration and generation configuration, the EOS of the scheduler's tokenizer and its
    additional stop tokens. Raises CheckpointError when there are none.
    """
    ids = set(scheduler.model_config.hf_eos_token_id or ())
    if scheduler.tokenizer is not None:  # --skip-tokenizer-init
        ids |= {scheduler.tokenizer.eos_token_id, *(scheduler.tokenizer.additional_stop_token_ids or ())}
    found = sorted(token for token in ids if token is not None and 0 <= token < scheduler.model_config.vocab_size)
    if not found:
        raise CheckpointError("neither the served model's configuration nor its tokenizer names an EOS token")
    return found


def check_head_supported(server_args: Any) -> None:
    """Raise CheckpointError naming an option of SGLang that a head does not work with."""
    _check_neutral(server_args, _UNSUPPORTED_WITH_HEAD, "a LenVM head")


def check_value_model_supported(server_args: Any) -> None:
    """Raise CheckpointError naming an option of SGLang that a separate LenVM does not work with."""
    _check_neutral(server_args, _UNSUPPORTED_WITH_VALUE_MODEL, "a separate LenVM")
    if envs.SGLANG_EXPERIMENTAL_CPP_RADIX_TREE.get():
        raise CheckpointError("SGLANG_EXPERIMENTAL_CPP_RADIX_TREE: does not work with a separate LenVM")


def _check_neutral(server_args: Any, neutral: Mapping[str, Any], kind: str) -> None:
    for name, expected in neutral.items():
        found = getattr(server_args, name)
        if found != expected:
            raise CheckpointError(f"--{name.replace('_', '-')} {found}: does not work with {kind}")


def value_server_args(target: Any, backbone: str, context_length: int) -> Any:
    """A copy of the served model's resolved ServerArgs that describes the value model.

    Its weights are read from its own files, however the served model's are, unless those are ``dummy`` ones.
    """
    resolved: dict[str, Any] = {}
    for _source, fields in get_context().overrides_log():
        resolved.update(fields)
    server_args = deepcopy(target)
    own = {
        "model_path": backbone,
        "revision": target.revision if backbone == target.model_path else None,
        "quantization": None,
        "load_format": "dummy" if target.load_format == "dummy" else "auto",
        "model_loader_extra_config": "{}",
        "weight_cache_mode": "off",
        "kv_cache_dtype": "auto",
        "context_length": context_length,
        "enable_lora": False,
    }
    server_args.override("lenvm.value_model", **{**resolved, **own})
    return server_args


@contextmanager
def published_server_args(server_args: Any) -> Iterator[None]:
    """Publish other ServerArgs to the process while a second model is built; the served model's come back after."""
    with get_context().preserve_config():
        get_context().set_server_args(server_args)
        yield


def value_model_config(server_args: Any) -> Any:
    """SGLang's ModelConfig of the value model."""
    from sglang.srt.configs.model_config import ModelConfig

    return ModelConfig(
        server_args.model_path,
        trust_remote_code=server_args.trust_remote_code,
        context_length=server_args.context_length,
        dtype=server_args.dtype,
    )


def served_config(server_args: Any) -> Any:
    """SGLang's ModelConfig of the served model."""
    return server_args.get_model_config()


def backbone_config(backbone: str, server_args: Any) -> Any:
    """The Hugging Face configuration of a LenVM's backbone, which may be the served model itself."""
    from sglang.srt.utils.hf_transformers_utils import get_config

    revision = backbone_options(backbone, server_args).get("revision")
    return get_config(backbone, trust_remote_code=server_args.trust_remote_code, revision=revision)


def context_length(config: Any) -> int:
    """How long a context SGLang lets a language model of this Hugging Face configuration have."""
    from sglang.srt.utils.hf_transformers_utils import get_context_length

    length: int = get_context_length(config)
    return length


def needs_lenvm(req: Any) -> bool:
    """Whether a separate LenVM runs for a request of SGLang's.

    Unless it has been set apart in the prefix cache, others may go on from its keys and values.
    """
    is_apart = length_control.WITHOUT_LENVM in (req.extra_key or "")
    return not is_apart or length_control.needs_lenvm(req.sampling_params.custom_params)


def tokenizer_options(server_args: Any) -> dict[str, Any]:
    """What SGLang's arguments say of how the served model's tokenizer is loaded."""
    return {name: getattr(server_args, name) for name in ("trust_remote_code", "revision", "tokenizer_mode")}


def backbone_options(backbone: str, server_args: Any) -> dict[str, Any]:
    """How a LenVM's tokenizer is loaded: one that is the served model itself as that is."""
    return tokenizer_options(server_args) if backbone == server_args.model_path else {}


def load_vocabulary(model: str, **options: Any) -> dict[str, int]:
    """Token -> id of a model's tokenizer (``options``: see `tokenizer_options`).

    Raises CheckpointError when it has none.
    """
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    try:
        vocabulary: dict[str, int] = get_tokenizer(model, **options).get_vocab()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: SGLang's own, for one it does not know
        raise CheckpointError(f"{model}: no usable tokenizer ({str(error).splitlines()[0]})") from None
    return vocabulary


def token_texts(model: str, **options: Any) -> list[str]:
    """The text of every token of a model's tokenizer, by id (``options``: see `tokenizer_options`)."""
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    tokenizer = get_tokenizer(model, **options)
    texts: list[str] = tokenizer.batch_decode([[token_id] for token_id in range(len(tokenizer))])
    return texts


def register_model_class(model_class: type[nn.Module]) -> None:
    """Let SGLang's loader find a model class by its name."""
    from sglang.srt.models.registry import ModelRegistry

    ModelRegistry.models[model_class.__name__] = model_class


def check_plain_pool(runner: Any) -> None:
    """Raise CheckpointError unless the served model keeps one KV slot a token for all of its layers."""
    pool = runner.token_to_kv_pool
    if not isinstance(pool, MHATokenToKVPool) or runner.is_hybrid_swa:
        raise CheckpointError(
            f"a separate LenVM needs SGLang's plain KV pool, the served model has {type(pool).__name__}"
        )
    for switch, is_on in (
        ("SGLANG_USE_HND_KVCACHE", pool.use_hnd),
        ("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING", pool.post_capture_active),
    ):
        if is_on:
            raise CheckpointError(f"{switch}: does not work with a separate LenVM")


def build_attention_backend(runner: Any) -> Any:
    """The attention backend that SGLang itself would build for a model runner."""
    from sglang.srt.model_executor.model_runner_components.attention_backend_setup import get_attention_backend

    return get_attention_backend(model_runner=runner)


def captures_decodes(runner: Any) -> bool:
    """Whether SGLang captures decode steps in CUDA graphs."""
    if runner.device != "cuda":
        return False
    return not check_cuda_graph_backend(Phase.DECODE, Backend.DISABLED)


@contextmanager
def graph_capture() -> Iterator[Callable[[Callable[[], Tensor]], Callable[[], Tensor]]]:
    """Yields what captures a function of static tensors in a CUDA graph and returns its replay.

    The graphs share a memory pool of their own: in SGLang's, a replay would overwrite the served model's logits.
    """
    from sglang.srt.distributed.parallel_state import graph_capture as communicators_captured
    from sglang.srt.model_executor.runner.base_cuda_graph_runner import freeze_gc
    from sglang.srt.model_executor.runner_utils.capture_mode import model_capture_mode

    pool = torch.cuda.graph_pool_handle()
    with freeze_gc(False), model_capture_mode(), communicators_captured() as context:

        def capture(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
            for _ in range(2):  # kernels are compiled and loaded
                function()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=context.stream):
                result = function()

            def replay() -> Tensor:
                graph.replay()
                return result

            return replay

        yield capture


def attention_backend() -> Any:
    """The attention backend of the forward that is running."""
    return get_attn_backend()


def attention(backend: Any) -> AbstractContextManager[None]:
    """Run a forward of a model with this attention backend and the KV pool that it holds."""
    context: AbstractContextManager[None] = forward_context(ForwardContext(attn_backend=backend))
    return context


def step_batch(
    input_ids: Tensor, positions: Tensor, req_pool_indices: Tensor, seq_lens: Tensor, out_cache_loc: Tensor
) -> Any:
    """A ForwardBatch for packed rows of a decode step, of which there may be more than requests."""
    return ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        batch_size=len(req_pool_indices),
        input_ids=input_ids,
        req_pool_indices=req_pool_indices,
        seq_lens=seq_lens,
        out_cache_loc=out_cache_loc,
        seq_lens_sum=0,
        positions=positions,
    )


def _register(target: str, hook: Callable[..., Any], kind: HookType) -> None:
    HookRegistry.register(target, hook, kind)
    _registered.append(target)
