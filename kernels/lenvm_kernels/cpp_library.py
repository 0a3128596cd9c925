"""C++ kernels for CPUs: built from their source at first use, loaded with ctypes.

The library goes to ``$LENVM_CACHE_DIR/kernels`` (default ``~/.cache/lenvm/kernels``), named by a hash of the source,
the compiler, the torch version and the CPU's flags, so that a home folder shared by unlike machines is safe. It uses
torch's own OpenMP runtime: the thread count is torch's, and no second thread pool fights for the cores.
"""

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

COMPILERS = ("c++", "g++", "clang++")
# GCC 12 warns about its own AVX-512 headers
CFLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-Wall", "-Wextra", "-Wno-maybe-uninitialized")
BUILD_TIMEOUT_S = 300

logger = logging.getLogger(__name__)


class KernelUnavailableError(RuntimeError):
    """The kernel cannot be built or loaded on this machine; the message says why."""


@functools.cache
def load(source: Path) -> ctypes.CDLL:
    """The library of one source file, built if this machine has none yet. Raises KernelUnavailableError."""
    compiler = find_compiler()
    path = cache_dir() / f"{source.stem}-{build_key(compiler, source)}.so"
    try:
        if not path.exists():
            build(compiler, source, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelUnavailableError(f"cannot build or load {path}: {error}") from error


@functools.cache
def available(source: Path) -> bool:
    """Whether the library of a source file is usable here; builds it at the first call, logs once why it is not."""
    try:
        load(source)
    except KernelUnavailableError as error:
        logger.warning("%s runs in plain torch, several times slower: %s", source.stem, error)
        return False
    return True


def cache_dir() -> Path:
    """Where built kernels of this user lie."""
    return Path(os.environ.get("LENVM_CACHE_DIR", Path.home() / ".cache" / "lenvm")) / "kernels"


def find_compiler() -> tuple[str, ...]:
    """The C++ compiler's command: $CXX, else the first of `COMPILERS` that is installed."""
    command = shlex.split(os.environ.get("CXX", "")) or [name for name in COMPILERS if shutil.which(name)][:1]
    if not command or not shutil.which(command[0]):
        wanted = command[0] if command else ", ".join(COMPILERS)
        raise KernelUnavailableError(f"no C++ compiler found ({wanted}); install g++ or set CXX")
    return tuple(command)


def build_key(compiler: tuple[str, ...], source: Path) -> str:
    """Hash of all that decides what the built library contains."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    headers = [path.read_text() for path in sorted(source.parent.glob("*.h"))]
    parts = (source.read_text(), *headers, *compiler, version, *CFLAGS, torch.__version__, cpu_flags())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def cpu_flags() -> str:
    """The instruction sets of this CPU, as one string."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def openmp_library() -> str:
    """Path of the OpenMP runtime that torch has loaded into this process."""
    names = ("libgomp", "libiomp5", "libomp")
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.split()[-1])
        if path.name.startswith(names) and ".so" in path.name:
            return str(path)
    raise KernelUnavailableError("this torch was built without OpenMP")


def build(compiler: tuple[str, ...], source: Path, path: Path) -> None:
    """Compile `source` to `path`: one process at a time, and the file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            compiled, linked = Path(folder, "kernel.o"), Path(folder, "kernel.so")
            run_compiler([*compiler, *CFLAGS, "-c", str(source), "-o", str(compiled)])
            run_compiler([*compiler, "-shared", str(compiled), openmp_library(), "-o", str(linked)])
            linked.replace(path)


def run_compiler(command: list[str]) -> None:
    """Run one compiler command; KernelUnavailableError with the end of its output if it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BUILD_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise KernelUnavailableError(f"{shlex.join(command)} took over {BUILD_TIMEOUT_S} s") from error
    if result.returncode:
        raise KernelUnavailableError(f"{shlex.join(command)} failed: {result.stderr.strip()[-500:]}")
