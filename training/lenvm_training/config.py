"""One YAML file an experiment: prompts, rollouts, model, target, training, evaluation. Every unknown key is an error.

Any value can be set on the command line by its path: ``target.gamma=0.999``, ``data.rollouts=[a.jsonl]``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import TypeAdapter, ValidationError

from lenvm_training.endpoints import Retry, Sampling
from lenvm_training.head_settings import HeadsSettings
from lenvm_training.model import DTYPES, LoraSettings, ModelSettings
from lenvm_training.prompt_sources import PromptSource
from lenvm_training.rollout_data import DataSettings
from lenvm_training.targets import TargetConfig

STRICT: dict[str, str] = {"extra": "forbid"}
APIS = ("engine", "openai")
BOUNDED_SPACE = "normalised_length"
NOT_OF_HEADS = ("kind", "lora", "dtype", "save_dtype", "attn_implementation", "freeze_vision")
"""Fields of `ModelSettings` that are of a training alone."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line and names the key."""


@dataclass(frozen=True)
class PromptSettings:
    """Prompt files to write: ``out``, and ``eval_out`` with ``eval_fraction`` of the prompts.

    ``templates``: prompts of each built-in template family; ``self_made``: how many user turns the served
    model is asked to write (needs its endpoint, see ``rollouts``), of ``self_made_tokens`` at most: those that go on
    are left out.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    out: str
    eval_out: str
    sources: tuple[PromptSource, ...] = ()
    templates: int = 0
    self_made: int = 0
    self_made_tokens: int = 256
    eval_fraction: float = 0.02
    image_folder: str = "data/images"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"prompts.eval_fraction: must be between 0 and 1, got {self.eval_fraction}")
        if not (self.sources or self.templates or self.self_made):
            raise ValueError("prompts: give 'sources', 'templates' or 'self_made'")
        _check_least("prompts", self, templates=0, self_made=0, self_made_tokens=1)
        _check_two_files("prompts", self.out, self.eval_out)
        for path in (self.out, self.eval_out):
            if any(_same_file(path, source.path) for source in self.sources):
                raise ValueError(f"prompts: {path} would replace the file of a source; name another")


@dataclass(frozen=True)
class RolloutSettings:
    """Completions to sample: ``samples`` of each training prompt into ``out``, ``eval_samples`` into ``eval_out``.

    Prompts of more than ``max_prompt_tokens`` are left out. A completion that takes more than ``timeout_s`` is
    given up and tried again: the engine has stalled.

    ``engine_url`` (or LENVM_ENGINE_URL) is the served model's address without ``/v1``, ``api`` how it is spoken to
    (OPENAI_API_KEY is sent where it is set); when it is empty the engine is started for the run, with SGLang's own
    ``engine_arguments``. ``extend``: rollout files of a lower token limit; their completions of these prompts are gone
    on with where they were cut, and taken over where they ended.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    out: str
    eval_out: str
    extend: tuple[str, ...] = ()
    samples: int = 16
    eval_samples: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    max_prompt_tokens: int = 4096
    concurrency: int = 256
    timeout_s: float = Retry.timeout_s
    api: str = "engine"
    engine_url: str = ""
    engine_arguments: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.api not in APIS:
            raise ValueError(f"rollouts.api: must be one of {', '.join(APIS)}, got {self.api!r}")
        _check_least("rollouts", self, samples=1, eval_samples=1, concurrency=1, max_prompt_tokens=1)
        _check_two_files("rollouts", self.out, self.eval_out)
        for name, path in (("out", self.out), ("eval_out", self.eval_out)):
            if not Path(path).suffix:
                raise ValueError(
                    f"rollouts.{name}: {path} has no suffix (.jsonl); without it, it is the report's folder"
                )
        if not 0 < self.timeout_s < float("inf"):
            raise ValueError(f"rollouts.timeout_s: must be positive and finite, got {self.timeout_s}")


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated: prompts of ``data.eval_rollouts`` with at least ``min_samples`` finished samples.

    ``lenvm``: the folder or hub name to evaluate, by default the result of the training; ``probe_model``: whose
    hidden states the ridge probe reads, by default the backbone; ``out``: folder of the figures. Errors are taken
    in the return space of ``gamma``, by default that of ``target``. ``dtype``: of the backbone, by default as engines
    serve it.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    out: str
    lenvm: str = ""
    probe_model: str = ""
    min_samples: int = 4
    gamma: float | None = None
    max_fit_prompts: int = 2000
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"evaluation.dtype: must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.gamma is not None and not 0 < self.gamma < 1:
            raise ValueError(f"evaluation.gamma: must be between 0 and 1, got {self.gamma}")
        _check_least("evaluation", self, min_samples=1, max_fit_prompts=2)


@dataclass(frozen=True)
class Experiment:
    """A whole configuration file. Exactly one of ``training`` (a LenVM) and ``heads`` (on frozen states) is there."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    model: ModelSettings
    data: DataSettings
    target: TargetConfig = field(default_factory=TargetConfig)
    training: dict[str, Any] | None = None
    heads: HeadsSettings | None = None
    prompts: PromptSettings | None = None
    rollouts: RolloutSettings | None = None
    evaluation: EvaluationSettings | None = None

    def __post_init__(self) -> None:
        if (self.training is None) == (self.heads is None):
            raise ValueError("give exactly one of 'training' and 'heads'")
        if self.training is not None and not self.training.get("output_dir"):
            raise ValueError("training.output_dir: missing")
        if self.heads is not None:
            self._check_used_by_heads()
        elif self.model.kind != "lora" and self.model.lora != LoraSettings():
            raise ValueError(f"model.lora: does nothing for model.kind {self.model.kind}")
        if self.target.space != BOUNDED_SPACE and self.target.max_length != TargetConfig.max_length:
            raise ValueError(f"target.max_length: does nothing for target.space {self.target.space}")

    @property
    def output_dir(self) -> str:
        """The folder of the head, or of the training's checkpoints and result."""
        return self.heads.out if self.heads else str((self.training or {})["output_dir"])

    def _check_used_by_heads(self) -> None:
        if self.target != TargetConfig(gamma=self.target.gamma):
            raise ValueError("target: heads take gamma alone, and discounted returns ('heads.censored' is theirs)")
        plain = ModelSettings(self.model.backbone, self.model.served_model)
        for name in NOT_OF_HEADS:
            if getattr(self.model, name) != getattr(plain, name):
                raise ValueError(f"model.{name}: does nothing for 'heads'")
        if self.model.served_name not in ("", self.model.base_name):
            raise ValueError("model.served_name: does nothing for 'heads', which are of the model in model.base_name")
        if self.data.max_eval_completions != DataSettings.max_eval_completions:
            raise ValueError("data.max_eval_completions: does nothing for 'heads'")


def _check_two_files(section: str, out: str, eval_out: str) -> None:
    if _same_file(out, eval_out):
        raise ValueError(f"{section}.eval_out: must be another file than {section}.out, {out}")


def _same_file(first: str, second: str) -> bool:
    return Path(first).expanduser().resolve() == Path(second).expanduser().resolve()


def _check_least(section: str, settings: object, **least: int) -> None:
    for name, value in least.items():
        if getattr(settings, name) < value:
            raise ValueError(f"{section}.{name}: must be at least {value}, got {getattr(settings, name)}")


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads 2e-5 as a number, as YAML 1.2 does."""


_EXPONENT = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read a configuration and apply ``key=value`` overrides. Raises ConfigError."""
    return build_experiment(apply_overrides(load_yaml(path), overrides), str(path))


def load_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises ConfigError."""
    try:
        content = _parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a mapping of keys")
    return content


def build_experiment(content: dict[str, Any], where: str) -> Experiment:
    """An experiment from a mapping, ``~`` expanded. Raises ConfigError naming ``where`` and the first bad key."""
    try:
        experiment: Experiment = TypeAdapter(Experiment).validate_python(expand_home(content))
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first_problem(error)}") from None
    return experiment


def expand_home(content: Any) -> Any:
    """``content`` with ``~`` at the beginning of its strings, however deep they lie, as the user's own folder."""
    if isinstance(content, dict):
        return {name: expand_home(value) for name, value in content.items()}
    if isinstance(content, list):
        return [expand_home(value) for value in content]
    return os.path.expanduser(content) if isinstance(content, str) else content


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy with each ``a.b.c=value`` (value as YAML) set. Raises ConfigError for what is no such assignment."""
    result = dict(content)
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals or not path:
            raise ConfigError(f"expected key=value, got {override!r}")
        result = _with_value(result, path.split("."), _parse(value, override), path)
    return result


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from None


def _with_value(content: Any, keys: Sequence[str], value: Any, path: str) -> dict[str, Any]:
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{path}: {keys[0]!r} is not inside a mapping")
    inner = _with_value((content or {}).get(keys[0]), keys[1:], value, path) if len(keys) > 1 else value
    return {**(content or {}), keys[0]: inner}


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    kinds = {
        "extra_forbidden": "unknown key",
        "unexpected_keyword_argument": "unknown key",
        "missing": "missing",
        "missing_argument": "missing",
    }
    message = kinds.get(first["type"], first["msg"].removeprefix("Value error, "))
    return message if message.startswith(path) else f"{path}: {message}"
