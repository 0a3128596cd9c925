"""A vision-language LenVM (Qwen2.5-VL architecture, random weights): real image files through the same commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import (
    AutoProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from lenvm_training import commands
from lenvm_training.lenvm_trainer import LenVMRun, train_lenvm
from lenvm_training.model import LoraSettings, ModelSettings, build_lenvm, load_lenvm
from lenvm_training.prompts import Prompt
from lenvm_training.rollout_data import DataSettings, RolloutCollator, RolloutDataset, RolloutFileError, load_rollouts
from lenvm_training.rollout_files import ungroup
from lenvm_training.rollouts import ImageChatEncoder
from lenvm_training.targets import TargetConfig
from local_engine import local_engine
from tiny import VOCAB_SIZE, make_rows, make_tokenizer, write_rows

IMAGE, START, END = VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 2
PIXELS = {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 16}
CHAT_TEMPLATE = (
    "{% for m in messages %}<user> {% if m.content is string %} {{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %} {{ part.text }}{% endif %}"
    "{% endfor %}{% endif %} <end> {% endfor %}<bot>"
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vl")
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCAB_SIZE + 4,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        video_token_id=VOCAB_SIZE + 3,
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


def make_processor() -> Qwen2_5_VLProcessor:
    tokenizer = make_tokenizer()
    names = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**PIXELS), tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE
    )


def make_image(folder: Path, bright: bool, size: tuple[int, int], seed: int = 0) -> str:
    """A dark or a bright noisy picture."""
    noise = np.random.default_rng((*size, seed)).integers(0, 40, (*size[::-1], 3))
    path = folder / f"{bright}-{size}-{seed}.png"
    Image.fromarray((noise + (200 if bright else 0)).astype(np.uint8)).save(path)
    return str(path)


def image_rows(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Only the picture tells how long the answer is: bright ones get long answers. A quarter has no picture."""
    processor = Qwen2VLImageProcessor(**PIXELS)
    rows = []
    for index, row in enumerate(make_rows(8, seed)):
        bright = bool(index % 2)
        row = row | {"output_token_ids": [10] * (12 if bright else 2) + [1], "finish_reason": "stop"}
        if index % 4 != 3:
            path = make_image(folder, bright, (56, 84) if index % 3 else (56, 56), seed)
            grid = processor(images=[Image.open(path)], return_tensors="pt")["image_grid_thw"][0]
            count = int(grid.prod()) // processor.merge_size**2
            row |= {"prompt_token_ids": [2, START, *[IMAGE] * count, END, 1, 3], "images": [path]}
        rows.append(row)
    return rows


def collator(backbone: Path) -> RolloutCollator:
    return RolloutCollator(0, Qwen2VLImageProcessor.from_pretrained(backbone), IMAGE)


def test_values_are_those_of_the_model_with_the_processors_inputs(backbone: Path, tmp_path: Path) -> None:
    dataset = RolloutDataset(image_rows(tmp_path, 0)[:5])
    batch = collator(backbone)([dataset[index] for index in range(5)])
    model = build_lenvm(ModelSettings(str(backbone), "served"), TargetConfig(gamma=0.9)).eval()
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(backbone).eval()
    processor = Qwen2VLImageProcessor.from_pretrained(backbone)
    labels = batch.pop("labels")
    with torch.inference_mode():
        predictions = model(**batch).predictions
        for row in range(5):
            item = dataset[row]
            ids = torch.tensor([item["input_ids"]])
            images = [Image.open(path).convert("RGB") for path in item["images"]]
            extra = dict(processor(images=images, return_tensors="pt")) if images else {}
            states = plain.model(input_ids=ids, mm_token_type_ids=ids.eq(IMAGE).int(), **extra).last_hidden_state
            expected = model.value_head(states[0])
            is_state = labels[row] != -100
            torch.testing.assert_close(
                predictions[row][is_state], expected[is_state[: len(expected)]], atol=1e-5, rtol=1e-4
            )


def make_idefics3() -> Any:
    text = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "pad_token_id": 0}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Idefics3Config(text_config=text, vision_config=vision, pad_token_id=0, image_token_id=63)
    return Idefics3ForConditionalGeneration(config)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_training_learns_what_only_the_pictures_tell(backbone: Path, tmp_path: Path, kind: str) -> None:
    files = [str(write_rows(tmp_path / f"{seed}.jsonl", image_rows(tmp_path, seed))) for seed in (0, 1)]
    arguments = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 25,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "save_steps": 25,
    }
    lora = LoraSettings(r=8, target_modules=r".*language_model.*\.(q_proj|v_proj|gate_proj|down_proj)")
    settings = ModelSettings(str(backbone), "served", kind=kind, lora=lora, save_dtype="float32")
    data = DataSettings((files[0],), (files[1],))
    figures = train_lenvm(LenVMRun(settings, data, arguments, TargetConfig(gamma=0.9)))
    assert figures["tau_0"] > 0.3
    folder = tmp_path / "run" / "lenvm"
    assert json.loads((folder / "figures.json").read_text()) == figures
    dataset = RolloutDataset(image_rows(tmp_path, 1)[:4])
    batch = collator(backbone)([dataset[index] for index in range(4)])
    labels = batch.pop("labels")
    with torch.inference_mode():
        loaded, again = (load_lenvm(path)(**batch).predictions for path in (folder, tmp_path / "run" / "checkpoint-25"))
    assert torch.equal(loaded[labels != -100], again[labels != -100])


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_vision_tower_is_frozen_if_asked(backbone: Path, kind: str, frozen: bool) -> None:
    lora = LoraSettings(target_modules="all-linear")
    settings = ModelSettings(str(backbone), "served", kind=kind, lora=lora, freeze_vision=frozen)
    trained = {name for name, part in build_lenvm(settings, TargetConfig()).named_parameters() if part.requires_grad}
    assert any("visual" in name for name in trained) != frozen
    assert any("language_model.layers" in name for name in trained)


@pytest.mark.parametrize("kind", ["full", "lora", "head"])
def test_whatever_lies_between_the_pictures_and_the_text_is_frozen(tmp_path: Path, kind: str) -> None:
    """A connector, here of Idefics3: no family's names are known to the code."""
    make_idefics3().save_pretrained(tmp_path)
    settings = ModelSettings(str(tmp_path), "served", kind=kind, lora=LoraSettings(target_modules="all-linear"))
    trained = {name for name, part in build_lenvm(settings, TargetConfig()).named_parameters() if part.requires_grad}
    assert not any("vision_model" in name or "connector" in name for name in trained)
    assert any("text_model.layers" in name for name in trained) == (kind != "head")


def test_a_head_needs_no_known_vision_tower(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "get_decoder", lambda self: self)
    build_lenvm(ModelSettings(str(backbone), "served", kind="head"), TargetConfig())
    with pytest.raises(ValueError, match=r"model\.freeze_vision: the vision tower of this backbone is not known"):
        build_lenvm(ModelSettings(str(backbone), "served", kind="full"), TargetConfig())


def test_freezing_no_vision_tower_is_refused(backbone: Path) -> None:
    settings = ModelSettings(str(backbone), "served", kind="head", freeze_vision=False)
    with pytest.raises(ValueError, match=r"model\.freeze_vision: does nothing for model\.kind head"):
        build_lenvm(settings, TargetConfig())


def test_public_rows_with_pictures_are_encoded_with_the_pictures(backbone: Path, tmp_path: Path) -> None:
    path = make_image(tmp_path, True, (56, 56))
    turns = [{"from": "human", "value": "<image>w4 w5"}, {"from": "gpt", "value": "w9"}]
    public = {"conversations": turns, "meta_info": {"lenvm_idx": 0, "finish_reason": "stop"}, "images": [path]}
    write_rows(tmp_path / "public.jsonl", [public])
    ungroup(tmp_path / "public.jsonl", tmp_path / "rollouts.jsonl", str(backbone), assume_finished=False)
    content = [{"type": "image"}, {"type": "text", "text": "w4 w5"}]
    prompt = Prompt("0", "", [{"role": "user", "content": content}], [path])
    expected = ImageChatEncoder(AutoProcessor.from_pretrained(backbone)).encode(prompt)
    (row,) = load_rollouts([tmp_path / "rollouts.jsonl"])
    assert IMAGE in expected
    assert (list(row["prompt_token_ids"]), row["images"]) == (expected, [path])


@pytest.mark.parametrize("text", ["w4 w5", "<image>w4 <image> w5"])
def test_public_rows_with_other_markers_than_pictures_are_named(backbone: Path, tmp_path: Path, text: str) -> None:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "w9"}]
    public = {"conversations": turns, "meta_info": {"lenvm_idx": 0, "finish_reason": "stop"}}
    write_rows(tmp_path / "p.jsonl", [public | {"images": [make_image(tmp_path, True, (56, 56))]}])
    message = rf"p\.jsonl:1: field 'images': 1 for {text.count('<image>')} <image> markers"
    with pytest.raises(RolloutFileError, match=message):
        ungroup(tmp_path / "p.jsonl", tmp_path / "r.jsonl", str(backbone), assume_finished=False)


def test_public_rows_without_pictures_need_no_processor(backbone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(backbone, folder)
    for path in folder.glob("*processor*"):
        path.write_text("damaged")
    turns = [{"from": "human", "value": "w4"}, {"from": "gpt", "value": "w9"}]
    public = {"conversations": turns, "meta_info": {"lenvm_idx": 0, "finish_reason": "stop"}}
    write_rows(tmp_path / "p.jsonl", [public])
    ungroup(tmp_path / "p.jsonl", tmp_path / "r.jsonl", str(folder), assume_finished=False)
    assert len(load_rollouts([tmp_path / "r.jsonl"])) == 1


def test_a_prompt_with_an_image_is_encoded_as_training_reads_it(backbone: Path, tmp_path: Path) -> None:
    processor = make_processor()
    image = make_image(tmp_path, True, (84, 56))
    content = [{"type": "image"}, {"type": "text", "text": "w7"}]
    prompt = Prompt("seen", "images", [{"role": "user", "content": content}], [image])
    ids = ImageChatEncoder(processor).encode(prompt)
    assert ids[:2] == [2, START]
    assert ids[-4:] == [END, 7, 1, 3]
    assert ids.count(IMAGE) == len(ids) - 6 > 1
    row = make_rows(1)[0] | {"prompt_token_ids": ids, "images": [image]}
    batch = collator(backbone)([RolloutDataset([row])[0]])
    assert batch["mm_token_type_ids"].sum() == ids.count(IMAGE)
    text_only = Prompt("read", "words", [{"role": "user", "content": content[1:]}])
    assert ImageChatEncoder(processor).encode(text_only) == [2, 7, 1, 3]


def test_images_that_do_not_fit_their_tokens_are_named(backbone: Path, tmp_path: Path) -> None:
    row = image_rows(tmp_path, 0)[0]
    prompt_ids = list(row["prompt_token_ids"])
    prompt_ids.remove(IMAGE)
    dataset = RolloutDataset([row | {"prompt_token_ids": prompt_ids}])
    with pytest.raises(RolloutFileError, match=r"prompt 0-0 sample 0: \d+ image tokens, its images stand for \d+"):
        collator(backbone)([dataset[0]])
    with pytest.raises(RolloutFileError, match="the backbone takes none"):
        RolloutCollator(0)([RolloutDataset([row])[0]])
    broken = RolloutDataset([row | {"images": [str(tmp_path / "gone.png")]}])
    with pytest.raises(RolloutFileError, match=r"gone\.png: cannot be read as an image"):
        collator(backbone)([broken[0]])


def write_experiment(backbone: Path, folder: Path, kind: str) -> str:
    """A data set of questions, most with a picture, and a configuration that goes from it to an evaluation."""
    rows = []
    for index in range(60):
        size = (56, 84) if index % 3 else (56, 56)
        picture = make_image(folder, bool(index % 2), size, index)
        rows.append({"q": f"w{4 + index % 50} w{4 + index // 50}", "image": picture if index % 6 else None})
    write_rows(folder / "questions.jsonl", rows)
    columns = {"text": "q", "image": "image"}
    source = {"path": "questions.jsonl", "domain": "images", "columns": columns, "count": 60}
    rollouts = {"out": "rollouts.jsonl", "eval_out": "eval.jsonl", "samples": 2, "eval_samples": 3, "api": "openai"}
    lora = {"r": 8, "target_modules": r".*language_model.*\.(q_proj|v_proj|gate_proj|down_proj)"}
    training = {"output_dir": "run", "max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    content = {
        "prompts": {
            "out": "prompts.jsonl",
            "eval_out": "eval_prompts.jsonl",
            "eval_fraction": 0.3,
            "sources": [source],
        },
        "rollouts": rollouts | {"concurrency": 8},
        "model": {
            "backbone": str(backbone),
            "served_model": str(backbone),
            "kind": kind,
            "lora": lora if kind == "lora" else {},
        },
        "target": {"gamma": 0.9},
        "data": {"rollouts": ["rollouts.jsonl"], "eval_rollouts": ["eval.jsonl"]},
        "training": training | {"report_to": "none", "disable_tqdm": True, "save_steps": 20},
        "evaluation": {"out": "run/evaluation", "min_samples": 3},
    }
    content["prompts"]["image_folder"] = "images"
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return "config.yaml"


@pytest.mark.usefixtures("empty_folder")
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_an_experiment_with_pictures_from_prompts_to_figures(
    backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    config = write_experiment(backbone, tmp_path, kind)
    with local_engine() as url:
        assert commands.prompts([config]) == 0
        assert commands.rollouts([config, f"rollouts.engine_url={url}"]) == 0
    assert commands.train([config]) == 0
    assert commands.evaluate([config]) == 0
    rows = [json.loads(line) for line in Path("eval.jsonl").read_text().splitlines()]
    pictured = [row for row in rows if row.get("images")]
    assert 0 < len(pictured) < len(rows)
    assert all(IMAGE in row["prompt_token_ids"] for row in pictured)
    figures = json.loads(Path("run/evaluation/evaluation.json").read_text())
    assert figures["num_prompts"] == len(rows) // 3
    boundary = figures["boundary"]
    assert set(boundary) == {"lenvm", "constant", "prompt_length", "ridge_probe"}
    assert boundary["lenvm"]["tau"] > 0.2, "within a kind of picture the order is chance"
    assert boundary["lenvm"]["mse"] < 0.5 * boundary["prompt_length"]["mse"], "only the pictures tell"
    assert figures["served"] == {}, "the engine has no such backbone"
    assert set(figures["coverage"]) == {"all", "images"}
    assert figures["states"]["mse"] < figures["states"]["mse_constant"]
    assert Path("run/evaluation/calibration.png").stat().st_size > 1000
    assert "| images, lenvm |" in Path("run/lenvm/README.md").read_text()
    if kind == "full":
        further = ["model.backbone=run/lenvm", "training.output_dir=further", "training.max_steps=1"]
        assert commands.train([config, *further]) == 0, "the result is a backbone with all that it needs"
    Path(pictured[0]["images"][0]).unlink()
    capsys.readouterr()
    assert commands.evaluate([config]) == 2
    assert ".png: cannot be read as an image" in capsys.readouterr().err.splitlines()[-1]
