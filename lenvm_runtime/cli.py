"""The ``lenvm`` command. Bad arguments: one line on standard error and exit status 2."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from types import FrameType
from typing import NoReturn

from lenvm_runtime import default_model, serve
from lenvm_runtime.value_model.source import find_folder

ADDED_COMMANDS = "lenvm.commands"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"lenvm: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status.

    Commands of other packages (entry points ``lenvm.commands``) get the rest of the arguments as they are.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    added = entry_points(group=ADDED_COMMANDS)
    if arguments and arguments[0] in added.names:
        added_status: int = added[arguments[0]].load()(arguments[1:])
        return added_status
    parsed = _build_parser(sorted(added.names)).parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
        return status
    except ValueError as error:
        print(f"lenvm: {error}", file=sys.stderr)
        return 2
    except (serve.StartError, default_model.ModelSourceError) as error:
        print(f"lenvm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lenvm: stopped", file=sys.stderr)
        return 130


def _build_parser(added: list[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lenvm",
        description="Length values and length control for LLM serving.",
        epilog=f"more commands: {', '.join(added)} (each has --help)" if added else None,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    command = commands.add_parser("serve", help="start the engine and the gateway")
    command.add_argument("--host", default="127.0.0.1")
    command.add_argument("--port", type=int, default=8000)
    command.add_argument("--model", default="", help="model folder or hub name (default: SmolLM2-135M-Instruct)")
    command.add_argument(
        "--lenvm",
        default="",
        help="LenVM by folder or hub name: a head, a checkpoint or an adapter (default: the shipped head)",
    )
    command.add_argument(
        "--lenvm-int8",
        action="store_true",
        help="on a CPU: round the weights of a separate LenVM to int8, which is faster and less exact",
    )
    command.add_argument("engine_arguments", nargs="*", help="after --: SGLang's own arguments")
    command.set_defaults(run=_serve)

    command = commands.add_parser("with-engine", help="run a command while an engine is up")
    command.add_argument("--model", default="", help="model folder or hub name (default: SmolLM2-135M-Instruct)")
    command.add_argument("--engine-argument", action="append", default=[], help="one of SGLang's own; may be repeated")
    command.add_argument("command", nargs="+", help="after --; gets LENVM_ENGINE_URL and LENVM_MODEL")
    command.set_defaults(run=_with_engine)
    return parser


def _serve(parsed: argparse.Namespace) -> int:
    config = serve.ServeConfig(
        host=parsed.host,
        port=parsed.port,
        model=parsed.model or None,
        head=find_folder(parsed.lenvm) if parsed.lenvm else None,
        engine_arguments=tuple(parsed.engine_arguments),
        in_int8=parsed.lenvm_int8,
    )
    return serve.serve(config)


def _with_engine(parsed: argparse.Namespace) -> int:
    model = parsed.model or str(default_model.ensure_default_model())
    config = serve.ServeConfig("127.0.0.1", 8000, parsed.model or None, serve.NO_HEAD, tuple(parsed.engine_argument))
    with serve.running_engine(config) as (_, url):
        environment = {**os.environ, "LENVM_ENGINE_URL": url, "LENVM_MODEL": model}
        return _run_to_end(parsed.command, environment)


def _run_to_end(command: Sequence[str], environment: dict[str, str]) -> int:
    """Run a command; its exit status, 128 + N when signal N ended it.

    Signals go on to it, and its end is awaited: it may need the engine until then. It has a process group of its own,
    so that one from the terminal comes to it once.
    """
    early: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def send_on(number: int, _frame: FrameType | None) -> None:
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)

    before = {number: signal.signal(number, send_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process = subprocess.Popen(command, env=environment, process_group=0)
        for number in early:
            process.send_signal(number)
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
