"""The commands: a whole experiment on a tiny model, exit statuses, one line an error, and how ``lenvm`` finds them."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import shutil
import signal
import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from lenvm_runtime import cli
from lenvm_training import commands, experiment_steps, features
from lenvm_training.tokens import tokenizer_fingerprint
from local_engine import local_engine
from tiny import make_backbone, make_rows, make_tokenizer, write_rows
from tiny_experiment import lines, write_config

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("empty_folder")


def test_an_experiment_from_prompts_to_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    with local_engine() as url:
        for command in (commands.prompts, commands.rollouts):
            assert command([config, f"rollouts.engine_url={url}"]) == 0
        rows = lines("rollouts.jsonl")
        assert commands.rollouts([config, f"rollouts.engine_url={url}"]) == 0
        assert lines("rollouts.jsonl") == rows, "nothing is sampled twice"
    prompts, held_out = lines("prompts.jsonl"), lines("eval_prompts.jsonl")
    assert {row["domain"] for row in prompts} == {"words", "self_made"}
    assert {row["sampling"]["max_new_tokens"] for row in lines("prompts.turns.jsonl")} == {256}
    assert not {row["id"] for row in prompts} & {row["id"] for row in held_out}
    assert len(rows) == 2 * len(prompts)
    assert len(lines("eval.jsonl")) == 4 * len(held_out)
    assert Path("rollouts/lengths.png").exists()
    assert commands.train([config]) == 0
    assert commands.evaluate([config]) == 0
    figures = json.loads(Path("run/evaluation/evaluation.json").read_text())
    assert figures["num_prompts"] == len(held_out)
    assert set(figures["boundary"]) == {"lenvm", "constant", "prompt_length", "ridge_probe"}
    assert "mse_position" in capsys.readouterr().out
    evaluated = Path("run/lenvm/README.md").read_text()
    assert evaluated.startswith("---\nlibrary_name: transformers\n")
    assert "| words, lenvm |" in evaluated
    assert commands.evaluate([config, "evaluation.lenvm=run/lenvm", "evaluation.min_samples=3"]) == 0
    assert Path("run/lenvm/README.md").read_text() == evaluated, "what is named is not written into"


def test_files_are_converted_and_thinned_out(tmp_path: Path) -> None:
    make_backbone(tmp_path / "backbone")
    rows = make_rows(4)
    write_rows(tmp_path / "rollouts.jsonl", rows)
    messages = [{"role": "user", "content": "w5"}]
    prompts = [{"id": f"0-{index}", "domain": "math", "messages": messages} for index in range(4)]
    write_rows(tmp_path / "prompts.jsonl", prompts)
    assert commands.group(["rollouts.jsonl", "g.jsonl", "--prompts", "prompts.jsonl", "--model", "backbone"]) == 0
    assert commands.ungroup(["g.jsonl", "again.jsonl", "--model", "backbone"]) == 0
    assert sorted(lines("again.jsonl"), key=str) == sorted(rows, key=str)
    assert commands.downsample(["rollouts.jsonl", "few.jsonl", "--samples", "2"]) == 0
    assert len(lines("few.jsonl")) == 8
    assert commands.report(["few.jsonl", "--out", "report"]) == 0
    assert Path("report/lengths.md").exists()


def test_heads_on_frozen_states_are_trained_by_the_same_command(tmp_path: Path) -> None:
    write_rows(tmp_path / "rollouts.jsonl", make_rows(40, 0))
    write_rows(tmp_path / "eval.jsonl", make_rows(12, 1, num_samples=6))
    heads = {
        "work": "states",
        "out": "head",
        "epochs": 3,
        "state_share": 0.3,
        "num_bins": 8,
        "max_length": 32,
        "rank": 8,
    }
    config = write_config(tmp_path, heads=heads, training=None)
    assert commands.train([config, "heads.training.learning_rat=1"]) == 2
    assert not Path("states").exists()
    assert commands.train([config, "heads.censored=bound", "heads.training={learning_rate: 1e-2, seed: 3}"]) == 0
    assert json.loads(Path("head/lenvm_config.json").read_text())["num_bins"] == 8
    assert {"value_loss.png", "candidate_loss.png", "figures.json"} <= {path.name for path in Path("head").iterdir()}
    card = Path("head/README.md").read_text()
    assert '"learning_rate": 0.01' in card
    assert 'at most the return of "at least this long" for the value' in card
    trained = Path("head/value_head.safetensors").read_bytes()
    assert commands.train([config, "heads.censored=bound", "heads.training={learning_rate: 1e-2, seed: 3}"]) == 0
    assert Path("head/value_head.safetensors").read_bytes() == trained
    assert commands.evaluate([config]) == 0
    assert json.loads(Path("run/evaluation/evaluation.json").read_text())["served"]["all"]["mean_width"] > 0
    assert "## Prompt boundary by domain" in Path("head/README.md").read_text()


def test_the_references_yaml_is_converted_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = {"stage": "lenvm", "model_name_or_path": "b", "dataset": "d", "output_dir": "o", "template": "qwen"}
    Path("reference.yaml").write_text(yaml.safe_dump(reference))
    assert commands.convert_config(["reference.yaml", "ours.yaml"]) == 0
    assert "template: not known here" in capsys.readouterr().err
    assert Path("ours.yaml").read_text().startswith("# template: not known here\n")
    assert commands.train(["reference.yaml"]) == 2
    assert "convert it with lenvm convert-config" in capsys.readouterr().err


def test_rollouts_go_on_under_a_higher_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    files = ["rollouts.out=long.jsonl", "rollouts.eval_out=long_eval.jsonl", "rollouts.sampling.max_new_tokens=700"]
    extend = "rollouts.extend=[rollouts.jsonl, eval.jsonl]"
    with local_engine() as url:
        for step in (commands.prompts, commands.rollouts):
            assert step([config, f"rollouts.engine_url={url}"]) == 0
        before = lines("rollouts.jsonl")
        before[0] |= {"finish_reason": "length", "output_token_ids": [5]}
        write_rows(Path("rollouts.jsonl"), before)
        capsys.readouterr()
        assert commands.rollouts([config, f"rollouts.engine_url={url}", extend, *files]) == 0
        count = len(before) + len(lines("eval.jsonl"))
        assert (
            f"{count} of {count} completions of rollouts.jsonl, eval.jsonl are gone on with" in capsys.readouterr().err
        )
        after = {(row["prompt_id"], row["sample"]): row for row in lines("long.jsonl")}
        for row in before:
            longer = after[row["prompt_id"], row["sample"]]["output_token_ids"]
            assert longer[: len(row["output_token_ids"])] == row["output_token_ids"]
            assert (longer == row["output_token_ids"]) == (row["finish_reason"] == "stop")
        others = ["rollouts.extend=[other.jsonl]", *files]
        write_rows(Path("other.jsonl"), [before[0] | {"prompt_id": "other"}])
        assert commands.rollouts([config, f"rollouts.engine_url={url}", *others]) == 2
        assert "rollouts.extend: other.jsonl: no completion of these prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "override", "message"),
    [
        (
            "rollouts",
            "rollouts.sampling.temperature=0.5",
            "rollouts.jsonl: holds rollouts sampled with temperature 1.0",
        ),
        ("prompts", "rollouts.sampling.temperature=0.5", "prompts.turns.jsonl: holds rollouts sampled with"),
        ("rollouts", "rollouts.concurrency=100000000", "concurrency: 100000000 connections need"),
    ],
)
def test_what_would_stop_the_sampling_is_found_before_an_engine_is_started(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    override: str,
    message: str,
) -> None:
    config = write_config(tmp_path)
    with local_engine() as url:
        for step in (commands.prompts, commands.rollouts):
            assert step([config, f"rollouts.engine_url={url}"]) == 0
    monkeypatch.setattr(experiment_steps.os, "execv", lambda *_: pytest.fail("an engine is started"))
    capsys.readouterr()
    assert getattr(commands, command)([config, override]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"lenvm {command}: {message}")


@pytest.fixture
def files(tmp_path: Path) -> str:
    """Rollouts for both sides that name their tokenizer, and a file where a folder should be; the configuration."""
    tokenizer = {"tokenizer": tokenizer_fingerprint(make_tokenizer())}
    write_rows(tmp_path / "rollouts.jsonl", [row | tokenizer for row in make_rows(40)])
    write_rows(tmp_path / "eval.jsonl", [row | tokenizer for row in make_rows(8, 1)])
    (tmp_path / "taken").write_text("a file")
    return write_config(tmp_path)


HEADS = ["training=null", "heads={work: states, out: head, epochs: 1, rank: 8, num_bins: 8, max_length: 32}"]


def refusal(capsys: pytest.CaptureFixture[str], command: str, arguments: Sequence[str]) -> str:
    """The one line of a command that ends with status 2."""
    capsys.readouterr()
    assert getattr(commands, command)(arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"lenvm {command}: ")
    return line.removeprefix(f"lenvm {command}: ")


@pytest.mark.parametrize("taken", ["taken", "taken/below"])
def test_a_file_where_a_folder_should_be_is_named(files: str, capsys: pytest.CaptureFixture[str], taken: str) -> None:
    assert commands.train([files, "training.max_steps=1"]) == 0
    for command, arguments in (
        ("report", ["rollouts.jsonl", "--out", taken]),
        ("train", [files, f"training.output_dir={taken}"]),
        ("train", [files, *HEADS, f"heads.work={taken}"]),
        ("evaluate", [files, f"evaluation.out={taken}"]),
    ):
        assert re.fullmatch(
            f"{taken}[^:]*: (is a file, not a folder|Not a directory)", refusal(capsys, command, arguments)
        )


def test_a_place_that_cannot_be_written_to_is_named(
    files: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(path: Path, **_: Any) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert refusal(capsys, "report", ["rollouts.jsonl", "--out", "there"]) == "there: Read-only file system"


def test_prompts_that_leave_nothing_to_do_are_refused(files: str, capsys: pytest.CaptureFixture[str]) -> None:
    split = refusal(capsys, "prompts", [files, "prompts.self_made=0", "prompts.eval_fraction=1e-9"])
    assert split == "prompts.eval_fraction: 1e-09 of 40 prompts leaves none for eval_prompts.jsonl"
    assert not Path("prompts.jsonl").exists()
    assert commands.prompts([files, "prompts.self_made=0"]) == 0
    new = [files, "rollouts.engine_url=http://127.0.0.1:9", "rollouts.out=a.jsonl", "rollouts.eval_out=b.jsonl"]
    limit = refusal(capsys, "rollouts", [*new, "rollouts.max_prompt_tokens=3"])
    count = len(lines("eval_prompts.jsonl"))
    assert limit == f"rollouts.max_prompt_tokens: none of the {count} prompts for b.jsonl is within 3"


def test_the_environments_model_is_that_of_its_engine_alone(
    files: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(experiment_steps.SERVED_MODEL, "gone/model")
    assert commands.prompts([files, "prompts.self_made=0"]) == 0
    new = [files, "rollouts.out=a.jsonl", "rollouts.eval_out=b.jsonl"]
    with local_engine() as url:
        assert commands.rollouts([*new, f"rollouts.engine_url={url}"]) == 0
        monkeypatch.setenv(experiment_steps.ENGINE_URL, url)
        assert commands.rollouts([*new, f"rollouts.engine_url={url}"]) == 0
        assert refusal(capsys, "rollouts", new).startswith("gone/model: neither a folder nor a model of the hub")


def test_the_first_signal_finishes_what_is_under_way_and_the_second_does_not(
    files: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never_ends(*_: Any, stop: asyncio.Event, **__: Any) -> int:
        os.kill(os.getpid(), number)
        await asyncio.wait_for(stop.wait(), 5)
        os.kill(os.getpid(), number)
        await asyncio.sleep(5)
        pytest.fail("the second signal did nothing")

    monkeypatch.setattr(experiment_steps, "sample_rollouts", never_ends)
    assert commands.prompts([files, "prompts.self_made=0"]) == 0
    new = ["rollouts.out=a.jsonl", "rollouts.eval_out=b.jsonl"]
    for number in (signal.SIGINT, signal.SIGTERM):
        before = signal.getsignal(number)
        assert commands.rollouts([files, "rollouts.engine_url=http://127.0.0.1:9", *new]) == 130
        said = capsys.readouterr().err.splitlines()
        assert said[-2:] == [
            "lenvm: finishing the completions under way; a second signal drops them, the long ones most of all",
            "lenvm rollouts: stopped; run the same command again to go on",
        ]
        assert signal.getsignal(number) == before


def test_images_are_refused_before_an_engine_is_started(files: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "what?"}]
    prompt = {"id": "seen", "domain": "d", "messages": [{"role": "user", "content": content}], "images": ["a.png"]}
    new = [files, "rollouts.out=a.jsonl", "rollouts.eval_out=b.jsonl"]
    for name in ("prompts.jsonl", "eval_prompts.jsonl"):
        write_rows(Path(name), [prompt])
    assert refusal(capsys, "rollouts", new).startswith("prompt seen: images need an OpenAI-compatible endpoint")
    line = refusal(capsys, "rollouts", [*new, "rollouts.api=openai"])
    assert line == "prompt seen: has images, which backbone does not take"


def test_every_held_out_completion_is_evaluated(files: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = lines("eval.jsonl")
    rows[0]["output_token_ids"] = [9] * 4200 + [1]
    write_rows(Path("eval.jsonl"), rows)
    assert commands.train([files, "training.max_steps=1"]) == 0
    assert commands.evaluate([files, "evaluation.min_samples=1"]) == 0
    figures = json.loads(Path("run/evaluation/evaluation.json").read_text())
    assert figures["num_samples"] == sum(row["finish_reason"] == "stop" for row in rows)
    capsys.readouterr()
    assert commands.train([files, *HEADS]) == 0
    left_out = "lenvm: 1 of 32 held-out completions are left out: more than data.max_tokens, 4096"
    assert left_out in capsys.readouterr().err.splitlines()


def test_completions_that_are_too_long_to_train_on_are_counted(files: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = lines("rollouts.jsonl")
    longest = max(len(row["prompt_token_ids"]) + len(row["output_token_ids"]) for row in rows)
    limit = longest - 1
    count = sum(len(row["prompt_token_ids"]) + len(row["output_token_ids"]) > limit for row in rows)
    for more, card in (["training.max_steps=1"], "run/lenvm"), (HEADS, "head"):
        capsys.readouterr()
        assert commands.train([files, f"data.max_tokens={limit}", *more]) == 0
        said = f"lenvm: {count} of {len(rows)} training completions are left out: more than data.max_tokens, {limit}"
        assert said in capsys.readouterr().err.splitlines()
        assert "none of more than " in Path(card, "README.md").read_text()


def test_what_is_evaluated_fits_the_rollouts(files: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.train([files, "training.max_steps=1"]) == 0
    assert commands.evaluate([files, "evaluation.lenvm=run/checkpoint-1"]) == 0
    assert "was trained on" not in capsys.readouterr().err
    assert commands.train([files, "training.max_steps=1", "model.kind=lora", "training.output_dir=adapter"]) == 0
    shutil.copytree("backbone", "another")
    assert commands.evaluate([files, "evaluation.lenvm=adapter/lenvm", "model.backbone=another"]) == 0
    assert "lenvm: evaluation.lenvm: was trained on backbone, and is put on model.backbone, another" in (
        capsys.readouterr().err.splitlines()
    )
    shutil.copytree("run/lenvm", "other")
    make_tokenizer("x").save_pretrained("other")
    for name in ("lenvm", "probe_model"):
        line = refusal(capsys, "evaluate", [files, f"evaluation.{name}=other"])
        assert re.match(rf"evaluation\.{name}: prompt 1-\d sample \d: sampled with another tokenizer", line)
    write_rows(tmp_path / "eval.jsonl", lines("eval.jsonl") + lines("rollouts.jsonl")[:4])
    for command, arguments in (("evaluate", [files]), ("train", [files, *HEADS])):
        line = refusal(capsys, command, arguments)
        assert line.startswith("data.eval_rollouts: prompt 0-0 is in data.rollouts too")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.kind=full", ""),
        ("model.kind=head", "lenvm: the result is for comparison only: a value head alone cannot be served"),
        ("target.space=length", "lenvm: the result is for comparison only: predicts length;"),
    ],
)
def test_training_says_when_its_result_cannot_be_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, said: str
) -> None:
    config = write_config(tmp_path)
    write_rows(tmp_path / "rollouts.jsonl", make_rows(4))
    write_rows(tmp_path / "eval.jsonl", make_rows(4, 1))
    assert commands.train([config, override, "training.max_steps=1"]) == 0
    error = capsys.readouterr().err
    assert said in error
    assert said or "comparison only" not in error


def test_a_sweep_trains_and_evaluates_every_variant(tmp_path: Path) -> None:
    write_rows(tmp_path / "rollouts.jsonl", make_rows(12))
    write_rows(tmp_path / "eval.jsonl", make_rows(8, 1))
    write_config(tmp_path)
    sweep = {
        "name": "tuned",
        "base": "config.yaml",
        "out": "sweep",
        "set": {"training.max_steps": 2, "evaluation.gamma": 0.95},
        "variants": {"head": {"model.kind": "head"}, "log": {"target.space": "log_length"}},
    }
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep))
    assert commands.sweep(["sweep.yaml", "training.learning_rate=1e-3"]) == 0
    table = Path("sweep/sweep.md").read_text()
    assert "| head |" in table
    assert "| log |" in table
    constants = [
        json.loads(Path(f"sweep/{name}/evaluation/evaluation.json").read_text())["states"]["mse_constant"]
        for name in ("head", "log")
    ]
    assert constants[0] == constants[1], "errors of all variants are on one scale"


def test_a_sweep_of_heads_computes_each_state_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, eval_rows = make_rows(40), make_rows(8, 1)
    write_rows(tmp_path / "rollouts.jsonl", rows)
    write_rows(tmp_path / "eval.jsonl", eval_rows)
    heads = {
        "work": "states",
        "out": "head",
        "epochs": 1,
        "state_share": 0.3,
        "num_bins": 8,
        "max_length": 32,
        "rank": 8,
    }
    write_config(tmp_path, heads=heads, training=None)
    variants = {"32": {"data.max_prompts": 8}, "80": {"data.max_prompts": 20}, "all": {"data.max_prompts": None}}
    sweep = {"name": "completions", "base": "config.yaml", "out": "sweep", "variants": variants}
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep))
    computed: list[int] = []
    original = features._batch_states

    def counting(model: Any, batch: Any, *rest: Any) -> Any:
        computed.append(len(batch))
        return original(model, batch, *rest)

    monkeypatch.setattr(features, "_batch_states", counting)
    assert commands.sweep(["sweep.yaml"]) == 0
    assert sum(computed) == len(rows) + len(eval_rows)
    table = Path("sweep/sweep.md").read_text()
    assert "served coverage" in table
    assert "head boundary_tau" in table
    assert Path("sweep/sweep.png").stat().st_size > 0
    for name, count in (("32", 32), ("80", 80), ("all", 160)):
        assert f"\n| {name} |" in table
        card = Path(f"sweep/{name}/head/README.md").read_text()
        assert f" of {count} completions of {count // 4} prompts" in card
        assert "of 32 completions of 8 prompts" in card.partition("Held out")[2], "all are judged by the same prompts"


def test_the_engine_is_started_by_the_runtimes_own_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path)
    for name in ("prompts.jsonl", "eval_prompts.jsonl"):
        write_rows(tmp_path / name, [{"id": "a", "domain": "d", "messages": []}])
    calls: list[list[str]] = []

    class Replaced(BaseException):
        pass

    def execv(path: str, call: list[str]) -> NoReturn:
        assert path == sys.executable
        calls.append(call)
        raise Replaced

    monkeypatch.setattr(experiment_steps.os, "execv", execv)
    for command in ("rollouts", "prompts"):
        with pytest.raises(Replaced):
            getattr(commands, command)([config, "rollouts.engine_arguments=[--dtype=bfloat16]"])
    with_engine = ["with-engine", "--model", "backbone", "--engine-argument=--dtype=bfloat16", "--"]
    lenvm = [sys.executable, "-m", "lenvm_runtime.cli"]
    assert calls == [
        [*lenvm, *with_engine, *lenvm, command, config, "rollouts.engine_arguments=[--dtype=bfloat16]"]
        for command in ("rollouts", "prompts")
    ]


def test_lenvm_hands_the_declared_commands_their_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][cli.ADDED_COMMANDS]
    points = EntryPoints(EntryPoint(name, value, cli.ADDED_COMMANDS) for name, value in declared.items())
    monkeypatch.setattr(cli, "entry_points", lambda group: points)
    for point in points:
        assert callable(point.load())
    assert cli.main(["train", "nothing.yaml", "a=b"]) == 2
    assert "lenvm train: nothing.yaml: No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as raised:
        cli.main(["tune"])
    assert raised.value.code == 2
