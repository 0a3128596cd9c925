"""The LenVM folder: published format both ways, adapters, heads; values against a plain transformers forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lenvm_kernels.checkpoint import load_value_head, save_value_head
from lenvm_kernels.checkpoint_files import CheckpointError
from lenvm_kernels.heads import ValueHead
from lenvm_kernels.length_value import value_from_length
from lenvm_training import model as model_module
from lenvm_training.model import (
    TOKENIZER_FILES,
    LenVM,
    LoraSettings,
    ModelSettings,
    build_lenvm,
    load_language_model,
    load_lenvm,
    resolve_folder,
    restore_lenvm,
    save_lenvm,
)
from lenvm_training.rollout_data import RolloutCollator
from lenvm_training.targets import TargetConfig, remaining_labels
from tiny import make_backbone

TARGET = TargetConfig(gamma=0.9)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["full", "lora", "head"])
def test_a_folder_gives_back_the_values(tmp_path: Path, family: str, kind: str) -> None:
    backbone = make_backbone(tmp_path / "backbone", family)
    settings = ModelSettings(str(backbone), "served", "", "", kind, LoraSettings(r=4, alpha=8))
    model = build_lenvm(settings, TARGET)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    expected = model(**batch()).predictions
    save_lenvm(model, tmp_path / "lenvm")
    loaded = load_lenvm(tmp_path / "lenvm")
    torch.testing.assert_close(loaded(**batch()).predictions, expected)
    assert loaded.lenvm_config == model.lenvm_config
    assert json.loads((tmp_path / "lenvm" / "lenvm_config.json").read_text())["gamma"] == 0.9
    fresh = build_lenvm(settings, TARGET)
    restore_lenvm(fresh, tmp_path / "lenvm")
    assert torch.equal(fresh(**batch()).predictions, expected)
    weights = (tmp_path / "lenvm").glob("*model.safetensors")
    assert {path.name for path in weights} == {
        "full": {"model.safetensors"},
        "lora": {"adapter_model.safetensors"},
        "head": set(),
    }[kind]


@pytest.mark.parametrize("kind", ["full", "lora", "head"])
def test_a_gathered_state_dict_is_saved_as_the_model_itself(tmp_path: Path, kind: str) -> None:
    """What sharded training hands over: all weights by name, the model's own being empty."""
    settings = ModelSettings(str(make_backbone(tmp_path / "backbone")), "served", kind=kind)
    model = build_lenvm(settings, TARGET)
    save_lenvm(model, tmp_path / "plain")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    save_lenvm(model, tmp_path / "gathered", state)
    plain, gathered = (load_lenvm(tmp_path / name).state_dict() for name in ("plain", "gathered"))
    assert all(torch.equal(plain[name], gathered[name]) for name in plain)


def test_a_new_head_starts_at_the_mean_target(tmp_path: Path) -> None:
    start = torch.tensor(-0.03)
    settings = ModelSettings(str(make_backbone(tmp_path)), "served")
    predictions = build_lenvm(settings, TARGET, start)(**batch()).predictions
    assert (predictions - start).abs().max() < 0.03
    save_value_head(ValueHead(32), tmp_path)
    continued = build_lenvm(settings, TARGET, start)
    assert torch.equal(continued.value_head.fc.weight, load_value_head(tmp_path, 32).fc.weight)
    assert torch.equal(continued.value_head.summary.bias, load_value_head(tmp_path, 32).summary.bias)


def test_values_are_those_of_the_published_formula(tmp_path: Path) -> None:
    model = build_lenvm(ModelSettings(str(make_backbone(tmp_path, "qwen2")), "served"), TARGET)
    inputs = batch()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.inference_mode():
        states = plain.model(**inputs).last_hidden_state
        head = {name: tensor.detach() for name, tensor in model.value_head.state_dict().items()}
        hidden = torch.nn.functional.silu(states @ head["fc.weight"].T + head["fc.bias"])
        expected = -torch.sigmoid(hidden @ head["summary.weight"].T + head["summary.bias"]).squeeze(-1)
        is_real = inputs["attention_mask"].bool()
        torch.testing.assert_close(model(**inputs).predictions[is_real], expected[is_real])


@pytest.mark.parametrize("stored", ["both", "lm_head", "embed_tokens"])
def test_published_folders_are_read_whatever_name_tied_embeddings_have(tmp_path: Path, stored: str) -> None:
    make_backbone(tmp_path, "qwen2")
    tensors = load_file(tmp_path / "model.safetensors")
    embeddings = tensors.pop("model.embed_tokens.weight")
    if stored != "embed_tokens":
        tensors["lm_head.weight"] = embeddings.clone()
    if stored != "lm_head":
        tensors["model.embed_tokens.weight"] = embeddings
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    head = {f"v_head.{name}": tensor for name, tensor in ValueHead(32).state_dict().items()}
    save_file(head, tmp_path / "value_head.safetensors")
    model = load_lenvm(tmp_path)
    assert model.lenvm_config.target.gamma == 0.997
    assert torch.equal(model.causal_model.get_input_embeddings().weight, embeddings)
    assert torch.equal(model.value_head.fc.weight, head["v_head.fc.weight"])
    continued = build_lenvm(ModelSettings(str(tmp_path), "served"), TargetConfig())
    assert torch.equal(continued.value_head.fc.weight, head["v_head.fc.weight"])
    with pytest.raises(
        ValueError, match=r"^target: .* has a value head of discounted_return, gamma 0\.997, this run is"
    ):
        build_lenvm(ModelSettings(str(tmp_path), "served"), TARGET)


@pytest.mark.parametrize(
    ("other", "refused"),
    [
        (TargetConfig(gamma=0.99), "discounted_return, gamma 0.9, this run is of discounted_return, gamma 0.99"),
        (TargetConfig(space="length", gamma=0.9), "discounted_return, gamma 0.9, this run is of length"),
        (TargetConfig(gamma=0.9, max_length=8, lam=0.5), ""),
    ],
)
def test_a_value_head_goes_on_with_its_own_target(tmp_path: Path, other: TargetConfig, refused: str) -> None:
    settings = ModelSettings(str(make_backbone(tmp_path / "backbone")), "served", kind="full")
    save_lenvm(build_lenvm(settings, TARGET), tmp_path / "lenvm")
    further = ModelSettings(str(tmp_path / "lenvm"), "served")
    if not refused:
        assert build_lenvm(further, other).lenvm_config.target == other
        return
    with pytest.raises(ValueError, match=rf"^target: .*lenvm has a value head of {refused}$"):
        build_lenvm(further, other)


def test_an_adapter_has_the_names_that_other_servers_read(tmp_path: Path) -> None:
    settings = ModelSettings(str(make_backbone(tmp_path / "b", "llama")), "served", "", "", "lora", LoraSettings(r=2))
    save_lenvm(build_lenvm(settings, TARGET), tmp_path / "lenvm")
    names = set(load_file(tmp_path / "lenvm" / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    adapter = json.loads((tmp_path / "lenvm" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == settings.backbone


@pytest.mark.parametrize(("kind", "trained"), [("full", "all"), ("lora", "lora_"), ("head", "value_head")])
def test_only_what_the_kind_names_is_trained(tmp_path: Path, kind: str, trained: str) -> None:
    model = build_lenvm(ModelSettings(str(make_backbone(tmp_path, "llama", tied=False)), "served", kind=kind), TARGET)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in names if name.startswith("value_head")} == {
        f"value_head.{name}" for name in model.value_head.state_dict()
    }
    rest = {name for name in names if not name.startswith("value_head")}
    assert not any("lm_head" in name for name in rest)
    assert bool(rest) == (kind != "head")
    assert trained == "all" or all(trained in name for name in rest)


def test_the_loss_is_the_mean_squared_error_of_the_states(tmp_path: Path) -> None:
    model = build_lenvm(ModelSettings(str(make_backbone(tmp_path, "llama")), "served"), TARGET)
    labels = torch.tensor([remaining_labels(3, 6, True), remaining_labels(2, 4, True) + [-100] * 3])
    output = model(**batch(), labels=labels)
    errors = [
        (output.predictions[b, t].item() - value_from_length(float(n), 0.9)) ** 2
        for b, row in enumerate(labels.tolist())
        for t, n in enumerate(row)
        if n >= 0
    ]
    assert output.loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert model(**batch(), labels=labels, num_items_in_batch=100).loss.item() == pytest.approx(sum(errors) / 100)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_padding_changes_no_value(tmp_path: Path, family: str) -> None:
    make_backbone(tmp_path, family)
    model = build_lenvm(ModelSettings(str(tmp_path), "served"), TARGET).eval()
    rows = [[2, 5, 9, 1, 3, 11, 12], [2, 7, 4], [2, 8, 8, 8, 1]]
    items = [{"input_ids": ids, "labels": [-100] * len(ids), "images": [], "name": ""} for ids in rows]
    with torch.inference_mode():
        together = model(**RolloutCollator(0)(items)).predictions
        for index, item in enumerate(items):
            alone = model(**RolloutCollator(0)([item])).predictions[0]
            torch.testing.assert_close(together[index, : len(alone)], alone, atol=1e-6, rtol=1e-5)


def test_a_cut_completion_bounds_the_values_of_its_states(tmp_path: Path) -> None:
    model = build_lenvm(ModelSettings(str(make_backbone(tmp_path, "llama")), "served"), TARGET)
    labels = torch.tensor([remaining_labels(3, 6, False), remaining_labels(3, 6, True)])
    output = model(**batch(), labels=labels, censored=torch.tensor([True, False]))
    errors = []
    for b, row in enumerate(labels.tolist()):
        for t, n in enumerate(row):
            error = output.predictions[b, t].item() - value_from_length(float(n), 0.9)
            errors += [max(error, 0) if b == 0 else error] if n >= 0 else []
    assert len(errors) == 6 + 7
    assert output.loss.item() == pytest.approx(sum(error**2 for error in errors) / len(errors), rel=1e-5)


def test_unusable_folders_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor a model of the hub"):
        load_lenvm(tmp_path / "nowhere")
    make_backbone(tmp_path / "llama", "llama")
    with pytest.raises(CheckpointError, match="no gamma is known"):
        load_lenvm(tmp_path / "llama")
    tensors = load_file(tmp_path / "llama" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "llama" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are missing, the first is model\.norm\.weight"):
        build_lenvm(ModelSettings(str(tmp_path / "llama"), "served"), TARGET)
    with pytest.raises(ValueError, match=r"model\.kind"):
        ModelSettings("a", "b", kind="half")
    nothing = LoraSettings(target_modules=("nothing",))
    settings = ModelSettings(str(make_backbone(tmp_path / "ok", "llama")), "served", "", "", "lora", nothing)
    with pytest.raises(ValueError, match=r"model\.lora\.target_modules"):
        build_lenvm(settings, TARGET)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        ("config.json", b'{"model_type": "lla'),
        ("config.json", b"[]"),
        ("pytorch_model.bin", b""),
        ("pytorch_model.bin", b"version https://git-lfs.github.com/spec/v1\n"),
        ("adapter_model.safetensors", b"half"),
    ],
)
def test_a_half_copied_folder_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    folder = make_backbone(tmp_path / "backbone")
    if name.startswith("adapter"):
        lora = build_lenvm(ModelSettings(str(folder), "served", kind="lora"), TARGET)
        folder = tmp_path / "lenvm"
        save_lenvm(lora, folder)
    elif name.startswith("pytorch"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"^{folder}: ."):
        load_lenvm(folder) if name.startswith("adapter") else load_language_model(folder, torch.float32)


def test_a_model_of_the_hub_can_be_had_without_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str] | None] = []

    def download(_: str, allow_patterns: list[str] | None) -> Path:
        asked.append(allow_patterns)
        return tmp_path

    monkeypatch.setattr(model_module, "snapshot_download", download)
    backbone = make_backbone(tmp_path / "backbone")
    assert resolve_folder(backbone, TOKENIZER_FILES) == backbone
    assert resolve_folder("me/model") == resolve_folder("me/model", TOKENIZER_FILES) == tmp_path
    everything, patterns = asked
    assert everything is None
    names = {path.name for path in backbone.iterdir()}
    assert names - set(filter_repo_objects(names, allow_patterns=patterns)) == {"model.safetensors"}


def test_bf16_weights_keep_the_head_in_fp32(tmp_path: Path) -> None:
    settings: Any = ModelSettings(str(make_backbone(tmp_path, "qwen2")), "served", dtype="bfloat16")
    model = build_lenvm(settings, TARGET)
    assert isinstance(model, LenVM)
    output = model(**batch(), labels=torch.tensor([remaining_labels(3, 6, True)] * 2))
    output.loss.backward()
    assert output.predictions.dtype == torch.float32
    assert model.value_head.fc.weight.grad is not None
