"""Training with transformers' Trainer: learning, exact token mean, exact resume, everything a result folder holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

from lenvm_kernels.checkpoint import load_value_head
from lenvm_kernels.checkpoint_files import SERVED_BACKBONES, CheckpointError
from lenvm_runtime.value_model.source import check_vocabulary, read_source
from lenvm_runtime.value_model.weights import LoraAdapter, backbone_weights, check_complete, mark_missing
from lenvm_training import lenvm_trainer
from lenvm_training.lenvm_trainer import LenVMRun, LenVMTrainer, last_checkpoint, train_lenvm, training_arguments
from lenvm_training.model import LoraSettings, ModelSettings, build_lenvm, load_lenvm
from lenvm_training.model_card import CARD_FILE, add_evaluation
from lenvm_training.rollout_data import DataSettings, RolloutCollator, RolloutDataset
from lenvm_training.targets import TargetConfig
from processes import run_processes
from tiny import make_backbone, make_rows, make_tokenizer, write_rows

TARGET = TargetConfig(gamma=0.9)


def make_run(folder: Path, kind: str = "full", name: str = "run", dropout: float = 0.1, **training: Any) -> LenVMRun:
    backbone = folder / "backbone"
    if not backbone.exists():
        make_backbone(backbone)
    if not (folder / "train.jsonl").exists():
        write_rows(folder / "train.jsonl", make_rows(12, 0))
        write_rows(folder / "eval.jsonl", make_rows(8, 1))
    settings = {
        "output_dir": str(folder / name),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        **training,
    }
    data = DataSettings((str(folder / "train.jsonl"),), (str(folder / "eval.jsonl"),))
    model = ModelSettings(str(backbone), "served", "", "", kind, LoraSettings(r=4, alpha=8, dropout=dropout))
    return LenVMRun(model, data, settings, TARGET)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_lenvm(folder).state_dict()


def test_training_learns_and_leaves_a_whole_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path, max_steps=60, report_to="tensorboard", eval_strategy="steps", eval_steps=30, bf16=True)
    figures = train_lenvm(run)
    first = json.loads((tmp_path / "run" / "checkpoint-60" / "trainer_state.json").read_text())["log_history"][0]
    assert figures["mse"] < 0.5 * first["loss"]
    assert figures["tau_0"] > 0.6
    folder = tmp_path / "run" / "lenvm"
    assert json.loads((folder / "figures.json").read_text()) == figures
    names = {path.name for path in folder.iterdir()}
    assert {"README.md", "loss.png", "error_by_position.png", "tokenizer.json", "value_head.safetensors"} <= names
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
    assert load_lenvm(folder).lenvm_config.target == TARGET


def test_trained_again_a_complete_result_keeps_its_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path, "head")
    figures = train_lenvm(run)
    folder = tmp_path / "run" / "lenvm"
    trained = (folder / CARD_FILE).read_text()
    add_evaluation(folder, "# Evaluation\n")
    evaluated = (folder / CARD_FILE).read_text()
    assert train_lenvm(run) == figures
    assert (folder / CARD_FILE).read_text() == evaluated
    (folder / CARD_FILE).write_text(evaluated.replace("Length Value Model", "Another"))
    assert train_lenvm(run) == figures
    assert (folder / CARD_FILE).read_text() == trained
    assert {path.name for path in folder.parent.glob("checkpoint-*")} == {"checkpoint-4"}


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_the_log_is_not_on_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], disable_tqdm: bool
) -> None:
    train_lenvm(make_run(tmp_path, "head", disable_tqdm=disable_tqdm))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "'loss': " in shown.err


def test_cut_completions_are_learned_from_when_asked(tmp_path: Path) -> None:
    run = replace(make_run(tmp_path), target=replace(TARGET, censored="bound"))
    train_lenvm(run)
    card = (tmp_path / "run" / "lenvm" / "README.md").read_text()
    assert "the least that their states' remaining length can be" in card
    left_out = train_lenvm(replace(run, training=run.training | {"output_dir": str(tmp_path / "other")}, target=TARGET))
    assert left_out != json.loads((tmp_path / "run" / "lenvm" / "figures.json").read_text())


def gradients(folder: Path, per_device: int, accumulated: int) -> dict[str, torch.Tensor]:
    """Gradients of one optimizer step over the same eight completions, in micro-batches."""
    run = make_run(folder)
    seen: dict[str, torch.Tensor] = {}

    class Recorder(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    torch.manual_seed(0)
    model = build_lenvm(run.model, TARGET)
    arguments = training_arguments(
        run.training
        | {
            "max_steps": 1,
            "per_device_train_batch_size": per_device,
            "gradient_accumulation_steps": accumulated,
            "max_grad_norm": 0.0,
            "save_strategy": "no",
        }
    )
    optimizer = Recorder(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    rows = make_rows(3, 0)[:8]
    rows[1]["finish_reason"] = rows[6]["finish_reason"] = "length"
    dataset = RolloutDataset(rows, with_censored=True)
    trainer = LenVMTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=RolloutCollator(0),
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    return seen


def test_one_by_eight_gives_the_gradients_of_eight_by_one(tmp_path: Path) -> None:
    whole, split = gradients(tmp_path, 8, 1), gradients(tmp_path, 1, 8)
    assert whole.keys() == split.keys()
    assert sum(gradient.norm() for gradient in whole.values()) > 0
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, atol=1e-6, rtol=1e-4)


ONE_STEP = """
import os, sys, torch
from pathlib import Path
from test_lenvm_trainer import gradients
torch.save(gradients(Path(sys.argv[1]), 4, 1), f"{sys.argv[1]}/gradients-{os.environ['RANK']}.pt")
"""


def test_two_devices_give_the_gradients_of_one(tmp_path: Path) -> None:
    whole = gradients(tmp_path, 8, 1)
    run_processes(ONE_STEP, tmp_path, [], 2)
    for rank in (0, 1):
        split = torch.load(tmp_path / f"gradients-{rank}.pt")
        for name, gradient in whole.items():
            torch.testing.assert_close(split[name], gradient, atol=1e-6, rtol=1e-4)


def shards(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights in the order of their names in the files, as an engine streams them."""
    for path in sorted(folder.glob("model*.safetensors")):
        yield from load_file(path).items()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_engine_reads_the_result_as_it_was_trained(tmp_path: Path, kind: str, tied: bool) -> None:
    make_backbone(tmp_path / "backbone", tied=tied)
    run = make_run(tmp_path, kind)
    train_lenvm(run)
    folder = tmp_path / "run" / "lenvm"
    source = read_source(folder)
    assert source.gamma == TARGET.gamma
    base = Path(source.find_backbone("elsewhere", "another name"))
    assert base == (folder if kind == "full" else tmp_path / "backbone")
    weights = backbone_weights(shards(base), tied)
    if source.adapter is not None:
        weights = LoraAdapter(source.adapter).merge(weights)
    served = AutoModel.from_config(AutoConfig.from_pretrained(base), dtype=torch.float32).eval()
    mark_missing(served)
    served.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights}, strict=True)
    check_complete(served)
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    check_vocabulary(vocabulary, make_tokenizer().get_vocab(), served.config.vocab_size)
    ids = torch.tensor([[2, 5, 9, 1, 3, 11, 12]])
    value_head = load_value_head(folder, 32)
    with torch.inference_mode():
        values = value_head(served(ids).last_hidden_state)
        trained = load_lenvm(folder)(ids, torch.ones_like(ids)).predictions
        untrained = value_head(AutoModel.from_pretrained(tmp_path / "backbone").eval()(ids).last_hidden_state)
    torch.testing.assert_close(values, trained, atol=1e-5, rtol=1e-5)
    assert (untrained - trained).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "space", "reason"),
    [
        ("head", "discounted_return", "a value head alone cannot be served"),
        ("lora", "log_length", "predicts log_length"),
    ],
)
def test_a_result_that_the_engine_refuses_says_so(tmp_path: Path, kind: str, space: str, reason: str) -> None:
    run = make_run(tmp_path, kind)
    train_lenvm(replace(run, target=TargetConfig(space=space, gamma=0.9)))
    folder = tmp_path / "run" / "lenvm"
    with pytest.raises(CheckpointError):
        read_source(folder)
    assert reason in load_lenvm(folder, base_model=run.model.backbone).serving_obstacle
    assert f"Only for comparison: {reason}" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "module", "reason"),
    [
        ("mistral", "q_proj", "its backbone is of the family mistral; only qwen2, qwen3, llama can be served"),
        ("llama", "embed_tokens", "its adapter changes model.embed_tokens; only the decoder's linear layers"),
        ("llama", "lm_head", "its adapter changes lm_head; only the decoder's linear layers"),
        ("llama", "down_proj", ""),
    ],
)
def test_backbones_and_adapters_that_the_engine_refuses_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, module: str, reason: str
) -> None:
    make_backbone(tmp_path / "backbone", family, tied=False)
    run = make_run(tmp_path, "lora", max_steps=1)
    run = replace(run, model=replace(run.model, lora=LoraSettings(r=2, target_modules=(module,))))
    train_lenvm(run)
    folder = tmp_path / "run" / "lenvm"
    said = f"Only for comparison: {reason}" if reason else "Served by `lenvm serve"
    assert said in (folder / "README.md").read_text()
    assert (f"the result is for comparison only: {reason}" in capsys.readouterr().err) == bool(reason)
    if family in SERVED_BACKBONES:
        with pytest.raises(CheckpointError) if reason else nullcontext():
            list(LoraAdapter(folder).merge(shards(tmp_path / "backbone")))


@pytest.mark.parametrize("kind", ["full", "lora", "head"])
def test_only_a_full_lenvm_is_trained_further(tmp_path: Path, kind: str) -> None:
    train_lenvm(make_run(tmp_path, kind, max_steps=1))
    further = make_run(tmp_path, name="further", max_steps=1)
    further = replace(further, model=replace(further.model, backbone=str(tmp_path / "run" / "lenvm")))
    if kind == "full":
        assert train_lenvm(further)
        return
    with pytest.raises(
        ValueError, match=r"^model\.backbone: .*lenvm is an adapter or a head; only a full LenVM can be"
    ):
        train_lenvm(further)


@pytest.mark.parametrize("kind", ["full", "lora", "head"])
def test_a_resumed_run_ends_with_the_same_weights_bit_by_bit(tmp_path: Path, kind: str) -> None:
    across_epochs = {"max_steps": 6, "save_steps": 4, "per_device_train_batch_size": 16}  # three steps an epoch
    train_lenvm(make_run(tmp_path, kind, "whole", **across_epochs))
    interrupted = make_run(tmp_path, kind, "resumed", **across_epochs)
    train_lenvm(interrupted)
    (tmp_path / "resumed" / "checkpoint-6" / "trainer_state.json").unlink()  # as a full disk leaves it
    torch.manual_seed(123)
    train_lenvm(interrupted)
    whole, resumed = (weights(tmp_path / name / "checkpoint-6") for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    start = build_lenvm(interrupted.model, TARGET).state_dict()
    assert not torch.equal(start["value_head.fc.weight"], whole["value_head.fc.weight"])


def test_micro_batches_of_a_step_hold_rows_of_like_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[tuple[int, str]]] = []

    class Recorder(RolloutCollator):
        def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
            batches.append([(len(item["input_ids"]), item["name"]) for item in items])
            return super().__call__(items)

    monkeypatch.setattr(lenvm_trainer, "build_collator", lambda *_: Recorder(0))
    epochs, micro_batches, rows_per_step = 2, 3, 12
    run = make_run(
        tmp_path,
        max_steps=-1,
        num_train_epochs=epochs,
        per_device_train_batch_size=rows_per_step // micro_batches,
        gradient_accumulation_steps=micro_batches,
    )
    train_lenvm(run)
    count = sum(row["finish_reason"] == "stop" for row in make_rows(12, 0))
    seen = [row for batch in batches for row in batch][: epochs * count]
    orders = [seen[:count], seen[count:]]
    assert all(len(set(order)) == count for order in orders)
    assert orders[0] != orders[1]
    for order in orders:
        steps = [order[start : start + rows_per_step] for start in range(0, count, rows_per_step)]
        lengths = [[length for length, _ in step] for step in steps]
        assert lengths == [sorted(step, reverse=True) for step in lengths]
        assert max(lengths[-1]) > min(lengths[0])  # sorted by step, not over the epoch


@pytest.mark.parametrize("kind", ["full", "lora", "head"])
def test_the_best_checkpoint_is_the_result_when_asked(tmp_path: Path, kind: str) -> None:
    """That of the largest loss, so that it is not the last."""
    chosen = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    run = make_run(tmp_path, kind, eval_strategy="steps", eval_steps=2, save_steps=2, max_steps=6, **chosen)
    run = replace(run, model=replace(run.model, save_dtype="float32"))
    train_lenvm(run)
    best = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())["best_global_step"]
    (tmp_path / "run" / "lenvm").rename(tmp_path / "first")
    train_lenvm(run)  # from its last checkpoint
    names = ("run/lenvm", "first", f"run/checkpoint-{best}", "run/checkpoint-6")
    result, first, wanted, last = (weights(tmp_path / name) for name in names)
    assert all(
        torch.equal(result[name], tensor) and torch.equal(first[name], tensor) for name, tensor in wanted.items()
    )
    assert not torch.equal(result["value_head.fc.weight"], last["value_head.fc.weight"])


def test_half_written_checkpoints_are_passed_over(tmp_path: Path) -> None:
    for name in ("2", "10", "20", "best"):
        (tmp_path / f"checkpoint-{name}").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"epoch": 1.0, "log_his')
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-best"}


def test_a_checkpoint_with_a_cut_file_of_a_process_is_passed_over(tmp_path: Path) -> None:
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / "global_step").mkdir(parents=True)
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        torch.save({"a": torch.ones(100)}, tmp_path / f"checkpoint-{step}" / "global_step" / "optim_states.pt")
    cut = tmp_path / "checkpoint-4" / "global_step" / "optim_states.pt"
    cut.write_bytes(cut.read_bytes()[:200])
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "config.json"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path, save_steps=2)
    figures = train_lenvm(run)
    cut = tmp_path / "run" / "checkpoint-4" / name
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-2")
    assert train_lenvm(run) == figures


def test_a_damaged_best_checkpoint_is_named(tmp_path: Path) -> None:
    chosen = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    run = make_run(tmp_path, "head", eval_strategy="steps", eval_steps=2, save_steps=2, **chosen)
    train_lenvm(run)
    (tmp_path / "run" / "checkpoint-2" / "value_head.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"run/checkpoint-2: the best checkpoint is damaged or gone; remove"):
        train_lenvm(run)


def test_an_output_folder_belongs_to_one_run_on_the_same_rollouts(tmp_path: Path) -> None:
    run = make_run(tmp_path, "head", max_steps=1)
    figures = train_lenvm(run)
    with pytest.raises(ValueError, match=r"holds a run of other settings or rollouts .* set another"):
        train_lenvm(make_run(tmp_path, "head", max_steps=2))
    record = tmp_path / "run" / "run_config.json"
    settings = json.loads(record.read_text())
    del settings["model"]["freeze_vision"]
    record.write_text(json.dumps(settings))
    assert train_lenvm(run) == figures, "a run from before a setting had its default"
    settings["model"]["freeze_vision"] = False
    record.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="holds a run of other settings or rollouts"):
        train_lenvm(run)
    del settings["model"]["freeze_vision"]
    record.write_text(json.dumps(settings))
    for name, rows in (("train.jsonl", make_rows(13, 0)), ("eval.jsonl", make_rows(9, 1))):
        before = (tmp_path / name).read_text()
        write_rows(tmp_path / name, rows)
        with pytest.raises(ValueError, match="holds a run of other settings or rollouts"):
            train_lenvm(run)
        (tmp_path / name).write_text(before)
    assert train_lenvm(run) == figures


def test_no_prompt_is_trained_on_and_held_out(tmp_path: Path) -> None:
    run = make_run(tmp_path, "head")
    write_rows(tmp_path / "eval.jsonl", make_rows(2, 1) + make_rows(1, 0))
    with pytest.raises(ValueError, match=r"data\.eval_rollouts: prompt 0-0 is in data\.rollouts too"):
        train_lenvm(run)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"learning_rat": 1}, r"training\.learning_rat: not one of"),
        ({"label_names": ["x"]}, r"training\.label_names: is set by the trainer itself, to \['labels'\]"),
        ({"resume_from_checkpoint": "x"}, r"training\.resume_from_checkpoint: is set by the trainer itself"),
        ({"push_to_hub": True}, r"training\.push_to_hub: is set by the trainer itself"),
        ({"label_smoothing_factor": 0.1}, r"training\.label_smoothing_factor: is set by the trainer itself"),
        ({"neftune_noise_alpha": 5}, r"training\.neftune_noise_alpha: is set by the trainer itself"),
        ({"use_liger_kernel": True}, r"training\.use_liger_kernel: is set by the trainer itself"),
        ({"average_tokens_across_devices": False}, r"training\.average_tokens_across_devices: is set by the trainer"),
        ({"eval_do_concat_batches": False}, r"training\.eval_do_concat_batches: is set by the trainer itself"),
        ({"do_predict": True}, r"training\.do_predict: does nothing here"),
        ({"learning_rate": "abc"}, r"training\.learning_rate: Input should be a valid number.* got 'abc'"),
        ({"bf16": "maybe"}, r"training\.bf16: Input should be a valid boolean.* got 'maybe'"),
        ({"per_device_train_batch_size": 0}, r"training\.per_device_train_batch_size: must be at least 1, got 0"),
        ({"report_to": "dvclive"}, r"training\.report_to: .*requires dvclive to be installed"),
        ({"report_to": "paper"}, r"training\.report_to: paper is not supported"),
        ({"optim": "schedule_free_adamw"}, r"training\.optim: .*schedulefree"),
        ({"lr_scheduler_type": "square"}, "training: .*square"),
        ({"fsdp": "full_shard", "use_cpu": True}, r"training\.fsdp: needs an accelerator"),
        (
            {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}},
            r"training\.fsdp_config: saves no whole weights without state_dict_type: FULL_STATE_DICT",
        ),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, r"training\.deepspeed: ZeRO 3 saves no whole weights"),
        ({"deepspeed": {"steps": 1}, "load_best_model_at_end": True}, r"training\.load_best_model_at_end: not with"),
        ({"fsdp": True, "load_best_model_at_end": True}, r"training\.load_best_model_at_end: not with fsdp"),
        ({"deepspeed": True}, r"training\.deepspeed: neither a mapping"),
        ({"deepspeed": "no/such.json"}, r"training\.deepspeed: .*no/such\.json"),
    ],
)
def test_bad_training_arguments_are_named(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_arguments({"output_dir": str(tmp_path), **bad})


def test_numbers_in_quotes_are_numbers(tmp_path: Path) -> None:
    quoted = {"learning_rate": "1e-5", "bf16": "false", "max_steps": 1e3, "push_to_hub": False}
    arguments = training_arguments({"output_dir": str(tmp_path), **quoted})
    assert (arguments.learning_rate, arguments.bf16, arguments.max_steps) == (1e-5, False, 1000)


def test_an_unknown_figure_for_the_best_checkpoint_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path, metric_for_best_model="eval_nonsense", load_best_model_at_end=True)
    with pytest.raises(ValueError, match=r"training\.metric_for_best_model: must be one of loss, mse, .*'nonsense'"):
        train_lenvm(run)


@pytest.mark.parametrize(
    ("chosen", "figure", "best"),
    [
        ({}, "eval_mse", min),
        ({"metric_for_best_model": "eval_mae_0"}, "eval_mae_0", min),
        ({"metric_for_best_model": "tau_0"}, "eval_tau_0", max),
        ({"metric_for_best_model": "mse", "greater_is_better": True}, "eval_mse", max),
    ],
)
def test_the_best_checkpoint_is_that_of_the_best_figure(
    tmp_path: Path, chosen: dict[str, Any], figure: str, best: Callable[..., float]
) -> None:
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 6, "load_best_model_at_end": True}
    train_lenvm(make_run(tmp_path, "head", **steps, **chosen))
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    figures = {entry["step"]: entry[figure] for entry in state["log_history"] if figure in entry}
    assert figures.keys() >= {2, 4, 6}
    assert state["best_metric"] == best(figures.values()) == figures[state["best_global_step"]]
