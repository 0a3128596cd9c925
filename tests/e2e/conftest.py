"""One real stack for all end-to-end tests: stock SGLang with the default model, the shipped head, the gateway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from lenvm_runtime.default_model import MODEL_NAME, ensure_default_model
from lenvm_runtime.serve import SHIPPED_HEAD, ServeConfig, Stack, free_port, running_stack
from sample_lenvm import make_lenvm


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    arguments = ("--chunked-prefill-size", "64", "--random-seed", "1")  # prompts longer than 64 tokens are chunked
    arguments += ("--max-total-tokens", "32768")
    with running_stack(ServeConfig("127.0.0.1", free_port(), None, None, arguments)) as running:
        yield running


@pytest.fixture(scope="session")
def client(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.gateway_url}/v1", api_key="none", max_retries=0, timeout=300)


@pytest.fixture
def async_client(stack: Stack) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{stack.gateway_url}/v1", api_key="none", max_retries=0, timeout=300)


@pytest.fixture(scope="session")
def model_name() -> str:
    return MODEL_NAME


@pytest.fixture(scope="session")
def head_folder() -> Path:
    return SHIPPED_HEAD


@pytest.fixture(scope="session")
def lenvm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A separate LenVM in the published format: the default model's weights, the shipped head's value head."""
    return make_lenvm(tmp_path_factory.mktemp("lenvm"))


@pytest.fixture(scope="session")
def reference_model() -> tuple[Any, Any]:
    """The default model and its tokenizer in plain transformers, bf16 like the engine."""
    import torch

    from lenvm_kernels import torchvision_schema

    torchvision_schema.declare_if_missing()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ensure_default_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    return model, AutoTokenizer.from_pretrained(folder)
