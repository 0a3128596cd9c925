"""``lenvm with-engine``: which engine it starts, and what the command gets."""

from __future__ import annotations

import json
import signal
import subprocess
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


LAUNCHER = """
import sys
from contextlib import contextmanager
from lenvm_runtime import cli, serve

@contextmanager
def running_engine(config):
    yield None, "http://127.0.0.1:1"
    print("the engine stops", flush=True)

serve.running_engine = running_engine
sys.exit(cli.main(["with-engine", "--model", "org/model", "--", sys.executable, "-c", sys.argv[1]]))
"""
COMMAND = """
import signal, sys, time
def end(number, frame):
    time.sleep(0.5)
    print("the command ends by", signal.Signals(number).name, flush=True)
    sys.exit(7)
signal.signal({signal}, end)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_command_which_ends_before_the_engine(number: signal.Signals) -> None:
    arguments = [sys.executable, "-c", LAUNCHER, COMMAND.format(signal=int(number))]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout
        assert launcher.stdout.readline() == "ready\n"
        launcher.send_signal(number)
        output, errors = launcher.communicate(timeout=30)
    assert output.splitlines() == [f"the command ends by {number.name}", "the engine stops"]
    assert (launcher.returncode, errors) == (7, "")


def test_an_interrupted_start_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def running_engine(_: serve.ServeConfig) -> Iterator[None]:
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "running_engine", running_engine)
    assert cli.main(["with-engine", "--model", "org/model", "--", "true"]) == 130
    assert capsys.readouterr().err == "lenvm: stopped\n"
