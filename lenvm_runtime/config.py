"""Configuration of the engine plugin: read once from the environment of the SGLang processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

CPU_ATTENTION_BACKEND = "lenvm_cpu"
SAMPLERS = ("stock", "inverse_cdf")


class ConfigError(ValueError):
    """An environment variable that cannot be used; the message names it."""


@dataclass(frozen=True)
class PluginConfig:
    """What the plugin does in this process.

    * ``head`` (``LENVM_HEAD``): folder of a LenVM of any kind, or None: serve without values or control;
    * ``sampler`` (``LENVM_SAMPLER``): ``stock`` draws SGLang's own tokens for a seed; ``inverse_cdf``
      draws from the same distributions faster on a CPU.
    """

    head: Path | None
    sampler: str

    @classmethod
    def from_environment(cls) -> PluginConfig:
        head = os.environ.get("LENVM_HEAD")
        sampler = os.environ.get("LENVM_SAMPLER", "stock")
        if sampler not in SAMPLERS:
            raise ConfigError(f"LENVM_SAMPLER: must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
        return cls(head=Path(head) if head else None, sampler=sampler)
