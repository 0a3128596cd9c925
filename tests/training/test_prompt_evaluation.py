"""Evaluation at the prompt boundary: figures by hand, comparison rows, intervals, and a whole run on a tiny LenVM."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lenvm_kernels.checkpoint import Head
from lenvm_kernels.heads import CandidateHead, HeadConfig, ValueHead, join_features
from lenvm_kernels.length_value import length_from_value, value_from_length
from lenvm_runtime.head_runner import HeadRunner
from lenvm_runtime.value_model.step import ValueGuide
from lenvm_training import plots
from lenvm_training.comparison_rows import PromptSample, comparison_predictions, group_samples, ridge_predict
from lenvm_training.features import capture_layers
from lenvm_training.model import LenVM, ModelSettings, build_lenvm
from lenvm_training.prompt_evaluation import (
    assumed_intervals,
    boundary_figures,
    boundary_states,
    evaluate_prompts,
    interval_coverage,
    interval_figures,
    predict_boundary,
    served_intervals,
)
from lenvm_training.rollout_data import RolloutCollator
from lenvm_training.targets import DiscountedReturn, TargetConfig
from tiny import make_backbone, make_rows

SPACE = DiscountedReturn(0.9)


def sample(lengths: list[float], domain: str = "math", prompt_len: int = 4) -> PromptSample:
    row = {"prompt_id": "p", "domain": domain, "prompt_token_ids": [1] * prompt_len}
    return PromptSample(row, np.array(lengths), 0)


def test_truth_is_the_mean_in_return_space() -> None:
    prompts = [sample([2.0, 6.0]), sample([10.0, 20.0])]
    figures = boundary_figures(np.array([3.0, 15.0]), prompts, SPACE)
    means = [(value_from_length(a, 0.9) + value_from_length(b, 0.9)) / 2 for a, b in ((2.0, 6.0), (10.0, 20.0))]
    truth = [length_from_value(mean, 0.9) for mean in means]
    assert figures["mre"] == pytest.approx((abs(3 - truth[0]) / truth[0] + abs(15 - truth[1]) / truth[1]) / 2)
    assert figures["mre_tokens"] == pytest.approx((1 / 4 + 0) / 2)
    assert figures["mre_single"] == pytest.approx((1 / 2 + 3 / 6 + 5 / 10 + 5 / 20) / 4)
    errors = [(value_from_length(p, 0.9) - mean) ** 2 for p, mean in zip((3.0, 15.0), means, strict=True)]
    assert figures["mse"] == pytest.approx(sum(errors) / 2)
    assert figures["tau"] == 1
    assert truth[0] < 4, "the certainty equivalent is below the mean (Jensen)"


def test_groups_leave_out_censored_samples_and_small_groups() -> None:
    prompts = group_samples(make_rows(8, num_samples=4), 4)
    assert len(prompts) == 6, "one prompt in four has a censored sample"
    fewer = group_samples(make_rows(8, num_samples=4), 3)
    assert len(fewer) == 8
    assert sum(prompt.censored for prompt in fewer) == 2


def test_an_interval_from_other_prompts_covers_what_it_says() -> None:
    generator = np.random.default_rng(0)
    predicted = generator.uniform(10, 100, 400)
    prompts = [
        sample(list(value * np.exp(generator.normal(0.3, 0.5, 6))), ("a", "b")[index % 3 == 0])
        for index, value in enumerate(predicted)
    ]
    coverage = interval_coverage(predicted, prompts)
    assert coverage.keys() == {"all", "a", "b"}
    assert coverage["all"] == pytest.approx(0.8, abs=0.03)


def test_figures_of_an_interval_by_hand() -> None:
    prompts = [sample([2.0, 6.0, 7.0]), sample([10.0], "code"), sample([1.0, 9.0], "code")]
    figures = interval_figures(np.array([[2.0, 6.0], [11.0, 12.0], [0.0, 8.0]]), prompts)
    assert figures == {
        "all": {"coverage": 3 / 6, "mean_width": 13 / 3},
        "code": {"coverage": 1 / 3, "mean_width": 4.5},
        "math": {"coverage": 2 / 3, "mean_width": 4.0},
    }


def test_the_interval_of_a_lenvm_is_the_engines() -> None:
    gamma = 0.99
    values = torch.linspace(-0.999, -0.01, 50)
    source = SimpleNamespace(gamma=gamma)
    runner, max_length = SimpleNamespace(device="cpu", source=source), int(length_from_value(-1.0, gamma))
    guide = ValueGuide(runner, [1], torch.zeros(64, dtype=torch.bool), max_length)
    served = guide.predictions(values)[:, 1:].round().numpy()
    np.testing.assert_array_equal(assumed_intervals(length_from_value(values, gamma).double().numpy(), gamma), served)


def head_and_model(folder: Path) -> tuple[Head, LenVM]:
    model = build_lenvm(ModelSettings(str(make_backbone(folder)), "served", kind="head"), TargetConfig(gamma=0.9))
    torch.manual_seed(1)
    config = HeadConfig("tiny", 32, 64, 0.9, 8, 64, 16, (0, 1), (1,))
    candidate_head = CandidateHead(config)
    torch.nn.init.normal_(candidate_head.out.weight)
    return Head(config, ValueHead(32), candidate_head), model.eval()


def test_the_interval_of_a_head_is_the_engines(tmp_path: Path) -> None:
    head, model = head_and_model(tmp_path)
    prompts = group_samples(make_rows(8), 1)
    intervals = served_intervals(model, head, prompts, np.ones(8), RolloutCollator(0))
    runner = HeadRunner(head, [], torch.zeros(64, 32), lambda table: table, [1], torch.zeros(64, dtype=torch.bool))
    with torch.inference_mode():
        for prompt, interval in zip(prompts, intervals, strict=True):
            ids = torch.tensor([list(prompt.row["prompt_token_ids"])])
            states = model.language_model.model(ids, output_hidden_states=True)
            layers = [states.hidden_states[1][0, -1:]]
            with capture_layers(model.language_model, [1]) as captured:
                model.language_model.model(ids)
            features = join_features(states.last_hidden_state[0, -1:], [*layers, captured[1][0, -1:]])
            np.testing.assert_array_equal(interval, runner.predictions(features)[0, 1:].round().numpy())
    assert len({tuple(interval) for interval in intervals}) > 1


@pytest.mark.parametrize(("kind", "space"), [("head", "discounted_return"), ("full", "log_length")])
def test_what_cannot_be_served_has_no_served_interval(tmp_path: Path, kind: str, space: str) -> None:
    settings = ModelSettings(str(make_backbone(tmp_path)), "served", kind=kind)
    model = build_lenvm(settings, TargetConfig(space=space, gamma=0.9))
    assert served_intervals(model, None, [], np.ones(0), RolloutCollator(0)) is None


def test_ridge_finds_a_linear_law_and_ignores_noise() -> None:
    generator = np.random.default_rng(0)
    features, new = generator.normal(size=(200, 6)), generator.normal(size=(50, 6))
    weights = np.array([1.0, -2.0, 0.5, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(ridge_predict(features, features @ weights + 3, new), new @ weights + 3, atol=0.15)
    noise = ridge_predict(features, generator.normal(size=200), new)
    assert noise.std() < 0.5


def test_comparison_rows_predict_from_what_they_may_see() -> None:
    fit = [sample([float(2 * n)] * 2, prompt_len=n) for n in range(4, 60)]
    prompts = [sample([float(2 * n)] * 2, prompt_len=n) for n in (10, 30, 50)]
    states = np.log([[len(prompt.row["prompt_token_ids"])] for prompt in fit])
    rows = comparison_predictions(fit, states, prompts, np.log([[10], [30], [50]]))
    assert np.ptp(rows["constant"]) == 0
    for name in ("prompt_length", "ridge_probe"):
        np.testing.assert_allclose(rows[name], [20, 60, 100], rtol=0.1)


def test_boundary_predictions_are_those_of_single_forwards(tmp_path: Path) -> None:
    model = build_lenvm(
        ModelSettings(str(make_backbone(tmp_path)), "served", kind="head"), TargetConfig(gamma=0.9)
    ).eval()
    prompts = group_samples(make_rows(8), 1)
    predicted = predict_boundary(model, prompts, RolloutCollator(0))
    states = boundary_states(model.language_model, prompts, RolloutCollator(0))
    with torch.inference_mode():
        for index, prompt in enumerate(prompts):
            ids = torch.tensor([list(prompt.row["prompt_token_ids"])])
            plain = model.language_model.model(ids).last_hidden_state[0, -1]
            np.testing.assert_allclose(states[index], plain.numpy(), atol=1e-5)
            value = float(model.value_head(plain))
            assert predicted[index] == pytest.approx(length_from_value(value, 0.9), rel=1e-4)


def test_figures_that_cannot_be_written_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_lenvm(ModelSettings(str(make_backbone(tmp_path / "b")), "served"), TargetConfig(gamma=0.9))
    arguments = (make_rows(16, 1), make_rows(24, 2), RolloutCollator(0), 3, SPACE, tmp_path / "out")
    monkeypatch.setattr(Path, "replace", refuse_json)
    with pytest.raises(OSError, match="No space left"):
        evaluate_prompts(model, model.language_model, *arguments)
    assert not (tmp_path / "out" / "evaluation.json").exists(), "a sweep would take it for a complete run"
    monkeypatch.undo()
    monkeypatch.setattr(plots, "plot_calibration", refuse)
    with pytest.raises(OSError, match="No space left"):
        evaluate_prompts(model, model.language_model, *arguments)
    assert not (tmp_path / "out" / "evaluation.json").exists()


def refuse(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def refuse_json(path: Path, target: Path) -> None:
    if target.suffix == ".json":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.replace(path, target)


def test_a_whole_evaluation_writes_its_figures(tmp_path: Path) -> None:
    settings = ModelSettings(str(make_backbone(tmp_path / "b")), "served", kind="full")
    model = build_lenvm(settings, TargetConfig(gamma=0.9))
    rows, fit = make_rows(16, 1), make_rows(24, 2)
    evaluation = evaluate_prompts(
        model, model.language_model, rows, fit, RolloutCollator(0), 3, SPACE, tmp_path / "out"
    )
    assert set(evaluation.boundary) == {"lenvm", "constant", "prompt_length", "ridge_probe"}
    assert evaluation.boundary["ridge_probe"]["tau"] > 0.7 > evaluation.boundary["lenvm"]["tau"]
    assert set(evaluation.domains) == {"math", "code"}
    for domain in evaluation.domains.values():
        assert domain.keys() == evaluation.boundary.keys()
        assert all(row["prompts"] == 8 for row in domain.values())
    assert evaluation.served.keys() == {"all", "math", "code"}
    assert 0 <= evaluation.served["all"]["coverage"] <= 1
    assert evaluation.served["all"]["mean_width"] > 0
    assert evaluation.states["mse_position"] <= evaluation.states["mse_constant"] * 1.1
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["num_prompts"] == 16
    text = (tmp_path / "out" / "evaluation.md").read_text()
    assert "| ridge_probe |" in text
    assert "| math, ridge_probe |" in text
    assert "| domain | coverage | mean_width |" in text
    assert (tmp_path / "out" / "calibration.png").exists()
    with pytest.raises(ValueError, match="fewer than two prompts with 9"):
        evaluate_prompts(model, model.language_model, rows, fit, RolloutCollator(0), 9, SPACE, tmp_path)
