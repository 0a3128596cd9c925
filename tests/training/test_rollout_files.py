"""The public grouped format both ways, and the report on a rollout file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lenvm_training.grouped_rows import GroupedReader, group_rollouts
from lenvm_training.prompts import Prompt
from lenvm_training.rollout_data import RolloutFileError
from lenvm_training.rollout_files import downsample
from lenvm_training.rollout_report import length_report, write_length_report
from lenvm_training.tokens import tokenizer_fingerprint
from tiny import make_rows, make_tokenizer, write_rows

TOKENIZER = make_tokenizer()
PROMPTS = [Prompt(f"0-{index}", "math", [{"role": "user", "content": f"w{index + 4}"}]) for index in range(4)]


def rollouts() -> list[dict[str, Any]]:
    fingerprint = tokenizer_fingerprint(TOKENIZER)
    return [row | {"tokenizer": fingerprint} for row in make_rows(4)]


def test_rows_written_here_are_read_back_exactly() -> None:
    rows = rollouts()
    rows[0] |= {"begun": 2}
    grouped = list(group_rollouts(rows[::-1], PROMPTS, TOKENIZER))
    order = [row["meta_info"]["lenvm_idx"] for row in grouped]
    assert [order.index(name) for name in dict.fromkeys(order)] == [0, 4, 8, 12], "groups lie side by side"
    assert grouped[0]["conversations"][0] == {"from": "human", "value": "w7"}
    assert grouped[0]["conversations"][-1]["value"].startswith("w")
    reader = GroupedReader(TOKENIZER)
    again = [reader.read(row, "f:1") for row in grouped]
    assert sorted(again, key=str) == sorted(rows, key=str)
    assert reader.num_retokenised == 0


def test_rows_of_others_are_tokenised_and_counted() -> None:
    public = {
        "conversations": [{"from": "human", "value": "w4 w5"}, {"from": "gpt", "value": "w9 w8"}],
        "meta_info": {"lenvm_idx": 12, "domain": "math"},
    }
    reader = GroupedReader(TOKENIZER, assume_finished=True)
    first, second = (reader.read(public, "f:1") for _ in range(2))
    assert first["prompt_token_ids"] == [2, 4, 5, 1, 3]
    assert first["output_token_ids"] == [9, 8, 1]
    assert (first["prompt_id"], first["sample"], second["sample"]) == ("12", 0, 1)
    assert reader.num_retokenised == 2
    cut = {**public, "meta_info": {"lenvm_idx": 1, "finish_reason": "length"}}
    assert reader.read(cut, "f:2")["output_token_ids"] == [9, 8]


def test_the_references_rows_say_how_they_ended_and_were_sampled() -> None:
    info = {"lenvm_idx": 3, "dataset_name": "deepmath", "split": "train", "model_name": "m"}
    info |= {"temperature": 1.0, "top_p": 0.9, "top_k": None, "max_tokens": 7, "answer_token_length": 6}
    public = {"conversations": [{"from": "human", "value": "w4"}, {"from": "gpt", "value": "w9 w8"}], "meta_info": info}
    reader = GroupedReader(TOKENIZER)
    row = reader.read(public, "f:1")
    assert (row["finish_reason"], row["domain"], row["output_token_ids"]) == ("stop", "deepmath", [9, 8, 1])
    assert row["sampling"] == {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 7}
    cut = reader.read({**public, "meta_info": info | {"answer_token_length": 7}}, "f:2")
    assert (cut["finish_reason"], cut["output_token_ids"]) == ("length", [9, 8])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {
                "conversations": [{"from": "human", "value": "<image>w4"}, {"from": "gpt", "value": "w9"}],
                "meta_info": {"lenvm_idx": 3, "finish_reason": "stop"},
                "images": ["a.png"],
            },
            "f:3: field 'images': the model does not take any",
        ),
        (
            {
                "conversations": [{"from": "human", "value": "w4"}, {"from": "gpt", "value": "w9"}],
                "meta_info": {"lenvm_idx": 3, "finish_reason": "stop"},
                "images": "a.png",
            },
            "f:3: 'images' must be a list of paths",
        ),
        ({"conversations": []}, "f:3: no field 'meta_info.lenvm_idx'"),
        ({"meta_info": 3}, "f:3: no field 'meta_info.lenvm_idx'"),
        ({"meta_info": {"lenvm_idx": 1}}, "must end with a turn from 'gpt'"),
        (
            {"meta_info": {"lenvm_idx": 1}, "conversations": [{"from": "gpt"}]},
            "a list of turns with 'from' and 'value'",
        ),
        ({"meta_info": {"lenvm_idx": 1}, "conversations": "hello"}, "a list of turns with 'from' and 'value'"),
        (
            {"meta_info": {"lenvm_idx": 1, "sample": "a"}, "conversations": [{"from": "gpt", "value": ""}]},
            "'meta_info.sample' must be a number",
        ),
        ({"meta_info": {"lenvm_idx": 1}, "conversations": [{"from": "gpt", "value": ""}]}, "may have been cut off"),
        (
            {
                "meta_info": {"lenvm_idx": 1, "finish_reason": "stop"},
                "conversations": [{"from": "cat", "value": ""}, {"from": "gpt", "value": ""}],
            },
            "a turn from 'cat'",
        ),
    ],
)
def test_bad_public_rows_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RolloutFileError, match=message):
        GroupedReader(TOKENIZER).read(row, "f:3")


def test_a_public_row_that_the_chat_template_refuses_is_named() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    turns = [{"from": "human", "value": "w4"}, {"from": "gpt", "value": "w9"}]
    row = {"meta_info": {"lenvm_idx": 7, "finish_reason": "stop"}, "conversations": turns}
    with pytest.raises(RolloutFileError, match=r"f:3: prompt 7: the chat template refuses it .*roles must alternate"):
        GroupedReader(tokenizer).read(row, "f:3")


def test_rollouts_of_an_unknown_prompt_are_refused() -> None:
    with pytest.raises(RolloutFileError, match="prompt 0-3 has rollouts but is not in the prompt file"):
        list(group_rollouts(rollouts(), PROMPTS[:3], TOKENIZER))


def test_nothing_is_written_over_what_it_is_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_rows(tmp_path / "r.jsonl", make_rows(2))
    for out in (path, Path("r.jsonl")):
        with pytest.raises(ValueError, match="would replace what it is made from"):
            downsample(str(path), out, 1, 0)
    assert len(path.read_text().splitlines()) == 8


def test_the_report_counts_by_domain(tmp_path: Path) -> None:
    rows = make_rows(40)
    report = write_length_report(rows, tmp_path)
    lengths = np.array([len(row["output_token_ids"]) for row in rows])
    assert report["all"]["mean"] == pytest.approx(lengths.mean())
    assert report["all"]["p50"] == np.median(lengths)
    assert report["all"]["completions"] == report["math"]["completions"] + report["code"]["completions"] == 160
    assert report["all"]["finished"] == pytest.approx(15 / 16)
    assert report["all"]["explained"] > 0.9
    assert (tmp_path / "lengths.png").stat().st_size > 0
    assert "| math |" in (tmp_path / "lengths.md").read_text()


def test_lengths_that_no_prompt_decides_are_not_explained() -> None:
    generator = np.random.default_rng(0)
    rows = [
        row | {"output_token_ids": [1] * int(generator.integers(1, 50)), "finish_reason": "stop"}
        for row in make_rows(50, num_samples=8)
    ]
    assert abs(length_report(rows)["all"]["explained"]) < 0.1


def test_what_cannot_be_explained_is_left_out(tmp_path: Path) -> None:
    report = write_length_report([row | {"finish_reason": "length"} for row in make_rows(2)], tmp_path)
    assert "explained" not in report["all"]
    assert "nan" not in (tmp_path / "lengths.md").read_text()
