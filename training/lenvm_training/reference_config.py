"""Reads the YAML of the LenVM paper's own training code (``stage: lenvm`` of a LLaMA-Factory fork) into ours.

Every key is either converted or named with the reason why it cannot be honoured; none is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lenvm_training.config import ConfigError

Setter = tuple[str, Callable[[Any], Any]]


class _Refused(Exception):
    """A known key whose value has no counterpart here."""


def _same(value: Any) -> Any:
    return value


def _only(*accepted: Any) -> Callable[[Any], Any]:
    """Accept these values (they ask for what is done anyway), refuse others."""

    def convert(value: Any) -> None:
        if value not in accepted:
            raise _Refused(f"only {' or '.join(map(str, accepted))}")

    return convert


def _kind(value: str) -> str:
    kinds = {"full": "full", "lora": "lora"}
    if value not in kinds:
        raise _Refused("only full or lora")
    return kinds[value]


def _files(value: Any) -> list[str]:
    names = value if isinstance(value, list) else str(value).split(",")
    return [f"{name.strip()}.jsonl" for name in names]


def _modules(value: Any) -> Any:
    names = value if isinstance(value, list) else str(value).split(",")
    return "all-linear" if list(names) == ["all"] else [name.strip() for name in names]


def _target(value: str) -> str:
    spaces = {"discounted_return": "discounted_return", "length": "length", "log_length": "log_length"}
    if value not in spaces:
        raise _Refused(f"only {', '.join(spaces)}")
    return spaces[value]


def _huber(value: Any) -> None:
    if float(value) < 1:
        raise _Refused("the loss is the squared error; only a Huber delta of 1 or more is the same within (-1, 0]")


TRAINING_KEYS = (
    "output_dir logging_steps save_steps save_strategy save_total_limit learning_rate num_train_epochs max_steps "
    "lr_scheduler_type warmup_steps weight_decay bf16 fp16 tf32 ddp_timeout seed eval_strategy eval_steps "
    "max_grad_norm per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps deepspeed "
    "gradient_checkpointing fsdp fsdp_config report_to run_name optim adam_beta1 adam_beta2 adam_epsilon "
    "dataloader_num_workers"
).split()
CONVERTED: dict[str, Setter] = {
    "stage": ("", _only("lenvm")),
    "do_train": ("", _only(True)),
    "model_name_or_path": ("model.backbone", _same),
    "finetuning_type": ("model.kind", _kind),
    "lora_rank": ("model.lora.r", _same),
    "lora_alpha": ("model.lora.alpha", _same),
    "lora_dropout": ("model.lora.dropout", _same),
    "lora_target": ("model.lora.target_modules", _modules),
    "flash_attn": ("model.attn_implementation", lambda value: {"fa2": "flash_attention_2"}.get(value, "sdpa")),
    "dataset": ("data.rollouts", _files),
    "eval_dataset": ("data.eval_rollouts", _files),
    "cutoff_len": ("data.max_tokens", _same),
    "lenvm_gamma": ("target.gamma", _same),
    "lenvm_lam": ("target.lam", _same),
    "lenvm_target_type": ("target.space", _target),
    "lenvm_agg_method": ("", _only("token-mean")),
    "lenvm_loss_type": ("", _only("huber", "mse")),
    "lenvm_relative_loss": ("", _only(False)),
    "lenvm_huber_loss_delta": ("", _huber),
    "plot_loss": ("", _only(True)),
    "resume_from_checkpoint": ("", _only(None)),
    "overwrite_output_dir": ("", _only(False)),
    **{key: (f"training.{key}", _same) for key in TRAINING_KEYS},
    "save_only_model": ("", _only(False)),
}


def convert_reference(content: dict[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """(our configuration, one line for each key that cannot be honoured).

    Data sets become the file ``NAME.jsonl`` of rollouts that ``lenvm ungroup`` writes from the grouped file.
    Raises ConfigError when it is no configuration of that stage.
    """
    if content.get("stage") != "lenvm":
        raise ConfigError(f"{where}: stage: expected 'lenvm', got {content.get('stage')!r}")
    if "model_name_or_path" not in content or "dataset" not in content:
        raise ConfigError(f"{where}: needs model_name_or_path and dataset")
    result: dict[str, Any] = {"training": {}}
    problems = []
    for key, value in content.items():
        if key not in CONVERTED:
            problems.append(f"{key}: not known here")
            continue
        path, convert = CONVERTED[key]
        try:
            converted = convert(value)
        except _Refused as reason:
            problems.append(f"{key}: {value!r} cannot be honoured ({reason})")
            continue
        if path:
            _set(result, path.split("."), converted)
    result["model"].setdefault("served_model", "")
    problems.append("served model: not in that file; set model.served_model")
    return result, problems


def _set(content: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        content = content.setdefault(key, {})
    content[keys[-1]] = value
