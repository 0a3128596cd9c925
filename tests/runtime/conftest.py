"""SGLang's own model runner in this process, for what runs beside it; on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import lenvm_fp32_norm
from tiny_lenvm import save_model


@pytest.fixture(scope="session")
def served_runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A tiny Llama in fp32, with SGLang's pools; on a CPU with our attention backend."""
    folder = tmp_path_factory.mktemp("served")
    save_model(folder, "llama")

    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel
    from sglang.srt.distributed.parallel_state_wrapper import ParallelState
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.runtime_context import get_context
    from sglang.srt.server_args import prepare_server_args

    from lenvm_runtime.cpu import attention_backend
    from lenvm_runtime.launch_engine import engine_arguments
    from lenvm_runtime.serve import free_port

    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        attention_backend.register()
    else:
        lenvm_fp32_norm.load()
    arguments = ["--model-path", str(folder), "--dtype", "float32", "--max-total-tokens", "512"]
    arguments += ["--max-running-requests", "8", *([] if on_cpu else ["--attention-backend", "triton"])]
    server_args = prepare_server_args(engine_arguments(arguments, on_cpu))
    get_context().set_server_args(server_args)
    runner = ModelRunner(
        model_config=ModelConfig.from_server_args(server_args),
        mem_fraction_static=0.1,
        gpu_id=0,
        ps=ParallelState.trivial(),
        nccl_port=free_port(),
        server_args=server_args,
    )
    runner.alloc_memory_pool()
    runner.init_attention_backends()
    yield runner
    destroy_model_parallel()
    destroy_distributed_environment()
