"""A separate LenVM to measure and to test with: the default model's weights and the shipped head's value head."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lenvm_kernels.checkpoint import read_config
from lenvm_kernels.checkpoint_files import CONFIG_FILE, VALUE_FILE
from lenvm_runtime.default_model import ensure_default_model
from lenvm_runtime.serve import SHIPPED_HEAD


def make_lenvm(folder: Path) -> Path:
    """Fill ``folder`` with a published-format checkpoint, as large as the served model; returns it."""
    for path in ensure_default_model().iterdir():
        (folder / path.name).symlink_to(path)
    shutil.copy(SHIPPED_HEAD / VALUE_FILE, folder)
    (folder / CONFIG_FILE).write_text(json.dumps({"gamma": read_config(SHIPPED_HEAD).gamma}))
    return folder
