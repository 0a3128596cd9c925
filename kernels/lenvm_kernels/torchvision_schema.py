"""Let torchvision import beside a CPU build of torch.

The package index has torchvision only with CUDA operators. Its native library cannot load beside
a CPU torch, and its import then fails on two undeclared operators. Declaring their schemas is enough
for transformers and SGLang, which import torchvision without calling it for text models.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_OPERATORS = ("nms", "qnms")
_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None


def declare_if_missing() -> bool:
    """Declare torchvision's operators where its native library cannot load; whether it did."""
    global _library
    if _library is not None or hasattr(torch.ops.torchvision, "nms") or _native_library_loads():
        return False
    _library = torch.library.Library("torchvision", "DEF")
    for name in _OPERATORS:
        _library.define(name + _SIGNATURE)
    return True


def _native_library_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
    return True
