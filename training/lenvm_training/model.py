"""A LenVM for training: any Hugging Face backbone and the published value head, and its folder on disk.

The folder (LenVM's published format): the backbone as an ordinary Hugging Face folder, or a PEFT adapter of
it, or neither (frozen backbone); ``value_head.safetensors`` (``lenvm_kernels.checkpoint``); and, ours,
``lenvm_config.json`` (the fields of `LenVMConfig`). Published folders do not have the last: the family's
gamma is taken then.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import ModelOutput

from lenvm_kernels.checkpoint import load_value_head, read_config, save_value_head
from lenvm_kernels.checkpoint_files import (
    BACKBONE_CONFIG_FILE,
    CANDIDATE_FILE,
    CONFIG_FILE,
    SERVED_BACKBONES,
    VALUE_FILE,
    CheckpointError,
)
from lenvm_kernels.heads import ValueHead
from lenvm_training.targets import IGNORED, TargetConfig, censored_errors, lambda_returns

FAMILY_GAMMA = {"qwen2": 0.997, "qwen2_5_vl": 0.997, "qwen3": 0.9998, "qwen3_moe": 0.9998}
KINDS = ("full", "lora", "head")
DTYPES = ("float32", "bfloat16", "float16")
SERVED_SPACE = "discounted_return"
DAMAGED = (SafetensorError, StrictDataclassError, pickle.UnpicklingError, EOFError, RuntimeError)
UNREADABLE = (OSError, ValueError, KeyError, TypeError, *DAMAGED)
"""What transformers and peft raise for a folder whose files are damaged, missing, or of another model."""
TOKENIZER_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
"""Of a model on the hub: its tokenizer, processor and configurations, without weights."""
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSettings:
    """A PEFT LoRA adapter; ``target_modules`` are names of linear layers, or one regular expression."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str = LINEAR_LAYERS


@dataclass(frozen=True)
class ModelSettings:
    """What is trained. ``kind``: ``full`` fine-tune, ``lora`` adapter, or ``head`` on a frozen backbone.

    ``backbone`` is a folder or hub name; one that holds a value head already is trained further. The result
    records ``base_name`` and ``served_name`` where they are given (for folders that others do not have).
    ``dtype`` is that of the weights during training, ``save_dtype`` that of the resulting backbone
    or adapter. ``freeze_vision``: leave all but the text decoder of a vision-language backbone as it is.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    backbone: str
    served_model: str
    base_name: str = ""
    served_name: str = ""
    kind: str = "full"
    lora: LoraSettings = field(default_factory=LoraSettings)
    dtype: str = "float32"
    save_dtype: str = "bfloat16"
    attn_implementation: str = "sdpa"
    freeze_vision: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"model.kind: must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name in ("dtype", "save_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"model.{name}: must be one of {', '.join(DTYPES)}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class LenVMConfig:
    """What a LenVM folder was trained for. ``base_model``: its backbone; ``served_model``: whose lengths it knows."""

    kind: str
    base_model: str
    served_model: str
    target: TargetConfig

    def to_json(self) -> str:
        """``gamma`` stands at the top too, where the serving side reads it."""
        return json.dumps({"gamma": self.target.gamma, **asdict(self)}, indent=2) + "\n"


class LenVM(nn.Module):
    """V(s_t) of every position: the value head on the post-norm final states of ``language_model``.

    ``language_model`` is a transformers causal (or image-text-to-text) model, or a PEFT model of one. Its
    output layer is never run.
    """

    accepts_loss_kwargs = True

    def __init__(self, language_model: Any, value_head: ValueHead, config: LenVMConfig) -> None:
        super().__init__()
        self.language_model = language_model
        self.value_head = value_head
        self.lenvm_config = config
        self.space = config.target.build_space()

    @property
    def config(self) -> Any:
        """The backbone's configuration."""
        return self.language_model.config

    @property
    def takes_images(self) -> bool:
        """Whether the backbone is a vision-language model."""
        return _has_vision(self.config)

    @property
    def serving_obstacle(self) -> str:
        """Why the engine cannot serve it; empty when it can."""
        space, family = self.lenvm_config.target.space, self.config.model_type
        if self.lenvm_config.kind == "head":
            return "a value head alone cannot be served; train a LoRA adapter, or heads (the 'heads' section)"
        if space != SERVED_SPACE:
            return f"predicts {space}; only {SERVED_SPACE} can be served"
        if family not in SERVED_BACKBONES:
            return f"its backbone is of the family {family}; only {', '.join(SERVED_BACKBONES)} can be served"
        unmerged = next(self._unmerged_modules(), "")
        return unmerged and f"its adapter changes {unmerged}; only the decoder's linear layers can be served adapted"

    def _unmerged_modules(self) -> Iterator[str]:
        """Adapted modules that the engine does not merge (``lenvm_runtime.value_model.weights.LoraAdapter``)."""
        for name, module in self.causal_model.named_modules():
            if not hasattr(module, "lora_A"):
                continue
            if not (isinstance(module.base_layer, nn.Linear) and name.startswith("model.")):
                yield name

    @property
    def causal_model(self) -> Any:
        """The backbone with its output layer, without any adapter's wrapper."""
        model = self.language_model
        return model.get_base_model() if hasattr(model, "peft_config") else model

    @property
    def _no_split_modules(self) -> Any:  # read by accelerate's FSDP wrapping
        return self.causal_model._no_split_modules

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """As transformers' models have it; called by its Trainer."""
        self.causal_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs)
        if self.lenvm_config.kind == "lora":
            self.causal_model.enable_input_require_grads()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        censored: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Any,
    ) -> ModelOutput:
        """``predictions`` fp32 [B, T] in the target space, and ``loss`` where ``labels`` are given.

        ``labels`` int64 [B, T] are remaining lengths (`targets.remaining_labels`), of ``censored`` rows (bool [B])
        the least that they can be (`targets.censored_errors`). The loss is the sum of
        squared errors over ``num_items_in_batch`` states: the token mean of the whole step, however it is
        split into micro-batches and devices; over the states of this batch when it is not given.
        Rows are padded on the right, so that under causal attention no state sees the padding: ``attention_mask``
        is for vision-language backbones, which count positions by it. ``inputs`` go to the backbone (their images).
        """
        if self.takes_images:
            inputs["attention_mask"] = attention_mask
        states = self.causal_model.base_model(
            input_ids=input_ids, use_cache=False, **inputs
        ).last_hidden_state  # [B, T, d]
        with torch.autocast(states.device.type, enabled=False):
            predictions = self.space.prediction(self.value_head.raw_value(states))
        if labels is None:
            return ModelOutput(predictions=predictions)
        return ModelOutput(loss=self._loss(predictions, labels, censored, num_items_in_batch), predictions=predictions)

    def _loss(
        self, predictions: Tensor, labels: Tensor, censored: Tensor | None, num_items: Tensor | int | None
    ) -> Tensor:
        is_state = labels != IGNORED
        targets = lambda_returns(predictions.detach(), labels, self.space, self.lenvm_config.target.lam)
        errors = predictions - targets
        if censored is not None:
            errors = censored_errors(errors, censored, self.space)
        return errors.square().masked_fill(~is_state, 0).sum() / (
            is_state.sum().clamp_min(1) if num_items is None else num_items
        )


def build_lenvm(settings: ModelSettings, target: TargetConfig, start: Tensor | None = None) -> LenVM:
    """A LenVM to train, with a new value head unless the backbone's folder holds one.

    Raises CheckpointError, ValueError for a value head that was trained for another target.

    A new head starts at ``start``, the prediction it makes at first (nearly) everywhere: from elsewhere, the common
    way to the mean target can drive the sigmoid into saturation before anything is learned.
    """
    folder = resolve_backbone(settings.backbone)
    dtype = getattr(torch, settings.dtype)
    language_model = load_language_model(folder, dtype, settings.attn_implementation)
    hidden_size = language_model.config.get_text_config().hidden_size
    has_head = (folder / VALUE_FILE).exists()
    if has_head:
        _check_target(folder, language_model.config.model_type, target)
    value_head = load_value_head(folder, hidden_size) if has_head else ValueHead(hidden_size)
    value_head.requires_grad_(True)
    base_name = settings.base_name or settings.backbone
    config = LenVMConfig(settings.kind, base_name, settings.served_name or settings.served_model, target)
    language_model.requires_grad_(settings.kind == "full")
    has_vision = _has_vision(language_model.config)
    if not settings.freeze_vision and (settings.kind == "head" or not has_vision):
        reason = f"for model.kind {settings.kind}" if has_vision else "for a backbone without vision"
        raise ValueError(f"model.freeze_vision: does nothing {reason}")
    excluded = None
    if has_vision and settings.freeze_vision and settings.kind != "head":
        excluded = _freeze_vision(language_model)
    if settings.kind == "lora":
        language_model = _add_lora(language_model, settings, base_name, excluded)
    model = LenVM(language_model, value_head, config)
    if start is not None and not has_head:
        nn.init.constant_(value_head.summary.bias, model.space.raw_value(start).item())
    _freeze_output_layer(model.causal_model)
    return model


def _freeze_vision(language_model: Any) -> str:
    """Freeze what is outside the text decoder and its output layer; a regular expression of those modules' names.

    Raises ValueError for a model whose text decoder is not apart from the rest.
    """
    decoder = language_model.get_decoder()
    names = [name for name, module in language_model.named_modules() if name and module is decoder]
    text = set(decoder.parameters()) | set(language_model.get_output_embeddings().parameters())
    frozen = [parameter for parameter in language_model.parameters() if parameter not in text]
    if not names or not frozen:
        raise ValueError("model.freeze_vision: the vision tower of this backbone is not known here; set it to false")
    for parameter in frozen:
        parameter.requires_grad_(False)
    return rf"(?!{re.escape(names[0])}(\.|$)).*"


def _check_target(folder: Path, model_type: str, target: TargetConfig) -> None:
    """Raises ValueError when the value head in ``folder`` is known to be of another target."""
    if not (folder / CONFIG_FILE).exists() and model_type not in FAMILY_GAMMA:
        return
    there = read_lenvm_config(folder).target
    if there.build_space() != target.build_space():
        raise ValueError(
            f"target: {folder} has a value head of {_described(there)}, this run is of {_described(target)}"
        )


def _described(target: TargetConfig) -> str:
    """The space and what decides its values."""
    return ", ".join([target.space, *(f"{name} {value}" for name, value in vars(target.build_space()).items())])


def load_lenvm(source: str | Path, dtype: torch.dtype = torch.float32, base_model: str = "") -> LenVM:
    """Load a LenVM by folder or hub name, for evaluation. Raises CheckpointError naming the file.

    ``base_model``: where the backbone of an adapter or a head lies now, if not where its folder says.
    """
    folder = resolve_folder(source)
    config = read_lenvm_config(folder)
    if config.kind == "full":
        language_model = load_language_model(folder, dtype)
    else:
        language_model = load_language_model(resolve_folder(base_model or config.base_model), dtype)
    if config.kind == "lora":
        from peft import PeftModel

        try:
            language_model = PeftModel.from_pretrained(language_model, folder)
        except UNREADABLE as error:
            raise CheckpointError(f"{folder}: {_first_line(error)}") from None
    value_head = load_value_head(folder, language_model.config.get_text_config().hidden_size)
    return LenVM(language_model, value_head, config).eval()


def save_lenvm(model: LenVM, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write a LenVM folder; ``state`` is a gathered state dict of ``model`` where it is sharded."""
    folder.mkdir(parents=True, exist_ok=True)
    part = _part(state, "language_model.") if state else None
    if model.lenvm_config.kind == "full":
        model.language_model.save_pretrained(folder, state_dict=part)
    elif model.lenvm_config.kind == "lora":
        model.language_model.save_pretrained(folder, state_dict=part, save_embedding_layers=False)
    value_head = model.value_head
    if state:
        value_head = ValueHead(value_head.fc.in_features)
        value_head.load_state_dict(_part(state, "value_head."))
    save_value_head(value_head, folder)
    (folder / CONFIG_FILE).write_text(model.lenvm_config.to_json())


def restore_lenvm(model: LenVM, folder: Path) -> None:
    """Load the trained weights of a folder that `save_lenvm` wrote into ``model``, in place."""
    if model.lenvm_config.kind == "full":
        dtype = next(model.language_model.parameters()).dtype
        model.language_model.load_state_dict(load_language_model(folder, dtype).state_dict())
    elif model.lenvm_config.kind == "lora":
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model.language_model, load_peft_weights(str(folder), device="cpu"))
    saved = load_value_head(folder, model.value_head.fc.in_features)
    model.value_head.load_state_dict(saved.state_dict())


def read_lenvm_config(folder: Path) -> LenVMConfig:
    """``lenvm_config.json`` of a LenVM or of a head on the served model, or what a published folder without one
    stands for. Raises CheckpointError.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        return _published_config(folder)
    if (folder / CANDIDATE_FILE).exists():
        head = read_config(folder)
        return LenVMConfig("head", head.base_model, head.base_model, TargetConfig(gamma=head.gamma))
    try:
        fields = json.loads(path.read_text())
        target = TargetConfig(**fields["target"])
        return LenVMConfig(fields["kind"], fields["base_model"], fields["served_model"], target)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a LenVM configuration ({error})") from None


def resolve_backbone(source: str) -> Path:
    """`resolve_folder` of what a LenVM is trained from. Raises ValueError for one without a backbone of its own."""
    folder = resolve_folder(source)
    if (folder / VALUE_FILE).exists() and not (folder / BACKBONE_CONFIG_FILE).exists():
        raise ValueError(f"model.backbone: {source} is an adapter or a head; only a full LenVM can be trained further")
    return folder


def resolve_folder(source: str | Path, files: Sequence[str] | None = None) -> Path:
    """The folder itself, or a hub repository's snapshot in the local cache: all of it, or ``files`` (patterns).

    Raises CheckpointError.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(source), allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{source}: neither a folder nor a model of the hub ({reason})") from None


def load_language_model(folder: Path, dtype: torch.dtype, attn_implementation: str = "sdpa") -> Any:
    """The causal or image-text-to-text model of a folder. Raises CheckpointError.

    Tied embeddings may be stored under either of their two names; the output layer may be missing.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        loader = AutoModelForImageTextToText if _has_vision(config) else AutoModelForCausalLM
        model, info = loader.from_pretrained(
            folder, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True
        )
    except UNREADABLE as error:
        raise CheckpointError(f"{folder}: {_first_line(error)}") from None
    missing = sorted(set(info["missing_keys"]) - {"lm_head.weight"})
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}")
    return model


def read_vocab_size(folder: Path) -> int:
    """Rows of the embeddings of a model's folder. Raises CheckpointError."""
    try:
        size: int = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    except UNREADABLE as error:
        raise CheckpointError(f"{folder}: {_first_line(error)}") from None
    return size


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder. Raises CheckpointError."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except UNREADABLE as error:
        raise CheckpointError(f"{folder}: no usable tokenizer ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), repr(error))


def default_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _published_config(folder: Path) -> LenVMConfig:
    try:
        model_type = json.loads((folder / "config.json").read_text())["model_type"]
        gamma = FAMILY_GAMMA[model_type]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(f"{folder}: no {CONFIG_FILE}, and no gamma is known for its family ({error})") from None
    return LenVMConfig("full", str(folder), "", TargetConfig(gamma=gamma))


def _has_vision(config: Any) -> bool:
    return config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _add_lora(language_model: Any, settings: ModelSettings, base_name: str, excluded: str | None) -> Any:
    from peft import LoraConfig, get_peft_model

    names = settings.lora.target_modules
    config = LoraConfig(
        r=settings.lora.r,
        lora_alpha=settings.lora.alpha,
        lora_dropout=settings.lora.dropout,
        target_modules=names if isinstance(names, str) else list(names),
        exclude_modules=excluded,
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(language_model, config)
    except ValueError as error:
        raise ValueError(f"model.lora.target_modules: {str(error).splitlines()[0]}") from None
    adapted.peft_config["default"].base_model_name_or_path = base_name
    return adapted


def _freeze_output_layer(causal_model: Any) -> None:
    """An output layer of its own gets no gradient, which data-parallel training would wait for."""
    output = causal_model.get_output_embeddings()
    if output is not None and output.weight is not causal_model.get_input_embeddings().weight:
        output.requires_grad_(False)


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
