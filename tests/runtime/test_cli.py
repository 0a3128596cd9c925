"""``lenvm with-engine``: which engine it starts, and what the command gets."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lenvm_runtime import cli, serve


def test_with_engine_starts_the_named_model_and_hands_on_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[serve.ServeConfig] = []

    @contextmanager
    def running_engine(config: serve.ServeConfig) -> Iterator[tuple[None, str]]:
        configs.append(config)
        yield None, "http://127.0.0.1:1"

    monkeypatch.setattr(serve, "running_engine", running_engine)
    out = tmp_path / "environment.json"
    code = f"import json, os; json.dump(dict(os.environ), open({str(out)!r}, 'w')); raise SystemExit(7)"
    flags = ["--model", "org/model", "--engine-argument=--dtype=bfloat16", "--engine-argument=--tp=2"]
    assert cli.main(["with-engine", *flags, "--", sys.executable, "-c", code]) == 7
    (config,) = configs
    assert (config.model, config.head) == ("org/model", serve.NO_HEAD)
    assert config.engine_arguments == ("--dtype=bfloat16", "--tp=2")
    environment = json.loads(out.read_text())
    assert environment["LENVM_ENGINE_URL"] == "http://127.0.0.1:1"
    assert environment["LENVM_MODEL"] == "org/model"
