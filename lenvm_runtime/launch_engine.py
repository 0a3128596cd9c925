"""Start stock SGLang with this project's plugin: ``python -m lenvm_runtime.launch_engine ARGS``.

ARGS are SGLang's own. Added unless given: incremental streaming output (bytes linear in the length)
and, without an accelerator, the CPU device and attention backend.
"""

from __future__ import annotations

import os
import sys

from lenvm_kernels import torchvision_schema
from lenvm_runtime.config import CPU_ATTENTION_BACKEND

# At import, because SGLang's spawned processes import this module before anything of SGLang.
torchvision_schema.declare_if_missing()


def engine_arguments(arguments: list[str], on_cpu: bool) -> list[str]:
    """SGLang's argument list: the caller's, with our defaults for what it leaves open."""
    defaults: dict[str, list[str]] = {"--incremental-streaming-output": []}
    if on_cpu:
        defaults |= {
            "--device": ["cpu"],
            "--attention-backend": [CPU_ATTENTION_BACKEND],
            "--grammar-backend": ["llguidance"],  # xgrammar pins host memory, which needs an accelerator
            "--disable-cuda-graph": [],
            "--sleep-on-idle": [],
        }
    given = {argument.split("=", 1)[0] for argument in arguments}
    added = [part for flag, values in defaults.items() if flag not in given for part in (flag, *values)]
    return [*arguments, *added]


def main() -> None:
    """Parse SGLang's arguments with the plugin loaded and serve until a signal."""
    from sglang.srt.plugins import load_plugins

    load_plugins()

    from sglang.launch_server import run_server
    from sglang.srt.platforms import current_platform
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    on_cpu = current_platform.device_type == "cpu"
    try:
        run_server(prepare_server_args(engine_arguments(sys.argv[1:], on_cpu)))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
