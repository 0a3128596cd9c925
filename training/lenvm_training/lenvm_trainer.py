"""Trains a `model.LenVM` on rollouts with transformers' Trainer, and leaves a folder that can be served.
`model.LenVM.serving_obstacle` names those that cannot.

Everything of the Trainer's own stays its own (schedules, bf16, gradient accumulation, FSDP and DeepSpeed
through its arguments, TensorBoard); added are the LenVM folder as the form of its checkpoints, and the
figures of `metrics`. A run that is started again goes on from its last complete checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, HfArgumentParser, Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from lenvm_training import plots
from lenvm_training.metrics import FIGURES, POSITIONS, state_metrics
from lenvm_training.model import (
    LenVM,
    ModelSettings,
    build_lenvm,
    load_tokenizer,
    read_vocab_size,
    resolve_backbone,
    resolve_folder,
    restore_lenvm,
    save_lenvm,
)
from lenvm_training.model_card import FIGURES_FILE, write_lenvm_card
from lenvm_training.rollout_data import (
    DataSettings,
    RolloutCollator,
    RolloutDataset,
    StepOrder,
    check_disjoint,
    check_tokenizer,
    load_rollouts,
    select_eval_rollouts,
)
from lenvm_training.rollout_files import choose_rollouts, say
from lenvm_training.rollouts import FINISHED
from lenvm_training.run_record import fill_defaults
from lenvm_training.targets import TargetConfig, mean_target

RESULT_FOLDER = "lenvm"
SETTINGS_FILE = "run_config.json"
FIXED_ARGUMENTS = {
    "remove_unused_columns": False,
    "label_names": ["labels"],
    "save_only_model": False,
    "resume_from_checkpoint": None,  # from the last one
    "prediction_loss_only": False,  # the figures are made from predictions
    "push_to_hub": False,  # it leaves the value head out; ``lenvm push`` does not
    "label_smoothing_factor": 0.0,  # these three are of language models
    "neftune_noise_alpha": None,
    "use_liger_kernel": False,
    "average_tokens_across_devices": True,  # the loss is the mean over the tokens of all of them
    "eval_do_concat_batches": True,
}
AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
SCALARS = {int, float, bool, type(None)}
DOES_NOTHING = ("do_train", "do_eval", "do_predict")
"""Which transformers leaves to the scripts around its Trainer."""
STEP_ORDER = {
    "train_sampling_strategy": "sequential",  # `StepOrder` shuffles by itself
    "dataloader_persistent_workers": False,  # they would keep the first epoch's order
    "auto_find_batch_size": False,  # a step would have other rows than the order was made for
}
BATCH_LOSS = "loss"
FIGURE_NAMES = (*FIGURES[:2], *(f"{name}_{position}" for name in FIGURES[2:] for position in POSITIONS))
WHOLE_WEIGHTS = "FULL_STATE_DICT"
GATHER_WEIGHTS = "stage3_gather_16bit_weights_on_model_save"
LAST_FILE_OF_CHECKPOINT = "trainer_state.json"
TORCH_FILES = ("*.pt", "*.pth", "*.bin")
_CHECKPOINT = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class LenVMRun:
    """One training run. ``training`` holds transformers.TrainingArguments by their own names."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    model: ModelSettings
    data: DataSettings
    training: dict[str, Any]
    target: TargetConfig = field(default_factory=TargetConfig)


class ResumableTrainer(Trainer):
    """transformers' Trainer, which trains a run that is taken up again at its last step for a step more."""

    def _run_epoch(self, **arguments: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**arguments)


class LenVMTrainer(ResumableTrainer):
    """A Trainer whose checkpoints are LenVM folders."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        save_lenvm(_unwrap(self.model), Path(output_dir or self.args.output_dir), state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            restore_lenvm(_unwrap(model or self.model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        restore_lenvm(_unwrap(self.model), best_checkpoint(self))


def _unwrap(model: Any) -> LenVM:
    while not isinstance(model, LenVM):
        model = model.module
    return model


def train_lenvm(run: LenVMRun) -> dict[str, float]:
    """Train as ``run`` says; returns the held-out figures, which also lie in the folder ``lenvm`` of the output.

    Raises ValueError for settings and data that cannot be used, before anything is loaded where possible.
    """
    arguments = training_arguments(_choice_of_best(run.training) | run.training, STEP_ORDER)
    train, held_out = _load_datasets(run.data, run.target)
    folder = resolve_backbone(run.model.backbone)
    tokenizer = load_tokenizer(folder)
    held_out_rows = [] if held_out is None else held_out.rows
    check_tokenizer([*train.rows, *held_out_rows], tokenizer, read_vocab_size(folder))
    check_disjoint(train.rows, held_out_rows)
    output = Path(arguments.output_dir)
    with arguments.main_process_first():
        claim_output(
            output, _record(run, {"train": rows_digest(train.rows), "eval": rows_digest(held_out_rows)}), LenVMRun
        )
        checkpoint = last_checkpoint(output)
    torch.manual_seed(arguments.seed)
    lengths = [len(row["output_token_ids"]) for row in train.rows]
    model = build_lenvm(run.model, run.target, mean_target(lengths, run.target.build_space()))
    if model.serving_obstacle and not arguments.process_index:
        say(f"the result is for comparison only: {model.serving_obstacle}")
    rows_per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    order_seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    trainer = LenVMTrainer(
        model=model,
        args=arguments,
        train_dataset=StepOrder(train, rows_per_step, order_seed),
        eval_dataset=held_out,
        data_collator=build_collator(model, folder),
        compute_metrics=lambda output: state_metrics(output.predictions, output.label_ids, model.space),
    )
    with redirect_stdout(sys.stderr):  # the Trainer prints its log; standard output is for figures
        trainer.train(resume_from_checkpoint=checkpoint)
        figures = _own_figures(trainer.evaluate()) if held_out is not None else {}
    trainer.save_model(str(output / RESULT_FOLDER))  # on every process: gathers sharded weights
    if trainer.is_world_process_zero():
        _complete_result(trainer, train, tokenizer, run, figures)
    return figures


def training_arguments(
    settings: Mapping[str, Any], own: Mapping[str, Any] = FIXED_ARGUMENTS, section: str = "training"
) -> TrainingArguments:
    """transformers.TrainingArguments of a mapping, on the CPU where there is no accelerator.

    ``own``: arguments that only the caller sets, beside FIXED_ARGUMENTS. Raises ValueError naming an unknown or
    unusable key of ``section``.
    """
    defaults = {"use_cpu": not torch.accelerator.is_available()}
    fixed = {**FIXED_ARGUMENTS, **own}
    _check_names(settings, fixed, section)
    _check_gathered(settings.get("deepspeed"), f"{section}.deepspeed")
    if settings.get("load_best_model_at_end") and (settings.get("fsdp") or settings.get("deepspeed")):
        raise ValueError(f"{section}.load_best_model_at_end: not with fsdp or deepspeed")
    given = {**settings, **_scalars(settings, section)}
    try:
        (parsed,) = HfArgumentParser(TrainingArguments).parse_dict({**defaults, **given, **fixed})
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"{section}: {str(error).splitlines()[0]}") from None
    arguments: TrainingArguments = parsed
    if arguments.fsdp and (arguments.fsdp_config or {}).get("state_dict_type", WHOLE_WEIGHTS) != WHOLE_WEIGHTS:
        raise ValueError(f"{section}.fsdp_config: saves no whole weights without state_dict_type: {WHOLE_WEIGHTS}")
    if arguments.fsdp and arguments.use_cpu:  # accelerate would leave it out without a word
        raise ValueError(f"{section}.fsdp: needs an accelerator")
    _check_installed(arguments, section)
    return arguments


def _check_names(settings: Mapping[str, Any], fixed: Mapping[str, Any], section: str) -> None:
    for name, value in sorted(settings.items()):
        if name in fixed and value != fixed[name]:
            raise ValueError(f"{section}.{name}: is set by the trainer itself, to {fixed[name]!r}")
        if name in DOES_NOTHING:
            raise ValueError(f"{section}.{name}: does nothing here")
        if name not in TrainingArguments.__dataclass_fields__:
            raise ValueError(f"{section}.{name}: not one of transformers.TrainingArguments")


def _scalars(settings: Mapping[str, Any], section: str) -> dict[str, Any]:
    """The numbers and switches of ``settings``, which transformers takes as they come. Raises ValueError."""
    types = get_type_hints(TrainingArguments)
    given: dict[str, Any] = {}
    for name in settings:
        if not set(get_args(types[name]) or (types[name],)) <= SCALARS:
            continue
        try:
            given[name] = TypeAdapter(types[name]).validate_python(settings[name])
        except ValidationError as error:
            raise ValueError(f"{section}.{name}: {error.errors()[0]['msg']}, got {settings[name]!r}") from None
        if name in AT_LEAST_ONE and given[name] < 1:
            raise ValueError(f"{section}.{name}: must be at least 1, got {given[name]}")
    return given


def _check_installed(arguments: TrainingArguments, section: str) -> None:
    """Raises ValueError where a package is missing that the optimizer or a report needs."""
    try:
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f"{section}.report_to: {error}") from None
    try:
        with suppress(ValueError):  # of an optimizer that has to see the model
            Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ImportError as error:
        raise ValueError(f"{section}.optim: {error}") from None


def _choice_of_best(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How the best checkpoint is told: by the mean over states, where transformers takes one of means of batches, and
    in the right direction, where transformers takes the greatest of everything but losses. Raises ValueError.
    """
    chooses = settings.get("load_best_model_at_end") or settings.get("metric_for_best_model")
    if not chooses:
        return {}
    name = str(settings.get("metric_for_best_model") or "mse").removeprefix("eval_")
    if name not in (BATCH_LOSS, *FIGURE_NAMES):
        raise ValueError(
            f"training.metric_for_best_model: must be one of {', '.join((BATCH_LOSS, *FIGURE_NAMES))}, got {name!r}"
        )
    return {"metric_for_best_model": name, "greater_is_better": name.startswith("tau_")}


def _check_gathered(deepspeed: Any, name: str) -> None:
    """Raises ValueError where DeepSpeed's configuration (a mapping, or a JSON file's path) leaves weights in shards."""
    try:
        config = json.loads(Path(deepspeed).read_text()) if isinstance(deepspeed, str) else deepspeed or {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
    if not isinstance(config, Mapping):
        raise ValueError(f"{name}: neither a mapping nor the path of a JSON file with one")
    zero = config.get("zero_optimization", {})
    if zero.get("stage") == 3 and zero.get(GATHER_WEIGHTS) is not True:
        raise ValueError(f"{name}: ZeRO 3 saves no whole weights without zero_optimization.{GATHER_WEIGHTS}: true")


def build_collator(model: LenVM, backbone: Path) -> RolloutCollator:
    """Batches for ``model``, with the image processor of its backbone's folder if it takes images."""
    tokenizer = load_tokenizer(backbone)
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if not model.takes_images:
        return RolloutCollator(pad_token_id)
    return RolloutCollator(pad_token_id, AutoImageProcessor.from_pretrained(backbone), model.config.image_token_id)


def last_checkpoint(output: Path) -> str | None:
    """The newest whole checkpoint of a run; newer ones that a crash or a full disk left half written are removed."""
    for folder in sorted(_checkpoints(output), key=_step, reverse=True):
        if _is_whole(folder):
            return str(folder)
        say(f"{folder}: half written, removed")
        shutil.rmtree(folder)
    return None


def best_checkpoint(trainer: Trainer) -> Path:
    """By its step: the path that a checkpoint holds is wrong once the folder has moved. Raises ValueError."""
    output = Path(trainer.args.output_dir)
    folder = output / f"checkpoint-{trainer.state.best_global_step}"
    if not _is_whole(folder):
        raise ValueError(f"{folder}: the best checkpoint is damaged or gone; remove {output} to train anew")
    return folder


def _checkpoints(output: Path) -> list[Path]:
    return [folder for folder in output.glob("checkpoint-*") if _CHECKPOINT.fullmatch(folder.name) and folder.is_dir()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    """Whether the file that is written last is there, and neither it nor another one was cut off."""
    try:
        for path in (checkpoint / LAST_FILE_OF_CHECKPOINT, *checkpoint.rglob("*.json")):
            json.loads(path.read_text())
        for path in checkpoint.rglob("*.safetensors"):
            with safe_open(path, "pt"):
                pass
    except (FileNotFoundError, ValueError, SafetensorError):
        return False
    return all(zipfile.is_zipfile(path) for pattern in TORCH_FILES for path in checkpoint.rglob(pattern))


def _load_datasets(settings: DataSettings, target: TargetConfig) -> tuple[RolloutDataset, RolloutDataset | None]:
    rows = choose_rollouts(load_rollouts(settings.rollouts), settings, "training")
    train = RolloutDataset(rows, target.censored != "leave_out")
    if not any(row["finish_reason"] == FINISHED for row in train.rows):
        raise ValueError(f"data.rollouts: no finished completion within {settings.max_tokens} tokens")
    if not settings.eval_rollouts:
        return train, None
    limit = DataSettings((), max_tokens=settings.max_tokens)
    held_out_rows = choose_rollouts(load_rollouts(settings.eval_rollouts), limit, "held-out")
    held_out = RolloutDataset(select_eval_rollouts(held_out_rows, settings))
    if not len(held_out):
        raise ValueError(f"data.eval_rollouts: no finished completion within {settings.max_tokens} tokens")
    return train, held_out


def rows_digest(rows: Sequence[dict[str, Any]]) -> str:
    """Of what is learned from rollouts with token ids as arrays, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        prompt, output = row["prompt_token_ids"], row["output_token_ids"]
        name = [row["prompt_id"], row["sample"], row["finish_reason"], len(prompt), len(output)]
        digest.update(json.dumps(name).encode())
        digest.update(prompt)
        digest.update(output)
    return digest.hexdigest()


def _record(run: LenVMRun, rollouts: dict[str, str]) -> str:
    """Everything that decides the weights and figures of a run, as JSON; ``rollouts`` are digests of the rows."""
    settings = TypeAdapter(LenVMRun).dump_python(run, mode="json")
    return json.dumps({**settings, "rollouts": rollouts}, indent=2) + "\n"


def claim_output(output: Path, settings: str, kind: type | None = None) -> None:
    """Keep the settings (JSON) beside the checkpoints. Raises ValueError when they are those of another run.

    A run that left no checkpoint and no result (its data could not be used, say) claims nothing.
    ``kind``: the dataclass that they are of; what theirs are too old to have counts as its default.
    """
    path = output / SETTINGS_FILE
    if path.exists():
        record = path.read_text()
        if settings == (fill_defaults(kind, record) if kind else record):
            return
    if path.exists() and (_checkpoints(output) or (output / RESULT_FOLDER).exists()):
        raise ValueError(
            f"training.output_dir: {output} holds a run of other settings or rollouts (see {SETTINGS_FILE} there); "
            "set another"
        )
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(settings)


def _own_figures(metrics: dict[str, float]) -> dict[str, float]:
    """The figures of `metrics.state_metrics`, without the Trainer's own entries (times, rates, its loss)."""
    own = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    return {name: value for name, value in own.items() if name in FIGURE_NAMES}


def _complete_result(
    trainer: LenVMTrainer, train: RolloutDataset, tokenizer: Any, run: LenVMRun, figures: dict[str, float]
) -> None:
    """Weights in their final precision, tokenizer (and image processor), figures, plots, card beside the value head."""
    folder, model = Path(trainer.args.output_dir) / RESULT_FOLDER, _unwrap(trainer.model)
    if run.model.save_dtype != run.model.dtype:
        _convert_weights(folder, run.model.kind, getattr(torch, run.model.save_dtype))
    tokenizer.save_pretrained(folder)
    if model.takes_images:
        AutoImageProcessor.from_pretrained(resolve_folder(run.model.backbone)).save_pretrained(folder)
    (folder / FIGURES_FILE).write_text(json.dumps(figures, indent=2) + "\n")
    plots.plot_loss(folder / "loss.png", trainer.state.log_history)
    if figures:
        plots.plot_error_by_position(folder / "error_by_position.png", figures)
    recorded = model.lenvm_config
    names = {"backbone": recorded.base_model, "served_model": recorded.served_model}
    settings = {"model": asdict(run.model) | names, "target": asdict(run.target), "training": run.training}
    backbone = resolve_folder(run.model.backbone)
    write_lenvm_card(folder, settings, train, trainer.eval_dataset, figures, backbone, model.serving_obstacle)


def _convert_weights(folder: Path, kind: str, dtype: torch.dtype) -> None:
    """The backbone's or the adapter's weights in another precision; the value head keeps its own.

    File by file: a model that transformers loads while DeepSpeed is active is sharded, which takes every process.
    """
    for path in folder.glob("model*.safetensors" if kind == "full" else SAFETENSORS_WEIGHTS_NAME):
        save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    if kind == "full":
        config = AutoConfig.from_pretrained(folder)
        for part in (config, *(getattr(config, name) for name in config.sub_configs)):
            part.dtype = dtype
        config.save_pretrained(folder)
