"""Reads the YAML of the LenVM paper's own training code (``stage: lenvm`` of a LLaMA-Factory fork) into ours.

Every key is either converted or named with the reason why it cannot be honoured; none is dropped in silence. What is
absent is as there: gamma 0.999, 2048 tokens at most, LoRA of rank 8 on all linear layers, alpha twice the rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lenvm_training.config import ConfigError

Setter = tuple[str, Callable[[Any], Any]]
REQUIRED = ("model_name_or_path", "dataset", "output_dir")
RETURN_SPACE = "discounted_return"
ATTENTION = {"auto": "sdpa", "sdpa": "sdpa", "fa2": "flash_attention_2", "disabled": "eager"}


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


def _one_of(*accepted: str) -> Callable[[Any], str]:
    """Take over one of these values, refuse others."""

    def convert(value: Any) -> str:
        if value not in accepted:
            raise _Refused(f"only {', '.join(accepted)}")
        return str(value)

    return convert


def _attention(value: Any) -> str:
    if not isinstance(value, str) or value not in ATTENTION:
        raise _Refused(f"only {', '.join(ATTENTION)}")
    return ATTENTION[value]


def _files(value: Any) -> list[str]:
    names = value if isinstance(value, list) else str(value).split(",")
    return [f"{name.strip()}.jsonl" for name in names]


def _modules(value: Any) -> Any:
    names = value if isinstance(value, list) else str(value).split(",")
    return "all-linear" if list(names) == ["all"] else [name.strip() for name in names]


def _warmup(value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise _Refused("only a share of all steps, at least 0 and less than 1")
    return value


def _huber(value: Any) -> None:
    try:
        delta = float(value)
    except (TypeError, ValueError):
        raise _Refused("not a number") from None
    if not delta >= 1:
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
    "finetuning_type": ("model.kind", _one_of("full", "lora")),
    "lora_rank": ("model.lora.r", _same),
    "lora_alpha": ("model.lora.alpha", _same),
    "lora_dropout": ("model.lora.dropout", _same),
    "lora_target": ("model.lora.target_modules", _modules),
    "flash_attn": ("model.attn_implementation", _attention),
    "dataset": ("data.rollouts", _files),
    "eval_dataset": ("data.eval_rollouts", _files),
    "cutoff_len": ("data.max_tokens", _same),
    "lenvm_gamma": ("target.gamma", _same),
    "lenvm_lam": ("target.lam", _same),
    "lenvm_target_type": ("target.space", _one_of(RETURN_SPACE, "length", "log_length")),
    "lenvm_agg_method": ("", _only("token-mean")),
    "lenvm_loss_type": ("", _only("huber", "mse")),
    "lenvm_relative_loss": ("", _only(False)),
    "lenvm_huber_loss_delta": ("", _huber),
    "plot_loss": ("", _only(True)),
    "resume_from_checkpoint": ("", _only(None)),
    "overwrite_output_dir": ("", _only(False)),
    "warmup_ratio": ("training.warmup_steps", _warmup),  # a number below 1 is a share there
    **{key: (f"training.{key}", _same) for key in TRAINING_KEYS},
    "save_only_model": ("", _only(False)),
    "freeze_vision_tower": ("model.freeze_vision", _same),
    "freeze_multi_modal_projector": ("", _same),
    "freeze_language_model": ("", _only(False)),
}


def convert_reference(content: dict[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """(our configuration, one line for each key that cannot be honoured).

    Data sets become the file ``NAME.jsonl`` of rollouts that ``lenvm ungroup`` writes from the grouped file.
    Raises ConfigError when it is no configuration of that stage.
    """
    if content.get("stage") != "lenvm":
        raise ConfigError(f"{where}: stage: expected 'lenvm', got {content.get('stage')!r}")
    missing = [key for key in REQUIRED if not content.get(key)]
    if missing:
        raise ConfigError(f"{where}: {missing[0]}: missing")
    result: dict[str, Any] = {"training": {}}
    whole = _with_defaults(content)
    problems = [problem for key in whole if (problem := _convert(key, whole, result))]
    result["model"].setdefault("served_model", "")
    problems += _loss_problems(whole)
    problems.append(f"cutoff_len: completions of more than {whole['cutoff_len']} tokens are left out, not cut")
    problems.append("served model: not in that file; set model.served_model")
    return result, problems


def _with_defaults(content: dict[str, Any]) -> dict[str, Any]:
    """``content`` and what the reference takes for keys that are absent or null, without ``warmup_steps`` of 0."""
    given = {key: value for key, value in content.items() if value is not None}
    whole = {"cutoff_len": 2048, "lenvm_gamma": 0.999, "finetuning_type": "lora", **given}
    if whole["finetuning_type"] == "lora":
        rank = content.get("lora_rank") or 8
        whole |= {"lora_rank": rank, "lora_target": content.get("lora_target") or "all"}
        whole["lora_alpha"] = content.get("lora_alpha") or 2 * rank
    if "freeze_vision_tower" in whole:
        whole = {"freeze_multi_modal_projector": True, **whole}
    return {key: value for key, value in whole.items() if value or key != "warmup_steps"}


def _convert(key: str, content: dict[str, Any], result: dict[str, Any]) -> str:
    """Put one key into ``result``; or why that cannot be."""
    value = content[key]
    if key not in CONVERTED:
        return f"{key}: not known here"
    path, convert = CONVERTED[key]
    try:
        _check_effective(key, content)
        converted = convert(value)
    except _Refused as reason:
        return f"{key}: {value!r} cannot be honoured ({reason})"
    if path:
        _set(result, path.split("."), converted)
    return ""


def _check_effective(key: str, content: dict[str, Any]) -> None:
    """Raises _Refused for what LLaMA-Factory itself does not read, or can do apart from another key."""
    if key.startswith("lora_") and content["finetuning_type"] != "lora":
        raise _Refused(f"does nothing with finetuning_type {content['finetuning_type']}")
    if key == "freeze_multi_modal_projector" and content[key] != content.get("freeze_vision_tower", True):
        raise _Refused("the projector is trained with the vision tower or not at all")
    if key == "warmup_ratio" and content.get("warmup_steps"):
        raise _Refused("does nothing beside warmup_steps")


def _loss_problems(content: dict[str, Any]) -> list[str]:
    space, loss = content.get("lenvm_target_type", RETURN_SPACE), content.get("lenvm_loss_type", "huber")
    if loss != "huber" or space == RETURN_SPACE:
        return []
    reason = f"with lenvm_target_type {space} (the loss is the squared error)"
    return [f"lenvm_loss_type: 'huber' cannot be honoured {reason}"]


def _set(content: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        content = content.setdefault(key, {})
    content[keys[-1]] = value
