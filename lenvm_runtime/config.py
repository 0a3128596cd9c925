"""Configuration of the engine plugin: read once from the environment of the SGLang processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

CPU_ATTENTION_BACKEND = "lenvm_cpu"
CUSTOM_LOGIT_PROCESSOR = "--enable-custom-logit-processor"
WITHOUT_PLUGIN = "LENVM_WITHOUT_PLUGIN"
"""Set to 1, an engine may start without the plugin, for comparisons with stock SGLang."""


@dataclass(frozen=True)
class PluginConfig:
    """What the plugin does in this process.

    * ``head`` (``LENVM_HEAD``): folder of a LenVM of any kind, or None: serve without values or control.
    """

    head: Path | None

    @classmethod
    def from_environment(cls) -> PluginConfig:
        head = os.environ.get("LENVM_HEAD")
        return cls(head=Path(head) if head else None)
