"""Out-of-tree SGLang platform for CPUs (entry-point group ``sglang.srt.platforms``).

Stock SGLang runs on a CPU only with a kernel package that is not on the package index; this
platform serves with torch's own operators and the attention backend of ``lenvm_kernels``.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from lenvm_kernels import torchvision_schema

ATTENTION_BACKEND = "lenvm_cpu"

torchvision_schema.declare_if_missing()


def activate() -> str | None:
    """Name the platform class, or None (not active) where CUDA, ROCm or XPU is available."""
    if torch.cuda.is_available() or torch.xpu.is_available():
        return None
    return f"{__name__}.CpuPlatform"


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """CPU without SGLang's own kernels: eager torch, paged KV cache, no graphs."""

    _enum = PlatformEnum.OOT

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        pool: type = MHATokenToKVPool
        return pool

    def get_paged_allocator_cls(self) -> Any:
        from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator

        def build(
            size: int,
            page_size: int,
            dtype: torch.dtype,
            device: str,
            kvcache: Any,
            need_sort: bool,
        ) -> TokenToKVPoolAllocator:
            if page_size != 1:
                raise ValueError(f"--page-size: the CPU platform needs 1, got {page_size}")
            return TokenToKVPoolAllocator(size, dtype=dtype, device=device, kvcache=kvcache, need_sort=need_sort)

        return build
