"""Configuration of the engine plugin: read once from the environment of the SGLang processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

CPU_ATTENTION_BACKEND = "lenvm_cpu"
CPU_PLATFORM = "lenvm_cpu"
"""Its entry point, as ``SGLANG_PLUGINS`` and ``SGLANG_PLATFORM`` name it."""
CUSTOM_LOGIT_PROCESSOR = "--enable-custom-logit-processor"
IN_INT8 = "LENVM_INT8"
WITHOUT_PLUGIN = "LENVM_WITHOUT_PLUGIN"
"""Set to 1, an engine may start without the plugin, for comparisons with stock SGLang."""


@dataclass(frozen=True)
class PluginConfig:
    """What the plugin does in this process.

    * ``head`` (``LENVM_HEAD``): folder of a LenVM of any kind, or None: without values, and control is refused.
    * ``in_int8`` (``LENVM_INT8`` = 1): a separate LenVM's weights are rounded to int8, on CPUs that multiply bytes.
    * ``step_times`` (``LENVM_STEP_TIMES``): file for the times of each step's parts, or None: they are not taken.
    """

    head: Path | None
    step_times: Path | None
    in_int8: bool = False

    @classmethod
    def from_environment(cls) -> PluginConfig:
        head, step_times = os.environ.get("LENVM_HEAD"), os.environ.get("LENVM_STEP_TIMES")
        in_int8 = os.environ.get(IN_INT8, "")
        if in_int8 not in ("", "0", "1"):
            raise ValueError(f"{IN_INT8}: must be 0 or 1, got {in_int8!r}")
        return cls(
            head=Path(head) if head else None,
            step_times=Path(step_times) if step_times else None,
            in_int8=in_int8 == "1",
        )
