"""The launcher: bad input is one line and exit status 2; nothing is started on a taken port."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lenvm_runtime import default_model, serve
from lenvm_runtime.cli import main
from lenvm_runtime.launch_engine import engine_arguments
from lenvm_runtime.serve import ServeConfig, StartError, running_stack
from tiny_lenvm import save_model


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--port", "0"],
        ["serve", "--port", "many"],
        ["serve", "--lenvm", "/no/such/folder"],
        ["serve", "--lenvm", "none"],
        ["serve", "--lenvm-int8"],
        ["serve", "--lenvm-int8", "--lenvm", str(serve.SHIPPED_HEAD)],
        ["serve", "--", "--enable-custom-logit-processor"],
        ["serve", "--", "--enable-custom-logit"],
        ["serve", "--no-such-flag"],
        ["no-such-command"],
    ],
)
def test_bad_arguments_are_one_line_and_exit_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: int | str | None = main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("localhost", "localhost")])
def test_a_taken_port_is_reported_before_anything_starts(host: str, shown: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as taken:
        try:
            taken.bind((host, 0))
        except OSError:
            pytest.skip("no such address here")
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(StartError, match=re.escape(f"{shown}:{port}: Address already in use")),
            running_stack(ServeConfig(host, port, None, None)),
        ):
            pass


def test_the_callers_engine_arguments_win() -> None:
    arguments = engine_arguments(["--device=cuda", "--attention-backend", "triton"], on_cpu=True)
    assert "cpu" not in arguments
    assert arguments.count("--attention-backend") == 1
    assert "--incremental-streaming-output" in arguments


def test_an_interrupted_conversion_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def save(_model: object, _tokenizer: object, folder: Path) -> None:
        folder.mkdir()
        (folder / "half.txt").write_text("x")
        attempts.append(folder)
        if len(attempts) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(default_model, "_find_gguf", lambda: tmp_path / "x.gguf")
    monkeypatch.setattr(default_model, "_verify_checksum", lambda _: None)
    monkeypatch.setattr(default_model, "_load", lambda _: (None, None))
    monkeypatch.setattr(default_model, "_save", save)
    with pytest.raises(KeyboardInterrupt):
        default_model.ensure_default_model(tmp_path)
    folder = default_model.ensure_default_model(tmp_path)
    assert folder.is_dir()
    assert len(attempts) == 2
    assert default_model.ensure_default_model(tmp_path) == folder
    assert len(attempts) == 2


def test_a_changed_model_file_is_refused(tmp_path: Path) -> None:
    changed = tmp_path / "model.gguf"
    changed.write_bytes(b"not the model")
    with pytest.raises(default_model.ModelSourceError, match="checksum"):
        default_model._verify_checksum(changed)


def launch_engine(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lenvm_runtime.launch_engine", *arguments],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": os.environ.get("PYTHONPATH", ""), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_an_engine_without_the_plugin_does_not_start() -> None:
    result = launch_engine("--model-path", "x", SGLANG_PLUGINS="other")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (
        "lenvm: SGLang did not load the plugin 'lenvm' (SGLANG_PLUGINS='other', SGLANG_PLATFORM='')"
    )


def test_a_cpu_engine_without_its_platform_does_not_start() -> None:
    result = launch_engine("--model-path", "x", SGLANG_PLUGINS="lenvm")
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == (
        "lenvm: the SGLang plugin cannot start: there is no accelerator, and SGLang runs on SRTPlatform instead of the "
        "platform 'lenvm_cpu'; name both in SGLANG_PLUGINS='lenvm', or leave it unset"
    )


def test_a_cpu_engine_with_plugin_and_platform_goes_on() -> None:
    """To the model that is not there."""
    result = launch_engine("--model-path", "/no/such/model", SGLANG_PLUGINS="lenvm, lenvm_cpu")
    assert "lenvm: " not in result.stderr
    assert "/no/such/model" in result.stderr


def test_without_the_plugin_on_purpose() -> None:
    """The start goes on, to the model that is not there."""
    arguments = ("--model-path", "/no/such/model", "--attention-backend", "torch_native")
    result = launch_engine(*arguments, SGLANG_PLUGINS="lenvm_cpu", LENVM_WITHOUT_PLUGIN="1")
    assert result.returncode != 0
    assert "did not load the plugin" not in result.stderr
    assert "/no/such/model" in result.stderr


@pytest.mark.parametrize("flag", ["--enable-custom-logit-processor", "--enable-custom-logit"])
def test_an_engine_that_would_unpickle_does_not_start(flag: str, tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    result = launch_engine("--model-path", str(tmp_path), flag)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (
        "lenvm: --enable-custom-logit-processor: refused, the engine would unpickle bytes that clients send"
    )


def test_a_failing_plugin_ends_the_engine_with_a_clear_message() -> None:
    result = launch_engine("--model-path", "x", LENVM_HEAD="/no/such/head")
    assert result.returncode != 0
    assert "lenvm: the SGLang plugin cannot start" in result.stderr
    assert "/no/such/head: no such folder" in result.stderr


def test_an_engine_refuses_what_it_would_not_take_for_int8() -> None:
    result = launch_engine("--model-path", "x", LENVM_INT8="yes")
    assert result.returncode != 0
    assert "LENVM_INT8: must be 0 or 1, got 'yes'" in result.stderr


@pytest.mark.parametrize("head", ["", str(serve.SHIPPED_HEAD)])
def test_an_engine_without_a_separate_lenvm_does_not_start_in_int8(head: str) -> None:
    result = launch_engine("--model-path", "x", LENVM_HEAD=head, LENVM_INT8="1")
    assert result.returncode != 0
    assert "LENVM_INT8: is read with a separate LenVM only" in result.stderr


def test_a_group_that_was_killed_is_gone() -> None:
    """Memory takes the kernel a moment to take back, after the process that is waited for has ended."""
    grandchild = "b = bytearray(600_000_000); b[::4096] = b'1' * len(b[::4096]); print(1, flush=True); input()"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", child], start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"1\n"
    serve._kill(process)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
