"""Several processes of one training run on this machine, as torchrun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PREPARE = "from lenvm_kernels import torchvision_schema\ntorchvision_schema.declare_if_missing()\n"
TIME_LIMIT_S = 300


def run_processes(script: str, folder: Path, arguments: Sequence[str], count: int) -> list[str]:
    """Run ``script FOLDER ARGUMENTS...`` as ``count`` processes of one group; returns their outputs by rank."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    common |= {"PYTHONPATH": os.pathsep.join(sys.path), "WORLD_SIZE": str(count)}
    command, pipe = [sys.executable, "-c", PREPARE + script, str(folder), *arguments], subprocess.PIPE
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        with ThreadPoolExecutor() as readers:
            answers = list(readers.map(lambda process: process.communicate(timeout=TIME_LIMIT_S), processes))
    finally:
        for process in processes:
            process.kill()
    for process, (_, error) in zip(processes, answers, strict=True):
        assert process.returncode == 0, error
    return [output for output, _ in answers]
