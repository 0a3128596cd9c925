"""Before any test module imports transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from lenvm_kernels import torchvision_schema

torchvision_schema.declare_if_missing()


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in a folder of their own, with nothing from outside: no engine, no hub, no cached data sets."""
    import datasets
    import huggingface_hub

    from lenvm_training import experiment_steps

    monkeypatch.delenv(experiment_steps.ENGINE_URL, raising=False)
    monkeypatch.delenv(experiment_steps.SERVED_MODEL, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
