"""SGLang plugin (entry-point group ``sglang.srt.plugins``): values and length control inside the engine.

``load`` runs in every SGLang process before the server arguments are parsed. SGLang only logs a
plugin that raises, so ``load`` ends the process instead: no engine serves without its plugin.
"""

from __future__ import annotations

from typing import Any

from lenvm_runtime import compat
from lenvm_runtime.config import PluginConfig


def load() -> None:
    """Register the CPU engine, the hooks and the samplers; ends the process on failure."""
    try:
        _load(PluginConfig.from_environment())
    except Exception as error:
        raise SystemExit(f"lenvm: the SGLang plugin cannot start: {error}") from error


def _load(config: PluginConfig) -> None:
    compat.check_version()
    _register_cpu_engine()
    if config.head is not None:
        from lenvm_runtime import engine_hooks, response_hooks

        engine_hooks.register(config.head)
        response_hooks.register(config.head)
    for backend in compat.STOCK_SAMPLING_BACKENDS:
        compat.register_sampler(backend, _create_sampler)


def _register_cpu_engine() -> None:
    from lenvm_runtime.cpu.platform import activate

    if activate() is not None:
        from lenvm_runtime.cpu import attention_backend, layers, linear, sampling

        for part in (attention_backend, layers, linear, sampling):
            part.register()


def _create_sampler() -> Any:
    from lenvm_runtime.sampler import LenVMSampler

    compat.check_hooks_applied()
    return LenVMSampler()
