"""Tiny random LenVMs in the published format, made with plain transformers and peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lenvm_kernels import torchvision_schema
from lenvm_kernels.checkpoint import save_value_head
from lenvm_kernels.heads import ValueHead

torchvision_schema.declare_if_missing()

from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: E402

VOCABULARY = 96
HIDDEN_SIZE = 64
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN_SIZE,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word ``w0`` .. ``w95``; EOS is ``w2``."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, as grammars need it; EOS has id 2."""
    alphabet = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(alphabet[:3])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def save_model(
    folder: Path,
    family: str,
    *,
    tied: bool = True,
    seed: int = 0,
    max_shard_size: str = "1GB",
    tokenizer: PreTrainedTokenizerFast | None = None,
    context: int = 128,
) -> Any:
    """A random fp32 model of a family (qwen2, qwen3, llama) with a tokenizer, `word_tokenizer` unless given."""
    torch.manual_seed(seed)
    tokenizer = tokenizer or word_tokenizer()
    shape = {**SHAPE, "vocab_size": len(tokenizer), "max_position_embeddings": context}
    config = AutoConfig.for_model(family, **shape, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return model


def save_lenvm(folder: Path, family: str, *, gamma: float = 0.99, **model_options: Any) -> tuple[Any, ValueHead]:
    """A published-format checkpoint (options as of `save_model`); returns its transformers model and value head."""
    model = save_model(folder, family, seed=1, **model_options)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["architectures"] = [f"{family.capitalize()}ForLengthValueModel"]
    path.write_text(json.dumps(config))
    return model, save_head(folder, gamma)


def save_head(folder: Path, gamma: float = 0.99) -> ValueHead:
    """A random value head and a configuration beside it."""
    head = ValueHead(HIDDEN_SIZE).requires_grad_(False)
    save_value_head(head, folder)
    (folder / "lenvm_config.json").write_text(json.dumps({"gamma": gamma}))
    return head


def save_adapter(folder: Path, base: Path, **lora: Any) -> tuple[Any, ValueHead]:
    """A random LoRA adapter over the model in ``base``, with a value head; returns peft's own merged model."""
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "o_proj", "down_proj"], **lora)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.merge_and_unload().eval(), save_head(folder)


def rename_weight(folder: Path, old: str, new: str | None) -> None:
    """Rename a stored weight, or drop it."""
    path = folder / "model.safetensors"
    state = load_file(path)
    weight = state.pop(old)
    save_file({**state, new: weight} if new else state, path, metadata={"format": "pt"})


def offline_values(model: Any, head: ValueHead, token_ids: list[int]) -> Tensor:
    """V of every state of a sequence, by a plain transformers forward: [len(token_ids)]."""
    with torch.inference_mode():
        return head(model.base_model(torch.tensor([token_ids])).last_hidden_state[0])
