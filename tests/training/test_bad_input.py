"""Bad input and bad luck at the commands: one clear line, its exit status, and a state that goes on."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from lenvm_training import commands, endpoints, experiment_steps
from local_engine import local_engine
from tiny import make_rows, write_rows
from tiny_experiment import full_disk, lines, write_config

pytestmark = pytest.mark.usefixtures("empty_folder")

NEEDS = "--prompts prompts.jsonl --model backbone"
WORDS = "{path: %s, domain: d, columns: {%s}, count: 3}"
SOURCES = "prompts config.yaml prompts.self_made=0 'prompts.sources=[" + WORDS + "]'"


def run(call: str) -> int:
    command, *arguments = shlex.split(call)
    status: int = getattr(commands, command)(arguments)
    return status


def only_line(capsys: pytest.CaptureFixture[str], command: str) -> str:
    """The last on standard error; nothing else there is of the command's own or looks like a crash."""
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    own = [line for line in errors.splitlines() if line.startswith(f"lenvm {command}: ")]
    assert own == errors.splitlines()[-1:]
    return own[0].removeprefix(f"lenvm {command}: ")


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment_steps.os, "execv", lambda *_: pytest.fail("an engine is started"))


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(_: float) -> None:
        pass

    monkeypatch.setattr(endpoints.asyncio, "sleep", at_once)


@pytest.fixture
def files(tmp_path: Path) -> None:
    """A configuration, rollouts that can be used, and files with one fault each."""
    write_config(tmp_path)
    rows = make_rows(4)
    text = write_rows(tmp_path / "rollouts.jsonl", rows).read_text()
    write_rows(tmp_path / "eval.jsonl", make_rows(4, 1))
    write_rows(tmp_path / "nameless.jsonl", [{k: v for k, v in row.items() if k != "domain"} for row in rows])
    other = [row | {"tokenizer": "another"} for row in rows]
    write_rows(tmp_path / "other.jsonl", other)
    write_rows(tmp_path / "mixed.jsonl", [*(row | {"tokenizer": "one"} for row in rows), *other])
    (tmp_path / "cut.jsonl").write_text(text[:-30])
    (tmp_path / "broken.jsonl").write_text(text[:300] + "\n" + text[500:])
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "bytes.jsonl").write_bytes(b'{"id": "\xff"}\n')
    (tmp_path / "fields.jsonl").write_text('{"prompt_id": "a"}\n')
    prompt = json.dumps({"id": "a", "domain": "d", "messages": [{"role": "user", "content": "w5"}]})
    for name in ("one_prompt.jsonl", "same_prompt.jsonl"):
        (tmp_path / name).write_text(prompt + "\n")
    (tmp_path / "cut_prompts.jsonl").write_text(prompt + "\n" + prompt[:-20])
    (tmp_path / "cut_words.jsonl").write_text('{"q": "w5"}\n{"q": "w')
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    for name, kept in (("half_model", slice(None, 5000)), ("no_tokenizer", slice(None))):
        (tmp_path / name).mkdir()
        for source in (tmp_path / "backbone").iterdir():
            if name == "half_model" or not source.name.startswith(("tokenizer", "special")):
                content = source.read_bytes()
                (tmp_path / name / source.name).write_bytes(
                    content[kept] if source.suffix == ".safetensors" else content
                )


ONE_PROMPT = "prompts.out=one_prompt.jsonl prompts.eval_out=same_prompt.jsonl rollouts.engine_url=http://127.0.0.1:9"


@pytest.mark.usefixtures("files", "no_engine")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        # what is not there
        ("train nothing.yaml", "nothing.yaml: No such file"),
        ("train config.yaml data.rollouts=[gone.jsonl]", "gone.jsonl: cannot be read"),
        ("train config.yaml model.backbone=gone/model", "gone/model: neither a folder nor a model of the hub"),
        ("train config.yaml model.backbone=no_tokenizer", "no_tokenizer: no usable tokenizer"),
        ("evaluate config.yaml", "run/lenvm: no such folder; lenvm train writes it"),
        ("evaluate config.yaml evaluation.lenvm=backbone", "backbone: no lenvm_config.json, and no gamma is known"),
        ("rollouts config.yaml", "eval_prompts.jsonl: no such prompt file; lenvm prompts writes it"),
        (f"rollouts config.yaml rollouts.out=new.jsonl rollouts.eval_out=new2.jsonl {ONE_PROMPT} "
         "model.served_model=no_tokenizer", "no_tokenizer: no usable tokenizer"),
        (SOURCES % ("gone.jsonl", "text: q"), "gone.jsonl: cannot be loaded"),
        (f"group gone.jsonl out.jsonl {NEEDS}", "gone.jsonl: cannot be read"),
        (f"group rollouts.jsonl out.jsonl {NEEDS}", "prompts.jsonl: No such file or directory"),
        ("group rollouts.jsonl out.jsonl --prompts one_prompt.jsonl --model no_tokenizer", "no_tokenizer: no usable"),
        ("ungroup gone.jsonl out.jsonl --model backbone", "gone.jsonl: No such file or directory"),
        ("ungroup backbone out.jsonl --model backbone", "backbone: Is a directory"),
        ("report gone.jsonl --out report", "gone.jsonl: cannot be read"),
        ("downsample gone.jsonl out.jsonl --samples 1", "gone.jsonl: cannot be read"),
        ("push backbone me/x", "backbone: no value_head.safetensors: not a head or LenVM folder"),
        # keys and values
        ("train config.yaml training.warmup=3", "training.warmup: not one of"),
        ("evaluate config.yaml evaluation=null", "evaluation: missing"),
        ("prompts config.yaml prompts=null", "prompts: missing"),
        ("rollouts config.yaml rollouts.api=telnet", "config.yaml: rollouts.api: must be one of engine, openai"),
        ("train config.yaml data.max_prompts=-5", "config.yaml: data.max_prompts: must be at least 1, got -5"),
        ("rollouts config.yaml 'rollouts.sampling={top_p: 0}'", "config.yaml: rollouts.sampling.top_p: must be "),
        (f"rollouts config.yaml rollouts.out=new.jsonl rollouts.eval_out=new2.jsonl {ONE_PROMPT} "
         "rollouts.engine_url=http://host:port", "rollouts.engine_url / --engine-url: 'http://host:port' is no"),
        ("downsample rollouts.jsonl o.jsonl --samples 0", "--samples: must be at least 1"),
        # missing columns and fields
        (SOURCES % ("words.jsonl", "text: question"), "words.jsonl: no column 'question'; there are q"),
        (SOURCES % ("words.jsonl", "conversation: q"), "words.jsonl: row "),
        (SOURCES % ("words.jsonl", "text: q, image: i"), "words.jsonl: no column 'i'; there are q"),
        (f"group nameless.jsonl out.jsonl {NEEDS}", "nameless.jsonl:1: field 'domain' is missing"),
        ("report nameless.jsonl --out report", "nameless.jsonl:1: field 'domain' is missing"),
        ("train config.yaml data.rollouts=[nameless.jsonl]", "nameless.jsonl:1: field 'domain' is missing"),
        ("evaluate config.yaml data.eval_rollouts=[nameless.jsonl]", "nameless.jsonl:1: field 'domain' is missing"),
        ("rollouts config.yaml prompts.eval_out=fields.jsonl prompts.out=one_prompt.jsonl",
         "fields.jsonl:1: no field 'id'"),
        (f"rollouts config.yaml rollouts.eval_out=fields.jsonl rollouts.out=new.jsonl {ONE_PROMPT}",
         "fields.jsonl:1: no field 'sample' of type int: no rollouts"),
        # files that would replace each other
        ("downsample rollouts.jsonl ./rollouts.jsonl --samples 1", "rollouts.jsonl: would replace what it is made"),
        ("group rollouts.jsonl one_prompt.jsonl --prompts one_prompt.jsonl --model backbone",
         "one_prompt.jsonl: would replace what it is made from"),
        ("ungroup rollouts.jsonl rollouts.jsonl --model backbone", "rollouts.jsonl: would replace what it is made"),
        ("prompts config.yaml prompts.eval_out=./prompts.jsonl", "config.yaml: prompts.eval_out: must be another file"),
        ("rollouts config.yaml rollouts.out=eval.jsonl", "config.yaml: rollouts.eval_out: must be another file than"),
        # mixed tokenizers
        ("train config.yaml data.rollouts=[mixed.jsonl]", "rollouts of different tokenizers: mixed.jsonl:1 and"),
        ("train config.yaml data.rollouts=[other.jsonl]", "prompt 0-0 sample"),
        ("report mixed.jsonl --out report", "rollouts of different tokenizers: mixed.jsonl:1 and"),
        ("downsample mixed.jsonl out.jsonl --samples 1", "rollouts of different tokenizers: mixed.jsonl:1 and"),
        # truncated files
        ("train config.yaml data.rollouts=[cut.jsonl]", "cut.jsonl: the last line is cut off; sample again"),
        ("train config.yaml data.eval_rollouts=[broken.jsonl]", "broken.jsonl:2: not a JSON object"),
        ("evaluate config.yaml data.eval_rollouts=[cut.jsonl]", "cut.jsonl: the last line is cut off; sample again"),
        ("report cut.jsonl --out report", "cut.jsonl: the last line is cut off; sample again"),
        ("rollouts config.yaml prompts.eval_out=cut_prompts.jsonl prompts.out=one_prompt.jsonl",
         "cut_prompts.jsonl:2: not a JSON object"),
        (f"rollouts config.yaml rollouts.eval_out=list.jsonl rollouts.out=new.jsonl {ONE_PROMPT}",
         "list.jsonl:1: not a JSON object"),
        ("report list.jsonl --out report", "list.jsonl:1: not a JSON object"),
        ("ungroup list.jsonl out.jsonl --model backbone", "list.jsonl:1: not a JSON object"),
        ("ungroup bytes.jsonl out.jsonl --model backbone", "bytes.jsonl:1: not UTF-8 text"),
        ("group rollouts.jsonl out.jsonl --prompts bytes.jsonl --model backbone", "bytes.jsonl:1: not UTF-8 text"),
        (SOURCES % ("cut_words.jsonl", "text: q"), "cut_words.jsonl: cannot be loaded (JSON parse error"),
        (SOURCES % ("cut.parquet", "text: q"), "cut.parquet: cannot be loaded ("),
        ("train config.yaml model.backbone=half_model", "half_model: Error while deserializing header"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], call: str, message: str) -> None:
    capsys.readouterr()
    assert run(call) == 2
    assert only_line(capsys, call.split()[0]).startswith(message)


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("wrong", ["data.rollouts=[other.jsonl]", "model.backbone=half_model"])
def test_a_run_that_could_not_begin_leaves_its_folder_to_the_next(wrong: str) -> None:
    assert run(f"train config.yaml {wrong}") == 2
    assert run("train config.yaml training.max_steps=1") == 0
    assert run("train config.yaml training.max_steps=2") == 2, "now it holds a result"


@pytest.mark.usefixtures("files")
def test_completions_of_another_tokenizer_are_not_evaluated_or_added_to(capsys: pytest.CaptureFixture[str]) -> None:
    heads = "training=null 'heads={work: states, out: head, epochs: 1, state_share: 0.3, rank: 8}'"
    assert run("train config.yaml training.max_steps=1") == 0
    for call in (
        "evaluate config.yaml data.eval_rollouts=[other.jsonl]",
        "evaluate config.yaml data.rollouts=[other.jsonl]",
        f"train config.yaml {heads} data.eval_rollouts=[other.jsonl]",
    ):
        capsys.readouterr()
        assert run(call) == 2
        assert "sampled with another tokenizer than the backbone's" in only_line(capsys, call.split()[0])
    with local_engine() as url:
        out = (
            f"prompts.self_made=0 {ONE_PROMPT} rollouts.engine_url={url} rollouts.out=a.jsonl rollouts.eval_out=b.jsonl"
        )
        assert run(f"rollouts config.yaml {out}") == 0
        rows = lines("a.jsonl")
        write_rows(Path("a.jsonl"), [row | {"tokenizer": "another"} for row in rows])
        capsys.readouterr()
        assert run(f"rollouts config.yaml {out}") == 2
    assert "a.jsonl: holds rollouts of another tokenizer; write to another file" in capsys.readouterr().err
    assert len(lines("a.jsonl")) == len(rows)


def test_a_file_that_lost_its_end_is_sampled_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    with local_engine() as url:
        for command in ("prompts", "rollouts"):
            assert run(f"{command} {config} rollouts.engine_url={url}") == 0
        whole = lines("rollouts.jsonl")
        Path("rollouts.jsonl").write_text(Path("rollouts.jsonl").read_text()[:-40])
        capsys.readouterr()
        assert run(f"train {config}") == 2
        assert "rollouts.jsonl: the last line is cut off; sample again" in only_line(capsys, "train")
        assert run(f"rollouts {config} rollouts.engine_url={url}") == 0
    rows = lines("rollouts.jsonl")
    assert rows[:-1] == whole[:-1]
    assert [rows[-1][name] for name in ("prompt_id", "sample")] == [whole[-1][name] for name in ("prompt_id", "sample")]
    assert run(f"train {config} training.max_steps=1") == 0


@pytest.mark.usefixtures("files", "no_waits")
def test_an_engine_that_is_down_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"rollouts config.yaml rollouts.out=a.jsonl rollouts.eval_out=b.jsonl {ONE_PROMPT}") == 1
    line = only_line(capsys, "rollouts")
    assert line.startswith("the engine at http://127.0.0.1:9 does not answer")
    assert line.endswith("(run the same command again to go on)")


@pytest.mark.usefixtures("no_waits")
@pytest.mark.parametrize("answers", [0, 3, 15, 75])
def test_an_engine_that_dies_at_any_point_is_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], answers: int
) -> None:
    config = write_config(tmp_path)
    with local_engine() as url:
        assert run(f"prompts {config} rollouts.engine_url={url}") == 0
    capsys.readouterr()
    with local_engine(answers) as url:
        assert run(f"rollouts {config} rollouts.engine_url={url}") == 1
        line = only_line(capsys, "rollouts")
        assert line.startswith(f"the engine at {url} does not answer")
        assert line.endswith("(run the same command again to go on)")
    kept = {name: lines(name) for name in ("eval.jsonl", "rollouts.jsonl") if Path(name).exists()}
    assert 0 <= answers - sum(map(len, kept.values())) < 8, "at most what was under way is sampled again"
    with local_engine() as url:
        assert run(f"rollouts {config} rollouts.engine_url={url}") == 0
    for name, prompts, samples in (("rollouts.jsonl", "prompts.jsonl", 2), ("eval.jsonl", "eval_prompts.jsonl", 4)):
        rows = lines(name)
        assert rows[: len(kept.get(name, []))] == kept.get(name, [])
        assert len({(row["prompt_id"], row["sample"]) for row in rows}) == len(rows) == samples * len(lines(prompts))


def full(capsys: pytest.CaptureFixture[str], call: str, size: int) -> None:
    """The command ends with one line and status 1 while no file can grow beyond ``size`` bytes."""
    capsys.readouterr()
    with full_disk(size):
        assert run(call) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith(f"lenvm {call.split()[0]}: ")
    assert "disk is full" in errors[-1] or "rows written so far stay" in errors[-1]
    assert "run the same command again" in errors[-1]


def test_a_full_disk_stops_each_step_and_it_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path)
    with local_engine() as url:
        sampled = f"{config} rollouts.engine_url={url}"
        full(capsys, f"prompts {sampled}", 500)
        full(capsys, f"prompts {sampled} prompts.self_made=0", 500)
        assert not Path("prompts.jsonl").exists()
        assert run(f"prompts {sampled}") == 0
        full(capsys, f"rollouts {sampled}", 2000)
        kept = len(Path("eval.jsonl").read_text().splitlines()) - 1
        assert kept > 0
        assert run(f"rollouts {sampled}") == 0
    rows = lines("eval.jsonl")
    assert len({(row["prompt_id"], row["sample"]) for row in rows}) == len(rows) == 4 * len(lines("eval_prompts.jsonl"))
    full(capsys, "downsample rollouts.jsonl few.jsonl --samples 1", 2000)
    assert not Path("few.jsonl").exists()
    full(capsys, "report rollouts.jsonl --out report", 100)
    assert run("downsample rollouts.jsonl few.jsonl --samples 1") == 0
    assert run("report rollouts.jsonl --out report") == 0
    for size in (20_000, 90_000):
        full(capsys, f"train {config}", size)
    assert run(f"train {config}") == 0
    full(capsys, f"evaluate {config}", 1000)
    assert run(f"evaluate {config}") == 0
    assert Path("run/evaluation/calibration.png").stat().st_size > 1000
    heads = f"{config} training=null 'heads={{work: states, out: head, epochs: 1, state_share: 0.3, rank: 8}}'"
    full(capsys, f"train {heads}", 5000)
    assert run(f"train {heads}") == 0
