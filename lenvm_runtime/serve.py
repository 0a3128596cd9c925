"""``lenvm serve``: one command that starts the engine and the gateway, and stops both.

The launcher is the parent of both processes. They run in sessions of their own, so that Ctrl-C reaches
the launcher alone, which ends the gateway first (no new requests), then the engine. Both also ask the
kernel to end them if the launcher is killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import httpx

from lenvm_kernels.checkpoint_files import LenVMKind, find_kind
from lenvm_runtime import default_model
from lenvm_runtime.config import CUSTOM_LOGIT_PROCESSOR, IN_INT8

SHIPPED_HEAD = Path(__file__).parent / "heads" / default_model.MODEL_NAME
DEFAULT_MODEL_ARGUMENTS = {
    "--served-model-name": default_model.MODEL_NAME,
    "--dtype": "bfloat16",
    "--tool-call-parser": "pythonic",
}
CPU_ARGUMENTS = {"--max-total-tokens": "65536", "--max-running-requests": "64"}
NO_HEAD = Path("none")
START_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 20.0
GONE_S = 5.0
_PR_SET_PDEATHSIG = 1


class StartError(RuntimeError):
    """The stack did not come up; the message says what to look at."""


@dataclass(frozen=True)
class ServeConfig:
    """What to serve where. ``model`` or ``head`` None: the default model, the shipped head for it.

    ``head`` is the folder of a LenVM of any kind (`lenvm_kernels.checkpoint_files`); NO_HEAD: no length values,
    no length control. ``in_int8``: the weights of a separate LenVM are rounded. Raises ValueError (CheckpointError) for
    what cannot be served.
    """

    host: str
    port: int
    model: str | None
    head: Path | None
    engine_arguments: tuple[str, ...] = ()
    in_int8: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ValueError(f"port: must be from 1 to 65535, got {self.port}")
        if self.head is not None and self.head != NO_HEAD:
            kind = find_kind(self.head)
        if self.in_int8 and (self.head in (None, NO_HEAD) or kind is LenVMKind.HEAD):
            raise ValueError("lenvm-int8: is for a separate LenVM, a checkpoint or an adapter")
        if self.model is not None and self.head is None:
            raise ValueError("lenvm: a model other than the default needs its own LenVM")
        for argument in self.engine_arguments:
            flag = argument.split("=", 1)[0]
            if flag.startswith("--enable-custom-l") and CUSTOM_LOGIT_PROCESSOR.startswith(flag):  # argparse takes parts
                raise ValueError(f"{argument}: refused, the engine would unpickle bytes that clients send")


@dataclass(frozen=True)
class Stack:
    """A running engine and gateway."""

    engine: subprocess.Popen[bytes]
    gateway: subprocess.Popen[bytes]
    engine_url: str
    gateway_url: str


class _Stop(BaseException):
    """A signal asked the launcher to stop."""


def serve(config: ServeConfig) -> int:
    """Serve until a signal (exit status 0) or until a process of the stack ends (1)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _raise_stop)
    try:
        with running_stack(config) as stack:
            _say(f"ready: {stack.gateway_url} (Ctrl-C stops)")
            name = _wait_for_end(stack)
            _say(f"the {name} ended unexpectedly; stopping")
            return 1
    except _Stop:
        return 0


@contextmanager
def running_stack(config: ServeConfig) -> Iterator[Stack]:
    """Start engine and gateway, wait until both answer, and stop both at the end, whatever happens.

    Raises StartError with the end of the engine's log when one of them does not come up, and ValueError for an
    engine that the gateway would not serve.
    """
    if config.head == NO_HEAD:
        raise ValueError("lenvm: none: the gateway serves no engine without a LenVM (lenvm with-engine starts one)")
    _check_port_is_free(config.host, config.port)
    with running_engine(config) as (engine, engine_url):
        gateway_url = f"http://{_url_host(config.host)}:{config.port}"
        gateway = _spawn(
            [sys.executable, "-m", "lenvm_service", "--host", config.host, "--port", str(config.port)],
            {"LENVM_ENGINE_URL": engine_url},
            None,
        )
        try:
            _wait_until_ready("gateway", gateway, f"{gateway_url}/ready", None)
            yield Stack(engine, gateway, engine_url, gateway_url)
        finally:
            _stop(gateway)


@contextmanager
def running_engine(config: ServeConfig) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start the engine alone on a free local port: yields its process and address."""
    model, head = _resolve(config)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    log = default_model.cache_dir() / "logs" / f"engine-{port}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "lenvm_runtime.launch_engine", *_engine_command(config, model, port)]
    _say(f"starting the engine (log: {log})")
    environment = {
        "LENVM_HEAD": str(head) if head else "",
        IN_INT8: "1" if config.in_int8 else "",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(_engine_threads())),
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS": "0",
    }
    engine = _spawn(command, environment, log)
    try:
        _wait_until_ready("engine", engine, f"{url}/health", log)
        yield engine, url
    finally:
        _kill(engine)  # nothing is under way any more; to SIGTERM, SGLang answers in 5 to 10 seconds


def _engine_threads() -> int:
    """Leave a core to the gateway and the engine's other processes.

    A thread of the engine that waits for a core stalls all of its threads at every operator.
    """
    return max(1, len(os.sched_getaffinity(0)) - 1)


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _resolve(config: ServeConfig) -> tuple[str, Path | None]:
    """The model folder or name, and the LenVM's folder (None: no values, no length control)."""
    if config.head == NO_HEAD:
        return config.model or str(default_model.ensure_default_model()), None
    if config.model is None:
        return str(default_model.ensure_default_model()), config.head or SHIPPED_HEAD
    return config.model, config.head


def _engine_command(config: ServeConfig, model: str, port: int) -> list[str]:
    defaults = {"--host": "127.0.0.1", "--port": str(port), "--model-path": model}
    if config.model is None:
        defaults |= DEFAULT_MODEL_ARGUMENTS | CPU_ARGUMENTS
    given = {argument.split("=", 1)[0] for argument in config.engine_arguments}
    parts = [part for flag, value in defaults.items() if flag not in given for part in (flag, value)]
    return [*parts, "--skip-server-warmup", *config.engine_arguments]


def _spawn(command: list[str], environment: dict[str, str], log: Path | None) -> subprocess.Popen[bytes]:
    output = log.open("wb") if log else None
    return subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_until_ready(name: str, process: subprocess.Popen[bytes], url: str, log: Path | None) -> None:
    started = time.monotonic()
    reported = 0.0
    while (elapsed := time.monotonic() - started) < START_TIMEOUT_S:
        if process.poll() is not None:
            raise StartError(f"the {name} ended with status {process.returncode}\n{_tail(log)}")
        if _answers(url):
            _say(f"the {name} is up after {elapsed:.0f} s")
            return
        if elapsed - reported >= 10:
            reported = elapsed
            _say(f"waiting for the {name} ({elapsed:.0f} s)")
        time.sleep(0.2)
    raise StartError(f"the {name} did not answer within {START_TIMEOUT_S:.0f} s\n{_tail(log)}")


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=30, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _tail(log: Path | None, num_lines: int = 20) -> str:
    if log is None or not log.exists():
        return ""
    return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])


def _check_port_is_free(host: str, port: int) -> None:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except OSError as error:
        raise StartError(f"cannot listen on {_url_host(host)}:{port}: {error.strerror}") from None


def _url_host(host: str) -> str:
    """The host as a URL has it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def _wait_for_end(stack: Stack) -> str:
    while True:
        for name, process in (("engine", stack.engine), ("gateway", stack.gateway)):
            if process.poll() is not None:
                return name
        time.sleep(0.5)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the process, then SIGKILL to whatever is left of its session."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            _say(f"process {process.pid} did not stop within {STOP_TIMEOUT_S:.0f} s; killing it")
    _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the process and whatever else is left of its session; waits until none of them is there."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + GONE_S
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:  # gigabytes take the kernel a moment
            os.killpg(process.pid, 0)
            with suppress(ChildProcessError):  # where this is PID 1, they are its children now
                os.waitpid(-process.pid, os.WNOHANG)
            time.sleep(0.02)


def _raise_stop(_number: int, _frame: FrameType | None) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise _Stop


def _say(message: str) -> None:
    print(f"lenvm: {message}", file=sys.stderr, flush=True)
