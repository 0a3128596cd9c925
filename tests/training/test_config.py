"""Experiment files: every shipped one is valid, every mistake is one line that names the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lenvm_runtime import default_model
from lenvm_training.config import ConfigError, Experiment, apply_overrides, build_experiment, load_experiment, load_yaml
from lenvm_training.lenvm_trainer import training_arguments
from lenvm_training.reference_config import convert_reference
from lenvm_training.sweep import Sweep, load_sweep, run_sweep, variant_experiments

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
LEAST: dict[str, Any] = {
    "model": {"backbone": "b", "served_model": "s"},
    "data": {"rollouts": ["a.jsonl"]},
    "training": {"output_dir": "o"},
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path, tmp_path: Path) -> None:
    experiment = load_experiment(path)
    assert experiment.prompts is not None
    assert experiment.rollouts is not None
    assert experiment.rollouts.out in experiment.data.rollouts
    assert experiment.rollouts.eval_out in experiment.data.eval_rollouts
    if experiment.training is not None:
        arguments = training_arguments({**experiment.training, "output_dir": str(tmp_path)})
        assert arguments.lr_scheduler_type == "cosine"


@pytest.mark.parametrize("name", [path.stem for path in CONFIGS.glob("*--*.yaml")])
def test_the_papers_pairs_have_its_settings(name: str) -> None:
    experiment = load_experiment(CONFIGS / f"{name}.yaml")
    training = experiment.training or {}
    devices = 8
    batch = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] * devices
    assert (batch, training["num_train_epochs"], training["learning_rate"]) == (1024, 2, 2e-5)
    assert experiment.target.gamma == (0.9998 if "qwen3" in name else 0.997)
    assert experiment.model.kind == "full"


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sweeps_are_valid(path: Path) -> None:
    sweep = load_sweep(path)
    experiments = variant_experiments(sweep, path, [])
    assert list(experiments) == list(sweep.variants)
    assert len({experiment.output_dir for experiment in experiments.values()}) == len(experiments)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("target.gama=1", "f.yaml: target.gama: unknown key"),
        ("extra=1", "f.yaml: extra: unknown key"),
        ("target.censored=drop", "f.yaml: target.censored: must be one of leave_out, bound, got 'drop'"),
        ("target={censored: bound, lam: 0.5}", "f.yaml: target.censored: bound needs target.lam 1"),
        ("target.gamma=2", "f.yaml: target.gamma: must be between 0 and 1, got 2.0"),
        ("model.kind=half", "f.yaml: model.kind: must be one of full, lora, head, got 'half'"),
        ("model.lora.r=wide", "f.yaml: model.lora.r: Input should be a valid integer"),
        ("prompts.out=a", "f.yaml: prompts.eval_out: missing"),
        ("rollouts={out: a, eval_out: b, sampling: {top_q: 1}}", "f.yaml: rollouts.sampling.top_q: unknown key"),
        ("model.lora={rank: 3}", "f.yaml: model.lora.rank: unknown key"),
        ("heads.colour=red", "f.yaml: heads.work: missing"),
        (
            "heads={work: w, out: o, censored: keep}",
            "f.yaml: heads.censored: must be one of leave_out, bound, impute, got 'keep'",
        ),
        ("heads={work: w, out: o, save_dtype: int8}", "f.yaml: heads.save_dtype: must be one of float32, bfloat16"),
        ("evaluation={out: e, dtype: int8}", "f.yaml: evaluation.dtype: must be one of float32, bfloat16, float16"),
        ("evaluation={out: e, gamma: 1}", "f.yaml: evaluation.gamma: must be between 0 and 1, got 1.0"),
        ("evaluation={out: e, gamma: 0}", "f.yaml: evaluation.gamma: must be between 0 and 1, got 0.0"),
        ("evaluation={out: e, min_samples: 0}", "f.yaml: evaluation.min_samples: must be at least 1, got 0"),
        ("evaluation={out: e, max_fit_prompts: 1}", "f.yaml: evaluation.max_fit_prompts: must be at least 2, got 1"),
        ("prompts={out: a, eval_out: ./a, self_made: 2}", "f.yaml: prompts.eval_out: must be another file than"),
        (
            "prompts={out: a, eval_out: b, sources: [{path: ./b, count: 1, domain: d, columns: {text: t}}]}",
            "f.yaml: prompts: b would replace the file of a source",
        ),
        ("rollouts={out: a.jsonl, eval_out: b}", "f.yaml: rollouts.eval_out: b has no suffix"),
        ("rollouts={out: a, eval_out: b/../a}", "f.yaml: rollouts.eval_out: must be another file than"),
        ("rollouts={out: a, eval_out: b, max_prompt_tokens: 0}", "f.yaml: rollouts.max_prompt_tokens: must be at"),
        ("prompts={out: a, eval_out: b, self_made: 2, templates: -1}", "f.yaml: prompts.templates: must be at least 0"),
        ("heads={work: w, out: o}", "f.yaml: give exactly one of 'training' and 'heads'"),
        ("training=null", "f.yaml: give exactly one of 'training' and 'heads'"),
        ("training={}", "f.yaml: training.output_dir: missing"),
        ("model.lora.r=4", "f.yaml: model.lora: does nothing for model.kind full"),
        ("target.max_length=512", "f.yaml: target.max_length: does nothing for target.space discounted_return"),
        ("model=3", "f.yaml: model: Input should be a dictionary"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        build_experiment(apply_overrides(LEAST, [override]), "f.yaml")
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_what_a_kind_or_a_space_uses_is_taken() -> None:
    used = ["model.kind=lora", "model.lora.r=4", "target={space: normalised_length, max_length: 512}"]
    experiment = build_experiment(apply_overrides(LEAST, used), "f.yaml")
    assert (experiment.model.lora.r, experiment.target.max_length) == (4, 512)
    with pytest.raises(ConfigError, match=r"model\.lora: does nothing for model\.kind head"):
        build_experiment(apply_overrides(LEAST, ["model.kind=head", "model.lora.r=4"]), "f.yaml")


@pytest.mark.parametrize("override", ["target.lam=0.5", "target.space=length", "target.censored=bound"])
def test_heads_take_gamma_alone(override: str) -> None:
    heads = apply_overrides(LEAST, ["training=null", "heads={work: w, out: o}", "target.gamma=0.99"])
    assert build_experiment(heads, "f.yaml").target.gamma == 0.99
    with pytest.raises(ConfigError, match=r"f\.yaml: target: heads take gamma alone"):
        build_experiment(apply_overrides(heads, [override]), "f.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.kind=lora", r"f\.yaml: model\.kind: does nothing for 'heads'"),
        ("model.lora.r=4", r"f\.yaml: model\.lora: does nothing"),
        ("model.dtype=bfloat16", r"f\.yaml: model\.dtype: does nothing"),
        ("model.save_dtype=float32", r"f\.yaml: model\.save_dtype: does nothing"),
        ("model.attn_implementation=eager", r"f\.yaml: model\.attn_implementation: does nothing"),
        ("model.served_name=other", r"f\.yaml: model\.served_name: does nothing"),
        ("data.max_eval_completions=5", r"f\.yaml: data\.max_eval_completions: does nothing"),
    ],
)
def test_what_heads_would_ignore_is_refused(override: str, message: str) -> None:
    heads = ["training=null", "heads={work: w, out: o}", "model.base_name=b", "model.served_name=b"]
    build_experiment(apply_overrides(LEAST, heads), "f.yaml")
    with pytest.raises(ConfigError, match=message):
        build_experiment(apply_overrides(LEAST, [*heads, override]), "f.yaml")


def test_the_users_own_folder_is_expanded_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    keys = [
        "model={backbone: ~/b, served_model: owner/~name}",
        "data={rollouts: [~/r, r], eval_rollouts: [~/e]}",
        "training={output_dir: ~/o, deepspeed: ~/d.json}",
        "prompts={out: ~/p, eval_out: ~/q, image_folder: ~/i, self_made: 1}",
        "rollouts={out: ~/r.jsonl, eval_out: ~/e.jsonl, extend: [~/x]}",
        "evaluation={out: ~/v, lenvm: ~/l, probe_model: ~/m}",
    ]
    experiment = build_experiment(apply_overrides(LEAST, keys), "f.yaml")
    assert experiment.training == {"output_dir": "/home/someone/o", "deepspeed": "/home/someone/d.json"}
    assert (experiment.model.backbone, experiment.model.served_model) == ("/home/someone/b", "owner/~name")
    assert experiment.data.rollouts == ("/home/someone/r", "r")
    heads = build_experiment(apply_overrides(LEAST, ["training=null", "heads={work: ~/w, out: ~/h, start: ~/s}"]), "f")
    paths = [str(section) for section in (experiment.prompts, experiment.rollouts, experiment.evaluation, heads.heads)]
    assert [path.count("/home/someone/") for path in paths] == [3, 3, 3, 3]
    assert "~" not in "".join(paths)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lonely", "^expected key=value"),
        ("data.rollouts.x=1", r"^data\.rollouts\.x: .* is not inside a mapping"),
        ("data.rollouts=[a", r"^data\.rollouts=\[a: .*expected ',' or ']'"),
        ("data.rollouts=@a", r"^data\.rollouts=@a: .*cannot start any token"),
        ("data.seed=2024-13-01", r"^data\.seed=2024-13-01: month must be in"),
    ],
)
def test_what_is_no_assignment_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides(LEAST, [override])


def test_overrides_are_yaml_and_leave_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("model: {backbone: b, served_model: s}\ndata: {rollouts: [a]}\ntraining: {output_dir: o}\n")
    experiment = load_experiment(path, ["training.learning_rate=2e-5", "data.rollouts=[x, y]", "target.lam=0.5"])
    assert experiment.training == {"output_dir": "o", "learning_rate": 2e-5}
    assert experiment.data.rollouts == ("x", "y")
    assert experiment.target.lam == 0.5
    assert experiment.model.backbone == "b"


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"- a\n", "not a mapping of keys"), (b"a: [1\n", "expected ',' or ']'"), (b"a: caf\xe9\n", "not UTF-8 text")],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "f.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match=rf"f\.yaml: .*{message}"):
        load_yaml(tmp_path / "f.yaml")


REFERENCE: dict[str, Any] = {
    "stage": "lenvm",
    "do_train": True,
    "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
    "finetuning_type": "full",
    "dataset": "math_train,code_train",
    "eval_dataset": "math_test",
    "cutoff_len": 2048,
    "lenvm_gamma": 0.997,
    "lenvm_lam": 1.0,
    "lenvm_agg_method": "token-mean",
    "output_dir": "saves/x",
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-5,
    "bf16": True,
}


def test_the_references_keys_are_converted() -> None:
    content, problems = convert_reference(REFERENCE, "r.yaml")
    experiment = build_experiment(content, "r.yaml")
    assert experiment.model.backbone == "Qwen/Qwen2.5-0.5B-Instruct"
    assert experiment.data.rollouts == ("math_train.jsonl", "code_train.jsonl")
    assert experiment.data.max_tokens == 2048
    assert (experiment.target.gamma, experiment.target.lam) == (0.997, 1.0)
    assert experiment.training == {
        "output_dir": "saves/x",
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-5,
        "bf16": True,
    }
    assert problems == [
        "cutoff_len: completions of more than 2048 tokens are left out, not cut",
        "served model: not in that file; set model.served_model",
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lenvm_agg_method", "seq-mean"),
        ("flash_attn", "fa3"),
        ("flash_attn", ["fa2"]),
        ("freeze_language_model", True),
        ("finetuning_type", "freeze"),
        ("lenvm_loss_type", "bce"),
        ("lenvm_huber_loss_delta", 0.1),
        ("lenvm_huber_loss_delta", "abc"),
        ("finetuning_type", ["full"]),
        ("lenvm_target_type", ["length"]),
        ("lora_rank", 8),
        ("template", "qwen"),
        ("neat_packing", True),
    ],
)
def test_what_cannot_be_honoured_is_named(key: str, value: Any) -> None:
    content, problems = convert_reference({**REFERENCE, key: value}, "r.yaml")
    assert any(problem.startswith(f"{key}: ") for problem in problems)
    build_experiment(content, "r.yaml")


@pytest.mark.parametrize("space", ["length", "log_length"])
@pytest.mark.parametrize("given", [{}, {"lenvm_loss_type": "huber"}])
def test_the_references_loss_of_other_targets_is_named(space: str, given: dict[str, str]) -> None:
    _, problems = convert_reference({**REFERENCE, "lenvm_target_type": space, **given}, "r.yaml")
    assert problems[0].startswith(f"lenvm_loss_type: 'huber' cannot be honoured with lenvm_target_type {space} (")


def test_a_reference_without_some_keys_means_the_references_defaults() -> None:
    without = dict.fromkeys(("cutoff_len", "lenvm_gamma", "eval_dataset"))
    experiment = build_experiment(convert_reference(REFERENCE | without, "r.yaml")[0], "r.yaml")
    assert (experiment.data.max_tokens, experiment.target.gamma) == (2048, 0.999)
    assert experiment.data.eval_rollouts == ()


@pytest.mark.parametrize(
    ("tower", "projector", "frozen", "named"),
    [
        (True, True, True, False),
        (False, False, False, False),
        (True, False, True, True),
        (None, False, True, True),
        (False, None, False, True),
        (True, None, True, False),
    ],
)
def test_a_reference_that_freezes_the_vision_tower(tower: Any, projector: Any, frozen: bool, named: bool) -> None:
    given = {"freeze_vision_tower": tower, "freeze_multi_modal_projector": projector}
    content, problems = convert_reference(REFERENCE | given, "r.yaml")
    assert build_experiment(content, "r.yaml").model.freeze_vision == frozen
    assert any(problem.startswith("freeze_multi_modal_projector: ") for problem in problems) == named


@pytest.mark.parametrize(("given", "taken"), [("fa2", "flash_attention_2"), ("auto", "sdpa"), ("disabled", "eager")])
def test_the_references_attention_is_converted(given: str, taken: str) -> None:
    content, _ = convert_reference(REFERENCE | {"flash_attn": given}, "r.yaml")
    assert build_experiment(content, "r.yaml").model.attn_implementation == taken


def test_another_stage_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected 'lenvm', got 'sft'"):
        convert_reference({**REFERENCE, "stage": "sft"}, "r.yaml")


@pytest.mark.parametrize("missing", ["model_name_or_path", "dataset", "output_dir"])
def test_what_a_reference_must_have_is_named(missing: str) -> None:
    with pytest.raises(ConfigError, match=rf"^r\.yaml: {missing}: missing$"):
        convert_reference({key: value for key, value in REFERENCE.items() if key != missing}, "r.yaml")


@pytest.mark.parametrize(
    ("given", "rank", "alpha", "modules"),
    [
        ({}, 8, 16, "all-linear"),
        ({"lora_rank": 64}, 64, 128, "all-linear"),
        ({"finetuning_type": "lora", "lora_alpha": 4, "lora_target": "q_proj,v_proj"}, 8, 4, ("q_proj", "v_proj")),
    ],
)
def test_a_reference_without_its_lora_keys_means_the_references_defaults(
    given: dict[str, Any], rank: int, alpha: int, modules: Any
) -> None:
    plain = {key: value for key, value in REFERENCE.items() if key != "finetuning_type"}
    content, problems = convert_reference(plain | given, "r.yaml")
    model = build_experiment(content, "r.yaml").model
    assert (model.kind, model.lora.r, model.lora.alpha, model.lora.target_modules) == ("lora", rank, alpha, modules)
    assert [problem.partition(":")[0] for problem in problems] == ["cutoff_len", "served model"]


@pytest.mark.parametrize(
    ("given", "warmup_steps"),
    [
        ({"warmup_ratio": 0.1}, 0.1),
        ({"warmup_ratio": 0.1, "warmup_steps": 0}, 0.1),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, 5),
        ({"warmup_ratio": 1.5}, None),
    ],
)
def test_a_share_of_steps_to_warm_up_is_honoured(given: dict[str, Any], warmup_steps: float | None) -> None:
    content, problems = convert_reference(REFERENCE | given, "r.yaml")
    assert content["training"].get("warmup_steps") == warmup_steps
    named = [problem for problem in problems if problem.startswith("warmup_ratio: ")]
    assert len(named) == (warmup_steps != 0.1)


@pytest.mark.parametrize("name", ["../x", "..", ".", "", "a/b"])
def test_a_variant_that_is_no_folder_of_the_sweep_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(f"name: n\nbase: b.yaml\nout: o\nvariants: {{fine: {{}}, '{name}': {{}}}}\n")
    with pytest.raises(ConfigError, match=r"sweep\.yaml: variants: .* is not the name of a folder"):
        load_sweep(path)


def test_a_sweep_runs_what_is_missing_and_makes_its_table(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    rollouts = tmp_path / "rollouts.jsonl"
    rollouts.write_text("{}\n")
    base.write_text(
        f"model: {{backbone: b, served_model: s}}\ndata: {{rollouts: [{rollouts}]}}\ntraining: {{output_dir: o}}\n"
    )
    keys: dict[str, dict[str, Any]] = {"small": {"target.gamma": 0.9}, "large": {"target.gamma": 0.99}}
    sweep = Sweep("gamma", "base.yaml", str(tmp_path / "out"), keys, {"data.seed": 3})
    experiments = variant_experiments(sweep, tmp_path / "sweep.yaml", ["data.max_prompts=5"])
    assert [experiment.target.gamma for experiment in experiments.values()] == [0.9, 0.99]
    assert all((e.data.seed, e.data.max_prompts) == (3, 5) for e in experiments.values())
    ran: list[str] = []

    def run(experiment: Experiment) -> None:
        ran.append(experiment.output_dir)
        assert experiment.evaluation is not None
        folder = Path(experiment.evaluation.out)
        figures = '{"tau": 0.5, "mre": 0.4, "mse": 0.1}'
        states = '{"mse": 0.1, "mre_50": 0.2, "tau_50": 0.3}'
        (folder / "evaluation.json").write_text(
            f'{{"boundary": {{"lenvm": {figures}}}, "states": {states}, "served": {{}}}}'
        )

    first = run_sweep(sweep, experiments, run, ran.append)
    assert first["small"]["boundary tau"] == 0.5
    assert len(ran) == 4
    assert run_sweep(sweep, experiments, run, ran.append) == first
    assert len(ran) == 4, "complete runs are not run again"
    assert "| small | 0.5 |" in (tmp_path / "out" / "sweep.md").read_text()
    assert (tmp_path / "out" / "sweep.png").exists()
    record = tmp_path / "out" / "small" / "evaluation" / "experiment.json"
    newer = ',\n    "freeze_vision": true'
    assert record.read_text().count(newer) == 1
    record.write_text(record.read_text().replace(newer, ""))
    assert run_sweep(sweep, experiments, run, ran.append) == first, "a run from before a setting had its default"
    assert len(ran) == 4
    others = variant_experiments(sweep, tmp_path / "sweep.yaml", ["data.max_prompts=6"])
    refusal = r"evaluation.json: is of other settings or rollouts than the sweep's now"
    with pytest.raises(ConfigError, match=refusal):
        run_sweep(sweep, others, run, ran.append)
    rollouts.write_text("{}\n{}\n")
    with pytest.raises(ConfigError, match=refusal):
        run_sweep(sweep, experiments, run, ran.append)
    rollouts.write_text("{}\n")
    assert run_sweep(sweep, experiments, run, ran.append) == first
    (tmp_path / "out" / "small" / "evaluation" / "experiment.json").unlink()
    with pytest.raises(ConfigError, match=refusal):
        run_sweep(sweep, experiments, run, ran.append)
    assert len(ran) == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.output_dir=x", "training.output_dir: is set by the sweep of gamma"),
        ("evaluation.out=x", "evaluation.out: is set by the sweep of gamma"),
        ("heads.out=x", "heads.out: is set by the sweep of gamma"),
        ("target.gamma=0.5", "target.gamma: is set by every variant of gamma"),
        ("model.lora.r=4", "model.lora.r: is set by every variant of gamma"),
        ("rollouts.samples=3", "rollouts.samples: does nothing in a sweep"),
        ("out=x", "out: does nothing in a sweep"),
        ("target.lam=0.5", ""),
        ("model.kind=lora", ""),
    ],
)
def test_what_no_variant_would_heed_is_refused(tmp_path: Path, override: str, message: str) -> None:
    (tmp_path / "base.yaml").write_text(
        "model: {backbone: b, served_model: s, kind: lora}\ndata: {rollouts: [a]}\ntraining: {output_dir: o}\n"
    )
    lora = {"model.lora": {"r": 2}}
    variants: dict[str, dict[str, Any]] = {
        "small": {"target.gamma": 0.9, "target.lam": 1.0, **lora},
        "large": {"target.gamma": 0.99, **lora},
    }
    sweep = Sweep("gamma", "base.yaml", str(tmp_path / "out"), variants)
    if not message:
        assert len(variant_experiments(sweep, tmp_path / "sweep.yaml", [override])) == len(variants)
        return
    with pytest.raises(ConfigError, match=f"^{message}$"):
        variant_experiments(sweep, tmp_path / "sweep.yaml", [override])


def test_a_sweeps_folder_and_base_may_lie_in_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text(
        "model: {backbone: b, served_model: s}\ndata: {rollouts: [a]}\ntraining: {output_dir: o}\n"
    )
    path = tmp_path / "elsewhere" / "sweep.yaml"
    path.parent.mkdir()
    path.write_text("{name: n, base: ~/base.yaml, out: ~/out, variants: {v: {target.gamma: 0.9}}}\n")
    sweep = load_sweep(path)
    assert variant_experiments(sweep, path, [])["v"].output_dir == f"{sweep.out}/v" == f"{tmp_path}/out/v"


def test_the_default_models_configurations_name_the_folder_that_it_is_converted_to() -> None:
    folder = f"{default_model.MODEL_NAME}-v{default_model.CONVERSION_VERSION}"
    for name in ("smollm2-heads", "smollm2-lora"):
        experiment = load_experiment(CONFIGS / f"{name}.yaml")
        assert Path(experiment.model.served_model or "").name == folder
        assert Path(experiment.model.backbone).name == folder
