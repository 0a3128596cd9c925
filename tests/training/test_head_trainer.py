"""Heads by transformers' Trainer: losses by hand, exact resume, runs of other settings and states apart."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lenvm_kernels.checkpoint import Head, load_head, save_head
from lenvm_kernels.heads import CandidateHead, HeadConfig, ValueHead
from lenvm_kernels.length_value import value_from_length
from lenvm_training import head_trainer
from lenvm_training.features import StateTable
from lenvm_training.head_losses import CandidateLoss, ValueLoss, imputed_returns, length_nll, value_loss
from lenvm_training.head_settings import HeadsSettings
from lenvm_training.head_trainer import StateRows, train_head

LAYERS = (3,)
CONFIG = HeadConfig("tiny", 8, 20, 0.9, 6, 64, 4, LAYERS, (2,))
EMBEDDINGS = torch.randn(20, 8, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
EPOCHS = 4


def table(count: int, seed: int) -> StateTable:
    """The first feature tells the remaining length; every eighth state is censored."""
    generator = torch.Generator().manual_seed(seed)
    remaining = torch.randint(1, 40, (count,), generator=generator)
    final = torch.randn(count, 8, generator=generator)
    final[:, 0] = remaining / 20
    return StateTable(
        final=final.to(torch.bfloat16),
        layers=torch.randn(count, 1, 8, generator=generator).to(torch.bfloat16),
        next_token=torch.randint(0, 20, (count,), generator=generator),
        position=torch.zeros(count, dtype=torch.int64),
        remaining=remaining,
        censored=torch.arange(count) % 8 == 0,
        rollout=torch.arange(count),
    )


TRAIN, VALIDATION = table(90, 0), table(30, 1)


def settings_in(folder: Path, **changes: Any) -> HeadsSettings:
    training = {"per_device_train_batch_size": 16, "learning_rate": 0.05, "report_to": "none", "disable_tqdm": True}
    training |= changes.get("training", {})
    return HeadsSettings(str(folder), "", LAYERS, **{"epochs": EPOCHS, **changes, "training": training})


def train(settings: HeadsSettings, data: StateTable = TRAIN) -> Head:
    head, _ = train_head(CONFIG, data, VALIDATION, EMBEDDINGS, settings)
    return head


def weights(head: Head) -> dict[str, Tensor]:
    parts = {"value": head.value_head, "candidate": head.candidate_head}
    return {f"{name}.{key}": w for name, part in parts.items() for key, w in part.state_dict().items()}


def same(first: Head, second: Head) -> bool:
    others = weights(second)
    return all(torch.equal(tensor, others[name]) for name, tensor in weights(first).items())


def count_steps(monkeypatch: pytest.MonkeyPatch, stop_at: dict[str, int] | None = None) -> dict[str, int]:
    """Optimizer steps of each head from here on; a head is interrupted in the step ``stop_at`` names."""
    steps = {"value": 0, "candidate": 0}

    def counting(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)  # the Trainer reads its signature
        def counted(module: torch.nn.Module, **batch: Tensor) -> Any:
            steps[name] += module.training
            if stop_at and module.training and steps[name] == stop_at.get(name):
                raise KeyboardInterrupt
            return forward(module, **batch)

        return counted

    for name, loss in (("value", ValueLoss), ("candidate", CandidateLoss)):
        monkeypatch.setattr(loss, "forward", counting(name, loss.forward))
    return steps


STEPS_AN_EPOCH = 6
ALL_STEPS = {"value": EPOCHS * STEPS_AN_EPOCH, "candidate": EPOCHS * STEPS_AN_EPOCH}


@pytest.mark.parametrize("killed", ["value", "candidate"])
def test_a_killed_run_goes_on_and_ends_with_the_same_weights_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: str
) -> None:
    whole = train(settings_in(tmp_path / "whole"))
    settings = settings_in(tmp_path / "killed")
    with monkeypatch.context() as patch:
        count_steps(patch, {killed: 2 * STEPS_AN_EPOCH + 3})
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    (run,) = (tmp_path / "killed" / killed).iterdir()
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-12"}
    torch.manual_seed(123)
    steps = count_steps(monkeypatch)
    resumed = train(settings)
    left = {"value": ALL_STEPS["value"], "candidate": ALL_STEPS["candidate"]} | {killed: 2 * STEPS_AN_EPOCH}
    if killed == "value":
        left["candidate"] = 0
    assert steps == left
    assert same(whole, resumed)
    assert not torch.equal(whole.value_head.fc.weight, ValueHead(8).fc.weight)


@pytest.mark.parametrize("max_steps", [-1, 8])
def test_a_complete_run_is_used_again_wherever_its_folder_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_steps: int
) -> None:
    training = {"max_steps": max_steps}
    first = train(settings_in(tmp_path / "work", training=training))
    shutil.move(tmp_path / "work", tmp_path / "moved")
    steps = count_steps(monkeypatch)
    assert same(train(settings_in(tmp_path / "moved", training=training)), first)
    assert steps == {"value": 0, "candidate": 0}


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "model.safetensors"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path: Path, name: str) -> None:
    settings = settings_in(tmp_path, training={"save_total_limit": None})
    first = train(settings)
    (cut,) = tmp_path.glob(f"value/*/checkpoint-{ALL_STEPS['value']}/{name}")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    assert same(train(settings), first)


@pytest.mark.parametrize(
    ("changes", "data", "trained"),
    [
        ({"censored": "bound"}, TRAIN, {"value"}),
        ({"censored": "impute"}, TRAIN, {"value"}),
        ({"dropout": 0.2}, TRAIN, {"value", "candidate"}),
        ({"training": {"weight_decay": 0.1}}, TRAIN, {"value", "candidate"}),
        ({}, replace(TRAIN, censored=~TRAIN.censored), {"value", "candidate"}),
        ({}, replace(TRAIN, layers=TRAIN.layers + 1), {"candidate"}),
        ({}, replace(TRAIN, next_token=TRAIN.next_token.flip(0)), {"candidate"}),
    ],
)
def test_a_run_of_other_settings_or_states_is_never_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], data: StateTable, trained: set[str]
) -> None:
    train(settings_in(tmp_path / "shared"))
    with monkeypatch.context() as patch:
        steps = count_steps(patch)
        shared = train(settings_in(tmp_path / "shared", **changes), data)
    assert steps == {name: ALL_STEPS[name] if name in trained else 0 for name in steps}
    assert same(shared, train(settings_in(tmp_path / "own", **changes), data))


def test_training_starts_from_a_head_of_the_same_form(tmp_path: Path) -> None:
    first = train(settings_in(tmp_path / "work"))
    save_head(first, tmp_path / "head")
    start = str(tmp_path / "head")
    further = train(settings_in(tmp_path / "work", start=start, epochs=1))
    there = weights(load_head(tmp_path / "head"))
    assert not any(torch.equal(tensor, there[name]) for name, tensor in weights(further).items())
    still = settings_in(tmp_path / "work", start=start, training={"learning_rate": 0.0})
    assert same(train(still), load_head(tmp_path / "head"))
    with pytest.raises(ValueError, match=r"heads\.start: .*head has rank 4, this run 5"):
        train_head(replace(CONFIG, rank=5), TRAIN, VALIDATION, EMBEDDINGS, still)


def test_one_head_is_trained_alone_beside_that_of_the_start(tmp_path: Path) -> None:
    save_head(train(settings_in(tmp_path / "work")), tmp_path / "head")
    start = str(tmp_path / "head")
    there = weights(load_head(tmp_path / "head"))
    alone = settings_in(tmp_path / "work", start=start, train=("value",), epochs=1)
    head, logs = train_head(CONFIG, TRAIN, VALIDATION, EMBEDDINGS, alone)
    assert list(logs) == ["value"]
    for name, tensor in weights(head).items():
        assert torch.equal(tensor, there[name]) == name.startswith("candidate.")


def test_the_epoch_with_the_least_loss_on_validation_is_kept(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, training={"learning_rate": 0.5}, dropout=0.5)
    head, logs = train_head(CONFIG, TRAIN, VALIDATION, EMBEDDINGS, settings)
    losses = {name: [entry["eval_loss"] for entry in log if "eval_loss" in entry] for name, log in logs.items()}
    value = ValueLoss(head.value_head, "leave_out", 0.0)
    candidate = CandidateLoss(head.candidate_head, CONFIG, EMBEDDINGS, 0.0)
    returns = value_from_length(VALIDATION.remaining.float(), CONFIG.gamma)
    remaining, censored = VALIDATION.remaining, VALIDATION.censored
    features = head_trainer.features_of(VALIDATION, CONFIG, LAYERS)
    kept = {
        "value": value(VALIDATION.final, returns, censored)["loss"],
        "candidate": candidate(features, remaining, censored, VALIDATION.next_token)["loss"],
    }
    for name, loss in kept.items():
        assert len(losses[name]) == EPOCHS
        assert loss.item() == pytest.approx(min(losses[name]), rel=1e-5)
    assert any(by_epoch[-1] > min(by_epoch) for by_epoch in losses.values())


def test_a_batch_is_one_indexing() -> None:
    rows = StateRows(features=TRAIN.final, labels=TRAIN.remaining)
    batch = rows.__getitems__([3, 0, 89])
    assert len(rows) == 90
    assert torch.equal(batch["features"], TRAIN.final[[3, 0, 89]])
    assert torch.equal(batch["labels"], TRAIN.remaining[[3, 0, 89]])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("leave_out", (0.09 + 0.0081) / 2),
        ("bound", (0.09 + 0.0081 + 0.04) / 4),
        ("impute", (0.09 + 0.0081 + 0.04 + 0.16) / 4),
    ],
)
def test_value_loss_by_hand(rule: str, expected: float) -> None:
    """Errors -0.3 and 0.09 of realised returns, 0.2 and -0.4 of censored ones."""
    returns, censored = torch.tensor([-0.1, -0.19, -0.19, -0.1]), torch.tensor([False, False, True, True])
    values = torch.tensor([-0.4, -0.1, 0.01, -0.5])
    assert value_loss(values, returns, censored, rule).item() == pytest.approx(expected, rel=1e-5)


def test_bound_pulls_a_censored_state_down_only_as_far_as_the_bound() -> None:
    returns, censored = torch.tensor([-0.4, -0.4]), torch.tensor([True, True])
    values = torch.tensor([-0.3, -0.5], requires_grad=True)
    value_loss(values, returns, censored, "bound").backward()
    torch.testing.assert_close(values.grad, torch.tensor([0.1, 0.0]))
    assert value_loss(values, returns, censored, "leave_out") == 0


def test_imputed_returns_are_those_of_the_lengths_that_are_left() -> None:
    """Bins from 1, 2 and 4 tokens on stand for 1, 3 and 6: with 3 written, 3 or 6 are left; with 7, 7 at least."""
    logprobs = torch.tensor([[0.5, 0.2, 0.3]]).log().repeat(3, 1)
    given = imputed_returns(
        logprobs, torch.tensor([1, 3, 7]), torch.tensor([1.0, 3.0, 6.0]), torch.tensor([1, 2, 4]), 0.5
    )
    g = [-(1 - 0.5**length) for length in range(8)]
    expected = [0.5 * g[1] + 0.2 * g[3] + 0.3 * g[6], (0.2 * g[3] + 0.3 * g[6]) / 0.5, g[7]]
    torch.testing.assert_close(given, torch.tensor(expected))


def test_imputed_returns_are_what_the_value_head_learns(tmp_path: Path) -> None:
    """All states alike: half of the completions are of 3 tokens, half of 30, of which every other was cut after 4."""
    number = torch.arange(400)
    remaining = torch.tensor([3, 4, 3, 30]).repeat(100)
    none = torch.zeros_like(number)
    features = torch.ones(400, 8, dtype=torch.bfloat16)
    states = StateTable(features, features.unsqueeze(1), none, none, remaining, remaining == 4, number)
    settings = settings_in(tmp_path, censored="impute", epochs=20, dropout=0.0)
    head, _ = train_head(CONFIG, states, states, EMBEDDINGS, settings)
    value = head.value_head(states.final[:1].float()).item()
    returns = [value_from_length(float(length), CONFIG.gamma) for length in (3, 30)]
    assert value == pytest.approx(sum(returns) / 2, abs=0.05)


def test_candidate_loss_is_the_sum_of_the_means_at_the_state_and_after_the_token() -> None:
    states = table(40, 3)
    head = CandidateHead(CONFIG)
    features = head_trainer.features_of(states, CONFIG, LAYERS)
    loss = CandidateLoss(head, CONFIG, EMBEDDINGS, 0.5).eval()
    given = loss(features, states.remaining, states.censored, states.next_token)["loss"]
    at_state = length_nll(head.state_logprobs(features), states.remaining, states.censored, loss.edges)
    after = []
    for row in torch.nonzero(states.remaining > 1).flatten().tolist():
        token = head.build_token_table(EMBEDDINGS[states.next_token[row]])
        logprobs = head.candidate_logprobs(features[row : row + 1], token.view(1, 1, -1))[0]
        after.append(length_nll(logprobs, states.remaining[row : row + 1] - 1, states.censored[row], loss.edges))
    torch.testing.assert_close(given, at_state.mean() + torch.cat(after).mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, r"heads\.epochs: must be at least 1, got 0"),
        ({"dropout": 1.0}, r"heads\.dropout: must be at least 0 and less than 1, got 1\.0"),
        ({"censored": "keep"}, r"heads\.censored: must be one of leave_out, bound, impute, got 'keep'"),
        ({"train": ()}, r"heads\.train: must name candidate or value or both, got \[\]"),
        ({"train": ("value",)}, r"heads\.train: the other head must come from heads\.start"),
        ({"train": ("candidate",), "start": "head", "censored": "impute"}, r"heads\.censored: is of the value head"),
        ({"training": {"learning_rat": 1}}, r"heads\.training\.learning_rat: not one of"),
        ({"training": {"num_train_epochs": 1}}, r"heads\.training\.num_train_epochs: is set by the trainer itself"),
        ({"training": {"gradient_checkpointing": True}}, r"heads\.training\.gradient_checkpointing: is set by the"),
        ({"training": {"resume_from_checkpoint": "x"}}, r"heads\.training\.resume_from_checkpoint: is set by the"),
        ({"training": {"report_to": "dvclive"}}, r"heads\.training\.report_to: .*dvclive"),
        ({"training": {"learning_rate": 1e30}}, r"heads\.training: the candidate head's loss on validation was never"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(settings_in(tmp_path, **changes))


def test_no_states_to_choose_the_epoch_by(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.rollouts: too few prompts"):
        train_head(CONFIG, TRAIN, table(0, 1), EMBEDDINGS, settings_in(tmp_path))
