"""Rollout rows into batches: exact ids, right labels, subsets that grow, and one clear line for each bad file."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest

from lenvm_training.rollout_data import (
    DataSettings,
    RolloutCollator,
    RolloutDataset,
    RolloutFileError,
    check_disjoint,
    check_tokenizer,
    load_rollouts,
    select_eval_rollouts,
    select_rollouts,
    tokenizer_fingerprint,
)
from tiny import VOCAB_SIZE, make_rows, make_tokenizer, write_rows


def test_batches_hold_the_exact_ids_and_remaining_lengths(tmp_path: Path) -> None:
    rows = load_rollouts([write_rows(tmp_path / "r.jsonl", make_rows(4))])
    dataset = RolloutDataset(rows)
    assert dataset.num_left_out == 1
    assert len(dataset) == 15
    batch = RolloutCollator(0)([dataset[index] for index in range(len(dataset))])
    for index, row in enumerate(dataset.rows):
        prompt_len, length = len(row["prompt_token_ids"]), len(row["output_token_ids"])
        total = prompt_len + length
        ids = list(row["prompt_token_ids"]) + list(row["output_token_ids"])
        assert batch["input_ids"][index].tolist() == ids + [0] * (batch["input_ids"].shape[1] - total)
        assert batch["attention_mask"][index].sum() == total
        labels = batch["labels"][index].tolist()
        assert labels[: prompt_len - 1] == [-100] * (prompt_len - 1)
        assert labels[prompt_len - 1 : total] == list(range(length, -1, -1))
        assert set(labels[total:]) <= {-100}


def test_cut_completions_have_the_least_that_can_remain(tmp_path: Path) -> None:
    dataset = RolloutDataset(load_rollouts([write_rows(tmp_path / "r.jsonl", make_rows(4))]), with_censored=True)
    assert (len(dataset), dataset.num_left_out) == (16, 0)
    batch = RolloutCollator(0)([dataset[index] for index in range(len(dataset))])
    (cut,) = batch["censored"].nonzero().flatten().tolist()
    row = dataset.rows[cut]
    prompt_len, length = len(row["prompt_token_ids"]), len(row["output_token_ids"])
    labels = batch["labels"][cut].tolist()
    assert labels[prompt_len - 1 : prompt_len + length] == [*range(length, 0, -1), -100]


def test_less_data_is_a_subset_of_more(tmp_path: Path) -> None:
    rows = load_rollouts([write_rows(tmp_path / "r.jsonl", make_rows(10))])
    keys = [
        {
            (row["prompt_id"], row["sample"])
            for row in select_rollouts(rows, DataSettings((), max_prompts=prompts, max_samples_per_prompt=samples))
        }
        for prompts, samples in ((2, 1), (2, 3), (6, 3), (None, None))
    ]
    assert [len(part) for part in keys] == [2, 6, 18, 40]
    assert keys[0] < keys[1] < keys[2] < keys[3]
    backwards = select_rollouts(rows[::-1], DataSettings((), max_prompts=6, max_samples_per_prompt=3))
    assert {(row["prompt_id"], row["sample"]) for row in backwards} == keys[2]
    short = select_rollouts(rows, DataSettings((), max_tokens=10))
    assert short
    assert all(len(row["prompt_token_ids"]) + len(row["output_token_ids"]) <= 10 for row in short)


def test_the_held_out_choice_does_not_depend_on_what_is_trained_on() -> None:
    rows = make_rows(10)
    choices = [
        select_eval_rollouts(rows, DataSettings((), max_prompts=prompts, max_eval_completions=7)) for prompts in (1, 9)
    ]
    assert choices[0] == choices[1]
    assert len(choices[0]) == 7


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt_id": "a"}\n', r"r\.jsonl:2: field 'sample' is missing"),
        (b"nonsense\n", r"r\.jsonl:2: not a JSON object"),
        (b"[1]\n", r"r\.jsonl:2: not a JSON object"),
        (b'{"prompt_id": "\xff"}\n', r"r\.jsonl:2: not UTF-8 text"),
        (json.dumps(make_rows(1)[0] | {"prompt_token_ids": []}).encode() + b"\n", r":2: .*'prompt_token_ids' is empty"),
        (b'{"prompt_id": "a", "sam', "the last line is cut off"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = write_rows(tmp_path / "r.jsonl", make_rows(1, num_samples=1))
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(RolloutFileError, match=message):
        load_rollouts([path])


@pytest.mark.parametrize("name", ["max_tokens", "max_prompts", "max_samples_per_prompt", "max_eval_completions"])
@pytest.mark.parametrize("value", [0, -5])
def test_a_count_below_one_is_named(name: str, value: int) -> None:
    settings: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=rf"^data\.{name}: must be at least 1, got {value}$"):
        DataSettings((), **settings)


def test_copies_in_several_files_count_once(tmp_path: Path) -> None:
    rows = make_rows(3)
    whole, part = write_rows(tmp_path / "whole.jsonl", rows), write_rows(tmp_path / "part.jsonl", rows[2:6])
    more = write_rows(tmp_path / "more.jsonl", rows[4:] + make_rows(2, seed=1))
    assert load_rollouts([whole, part, whole]) == load_rollouts([whole])
    assert len(load_rollouts([part, whole])) == 12
    assert len(load_rollouts([whole, more])) == 20


def test_files_that_were_sampled_apart_count_whole(tmp_path: Path) -> None:
    rows = make_rows(3)
    again = [row | {"output_token_ids": [9, *row["output_token_ids"]]} for row in rows[:6]] + rows[6:]
    first, second = write_rows(tmp_path / "first.jsonl", rows), write_rows(tmp_path / "second.jsonl", again)
    assert len(load_rollouts([first, second])) == 24, "equal answers too, by chance"
    both = tmp_path / "both.jsonl"
    both.write_text(first.read_text() + second.read_text())
    assert len(load_rollouts([first, both])) == 24 - 6
    assert len(load_rollouts([first])) == len(load_rollouts([write_rows(tmp_path / "twice.jsonl", rows + rows)])) == 12


def test_a_copy_in_which_one_completion_is_another_is_a_copy(tmp_path: Path) -> None:
    rows = make_rows(40)
    first = write_rows(tmp_path / "first.jsonl", rows)
    second = write_rows(tmp_path / "second.jsonl", [rows[0] | {"output_token_ids": [9, 1]}, *rows[1:]])
    assert len(load_rollouts([first, second])) == len(rows) + 1


def test_files_that_number_their_prompts_alike_have_prompts_of_their_own(tmp_path: Path) -> None:
    first = make_rows(3)
    second = [row | {"prompt_token_ids": [*row["prompt_token_ids"], 9]} for row in first]
    paths = [write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", first), ("b", second))]
    loaded = load_rollouts([*paths, paths[0]])
    assert len(loaded) == 24
    assert {row["prompt_id"] for row in loaded} == {"0-0", "0-1", "0-2", "0-0#2", "0-1#2", "0-2#2"}
    by_prompt = {row["prompt_id"]: row["prompt_token_ids"] for row in loaded}
    assert all(row["prompt_token_ids"] == by_prompt[row["prompt_id"]] for row in loaded)


def test_a_prompt_on_both_sides_is_named() -> None:
    train, held_out = make_rows(1), [row | {"prompt_token_ids": [2, 60, 3]} for row in make_rows(1, seed=1)]
    check_disjoint(train, held_out)
    both = make_rows(1)
    with pytest.raises(RolloutFileError, match=r"data\.eval_rollouts: prompt 0-0 is in data\.rollouts too$"):
        check_disjoint(train, [*held_out, both[0] | {"prompt_token_ids": array("i", both[0]["prompt_token_ids"])}])
    with pytest.raises(RolloutFileError, match=r"prompt 1-0 is in data\.rollouts too \(as 0-0\)"):
        check_disjoint(train, [row | {"prompt_id": "1-0"} for row in both])
    check_disjoint(train, [row | {"images": ["a.png"]} for row in both])
    with pytest.raises(RolloutFileError, match="prompt 0-0"):
        check_disjoint([both[0] | {"images": ["a.png"]}], [both[1] | {"images": ["a.png"]}])


def test_ids_that_are_no_ids_and_missing_files_are_named(tmp_path: Path) -> None:
    row = make_rows(1)[0] | {"output_token_ids": [1, "two"]}
    with pytest.raises(RolloutFileError, match="'output_token_ids' must hold token ids"):
        load_rollouts([write_rows(tmp_path / "r.jsonl", [row])])
    with pytest.raises(RolloutFileError, match=r"no\.jsonl: cannot be read"):
        load_rollouts([tmp_path / "no.jsonl"])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(RolloutFileError, match=r"no rollouts in .*empty\.jsonl"):
        load_rollouts([tmp_path / "empty.jsonl"])


def test_mixed_tokenizers_are_refused(tmp_path: Path) -> None:
    def tagged(name: str, tag: str) -> Path:
        return write_rows(tmp_path / name, [row | {"tokenizer": tag} for row in make_rows(1)])

    with pytest.raises(RolloutFileError, match=r"different tokenizers: .*a\.jsonl:1 and .*b\.jsonl:1"):
        load_rollouts([tagged("a.jsonl", "1"), tagged("b.jsonl", "2")])
    tokenizer = make_tokenizer()
    right: list[dict[str, Any]] = [row | {"tokenizer": tokenizer_fingerprint(tokenizer)} for row in make_rows(1)]
    check_tokenizer(right, tokenizer, VOCAB_SIZE)
    with pytest.raises(RolloutFileError, match="another tokenizer"):
        check_tokenizer([right[0] | {"tokenizer": "0"}], tokenizer, VOCAB_SIZE)
    with pytest.raises(RolloutFileError, match="token id 99, but the backbone has 64 tokens"):
        check_tokenizer([right[0] | {"output_token_ids": [99]}], tokenizer, VOCAB_SIZE)


def test_a_tokenizers_fingerprint_is_its_vocabulary_without_added_tokens() -> None:
    first, second = make_tokenizer(), make_tokenizer()
    second.add_tokens(["new"])
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)
    assert tokenizer_fingerprint(first) != tokenizer_fingerprint(make_tokenizer(prefix="v"))


def test_rows_survive_json(tmp_path: Path) -> None:
    row = make_rows(1)[0] | {"note": "line\u2028separator"}
    path = write_rows(tmp_path / "r.jsonl", [row])
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert len(load_rollouts([path])) == 1
