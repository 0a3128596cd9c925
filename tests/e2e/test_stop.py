"""``lenvm serve`` as a user runs it: a signal or a dead engine ends streams with one event and leaves no process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from lenvm_runtime.default_model import MODEL_NAME
from lenvm_runtime.serve import free_port

pytestmark = pytest.mark.e2e

SCHEDULER = "sglang::scheduler"
START_S, END_S = 120, 60


class Served:
    """A running ``lenvm serve``."""

    def __init__(self, log: Path, host: str) -> None:
        self.log, port = log, free_port()
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        command = [sys.executable, "-m", "lenvm_runtime.cli", "serve", "--host", host, "--port", str(port)]
        environment = {**os.environ, "LENVM_SHUTDOWN_TIMEOUT_S": "1"}
        with log.open("wb") as output:
            self.launcher = subprocess.Popen(command, env=environment, stderr=output, start_new_session=True)
        self.sessions = {self.launcher.pid}

    def processes(self) -> list[psutil.Process]:
        """Every live process of the stack, orphans too: those of the sessions that the launcher's descendants had."""
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.launcher.pid).children(recursive=True):
                with suppress(ProcessLookupError):
                    self.sessions.add(os.getsid(process.pid))
        return [process for process in psutil.process_iter() if self.owns(process)]

    def owns(self, process: psutil.Process) -> bool:
        try:
            return os.getsid(process.pid) in self.sessions and process.status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.NoSuchProcess):
            return False

    def schedulers(self) -> list[psutil.Process]:
        return [process for process in self.processes() if SCHEDULER in process.cmdline()]

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + START_S
        while not condition():
            assert self.launcher.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def is_ready(self) -> bool:
        return f"lenvm: ready: {self.url} " in self.log.read_text()

    @contextmanager
    def endless_stream(self) -> Iterator[Iterator[str]]:
        """The events of an answer that does not end by itself, after the first three."""
        body = {
            "model": MODEL_NAME,
            "messages": [{"role": "user", "content": "Write a long essay about rivers."}],
            "ignore_eos": True,
            "stream": True,
        }
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=60) as response:
            events = (line for line in response.iter_lines() if line)
            for _ in range(3):
                assert '"choices"' in next(events)
            yield events


def has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as probe, suppress(OSError):
        probe.bind(("::1", 0))
        return True
    return False


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    running = Served(tmp_path / "serve.log", "::1" if has_ipv6() else "127.0.0.1")
    yield running
    for process in running.processes():
        process.kill()
    running.launcher.wait()


def assert_one_error_at_the_end(events: Iterator[str], code: str) -> None:
    *chunks, last = events
    assert all('"choices"' in chunk for chunk in chunks)
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == code


def test_ctrl_c_ends_streams_and_leaves_no_process(served: Served) -> None:
    served.wait_for(served.is_ready)
    assert len(served.processes()) >= 5  # launcher, gateway, engine, scheduler, detokenizer
    with served.endless_stream() as events:
        served.launcher.send_signal(signal.SIGINT)
        assert_one_error_at_the_end(events, "engine_unavailable")
    assert served.launcher.wait(END_S) == 0
    assert served.processes() == []


def test_sigterm_while_the_engine_starts(served: Served) -> None:
    served.wait_for(served.schedulers)
    assert not served.is_ready()
    served.launcher.send_signal(signal.SIGTERM)
    assert served.launcher.wait(END_S) == 0
    assert served.processes() == []


def test_a_dead_scheduler_ends_streams_and_everything_else(served: Served) -> None:
    served.wait_for(served.is_ready)
    (scheduler,) = served.schedulers()
    with served.endless_stream() as events:
        scheduler.kill()
        assert_one_error_at_the_end(events, "engine_broken")
    assert served.launcher.wait(END_S) == 1
    assert "the engine ended unexpectedly" in served.log.read_text()
    assert served.processes() == []
