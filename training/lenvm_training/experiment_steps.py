"""The steps of an experiment, as the commands run them: prompts, rollouts, training, evaluation, sweep."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import PartialState

from lenvm_kernels.checkpoint import load_head
from lenvm_kernels.checkpoint_files import CANDIDATE_FILE
from lenvm_training.config import ConfigError, Experiment, PromptSettings, RolloutSettings
from lenvm_training.endpoints import IMAGES_NEED_OPENAI, MissingCompletionsError, Retry, Sampling
from lenvm_training.model import (
    TOKENIZER_FILES,
    ModelSettings,
    default_device,
    load_language_model,
    load_lenvm,
    load_tokenizer,
    read_lenvm_config,
    read_vocab_size,
    resolve_folder,
)
from lenvm_training.prompt_sources import load_prompts, split_prompts
from lenvm_training.prompts import Prompt, read_prompts, template_prompts
from lenvm_training.rollout_data import (
    DataSettings,
    RolloutFileError,
    check_disjoint,
    check_tokenizer,
    load_rollouts,
    select_rollouts,
)
from lenvm_training.rollout_files import as_lists, choose_rollouts, print_figures, say, write_lines
from lenvm_training.rollout_report import write_length_report
from lenvm_training.rollouts import (
    Beginnings,
    CachedEncoder,
    ChatEncoder,
    ImageChatEncoder,
    PromptEncoder,
    check_beginnings,
    check_sampling,
    read_beginnings,
    read_rollouts,
    reserve_files,
    sample_rollouts,
)
from lenvm_training.self_prompts import TURN, EmptyTurnEncoder, prompts_from_turns
from lenvm_training.targets import DiscountedReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAID_ON_STOP = "finishing the completions under way; a second signal drops them, the long ones most of all"
TEMPLATE_DOMAINS = ("short_long", "requested")
ENGINE_URL, SERVED_MODEL = "LENVM_ENGINE_URL", "LENVM_MODEL"
EVERYTHING = DataSettings((), max_tokens=sys.maxsize)
Part = tuple[list[Prompt], str, int]
"""Prompts, the file of their completions, and how many of each."""


def write_prompts(experiment: Experiment, command: Sequence[str]) -> None:
    """Write the prompt files: sources, templates, self-made ones; deduplicated and split."""
    settings = experiment.prompts
    if settings is None:
        raise ConfigError("prompts: missing")
    prompts: list[Prompt] = []
    if settings.self_made:
        _check_before_sampling(experiment, _turn_sampling(experiment), _turns_file(settings))
        if not _engine_url(experiment):
            _run_with_engine(experiment, command)
        prompts += _self_made(experiment, settings)
    for source in settings.sources:
        found = load_prompts(source, Path(settings.image_folder), settings.seed)
        say(f"{source.name or source.path}: {len(found)} prompts")
        prompts += found
    if settings.templates:
        prompts += [p for name in TEMPLATE_DOMAINS for p in template_prompts(settings.templates, name, settings.seed)]
    train, held_out = split_prompts(prompts, settings.eval_fraction, settings.seed)
    parts = ((settings.out, train), (settings.eval_out, held_out))
    for path, part in parts:
        if not part:
            count, fraction = len(train) + len(held_out), settings.eval_fraction
            raise ConfigError(f"prompts.eval_fraction: {fraction} of {count} prompts leaves none for {path}")
    for path, part in parts:
        write_lines(Path(path), (prompt.to_json() for prompt in part))
        say(f"{path}: {len(part)} prompts")


def _turns_file(settings: PromptSettings) -> Path:
    return Path(settings.out).with_suffix(".turns.jsonl")


def _self_made(experiment: Experiment, settings: PromptSettings) -> list[Prompt]:
    tokenizer = load_tokenizer(_served_folder(experiment))
    path, count = _turns_file(settings), settings.self_made
    asyncio.run(_sample(experiment, [TURN], EmptyTurnEncoder(tokenizer), path, count, _turn_sampling(experiment)))
    prompts = prompts_from_turns(read_rollouts(path), tokenizer)
    say(f"self-made: {len(prompts)} different prompts of {count} turns ({settings.self_made_tokens} tokens at most)")
    return prompts


def _turn_sampling(experiment: Experiment) -> Sampling:
    assert experiment.prompts is not None
    return replace(_rollout_settings(experiment).sampling, max_new_tokens=experiment.prompts.self_made_tokens)


def write_rollouts(experiment: Experiment, command: Sequence[str]) -> None:
    """Sample completions of both prompt files, evaluation first; starts the engine when no address is given."""
    settings = _rollout_settings(experiment)
    if experiment.prompts is None:
        raise ConfigError("prompts: missing: 'out' and 'eval_out' name the prompt files")
    parts = (
        (_read_prompts(experiment.prompts.eval_out), settings.eval_out, settings.eval_samples),
        (_read_prompts(experiment.prompts.out), settings.out, settings.samples),
    )
    _check_before_sampling(experiment, settings.sampling, Path(settings.out), Path(settings.eval_out))
    _check_images(experiment, [prompt for prompts, _, _ in parts for prompt in prompts])
    begun = _beginnings(experiment, parts)
    if not _engine_url(experiment):
        _run_with_engine(experiment, command)
    encoders = [CachedEncoder(_encoder(experiment, prompts)) for prompts, _, _ in parts]
    kept = [_short_enough(part, encoder, settings) for part, encoder in zip(parts, encoders, strict=True)]
    missing: list[MissingCompletionsError] = []
    for (_, out, samples), encoder, prompts in zip(parts, encoders, kept, strict=True):
        try:
            added = asyncio.run(_sample(experiment, prompts, encoder, Path(out), samples, settings.sampling, begun))
        except MissingCompletionsError as error:
            missing.append(error)
            continue
        say(f"{out}: {added} completions added")
        write_length_report(load_rollouts([out]), Path(out).with_suffix(""))
    if missing:
        raise missing[0]


def _check_images(experiment: Experiment, prompts: Sequence[Prompt]) -> None:
    """Raises ConfigError for prompts with images that the engine, or the served model, would not take."""
    from transformers import AutoProcessor

    pictured = next((prompt for prompt in prompts if prompt.images), None)
    if pictured is None:
        return
    if _rollout_settings(experiment).api != "openai":
        raise ConfigError(f"prompt {pictured.id}: {IMAGES_NEED_OPENAI}")
    if not hasattr(AutoProcessor.from_pretrained(_served_folder(experiment)), "image_processor"):
        raise ConfigError(f"prompt {pictured.id}: has images, which {experiment.model.served_model} does not take")


def _short_enough(part: Part, encoder: PromptEncoder, settings: RolloutSettings) -> list[Prompt]:
    prompts, out, _ = part
    limit = settings.max_prompt_tokens
    kept = [prompt for prompt in prompts if len(encoder.encode(prompt)) <= limit]
    if not kept:
        raise ConfigError(f"rollouts.max_prompt_tokens: none of the {len(prompts)} prompts for {out} is within {limit}")
    say(f"{out}: {len(prompts) - len(kept)} of {len(prompts)} prompts are too long")
    return kept


def _read_prompts(path: str) -> list[Prompt]:
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such prompt file; lenvm prompts writes it")
    return read_prompts(Path(path))


def _check_before_sampling(experiment: Experiment, sampling: Sampling, *paths: Path) -> None:
    """What would stop the sampling, before an engine is started for it. Raises ValueError."""
    reserve_files(_rollout_settings(experiment).concurrency)
    for path in paths:
        check_sampling(path, sampling)


def _beginnings(experiment: Experiment, parts: Sequence[Part]) -> Beginnings:
    settings = _rollout_settings(experiment)
    if not settings.extend:
        return {}
    encoder = ChatEncoder(load_tokenizer(_served_folder(experiment)))
    beginnings = read_beginnings(map(Path, settings.extend), encoder.fingerprint, settings.sampling)
    found = sum(check_beginnings(beginnings, prompts, encoder, samples) for prompts, _, samples in parts)
    if not found:
        raise ConfigError(f"rollouts.extend: {', '.join(settings.extend)}: no completion of these prompts")
    say(f"{found} of {len(beginnings)} completions of {', '.join(settings.extend)} are gone on with or taken over")
    return beginnings


def _encoder(experiment: Experiment, prompts: Sequence[Prompt]) -> PromptEncoder:
    from transformers import AutoProcessor

    folder = _served_folder(experiment)
    if any(prompt.images for prompt in prompts):
        return ImageChatEncoder(AutoProcessor.from_pretrained(folder))
    return ChatEncoder(load_tokenizer(folder))


async def _sample(
    experiment: Experiment,
    prompts: list[Prompt],
    encoder: PromptEncoder,
    path: Path,
    samples: int,
    sampling: Sampling,
    beginnings: Beginnings | None = None,
) -> int:
    settings = _rollout_settings(experiment)
    with _stopped_by_signals() as stop:
        added = await sample_rollouts(
            prompts,
            encoder,
            _engine_url(experiment),
            path,
            samples,
            sampling,
            settings.concurrency,
            settings.seed,
            settings.api,
            Retry(timeout_s=settings.timeout_s),
            stop=stop,
            beginnings=beginnings,
        )
    if stop.is_set():
        raise KeyboardInterrupt
    return added


@contextmanager
def _stopped_by_signals() -> Iterator[asyncio.Event]:
    """What the first SIGINT or SIGTERM sets; raises KeyboardInterrupt where the second interrupts the caller's task."""
    loop, task, stop = asyncio.get_running_loop(), asyncio.current_task(), asyncio.Event()
    assert task is not None

    def stop_or_cancel() -> None:
        if stop.is_set():
            task.cancel()
        else:
            say(SAID_ON_STOP)
        stop.set()

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop_or_cancel)
    try:
        yield stop
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)


def _rollout_settings(experiment: Experiment) -> RolloutSettings:
    if experiment.rollouts is None:
        raise ConfigError("rollouts: missing")
    return experiment.rollouts


def _engine_url(experiment: Experiment) -> str:
    return _rollout_settings(experiment).engine_url or os.environ.get(ENGINE_URL, "")


def _served_folder(experiment: Experiment) -> Path:
    """Of the engine of LENVM_ENGINE_URL, LENVM_MODEL is the model."""
    by_environment = os.environ.get(ENGINE_URL) and not _rollout_settings(experiment).engine_url
    named = os.environ.get(SERVED_MODEL) if by_environment else None
    return resolve_folder(named or experiment.model.served_model, TOKENIZER_FILES)


def _run_with_engine(experiment: Experiment, command: Sequence[str]) -> NoReturn:
    """This process becomes ``lenvm with-engine``: it runs ``command`` while its engine is up, and ends as that does."""
    lenvm = [sys.executable, "-m", "lenvm_runtime.cli"]
    flags = [f"--engine-argument={argument}" for argument in _rollout_settings(experiment).engine_arguments]
    model = experiment.model.served_model
    sys.stdout.flush()
    os.execv(sys.executable, [*lenvm, "with-engine", "--model", model, *flags, "--", *lenvm, *command])


def train(experiment: Experiment, _: Sequence[str]) -> None:
    """Train what the configuration names; figures on standard output."""
    from lenvm_training.heads_run import train_heads
    from lenvm_training.lenvm_trainer import LenVMRun, train_lenvm

    model, target = experiment.model, experiment.target
    if experiment.training is not None:
        _print_once(train_lenvm(LenVMRun(model, experiment.data, experiment.training, target)))
        return
    assert experiment.heads is not None
    data = experiment.data
    rows = choose_rollouts(load_rollouts(data.rollouts), data, "training")
    limit = DataSettings((), max_tokens=data.max_tokens)
    held_out = choose_rollouts(load_rollouts(data.eval_rollouts), limit, "held-out")
    folder, name = resolve_folder(model.backbone), model.base_name or model.backbone
    check_tokenizer([*rows, *held_out], load_tokenizer(folder), read_vocab_size(folder))
    check_disjoint(rows, held_out)
    _print_once(train_heads(experiment.heads, folder, name, target.gamma, as_lists(rows), as_lists(held_out)))


def _print_once(figures: dict[str, float]) -> None:
    if PartialState().is_main_process:
        print_figures(figures)


def evaluate(experiment: Experiment, _: Sequence[str]) -> None:
    """Evaluate a LenVM or head; figures and plots go to ``evaluation.out``, and into the card of a result of ours."""
    from lenvm_training.lenvm_trainer import RESULT_FOLDER, build_collator
    from lenvm_training.model_card import CARD_FILE, add_evaluation
    from lenvm_training.prompt_evaluation import MARKDOWN_FILE, evaluate_prompts

    settings = experiment.evaluation
    if settings is None:
        raise ConfigError("evaluation: missing")
    trained = experiment.output_dir if experiment.heads else f"{experiment.output_dir}/{RESULT_FOLDER}"
    data, out = experiment.data, Path(settings.out)
    rows, known = select_rollouts(load_rollouts(data.eval_rollouts), EVERYTHING), load_rollouts(data.rollouts)
    fit = select_rollouts(known, replace(data, max_prompts=settings.max_fit_prompts))
    if not settings.lenvm and not Path(trained).is_dir():
        raise ConfigError(f"{trained}: no such folder; lenvm train writes it")
    source = resolve_folder(settings.lenvm or trained)
    backbone = resolve_folder(experiment.model.backbone)
    probe_folder = resolve_folder(settings.probe_model) if settings.probe_model else backbone
    check_tokenizer([*rows, *fit], load_tokenizer(backbone), read_vocab_size(backbone))
    if settings.lenvm:
        _check_lenvm(experiment.model, [*rows, *fit], source, backbone)
    if settings.probe_model:
        _check_named("probe_model", [*rows, *fit], probe_folder, backbone)
    check_disjoint([*select_rollouts(known, data), *fit], rows)
    out.mkdir(parents=True, exist_ok=True)
    device = default_device()
    dtype = getattr(torch, settings.dtype)
    model = load_lenvm(source, dtype, str(backbone)).to(device)
    probe = load_language_model(probe_folder, dtype).to(device)
    space = DiscountedReturn(settings.gamma or model.lenvm_config.target.gamma)
    collator = build_collator(model, backbone)
    head = load_head(source) if (source / CANDIDATE_FILE).exists() else None
    result = evaluate_prompts(model, probe, rows, fit, collator, settings.min_samples, space, out, head)
    if not settings.lenvm and (source / CARD_FILE).exists():
        add_evaluation(source, (out / MARKDOWN_FILE).read_text())
    shown = ("boundary", "served", "coverage", "states")
    print_figures({name: getattr(result, name) for name in shown})


def _check_lenvm(model: ModelSettings, rows: list[dict[str, Any]], folder: Path, backbone: Path) -> None:
    """Raises ConfigError for rows that a LenVM cannot read; says where it names another model than it is put on."""
    config = read_lenvm_config(folder)
    if config.kind == "full":
        _check_named("lenvm", rows, folder, backbone)
    elif config.base_model not in (model.backbone, model.base_name):
        say(f"evaluation.lenvm: was trained on {config.base_model}, and is put on model.backbone, {model.backbone}")


def _check_named(name: str, rows: list[dict[str, Any]], folder: Path, backbone: Path) -> None:
    """Raises ConfigError naming the key for rows that the model of ``folder`` cannot read.

    A training's checkpoint holds no tokenizer: it is the backbone's.
    """
    tokenizer = load_tokenizer(folder if any(folder.glob("tokenizer*")) else backbone)
    try:
        check_tokenizer(rows, tokenizer, read_vocab_size(folder))
    except RolloutFileError as error:
        raise ConfigError(f"evaluation.{name}: {error}") from None


def sweep(path: Path, overrides: list[str]) -> None:
    """Train and evaluate what a sweep file names."""
    from lenvm_training.sweep import load_sweep, run_sweep, variant_experiments

    def run(experiment: Experiment) -> None:
        train(experiment, ())
        evaluate(experiment, ())

    loaded = load_sweep(path)
    print_figures(run_sweep(loaded, variant_experiments(loaded, path, overrides), run, say))
