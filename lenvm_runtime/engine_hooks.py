"""Values and steering inside the model process: what our hooks do on SGLang's seams.

Once a step: (1) after ``LogitsProcessor.forward``, the value head runs on the rows being sampled;
(2) before ``ModelRunner.sample``, values become the step's ``customized_info`` and what steering needs
is laid beside the sampling info; (3) our sampler steers; (4) with overlap scheduling, values are copied
to the host in the same asynchronous copy as the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lenvm_kernels.checkpoint import load_head
from lenvm_kernels.checkpoint_files import CheckpointError
from lenvm_runtime import compat, control_batch
from lenvm_runtime.closing import closing_tokens
from lenvm_runtime.control_batch import ControlBatch
from lenvm_runtime.head_runner import HeadRunner
from lenvm_runtime.input_values import QueryBatch, write_input_values
from lenvm_runtime.length_control import TOP_K_KEY, LengthControl, ValueQuery
from lenvm_runtime.readers import Readers
from lenvm_runtime.response import CANDIDATES_KEY, PREDICTION_KEY, VALUE_KEY
from lenvm_runtime.steering import DeviceRows, last_token_ids, released

_FEATURES_KEY = "lenvm_features"
_RUNNER = "lenvm_head_runner"


@dataclass(frozen=True)
class HeadStep:
    """What the sampler needs to steer one step with a head: all [rows, ...], on the device."""

    runner: HeadRunner
    control: ControlBatch
    features: Tensor
    slots: Tensor
    last_token_ids: Tensor

    def steer(self, logits_output: Any, sampling: Any, positions: Tensor) -> Any:
        """See `lenvm_runtime.steering.Step`."""
        generated = positions + 1 - self.control.prompt_len
        logits = logits_output.next_token_logits
        steered = self.runner.steer(
            logits, self.features, self.control, self.slots, generated, self.last_token_ids, sampling
        )
        return released(sampling, steered)


def register(head_folder: Path) -> None:
    """Register every hook of the model process. The head itself is loaded after the served model."""

    def attach(_result: None, scheduler: Any) -> None:
        _attach_head(scheduler, head_folder)

    compat.before(compat.CHECK_ARGUMENTS, _check_supported)
    compat.after(compat.INIT_TARGET_WORKER, attach)
    compat.after(compat.LOGITS_FORWARD, _run_value_head)
    compat.after(compat.PREFILL_GRAPH_OUTPUT, _keep_values)
    compat.before(compat.SAMPLE, _prepare_sampling)
    register_controls()


def register_controls() -> None:
    """Register the hooks that carry the controls of a running batch, and bring each step's values to the host."""
    compat.before(compat.COPY_TO_CPU, _start_copies)
    compat.after(compat.BATCH_BUILD, _build_control)
    compat.after(compat.BATCH_FILTER, _filter_control)
    compat.after(compat.BATCH_MERGE, _merge_control)
    compat.after(compat.BATCH_COPY, _carry_control)


def _check_supported(server_args: Any) -> None:
    """End the launching process with one message where a head does not work with SGLang's arguments."""
    try:
        compat.check_head_supported(server_args)
    except CheckpointError as error:
        raise SystemExit(f"lenvm: this LenVM cannot be served so: {error}") from None


def _attach_head(scheduler: Any, folder: Path) -> None:
    """Load the head onto the served model's device and let the model's logits processor reach it."""
    runner, eos_token_ids = compat.target_runner(scheduler), compat.eos_token_ids(scheduler)
    head = load_head(folder)
    compat.check_head_fits(head.config, runner.model_config, eos_token_ids)
    if head.config.feature_layers:
        compat.disable_prefill_graphs(runner.server_args)
    server_args = runner.server_args
    texts = compat.token_texts(server_args.tokenizer_path, **compat.tokenizer_options(server_args))
    head_runner = HeadRunner(
        head,
        [compat.decoder_layers(runner.model)[index] for index in head.config.feature_layers],
        compat.input_embeddings(runner.model),
        compat.gather_vocabulary,
        eos_token_ids,
        closing_tokens(texts, head.config.vocab_size),
    )
    setattr(runner.model.logits_processor, _RUNNER, head_runner)
    setattr(runner, _RUNNER, head_runner)


def _run_value_head(
    result: Any,
    processor: Any,
    _input_ids: Tensor,
    hidden_states: Tensor,
    _lm_head: Any,
    metadata: Any,
    *_: Any,
    **__: Any,
) -> None:
    runner: HeadRunner | None = getattr(processor, _RUNNER, None)
    if runner is None or result.next_token_logits is None or metadata.is_prefill_only:
        return
    sampled = compat.sampled_rows(metadata)
    features = runner.features(hidden_states, sampled)
    info: dict[str, Any] = {VALUE_KEY: runner.values(features), _FEATURES_KEY: features}
    if sampled is not None:
        info[PREDICTION_KEY] = runner.predictions(features)
        info |= _answer_queries(runner, result, hidden_states, features, metadata)
    result.customized_info = info


def _keep_values(trimmed: Any, _runner: Any, output: Any) -> None:
    """SGLang copies what it knows of a prefill graph's output; the values are those of the live batch."""
    trimmed.customized_info = output.customized_info


def _answer_queries(
    runner: HeadRunner, result: Any, hidden_states: Tensor, features: Tensor, metadata: Any
) -> dict[str, Tensor]:
    """What rows with a value query add to the step's values; their prompts' values go into the input logprobs."""
    queries: QueryBatch | None = getattr(metadata.sampling_info, "lenvm_queries", None)
    if queries is None or queries.is_empty:
        return {}
    write_input_values(runner.values, hidden_states, result, metadata, queries)
    ids, _ = queries.candidate_ids(features.device)
    return {CANDIDATES_KEY: runner.candidate_values(features, ids)} if ids.numel() else {}


def _prepare_sampling(runner: Any, logits_output: Any, forward_batch: Any) -> None:
    info = logits_output.customized_info
    if info is None or _FEATURES_KEY not in info:
        return
    num_rows = len(forward_batch.req_pool_indices)
    # Copies: the next replay of a CUDA graph may write to its results before they are on the host.
    logits_output.customized_info = {
        key: DeviceRows(tensor[:num_rows].clone()) for key, tensor in info.items() if key != _FEATURES_KEY
    }
    sampling_info = forward_batch.sampling_info
    control: ControlBatch | None = getattr(sampling_info, "lenvm_control", None)
    if control is None:
        return
    head_runner: HeadRunner = getattr(runner, _RUNNER)
    features, slots = info[_FEATURES_KEY][:num_rows], forward_batch.req_pool_indices
    sampling_info.lenvm_step = HeadStep(head_runner, control, features, slots, last_token_ids(forward_batch))
    if forward_batch.forward_mode.is_extend():
        head_runner.set_scaled_targets(features, control, slots, forward_batch.seq_lens - control.prompt_len)


def _start_copies(result: Any, *_: Any, **__: Any) -> None:
    info = result.logits_output.customized_info if result.logits_output is not None else None
    for rows in (info or {}).values():
        rows.start_copy()


def _build_control(_result: None, sampling_info: Any, batch: Any, _vocab_size: int) -> None:
    reqs = batch.reqs
    sampling_info.lenvm_queries = QueryBatch(
        tuple(ValueQuery.from_custom_params(req.sampling_params.custom_params) for req in reqs)
    )
    sampling_info.lenvm_readers = Readers.build([compat.needs_lenvm(req) for req in reqs], sampling_info.device)
    sampling_info.lenvm_control = ControlBatch.build(
        [_read_control(req) for req in reqs],
        [len(req.origin_input_ids) for req in reqs],
        [req.sampling_params.top_k for req in reqs],
        sampling_info.device,
        [req.sampling_params.ignore_eos for req in reqs],
        [req.sampling_params.stop_token_ids for req in reqs],
        [(req.sampling_params.custom_params or {}).get(TOP_K_KEY) for req in reqs],
    )


def _read_control(req: Any) -> LengthControl | None:
    """The control of a request of SGLang's, which keeps the results of its steps when it is retracted.

    Prefilled again, ``scale`` holds to the length that was predicted when the prompt was first read.
    """
    control = LengthControl.from_custom_params(req.sampling_params.custom_params)
    predictions = (req.customized_info or {}).get(PREDICTION_KEY)
    if control is None or not predictions:
        return control
    expected, _, _ = predictions[0]
    return control.at_predicted_length(expected)


def _filter_control(_result: None, sampling_info: Any, keep_indices: list[int], keep_indices_device: Tensor) -> None:
    sampling_info.lenvm_queries = sampling_info.lenvm_queries.filter(keep_indices)
    sampling_info.lenvm_readers = sampling_info.lenvm_readers.filter(keep_indices)
    control = sampling_info.lenvm_control
    if control is not None:
        sampling_info.lenvm_control = control.filter(keep_indices, keep_indices_device)


def _merge_control(_result: None, sampling_info: Any, other: Any) -> None:
    num_right = len(other)
    sampling_info.lenvm_queries = sampling_info.lenvm_queries.concat(other.lenvm_queries)
    sampling_info.lenvm_readers = sampling_info.lenvm_readers.concat(other.lenvm_readers)
    sampling_info.lenvm_control = control_batch.merge(
        sampling_info.lenvm_control,
        other.lenvm_control,
        len(sampling_info) - num_right,
        num_right,
        sampling_info.device,
    )


def _carry_control(copy: Any, sampling_info: Any) -> None:
    copy.lenvm_control = sampling_info.lenvm_control
    copy.lenvm_queries = sampling_info.lenvm_queries
    copy.lenvm_readers = sampling_info.lenvm_readers
