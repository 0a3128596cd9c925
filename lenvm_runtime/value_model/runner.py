"""The value model of one engine process: a second model runner of SGLang on the served model's slots."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.model_runner import ModelRunner
from torch import Tensor

from lenvm_kernels.checkpoint import load_value_head
from lenvm_runtime import compat
from lenvm_runtime.length_control import MAX_TOP_K
from lenvm_runtime.value_model.attention import CandidateAttentionBackend
from lenvm_runtime.value_model.models import ARCHITECTURES, find_architecture
from lenvm_runtime.value_model.packing import StepRows
from lenvm_runtime.value_model.source import ValueModelSource, check_vocabulary
from lenvm_runtime.value_model.step_graphs import StepGraphs, graph_sizes


class ValueModelRunner(ModelRunner):
    """Loads a separate LenVM and runs it on the served model's requests.

    Both models cache their keys and values of a token at the same slot id, each in buffers of its own, so that
    prefix reuse, chunked prefill, retraction and abort need no bookkeeping here: of each request that needs its values,
    `extend` must see every prefill and `step` every decode.
    """

    def __init__(self, source: ValueModelSource, target: ModelRunner, in_int8: bool = False) -> None:
        """Load the model, beside ``target``; ``in_int8``: with weights rounded (`lenvm_runtime.cpu.linear`).

        Raises CheckpointError where it does not fit the served model.
        """
        compat.check_value_model_supported(target.server_args)
        backbone = source.find_backbone(target.server_args.model_path, target.server_args.served_model_name)
        server_args = compat.value_server_args(target.server_args, backbone, target.model_config.context_len)
        self.source, self.in_int8 = source, in_int8
        with compat.published_server_args(server_args):
            config = compat.value_model_config(server_args)
            _prepare_config(config.hf_config, source)
            options = compat.tokenizer_options(target.server_args)
            served = compat.load_vocabulary(target.server_args.tokenizer_path, **options)
            own = compat.load_vocabulary(backbone, **compat.backbone_options(backbone, target.server_args))
            check_vocabulary(own, served, config.vocab_size)
            super().__init__(
                model_config=config,
                mem_fraction_static=target.mem_fraction_static,
                gpu_id=target.gpu_id,
                ps=target.ps,
                nccl_port=target.dist_port,
                server_args=server_args,
                is_draft_worker=True,
            )
        self.value_head = load_value_head(source.folder, config.hidden_size).to(self.device)
        self._step_graphs: StepGraphs | None = None

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one slot costs in this model's KV pool on this rank."""
        config = self.model_config
        num_heads = config.get_num_kv_heads(self.ps.tp_size)
        return int(num_heads * (config.head_dim + config.v_head_dim) * self._num_layers * self.dtype.itemsize)

    def share_slots(self, target: ModelRunner) -> None:
        """Allocate the KV buffers for the served model's slots; call when ``target`` has its own."""
        compat.check_plain_pool(target)
        self.req_to_token_pool = target.req_to_token_pool
        self.token_to_kv_pool_allocator = target.token_to_kv_pool_allocator
        self.max_total_num_tokens = target.max_total_num_tokens
        self.max_running_requests = target.max_running_requests
        self.token_to_kv_pool = MHATokenToKVPool(
            target.token_to_kv_pool.size,
            page_size=self.page_size,
            dtype=self.dtype,
            head_num=self.model_config.get_num_kv_heads(self.ps.tp_size),
            head_dim=self.model_config.head_dim,
            layer_num=self._num_layers,
            device=self.device,
            enable_memory_saver=False,
        )

    def build_attention(self) -> None:
        """Build the backends of prefills (SGLang's own) and of steps."""
        self.attn_backend = compat.build_attention_backend(self)
        self._step_backend = CandidateAttentionBackend(self.req_to_token_pool, self.token_to_kv_pool)

    def capture_steps(self) -> None:
        """Capture the steps in CUDA graphs, where SGLang does so with the served model's decodes."""
        if not compat.captures_decodes(self):
            return
        sizes = graph_sizes(self.max_running_requests, MAX_TOP_K)
        with torch.inference_mode(), compat.graph_capture() as capture:
            self._step_graphs = StepGraphs(self._run_step, capture, sizes, self.device)

    def extend(self, forward_batch: Any) -> Tensor:
        """Run the tokens of a prefill, whose keys and values are cached: their states [tokens, hidden_size]."""
        with torch.inference_mode(), compat.attention(self.attn_backend):
            self.attn_backend.init_forward_metadata(forward_batch)
            states: Tensor = self.model(self._known(forward_batch.input_ids), forward_batch.positions, forward_batch)
            return states

    def step(self, rows: StepRows) -> Tensor:
        """Run packed rows; keys and values of each row 0 are cached: V of every row's state [T] fp32.

        The next step may overwrite it.
        """
        with torch.inference_mode():
            values = self._step_graphs.run(rows) if self._step_graphs is not None else None
        return self._run_step(rows) if values is None else values

    def _run_step(self, rows: StepRows) -> Tensor:
        self._step_backend.set_rows(rows)
        batch = compat.step_batch(rows.input_ids, rows.positions, rows.req_pool_indices, rows.kv_lens, rows.slots)
        with torch.inference_mode(), compat.attention(self._step_backend):
            return self.values(self.model(self._known(rows.input_ids), rows.positions, batch))

    def values(self, states: Tensor) -> Tensor:
        """V of states: [rows, hidden_size] -> [rows] fp32."""
        with torch.inference_mode():
            values: Tensor = self.value_head(states)
            return values

    @property
    def _num_layers(self) -> int:
        layers: int = self.model_config.num_hidden_layers
        return layers

    def _known(self, token_ids: Tensor) -> Tensor:
        """Padding ids of the served vocabulary, which stand for no token, read the last embedding."""
        return token_ids.clamp(max=self.model_config.vocab_size - 1)


def _prepare_config(config: Any, source: ValueModelSource) -> None:
    config.architectures = [find_architecture(config.model_type)]
    for model_class in ARCHITECTURES.values():
        compat.register_model_class(model_class)
    config.lenvm_tied, config.tie_word_embeddings = config.tie_word_embeddings, True
    config.lenvm_adapter = str(source.adapter) if source.adapter else None
