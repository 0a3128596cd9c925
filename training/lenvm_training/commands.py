"""The training side of the ``lenvm`` command (entry points ``lenvm.commands``): each function is one command.

Bad input: one line on standard error and exit status 2. What another try may cure (engine or hub down, full
disk): one line and exit status 1; the same command started again goes on from where it stopped.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeGuard

from lenvm_kernels import torchvision_schema

torchvision_schema.declare_if_missing()  # before anything imports transformers

from safetensors import SafetensorError  # noqa: E402

from lenvm_training import experiment_steps, rollout_files  # noqa: E402
from lenvm_training.config import Experiment, load_experiment, load_yaml  # noqa: E402
from lenvm_training.endpoints import EngineError  # noqa: E402
from lenvm_training.hub import HubError, pull_folder, push_folder  # noqa: E402
from lenvm_training.prompt_sources import FULL_DISK  # noqa: E402
from lenvm_training.rollouts import RolloutWriteError  # noqa: E402

Command = Callable[[argparse.Namespace], None]
STATUS_BAD_INPUT, STATUS_TRY_AGAIN, STATUS_INTERRUPTED = 2, 1, 130
UNUSABLE_FILE = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
UNUSABLE_PLACE = (errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)
FULL_MARKS = ("No space left", "File too large", "PytorchStreamWriter", "inline_container", "iostream error")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(STATUS_BAD_INPUT, f"{self.prog}: {message}\n")


def prompts(arguments: Sequence[str]) -> int:
    """Write the prompt files of a configuration."""
    return _run(_config_parser("prompts", "write prompt files"), experiment_steps.write_prompts, arguments)


def rollouts(arguments: Sequence[str]) -> int:
    """Sample the completions of a configuration's prompts."""
    return _run(_config_parser("rollouts", "sample completions"), experiment_steps.write_rollouts, arguments)


def train(arguments: Sequence[str]) -> int:
    """Train the LenVM or the heads of a configuration."""
    return _run(_config_parser("train", "train a LenVM or heads"), experiment_steps.train, arguments)


def evaluate(arguments: Sequence[str]) -> int:
    """Evaluate a configuration's LenVM on its evaluation rollouts."""
    return _run(_config_parser("evaluate", "evaluate a LenVM"), experiment_steps.evaluate, arguments)


def sweep(arguments: Sequence[str]) -> int:
    """Train and evaluate every variant of a sweep file."""
    parser = _Parser(prog="lenvm sweep", description="train and evaluate the variants of a sweep file")
    parser.add_argument("sweep", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return _guard(parser, lambda parsed: experiment_steps.sweep(parsed.sweep, parsed.overrides), arguments)


def report(arguments: Sequence[str]) -> int:
    """Length distribution of a rollout file."""
    parser = _Parser(prog="lenvm report", description="length distribution of rollout files: numbers and plot")
    parser.add_argument("rollouts", nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="folder for lengths.md and lengths.png")
    return _guard(parser, lambda parsed: rollout_files.report(parsed.rollouts, parsed.out), arguments)


def downsample(arguments: Sequence[str]) -> int:
    """Keep fewer completions of each prompt, or fewer prompts."""
    parser = _Parser(prog="lenvm downsample", description="keep fewer completions a prompt; less is a subset of more")
    parser.add_argument("rollouts")
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, required=True, help="completions kept a prompt")
    parser.add_argument("--seed", type=int, default=0)
    return _guard(
        parser,
        lambda parsed: rollout_files.downsample(parsed.rollouts, parsed.out, parsed.samples, parsed.seed),
        arguments,
    )


def group(arguments: Sequence[str]) -> int:
    """Rollouts into the public grouped format."""
    parser = _Parser(prog="lenvm group", description="write rollouts in the public grouped format")
    parser.add_argument("rollouts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--model", required=True, help="whose tokenizer the rollouts are of")
    return _guard(
        parser,
        lambda parsed: rollout_files.group(parsed.rollouts, parsed.prompts, parsed.model, parsed.out),
        arguments,
    )


def ungroup(arguments: Sequence[str]) -> int:
    """The public grouped format into rollouts."""
    parser = _Parser(prog="lenvm ungroup", description="read the public grouped format into a rollout file")
    parser.add_argument("grouped", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True, help="whose tokenizer texts are tokenised with")
    parser.add_argument("--assume-finished", action="store_true", help="take rows that do not say how they ended")
    return _guard(
        parser,
        lambda parsed: rollout_files.ungroup(parsed.grouped, parsed.out, parsed.model, parsed.assume_finished),
        arguments,
    )


def convert_config(arguments: Sequence[str]) -> int:
    """The reference's training YAML into ours."""
    parser = _Parser(prog="lenvm convert-config", description="convert a 'stage: lenvm' YAML; names what is lost")
    parser.add_argument("reference", type=Path)
    parser.add_argument("out", type=Path)
    return _guard(parser, lambda parsed: rollout_files.convert_config(parsed.reference, parsed.out), arguments)


def push(arguments: Sequence[str]) -> int:
    """Upload a head or LenVM folder to the hub."""
    parser = _Parser(prog="lenvm push", description="upload a head or LenVM folder to the hub")
    parser.add_argument("folder", type=Path)
    parser.add_argument("repository", help="OWNER/NAME")
    parser.add_argument("--private", action="store_true")
    return _guard(
        parser, lambda parsed: print(push_folder(parsed.folder, parsed.repository, parsed.private)), arguments
    )


def pull(arguments: Sequence[str]) -> int:
    """Download a head or LenVM from the hub."""
    parser = _Parser(prog="lenvm pull", description="download a head or LenVM from the hub")
    parser.add_argument("repository", help="OWNER/NAME")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--revision")
    return _guard(parser, lambda parsed: pull_folder(parsed.repository, parsed.folder, parsed.revision), arguments)


def _config_parser(name: str, description: str) -> _Parser:
    parser = _Parser(prog=f"lenvm {name}", description=description)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set a key, as target.gamma=0.999")
    return parser


def _run(parser: _Parser, step: Callable[[Experiment, Sequence[str]], None], arguments: Sequence[str]) -> int:
    """A step of an experiment; it also gets the command that would run it again."""

    def run(parsed: argparse.Namespace) -> None:
        if load_yaml(parsed.config).get("stage") == "lenvm":
            raise ValueError(f"{parsed.config}: a file of the reference; convert it with lenvm convert-config")
        step(load_experiment(parsed.config, parsed.overrides), [*parser.prog.split()[1:], *arguments])

    return _guard(parser, run, arguments)


def _guard(parser: _Parser, command: Command, arguments: Sequence[str]) -> int:
    parsed = parser.parse_args(list(arguments))
    try:
        command(parsed)
    except ValueError as error:
        return _fail(parser, str(error), STATUS_BAD_INPUT)
    except (EngineError, RolloutWriteError, HubError) as error:
        return _fail(parser, f"{error} (run the same command again to go on)", STATUS_TRY_AGAIN)
    except (OSError, SafetensorError, RuntimeError) as error:
        if _is_full_disk(error):
            return _fail(parser, "the disk is full; make room and run the same command again", STATUS_TRY_AGAIN)
        if not _is_unusable(error):
            raise
        return _fail(parser, _file_problem(error), STATUS_BAD_INPUT)
    except KeyboardInterrupt:
        return _fail(parser, "stopped; run the same command again to go on", STATUS_INTERRUPTED)
    return 0


def _is_unusable(error: Exception) -> TypeGuard[OSError]:
    """Whether a file or folder that the user named is not what it must be."""
    return isinstance(error, UNUSABLE_FILE) or (isinstance(error, OSError) and error.errno in UNUSABLE_PLACE)


def _file_problem(error: OSError) -> str:
    reason = "is a file, not a folder" if isinstance(error, FileExistsError) else error.strerror
    return f"{error.filename}: {reason}" if error.filename else str(error)


def _is_full_disk(error: Exception) -> bool:
    """Also as safetensors and torch.save report it, who raise errors of their own."""
    if isinstance(error, OSError):
        return error.errno in FULL_DISK
    text = str(error)
    return any(mark in text for mark in FULL_MARKS)


def _fail(parser: _Parser, message: str, status: int) -> int:
    print(f"{parser.prog}: {' '.join(message.split())}", file=sys.stderr)
    return status
