"""The CPU kernel of both attentions: built from ``paged_attention.cpp`` at first use, called by ctypes.

The library goes to ``$LENVM_CACHE_DIR/kernels`` (default ``~/.cache/lenvm/kernels``), named by a hash of the source,
the compiler, the torch version and the CPU's flags, so that a home folder shared by unlike machines is safe. It uses
torch's own OpenMP runtime: the thread count is torch's, and no second thread pool fights for the cores.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("paged_attention.cpp")
COMPILERS = ("c++", "g++", "clang++")
# GCC 12 warns about its own AVX-512 headers
CFLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-Wall", "-Wextra", "-Wno-maybe-uninitialized")
DTYPES = (torch.bfloat16, torch.float32)
BUILD_TIMEOUT_S = 300


class KernelUnavailableError(RuntimeError):
    """The kernel cannot be built or loaded on this machine; the message says why."""


class Problem(ctypes.Structure):
    """Mirror of `Problem` in paged_attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "k_new", "v_new", "out", "req_to_token")),
        *((name, ctypes.c_void_p) for name in ("req_pool_indices", "kv_lens", "q_starts")),
        *((name, ctypes.c_int64) for name in ("num_reqs", "num_heads", "num_kv_heads", "qk_dim", "v_dim")),
        *((name, ctypes.c_int64) for name in ("req_stride", "q_stride", "out_stride", "k_stride", "v_stride")),
        *((name, ctypes.c_int64) for name in ("k_new_stride", "v_new_stride")),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("logit_cap", ctypes.c_float),
        ("causal", ctypes.c_int32),
    )


def supports(q: torch.Tensor, *keys_and_values: torch.Tensor) -> bool:
    """Whether the kernel takes these tensors: CPU, bf16 or fp32, dense rows, an even head size."""
    return (
        q.device.type == "cpu"
        and q.dtype in DTYPES
        and q.shape[2] % 2 == 0
        and all(dense_rows(tensor) for tensor in (q, *keys_and_values))
    )


def dense_rows(tensor: torch.Tensor) -> bool:
    """Whether tensor[i] is contiguous for a [n, heads, dim] tensor."""
    return tensor.stride(2) == 1 and tensor.stride(1) == tensor.shape[2]


def paged_attention(
    q: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    kv_lens: torch.Tensor,
    q_starts: torch.Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """See `lenvm_kernels.paged_attention.paged_attention`; takes what `supports` accepts."""
    tables = (req_to_token, req_pool_indices, kv_lens, q_starts)
    return _run(q, None, k_buffer, v_buffer, tables, scale, causal, window, logit_cap)


def candidate_attention(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    kv_lens: torch.Tensor,
    q_starts: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """See `lenvm_kernels.candidate_attention.candidate_attention`; takes what `supports` accepts."""
    tables = (req_to_token, req_pool_indices, kv_lens, q_starts)
    return _run(q, (k_new, v_new), k_buffer, v_buffer, tables, scale, False, window, logit_cap)


def _run(
    q: torch.Tensor,
    new: tuple[torch.Tensor, torch.Tensor] | None,
    k_buffer: torch.Tensor,
    v_buffer: torch.Tensor,
    tables: tuple[torch.Tensor, ...],
    scale: float,
    causal: bool,
    window: int | None,
    logit_cap: float,
) -> torch.Tensor:
    """One call of the library. ``new``: the candidates' keys and values; ``tables``: the four index tensors."""
    out = q.new_empty(q.shape[0], q.shape[1], v_buffer.shape[2])
    req_to_token, *rest = tables
    req_pool_indices, kv_lens, q_starts = (t.contiguous() for t in rest)
    problem = Problem(
        *(t.data_ptr() for t in (q, k_buffer, v_buffer)),
        *((t.data_ptr() for t in new) if new else (None, None)),
        *(t.data_ptr() for t in (out, req_to_token, req_pool_indices, kv_lens, q_starts)),
        req_pool_indices.shape[0],
        q.shape[1],
        k_buffer.shape[1],
        q.shape[2],
        v_buffer.shape[2],
        *(t.stride(0) for t in (req_to_token, q, out, k_buffer, v_buffer)),
        *((t.stride(0) for t in new) if new else (0, 0)),
        -1 if window is None else window,
        scale,
        logit_cap,
        causal,
    )
    load().lenvm_paged_attention(ctypes.byref(problem), q.dtype == torch.bfloat16, torch.get_num_threads())
    return out


@functools.cache
def load() -> ctypes.CDLL:
    """The kernel's library, built if this machine has none yet. Raises KernelUnavailableError."""
    compiler = find_compiler()
    path = cache_dir() / f"paged_attention-{build_key(compiler)}.so"
    try:
        if not path.exists():
            build(compiler, path)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelUnavailableError(f"cannot build or load {path}: {error}") from error
    library.lenvm_paged_attention.argtypes = (ctypes.POINTER(Problem), ctypes.c_int32, ctypes.c_int32)
    library.lenvm_paged_attention.restype = None
    return library


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


def build_key(compiler: tuple[str, ...]) -> str:
    """Hash of all that decides what the built library contains."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = (SOURCE.read_text(), *compiler, version, *CFLAGS, torch.__version__, cpu_flags())
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


def build(compiler: tuple[str, ...], path: Path) -> None:
    """Compile to `path`: one process at a time, and the file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            compiled, linked = Path(folder, "kernel.o"), Path(folder, "kernel.so")
            run_compiler([*compiler, *CFLAGS, "-c", str(SOURCE), "-o", str(compiled)])
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
