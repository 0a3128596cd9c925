"""Start stock SGLang with this project's plugin: ``python -m lenvm_runtime.launch_engine ARGS``.

ARGS are SGLang's own. Added unless given: incremental streaming output (bytes linear in the length)
and, without an accelerator, the CPU device and attention backend.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from lenvm_kernels import torchvision_schema
from lenvm_runtime.config import CPU_ATTENTION_BACKEND, CUSTOM_LOGIT_PROCESSOR, WITHOUT_PLUGIN

PLUGIN = "lenvm_runtime.plugin"

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
    _require_plugin()

    from sglang.launch_server import run_server
    from sglang.srt.platforms import current_platform
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    on_cpu = current_platform.device_type == "cpu"
    server_args = prepare_server_args(engine_arguments(sys.argv[1:], on_cpu))
    if server_args.enable_custom_logit_processor:
        _refuse(f"{CUSTOM_LOGIT_PROCESSOR}: refused, the engine would unpickle bytes that clients send")
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _require_plugin() -> None:
    """End the process if SGLang left the plugin out, which it only logs, unless the engine is to run without it.

    Loading imports the plugin; one that fails then ends the process itself.
    """
    if PLUGIN not in sys.modules and os.environ.get(WITHOUT_PLUGIN) != "1":
        given = {name: os.environ.get(name, "") for name in ("SGLANG_PLUGINS", "SGLANG_PLATFORM")}
        found = ", ".join(f"{name}={value!r}" for name, value in given.items())
        _refuse(f"SGLang did not load the plugin 'lenvm' ({found})")


def _refuse(message: str) -> NoReturn:
    print(f"lenvm: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
