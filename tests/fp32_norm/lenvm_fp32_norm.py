"""A plugin for SGLang on a GPU, whose RMS norm has no fp32 kernel: models in fp32, which the tests compare with, run.

An engine finds it by its metadata beside this file when the folder is on PYTHONPATH.
"""

from __future__ import annotations


def load() -> None:
    """Run every RMS norm by SGLang's torch form."""
    from sglang.srt.layers.layernorm import RMSNorm

    RMSNorm.forward_cuda = RMSNorm.forward_native
