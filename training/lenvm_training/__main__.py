"""``python -m lenvm_training``: prompts -> rollouts -> head, each step resumable.

prompts    write a prompt file from templates and the user's own JSONL files
rollouts   sample completions of a prompt file from a running engine
train      read the states off, train both heads, evaluate on other prompts, write head and model card

Bad input: one line on standard error and exit status 2; stopped with Ctrl-C: 130. A step that is started again goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from lenvm_kernels import torchvision_schema
from lenvm_training.endpoints import EngineError, Sampling
from lenvm_training.prompts import Prompt, PromptFileError, prompts_from_file, read_prompts, template_prompts
from lenvm_training.rollouts import ChatEncoder, RolloutWriteError, sample_rollouts

STATUS_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"lenvm_training: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Run a step; returns the exit status."""
    parsed = _build_parser().parse_args(arguments)
    torchvision_schema.declare_if_missing()
    try:
        parsed.run(parsed)
    except (PromptFileError, OSError, ValueError) as error:
        return _fail(str(error), 2)
    except (EngineError, RolloutWriteError) as error:
        return _fail(f"{error} (run the same command again to go on)", 1)
    except KeyboardInterrupt:
        return _fail("stopped; run the same command again to go on", STATUS_INTERRUPTED)
    return 0


def _fail(message: str, status: int) -> int:
    print(f"lenvm_training: {' '.join(message.split())}", file=sys.stderr)
    return status


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lenvm_training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="STEP", parser_class=_Parser)

    prompts = commands.add_parser("prompts", help="write a prompt file")
    prompts.add_argument("--out", type=Path, required=True)
    prompts.add_argument("--file", action="append", default=[], metavar="DOMAIN=PATH:COUNT", help="may be repeated")
    prompts.add_argument("--templates", type=int, default=200, help="template prompts a domain")
    prompts.add_argument("--seed", type=int, default=0)
    prompts.add_argument("--exclude", type=Path, help="a prompt file whose prompts must not appear")
    prompts.set_defaults(run=_prompts)

    rollouts = commands.add_parser("rollouts", help="sample completions")
    rollouts.add_argument("--prompts", type=Path, required=True)
    rollouts.add_argument("--out", type=Path, required=True)
    _add_model(rollouts)
    rollouts.add_argument("--engine-url", default=os.environ.get("LENVM_ENGINE_URL"), help="or LENVM_ENGINE_URL")
    rollouts.add_argument("--samples", type=int, default=5, help="completions a prompt")
    rollouts.add_argument("--max-new-tokens", type=int, default=512)
    rollouts.add_argument("--concurrency", type=int, default=96)
    rollouts.set_defaults(run=_rollouts)

    train = commands.add_parser("train", help="train and evaluate the heads")
    train.add_argument("--rollouts", type=Path, required=True)
    train.add_argument("--eval-rollouts", type=Path, required=True, help="completions of other prompts")
    _add_model(train)
    train.add_argument("--base-model", default="SmolLM2-135M-Instruct", help="the served model's name, for the card")
    train.add_argument("--work", type=Path, required=True, help="folder for the states (reused)")
    train.add_argument("--out", type=Path, required=True, help="head folder to write")
    train.add_argument("--layers", default="", help="decoder layers to read beside the final state, as 15,20")
    train.add_argument("--gamma", type=float, default=0.997)
    train.add_argument("--rank", type=int, default=256)
    train.add_argument("--epochs", type=int, default=8)
    train.add_argument("--state-share", type=float, default=0.1, help="share of a completion's states that is kept")
    train.set_defaults(run=_train)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    given = os.environ.get("LENVM_MODEL")
    text = "folder of the served model (or LENVM_MODEL)"
    parser.add_argument("--model", type=Path, default=given, required=given is None, help=text)


def _prompts(parsed: argparse.Namespace) -> None:
    prompts: list[Prompt] = []
    for source in parsed.file:
        domain, _, rest = source.partition("=")
        path, _, count = rest.rpartition(":")
        if not (domain and path and count.isdigit()):
            raise ValueError(f"--file: expected DOMAIN=PATH:COUNT, got {source!r}")
        prompts += prompts_from_file(Path(path), domain, int(count), parsed.seed)
    for domain in ("short_long", "requested"):
        prompts += template_prompts(parsed.templates, domain, parsed.seed)
    excluded = {prompt.messages[0]["content"] for prompt in read_prompts(parsed.exclude)} if parsed.exclude else set()
    kept = [prompt for prompt in prompts if prompt.messages[0]["content"] not in excluded]
    for prompt_id, count in Counter(prompt.id for prompt in kept).items():
        if count > 1:
            raise ValueError(f"--file: two prompts of the id {prompt_id!r}; give each file a name of its own")
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    parsed.out.write_text("".join(prompt.to_json() + "\n" for prompt in kept), encoding="utf-8")
    print(f"{len(kept)} prompts")


def _rollouts(parsed: argparse.Namespace) -> None:
    if not parsed.engine_url:
        raise ValueError("--engine-url: give the address of a running engine")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(parsed.model)
    prompts = read_prompts(parsed.prompts)
    sampling = Sampling(max_new_tokens=parsed.max_new_tokens)
    added = asyncio.run(_sample(prompts, tokenizer, sampling, parsed))
    print(f"{added} completions added")


async def _sample(prompts: list[Prompt], tokenizer: Any, sampling: Sampling, parsed: argparse.Namespace) -> int:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    added = await sample_rollouts(
        prompts,
        ChatEncoder(tokenizer),
        parsed.engine_url,
        parsed.out,
        parsed.samples,
        sampling,
        parsed.concurrency,
        stop=stop,
    )
    if stop.is_set():
        raise KeyboardInterrupt
    return added


def _train(parsed: argparse.Namespace) -> None:
    from lenvm_training.head_settings import HeadsSettings
    from lenvm_training.heads_run import train_heads
    from lenvm_training.rollout_data import check_disjoint, load_rollouts
    from lenvm_training.rollout_files import as_lists

    layers = tuple(int(layer) for layer in parsed.layers.split(",") if layer)
    work, out, share = str(parsed.work), str(parsed.out), parsed.state_share
    settings = HeadsSettings(work, out, layers, rank=parsed.rank, epochs=parsed.epochs, state_share=share)
    rollouts, held_rollouts = (as_lists(load_rollouts([path])) for path in (parsed.rollouts, parsed.eval_rollouts))
    check_disjoint(rollouts, held_rollouts)
    figures = train_heads(settings, parsed.model, parsed.base_model, parsed.gamma, rollouts, held_rollouts)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    sys.exit(main())
