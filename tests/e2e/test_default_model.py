"""The converted default model: end token, chat template, and agreement with plain transformers."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
import torch

from lenvm_runtime.serve import Stack

pytestmark = pytest.mark.e2e


def test_end_token_and_chat_template(reference_model: tuple[Any, Any]) -> None:
    model, tokenizer = reference_model
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 2
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_greedy_answer_is_that_of_plain_transformers(stack: Stack, reference_model: tuple[Any, Any]) -> None:
    """Every greedy token must be transformers' own, or within the bf16 noise of its best logit."""
    model, tokenizer = reference_model
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_dict=True
    )
    prompt = list(encoded["input_ids"])
    body = {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 48}}
    answer = httpx.post(f"{stack.engine_url}/generate", json=body, timeout=120).json()
    output = answer["output_ids"]
    assert "Paris" in answer["text"]
    assert output[-1] == tokenizer.eos_token_id
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(output)[:, None]).squeeze(1)
    assert (logits.max(dim=1).values - chosen).max() < 0.25  # 2 ulp of bf16 at a logit of 16 to 32


def test_grammars_read_the_vocabulary_as_text(reference_model: tuple[Any, Any]) -> None:
    """A space, a line break and other scripts are what they are in a grammar, not the letters they are stored as."""
    from llguidance import LLMatcher, grammar_from
    from llguidance.hf import from_tokenizer

    _, tokenizer = reference_model
    vocabulary = from_tokenizer(tokenizer)
    for text in ("hello 123", "one\ntwo", "naïve 日本", '{"a": [1, 2]}'):
        matcher = LLMatcher(vocabulary, grammar_from("regex", re.escape(text)))
        assert all(matcher.consume_token(token) for token in tokenizer.encode(text)), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
