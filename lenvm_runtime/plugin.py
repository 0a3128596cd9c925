"""SGLang plugin (entry-point group ``sglang.srt.plugins``): values and length control inside the engine.

``load`` runs in every SGLang process before the server arguments are parsed. SGLang only logs a
plugin that raises, so ``load`` ends the process instead: no engine serves without its plugin.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lenvm_kernels.checkpoint import read_config
from lenvm_kernels.checkpoint_files import LenVMKind, find_kind
from lenvm_kernels.length_value import length_from_value
from lenvm_runtime import compat, grammar_errors, tool_calls
from lenvm_runtime.config import CPU_PLATFORM, PluginConfig
from lenvm_runtime.value_model.source import read_source


def load() -> None:
    """Register the CPU engine, the hooks and the samplers; ends the process on failure."""
    try:
        _load(PluginConfig.from_environment())
    except Exception as error:
        raise SystemExit(f"lenvm: the SGLang plugin cannot start: {error}") from error


def _load(config: PluginConfig) -> None:
    compat.check_version()
    _register_cpu_engine()
    tool_calls.register()
    grammar_errors.register()
    _register_lenvm(config.head, config.in_int8)
    if config.step_times is not None:
        from lenvm_runtime import step_times

        step_times.install(config.step_times)
    for backend in compat.STOCK_SAMPLING_BACKENDS:
        compat.register_sampler(backend, _create_sampler)


def _register_lenvm(folder: Path | None, in_int8: bool) -> None:
    """Register the hooks for the kind of LenVM in ``folder``, or those of an engine without one."""
    from lenvm_runtime import engine_hooks, response_hooks

    if in_int8 and (folder is None or find_kind(folder) is LenVMKind.HEAD):
        raise ValueError("LENVM_INT8: is read with a separate LenVM only")
    if folder is None:
        response_hooks.register_without_lenvm()
        return
    compat.check_returned_logprobs()
    if find_kind(folder) is LenVMKind.HEAD:
        head = read_config(folder)
        engine_hooks.register(folder)
        response_hooks.register(head.gamma, head.max_length, is_separate=False)
        return
    from lenvm_runtime.value_model.hooks import ValueModelHooks

    source = read_source(folder)
    max_length = int(length_from_value(-1.0, source.gamma))
    ValueModelHooks(source, max_length, in_int8).register()
    response_hooks.register(source.gamma, max_length, is_separate=True)


def _register_cpu_engine() -> None:
    from lenvm_runtime.cpu.platform import CpuPlatform, activate

    if activate() is not None:
        compat.check_platform(CpuPlatform, CPU_PLATFORM)
        from lenvm_runtime.cpu import attention_backend, layers, linear, sampling

        for part in (attention_backend, layers, linear, sampling):
            part.register()


def _create_sampler() -> Any:
    from lenvm_runtime.sampler import LenVMSampler

    compat.check_hooks_applied()
    return LenVMSampler()
