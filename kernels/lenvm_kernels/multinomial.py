"""One draw a row from unnormalised probabilities: ``torch.multinomial(probs, 1)``, draw for draw, several times faster.

torch takes argmax p / q with q = -log(1 - u), one u from its generator for every entry of the table. The C++ kernel
steps the same generator and skips the logarithm and the quotient of entries that cannot win, as q >= u.
"""

import ctypes
import functools
import logging
from pathlib import Path

import torch

from lenvm_kernels import cpp_library

SOURCE = Path(__file__).with_name("multinomial.cpp")
STATE_WORDS = 624
_COUNTERS, _STATE = slice(8, 24), slice(24, 24 + 8 * STATE_WORDS)
"""Bytes of torch's serialised generator: int32 (words left + 1, seeded), int64 next word; the words, 64 bits each."""

logger = logging.getLogger(__name__)


def multinomial(probs: torch.Tensor) -> torch.Tensor:
    """Draw one index a row: [num_rows, n] >= 0, rows need not sum to 1 -> [num_rows, 1] int64.

    Uses and advances torch's default CPU generator exactly as ``torch.multinomial(probs, 1)``, and gives its
    indices; fp32 CPU tensors with dense rows go to the kernel, others to torch.

    Raises:
        RuntimeError: a row with a negative number, an infinity, a NaN or no positive number.
    """
    if probs.device.type != "cpu" or probs.dtype != torch.float32 or probs.stride(-1) != 1 or not kernel_usable():
        return torch.multinomial(probs, 1)
    return _multinomial_cpp(probs)


@functools.cache
def kernel_usable() -> bool:
    """Whether the kernel builds and draws what this torch draws; logs once why not."""
    if not cpp_library.available(SOURCE):
        return False
    state = torch.get_rng_state()
    probs = torch.softmax(torch.randn(3, 1000), dim=-1)
    start = torch.get_rng_state()
    expected, expected_next = torch.multinomial(probs, 1), torch.rand(1)
    torch.set_rng_state(start)
    agrees = torch.equal(_multinomial_cpp(probs), expected) and torch.equal(torch.rand(1), expected_next)
    torch.set_rng_state(state)
    if not agrees:
        logger.warning("multinomial runs in plain torch: torch %s draws in another way", torch.__version__)
    return agrees


def _multinomial_cpp(probs: torch.Tensor) -> torch.Tensor:
    serialised = torch.get_rng_state()
    words, counters = serialised[_STATE].view(torch.int64), serialised[_COUNTERS].view(torch.int32)
    state = words.to(torch.int32)
    used_up = int(counters[0]) == 1
    position = ctypes.c_int32(STATE_WORDS if used_up else int(counters[2]))
    tokens = torch.empty(probs.shape[0], 1, dtype=torch.int64)
    _library().lenvm_multinomial(
        probs.data_ptr(),
        probs.shape[0],
        probs.shape[1],
        probs.stride(0),
        state.data_ptr(),
        ctypes.byref(position),
        tokens.data_ptr(),
    )
    if (tokens < 0).any():
        raise RuntimeError("probabilities with a negative number, an infinity, a NaN or no positive number")
    words.copy_(state.to(torch.int64) & 0xFFFFFFFF)
    counters[0], counters[2] = STATE_WORDS + 1 - position.value, position.value
    torch.set_rng_state(serialised)
    return tokens


@functools.cache
def _library() -> ctypes.CDLL:
    library = cpp_library.load(SOURCE)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.lenvm_multinomial.argtypes = (pointer, size, size, size, pointer, pointer, pointer)
    library.lenvm_multinomial.restype = None
    return library
