"""A separate LenVM on SGLang's seams: loaded beside the served model, run after its prefills and in its decodes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lenvm_kernels import decoder_layer
from lenvm_kernels.checkpoint_files import CheckpointError
from lenvm_runtime import compat
from lenvm_runtime.closing import closing_tokens
from lenvm_runtime.engine_hooks import register_controls
from lenvm_runtime.input_values import QueryBatch, write_input_values
from lenvm_runtime.readers import Readers
from lenvm_runtime.value_model.source import (
    ValueModelSource,
    check_context_length,
    check_family,
    check_tensor_parallelism,
    check_vocabulary,
)
from lenvm_runtime.value_model.weights import read_adapter_config


class ValueModelHooks:
    """The hooks of one process, and in a model process the value model once it is loaded.

    * before any model process starts: what can be told without loading a model is checked;
    * at start: the model is loaded after the served one, its KV bytes enter SGLang's memory budget, its KV
      buffers get the served model's slots;
    * when SGLang has captured the served model's decodes in CUDA graphs, the value model's steps are too;
    * each prefill of the served model with a request that needs the LenVM is run by the value model too
      (`ModelRunner.forward`); what the others leave in the prefix cache is theirs alone, since it may lack the value
      model's keys (`lenvm_runtime.response_hooks`);
    * those requests' decode steps are run in our sampler, when candidates can be told from the masked logits.
    """

    def __init__(self, source: ValueModelSource, max_length: int, in_int8: bool = False) -> None:
        self._source = source
        self._in_int8 = in_int8
        self._max_length = max_length
        self._guide: Any = None

    def register(self) -> None:
        """Register every hook."""
        compat.before(compat.CHECK_ARGUMENTS, self._check_fits)
        compat.after(compat.INIT_TARGET_WORKER, self._load)
        compat.after(compat.KV_BYTES_PER_TOKEN, self._count_kv_bytes)
        compat.after(compat.INIT_MEMORY_POOLS, self._share_slots)
        compat.after(compat.INIT_ATTENTION_BACKENDS, self._build_attention)
        compat.after(compat.INIT_CUDA_GRAPHS, self._capture_steps)
        compat.around(compat.LAUNCH_DELAYED_SAMPLE, compat.hold_request_table_of_delayed_sample)
        compat.after(compat.FORWARD, self._extend)
        compat.before(compat.SAMPLE, self._prepare_sampling)
        register_controls()

    def _check_fits(self, server_args: Any) -> None:
        """End the launching process with one message where the LenVM does not fit the served model."""
        try:
            check_fits(self._source, server_args)
            if self._in_int8:
                check_runs_in_int8(server_args)
        except CheckpointError as error:
            raise SystemExit(f"lenvm: this LenVM cannot be served beside this model: {error}") from None

    def _load(self, _result: None, scheduler: Any) -> None:
        from lenvm_runtime.value_model.runner import ValueModelRunner
        from lenvm_runtime.value_model.step import MAX_ROWS, ValueGuide

        target = compat.target_runner(scheduler)
        with compat.random_state_kept(target):  # the served model's tokens for a seed stay stock SGLang's
            runner = ValueModelRunner(self._source, target, self._in_int8)
        server_args = target.server_args
        texts = compat.token_texts(server_args.tokenizer_path, **compat.tokenizer_options(server_args))
        closing = closing_tokens(texts, target.model_config.vocab_size)
        max_rows = max(server_args.chunked_prefill_size, MAX_ROWS)
        self._guide = ValueGuide(runner, compat.eos_token_ids(scheduler), closing, self._max_length, max_rows)

    def _count_kv_bytes(self, cell_size: int, _configurator: Any, _kvc: Any, _num_layers: int) -> int:
        assert self._guide is not None
        return cell_size + int(self._guide.runner.kv_bytes_per_token)

    def _share_slots(self, _result: None, scheduler: Any) -> None:
        self._guide.runner.share_slots(compat.target_runner(scheduler))

    def _build_attention(self, _result: None, _scheduler: Any) -> None:
        self._guide.runner.build_attention()

    def _capture_steps(self, _result: None, _scheduler: Any) -> None:
        self._guide.runner.capture_steps()

    def _extend(self, output: Any, served: Any, forward_batch: Any, *_: Any, **__: Any) -> None:
        if not _has_readers(forward_batch):
            return
        if not forward_batch.forward_mode.is_extend():
            compat.hold_request_table(served)
            return
        runner = self._guide.runner
        states = runner.extend(forward_batch)
        forward_batch.lenvm_values = runner.values(states[compat.sampled_rows(forward_batch)])
        queries: QueryBatch = forward_batch.sampling_info.lenvm_queries
        if not queries.is_empty:
            write_input_values(runner.values, states, output.logits_output, forward_batch, queries)

    def _prepare_sampling(self, _runner: Any, _logits_output: Any, forward_batch: Any) -> None:
        if not _has_readers(forward_batch):
            return
        values: Tensor | None = getattr(forward_batch, "lenvm_values", None)
        forward_batch.sampling_info.lenvm_step = self._guide.begin_step(forward_batch, values)


def check_fits(source: ValueModelSource, server_args: Any) -> None:
    """Raise CheckpointError where the LenVM and the served model of these arguments do not fit; loads neither."""
    compat.check_value_model_supported(server_args)
    served = compat.served_config(server_args)
    if served.is_multimodal:
        raise CheckpointError(
            f"{server_args.model_path} takes images, video or audio, which a separate LenVM cannot read"
        )
    backbone = source.find_backbone(server_args.model_path, server_args.served_model_name)
    config = compat.backbone_config(backbone, server_args)
    check_family(config.model_type)
    if source.adapter is not None:
        read_adapter_config(source.adapter)
    check_context_length(served.context_len, compat.context_length(config))
    check_tensor_parallelism(server_args.tp_size, config.num_attention_heads, config.num_key_value_heads)
    vocabulary = compat.load_vocabulary(server_args.tokenizer_path, **compat.tokenizer_options(server_args))
    own = compat.load_vocabulary(backbone, **compat.backbone_options(backbone, server_args))
    check_vocabulary(own, vocabulary, config.vocab_size)


def check_runs_in_int8(server_args: Any) -> None:
    """Raise CheckpointError where a value model cannot be rounded to int8."""
    if server_args.device != "cpu" or not decoder_layer.runs_in_int8():
        raise CheckpointError("int8 needs a CPU with AVX-512 VNNI and a C++ compiler")


def _has_readers(forward_batch: Any) -> bool:
    readers: Readers | None = getattr(forward_batch.sampling_info, "lenvm_readers", None)  # None: a warm-up
    return readers is not None and not readers.is_empty
