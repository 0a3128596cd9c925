"""An engine that cannot serve its LenVM does not start, and says why once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lenvm_runtime.serve import free_port
from tiny_lenvm import byte_tokenizer, save_lenvm, save_model

pytestmark = pytest.mark.e2e


def start_engine(model: Path, lenvm: Path, arguments: tuple[str, ...] = (), **environment: str) -> tuple[int, str]:
    """Exit status and output of an engine that is expected to end by itself."""
    command = [sys.executable, "-m", "lenvm_runtime.launch_engine", "--model-path", str(model)]
    command += ["--port", str(free_port()), "--dtype", "float32", *arguments]
    env = {**os.environ, "LENVM_HEAD": str(lenvm), **environment}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    return ended.returncode, ended.stdout + ended.stderr


def only_message(output: str) -> str:
    assert "Traceback" not in output, output
    messages = [line for line in output.splitlines() if line.startswith("lenvm: ")]
    assert len(messages) == 1, output
    return messages[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    save_model(folder, "llama")
    return folder


def test_another_tokenizer_stops_the_start(model: Path, tmp_path: Path) -> None:
    save_lenvm(tmp_path, "llama", tokenizer=byte_tokenizer())
    status, output = start_engine(model, tmp_path)
    assert status == 1
    message = only_message(output)
    assert "the LenVM's tokenizer is not the served model's: 'w" in message
    assert "the LenVM has no such token" in message


def test_an_option_that_does_not_work_with_it_stops_the_start(model: Path, tmp_path: Path) -> None:
    save_lenvm(tmp_path, "llama")
    status, output = start_engine(model, tmp_path, ("--disaggregation-mode", "prefill"))
    assert status == 1
    assert "--disaggregation-mode prefill: does not work with a separate LenVM" in only_message(output)


def test_a_context_longer_than_the_lenvms_stops_the_start(tmp_path: Path) -> None:
    save_model(tmp_path / "served", "llama", context=256)
    save_lenvm(tmp_path / "lenvm", "llama")
    status, output = start_engine(tmp_path / "served", tmp_path / "lenvm")
    assert status == 1
    assert "give --context-length 128 or less" in only_message(output)


def test_log_probabilities_from_before_the_temperature_stop_the_start(model: Path, tmp_path: Path) -> None:
    save_lenvm(tmp_path, "llama")
    status, output = start_engine(model, tmp_path, SGLANG_RETURN_ORIGINAL_LOGPROB="1")
    assert status == 1
    assert "SGLANG_RETURN_ORIGINAL_LOGPROB" in only_message(output)
