"""Tiny models, tokenizers and rollouts for the training tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 64
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }}{{ ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)


def make_tokenizer(prefix: str = "w") -> PreTrainedTokenizerFast:
    words = ["<pad>", "<end>", "<user>", "<bot>", *(f"{prefix}{index}" for index in range(4, VOCAB_SIZE))]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_backbone(folder: Path, family: str = "llama", tied: bool = True) -> Path:
    """A random-weight model with its tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_rows(num_prompts: int, seed: int = 0, num_samples: int = 4) -> list[dict[str, Any]]:
    """The prompt's token tells the kind of length: a LenVM can learn it. One row in 16 is censored.

    Prompts of two seeds are different (of three in a row).
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt in range(num_prompts):
        kind = prompt % 4
        for sample in range(num_samples):
            length = (2, 5, 9, 14)[kind] + int(torch.randint(0, 3, (1,), generator=generator))
            output = [*torch.randint(8, VOCAB_SIZE, (length,), generator=generator).tolist(), 1]
            rows.append(
                {
                    "prompt_id": f"{seed}-{prompt}",
                    "domain": ("math", "code")[prompt % 2],
                    "sample": sample,
                    "prompt_token_ids": [2, 4 + kind, *[9] * (3 * (prompt % 3) + seed % 3), 1, 3],
                    "output_token_ids": output,
                    "finish_reason": "length" if kind == 3 and sample == 0 else "stop",
                    "sampling": {"temperature": 1.0},
                }
            )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
