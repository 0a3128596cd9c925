"""What a LenVM folder is, which gamma it has, whether its vocabulary and weights fit."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor

from lenvm_kernels.checkpoint import load_value_head
from lenvm_kernels.checkpoint_files import ADAPTER_CONFIG_FILE, CONFIG_FILE, CheckpointError, LenVMKind, find_kind
from lenvm_runtime.serve import SHIPPED_HEAD
from lenvm_runtime.value_model.source import (
    check_context_length,
    check_tensor_parallelism,
    check_vocabulary,
    find_folder,
    read_source,
)
from lenvm_runtime.value_model.weights import EMBEDDINGS, LoraAdapter, backbone_weights
from tiny_lenvm import save_adapter, save_lenvm, save_model


def test_the_kind_is_told_from_the_files(tmp_path: Path) -> None:
    save_lenvm(tmp_path / "checkpoint", "llama")
    save_model(tmp_path / "model", "llama")
    save_adapter(tmp_path / "adapter", tmp_path / "model")
    assert find_kind(SHIPPED_HEAD) is LenVMKind.HEAD
    assert find_kind(tmp_path / "checkpoint") is LenVMKind.CHECKPOINT
    assert find_kind(tmp_path / "adapter") is LenVMKind.ADAPTER
    with pytest.raises(CheckpointError, match="make no LenVM"):
        find_kind(tmp_path / "model")  # has no value head


def test_a_value_head_round_trips(tmp_path: Path) -> None:
    _, head = save_lenvm(tmp_path, "qwen3")
    loaded = load_value_head(tmp_path, head.fc.in_features)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in head.state_dict().items())
    with pytest.raises(CheckpointError, match=r"value_head\.safetensors"):
        load_value_head(tmp_path, head.fc.in_features + 1)


@pytest.mark.parametrize(("family", "gamma"), [("qwen2", 0.997), ("qwen3", 0.9998)])
def test_gamma_is_the_familys_unless_it_is_given(tmp_path: Path, family: str, gamma: float) -> None:
    save_lenvm(tmp_path, family, gamma=0.9)
    assert read_source(tmp_path).gamma == 0.9
    (tmp_path / CONFIG_FILE).unlink()
    assert read_source(tmp_path).gamma == gamma


def test_a_family_without_a_default_gamma_must_give_one(tmp_path: Path) -> None:
    save_lenvm(tmp_path, "llama")
    (tmp_path / CONFIG_FILE).unlink()
    with pytest.raises(CheckpointError, match="llama has no default gamma"):
        read_source(tmp_path)


@pytest.mark.parametrize("gamma", [None, 1, 0, "0.9", True, 1.5])
def test_a_bad_gamma_is_named(tmp_path: Path, gamma: object) -> None:
    save_lenvm(tmp_path, "qwen2")
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"gamma": gamma}))
    with pytest.raises(CheckpointError, match="gamma must be"):
        read_source(tmp_path)


def test_a_path_is_itself_and_another_name_is_no_folder(tmp_path: Path) -> None:
    assert find_folder(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match="no such folder"):
        find_kind(find_folder("not/a/hub/name"))


def test_a_hub_name_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str) -> str:
        if name != "owner/lenvm":
            raise LocalEntryNotFoundError(f"{name} is not there\nand more")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert find_folder("owner/lenvm") == tmp_path
    with pytest.raises(CheckpointError, match=r"owner/other: .* \(owner/other is not there\)$"):
        find_folder("owner/other")


def test_the_base_of_an_adapter(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    save_adapter(tmp_path / "adapter", tmp_path / "model")
    source = read_source(tmp_path / "adapter")
    assert source.find_backbone("/served", "name") == str(tmp_path / "model")
    path = tmp_path / "adapter" / ADAPTER_CONFIG_FILE
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "base_model_name_or_path": "name"}))
    assert source.find_backbone("/served", "name") == "/served"
    path.write_text(json.dumps({**fields, "base_model_name_or_path": None}))
    with pytest.raises(CheckpointError, match="base_model_name_or_path"):
        source.find_backbone("/served", "name")
    (tmp_path / "adapter" / CONFIG_FILE).write_text(json.dumps({"gamma": 0.9, "base_model": "owner/base"}))
    assert source.find_backbone("/served", "name") == "owner/base"


def test_values_of_another_kind_are_refused(tmp_path: Path) -> None:
    save_lenvm(tmp_path, "qwen2")
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"gamma": 0.9, "target": {"space": "log_length"}}))
    with pytest.raises(CheckpointError, match="predicts log_length"):
        read_source(tmp_path)


def test_vocabularies() -> None:
    served = {"a": 0, "b": 1}
    check_vocabulary(served, served, 2)
    check_vocabulary({**served, "c": 2}, served, 64)  # more tokens, padded embeddings
    with pytest.raises(CheckpointError, match="'b' is 1 there, the LenVM has id 2"):
        check_vocabulary({"a": 0, "c": 1, "b": 2}, served, 3)
    with pytest.raises(CheckpointError, match="no such token"):
        check_vocabulary({"a": 0}, served, 2)
    with pytest.raises(CheckpointError, match="embeds 1 tokens"):
        check_vocabulary(served, served, 1)


def test_context_lengths() -> None:
    check_context_length(served=128, lenvm=128)
    with pytest.raises(CheckpointError, match=r"is 129 tokens, the LenVM's 128; give --context-length 128 or less$"):
        check_context_length(served=129, lenvm=128)


@pytest.mark.parametrize(("ranks", "heads", "kv_heads"), [(1, 9, 3), (2, 4, 2), (4, 16, 8), (8, 16, 2), (3, 9, 3)])
def test_ranks_that_share_the_heads(ranks: int, heads: int, kv_heads: int) -> None:
    check_tensor_parallelism(ranks, heads, kv_heads)


@pytest.mark.parametrize(
    ("ranks", "heads", "kv_heads", "named"),
    [(2, 9, 3, "9 attention heads"), (4, 14, 2, "14 attention heads"), (4, 12, 6, "6 KV"), (6, 12, 4, "4 KV")],
)
def test_ranks_that_do_not_share_the_heads_are_refused(ranks: int, heads: int, kv_heads: int, named: str) -> None:
    with pytest.raises(CheckpointError, match=f"--tp-size {ranks}: .*{named}"):
        check_tensor_parallelism(ranks, heads, kv_heads)


def test_tied_embeddings_may_be_stored_under_either_name() -> None:
    embeddings, norm = torch.ones(2), torch.zeros(2)

    def read(*names: str, tied: bool) -> dict[str, Tensor]:
        return dict(backbone_weights([("model.norm.weight", norm), *((name, embeddings) for name in names)], tied))

    expected = {"model.norm.weight": norm, EMBEDDINGS: embeddings}
    assert read(EMBEDDINGS, tied=True).keys() == expected.keys()
    assert read("lm_head.weight", "v_head.fc.bias", tied=True).keys() == expected.keys()
    assert read("lm_head.weight", EMBEDDINGS, tied=False).keys() == expected.keys()
    with pytest.raises(CheckpointError, match=EMBEDDINGS):
        read("lm_head.weight", tied=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("rank_pattern", {"q_proj": 2}),
        ("fan_in_fan_out", True),
        ("alora_invocation_tokens", [5, 6]),
        *(("init_lora_weights", name) for name in ("pissa", "pissa_niter_16", "olora", "CorDA", "loftq", "lora_ga")),
    ],
)
def test_an_adapter_of_another_form_is_refused(tmp_path: Path, field: str, value: object) -> None:
    save_model(tmp_path / "model", "llama")
    save_adapter(tmp_path / "adapter", tmp_path / "model")
    path = tmp_path / "adapter" / ADAPTER_CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(CheckpointError, match=field):
        LoraAdapter(tmp_path / "adapter")


@pytest.mark.parametrize("initial", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"])
def test_an_adapter_whose_initial_weights_leave_the_base_alone_is_read(tmp_path: Path, initial: object) -> None:
    save_model(tmp_path / "model", "llama")
    save_adapter(tmp_path / "adapter", tmp_path / "model")
    path = tmp_path / "adapter" / ADAPTER_CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": initial}))
    LoraAdapter(tmp_path / "adapter")


def test_an_adapter_for_other_layers_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    save_adapter(tmp_path / "adapter", tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"has no model\.layers\.0\.mlp\.down_proj"):
        list(LoraAdapter(tmp_path / "adapter").merge([]))
