"""Prompt sources on local files: mapping, images, duplicates, split, self-made prompts, bad input."""

from __future__ import annotations

import base64
import io
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lenvm_training import prompt_sources
from lenvm_training.prompt_sources import (
    NAMED,
    ColumnMap,
    PromptSource,
    load_prompts,
    prompt_key,
    save_image,
    split_prompts,
)
from lenvm_training.prompts import Prompt, PromptFileError
from lenvm_training.self_prompts import EmptyTurnEncoder, prompts_from_turns
from tiny import make_tokenizer


@pytest.fixture(autouse=True)
def no_cache_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def user(text: str) -> Prompt:
    return Prompt(text, "math", [{"role": "user", "content": text}])


def texts(prompts: list[Prompt]) -> set[str]:
    return {prompt.text for prompt in prompts}


def test_a_text_column_is_sampled_without_duplicates(tmp_path: Path) -> None:
    rows = [{"q": f"Question {index % 8}?", "lang": "en" if index % 2 else "de"} for index in range(40)]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    source = PromptSource(99, path=path, domain="math", columns=ColumnMap(text="q", where={"lang": "en"}))
    prompts = load_prompts(source, tmp_path, seed=0)
    assert texts(prompts) == {f"Question {index}?" for index in (1, 3, 5, 7)}
    assert load_prompts(source, tmp_path, 0) == prompts
    assert len({prompt.id for prompt in prompts}) == 4
    backwards = write_jsonl(tmp_path / "again" / "data.jsonl", rows[::-1])
    again = load_prompts(replace(source, path=backwards), tmp_path, seed=1)
    assert {prompt.id for prompt in again} == {prompt.id for prompt in prompts}
    few = PromptSource(2, path=path, domain="math", columns=ColumnMap(text="q"))
    assert len(load_prompts(few, tmp_path, 0)) == 2


def test_a_conversation_is_cut_before_the_first_answer(tmp_path: Path) -> None:
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hello?"},
        {"from": "gpt", "value": "Hi."},
        {"from": "human", "value": "And then?"},
    ]
    path = write_jsonl(tmp_path / "data.jsonl", [{"conversations": turns}])
    source = PromptSource(5, path=path, domain="chat", columns=ColumnMap(conversation="conversations"))
    (prompt,) = load_prompts(source, tmp_path, 0)
    assert prompt.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello?"},
    ]


def named_rows(name: str) -> list[dict[str, Any]]:
    """Rows of the four data sets' own columns."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (200, 10, 10)).save(buffer, format="PNG")
    asked = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "Red."}]
    chat = [{"role": "user", "content": "Tell a joke", "language": "English"}, {"role": "assistant", "content": "No"}]
    return {
        "deepmath": [{"question": "1 + 1?", "final_answer": "2", "difficulty": 1.0}],
        "opencodereasoning": [{"question": "-", "dataset": "taco", "split": "train", "index": "1", "solution": "..."}],
        "wildchat": [{"conversation_id": "a", "conversation": chat}],
        "r1-onevision": [{"image": base64.b64encode(buffer.getvalue()).decode(), "conversations": asked}],
    }[name]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deepmath", "1 + 1?"),
        ("opencodereasoning", "Sort the list."),
        ("wildchat", "Tell a joke"),
        ("r1-onevision", "What colour?"),
    ],
)
def test_the_named_data_sets_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    taco = "hf://datasets/BAAI/TACO/ALL/train-*.parquet"
    tables = {NAMED[name].path: named_rows(name), taco: [{"question": "x"}, {"question": "Sort the list."}]}
    asked: list[tuple[str, str]] = []

    def load(path: str, split: str, subset: str | None) -> datasets.Dataset:
        asked.append((path, split))
        return datasets.Dataset.from_list(tables[path])

    monkeypatch.setattr(prompt_sources, "load_rows", load)
    (prompt,) = load_prompts(PromptSource(3, name=name), tmp_path / "images", 0)
    assert prompt.text == text
    assert asked[0] == (NAMED[name].path, "python" if name == "opencodereasoning" else "train")
    assert bool(prompt.images) == (name == "r1-onevision")


def test_the_questions_are_read_from_the_files_of_their_data_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they lie on the hub: two of the four have a script beside their files, which the library does not run."""
    monkeypatch.setattr(prompt_sources, "HUB_FILES", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    problems = [{"question": f"Problem {index}", "input_output": "{}"} for index in range(5)]
    for name in ("BAAI/TACO/ALL", "deepmind/code_contests/data", "open-r1/codeforces/data", "codeparrot/apps"):
        (tmp_path / name).mkdir(parents=True)
    for number, rows in enumerate((problems[:2], problems[2:])):
        datasets.Dataset.from_list(rows).to_parquet(f"BAAI/TACO/ALL/train-0000{number}-of-00002.parquet")
    write_jsonl(tmp_path / "codeparrot" / "apps" / "test.jsonl", problems[::-1])
    for name in ("BAAI/TACO/TACO.py", "codeparrot/apps/apps.py"):
        (tmp_path / name).write_text("raise AssertionError\n")
    contest = [{"name": "a", "description": "A contest"}]
    datasets.Dataset.from_list(contest).to_parquet("deepmind/code_contests/data/valid-00000-of-00001-a.parquet")
    forces = [{"description": "Do it.", "input_format": "A number", "output_format": None}]
    datasets.Dataset.from_list(forces).to_parquet("open-r1/codeforces/data/train-00000-of-00001.parquet")
    asked = (
        ("taco", "train", 3),
        ("apps", "test", 0),
        ("code_contests", "valid", 0),
        ("open-r1/codeforces", "train", 0),
    )
    rows = [{"question": "-", "dataset": name, "split": split, "index": str(index)} for name, split, index in asked]
    path = write_jsonl(tmp_path / "reasoning.jsonl", rows)
    source = PromptSource(9, path=path, domain="code", columns=ColumnMap(text="question"))
    prompts = load_prompts(source, tmp_path, 0)
    assert texts(prompts) == {"Problem 3", "Problem 4", "A contest", "Do it.\n\nA number"}


def test_images_are_kept_as_files_once(tmp_path: Path) -> None:
    picture = Image.new("RGB", (5, 4), (0, 0, 255))
    rows = [{"image": picture, "q": "What is it?"}, {"image": picture, "q": "What else?"}]
    features = datasets.Features({"image": datasets.Image(), "q": datasets.Value("string")})
    path = str(tmp_path / "data.parquet")
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    source = PromptSource(5, path=path, domain="images", columns=ColumnMap(text="q", image="image"))
    prompts = load_prompts(source, tmp_path / "images", 0)
    assert len(list((tmp_path / "images").iterdir())) == 1
    assert {tuple(prompt.images) for prompt in prompts} == {tuple(prompts[0].images)}
    assert Image.open(prompts[0].images[0]).getpixel((0, 0)) == (0, 0, 255)
    assert prompts[0].messages[0]["content"][0] == {"type": "image"}
    again = Prompt.from_dict(json.loads(prompts[0].to_json()))
    assert again == prompts[0]


def test_an_image_of_more_pixels_than_can_be_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("1", (2, 2)).save(stream, "BMP")
    header = bytearray(stream.getvalue())
    header[18:26] = (2**20).to_bytes(4, "little") * 2  # width and height
    with pytest.raises(PromptFileError, match=r"here: not a usable image .*exceeds limit"):
        save_image(bytes(header), tmp_path, "here")


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ('{"a": "x"}\n', ColumnMap(text="q"), "no column 'q'; there are a"),
        ('{"a": "x"\n', ColumnMap(text="a"), "cannot be loaded"),
        ('{"a": [{"role": "robot", "content": "x"}]}\n', ColumnMap(conversation="a"), "row 0: a turn .* no known role"),
        ('{"a": ["x"]}\n', ColumnMap(conversation="a"), "row 0: a turn .* no known role"),
        ('{"a": "x"}\n', ColumnMap(conversation="a"), "row 0: no conversation .a list of turns.: x"),
        (
            '{"a": [{"role": "system", "content": "x"}], "i": "PICTURE"}\n',
            ColumnMap(conversation="a", image="i"),
            "no user turn",
        ),
        ('{"a": [{"role": "user"}]}\n', ColumnMap(text="a"), "row 0: no text: .*role"),
        ('{"a": "x", "i": "not an image"}\n', ColumnMap(text="a", image="i"), "row 0: column 'i': not a usable image"),
        ('{"a": "x", "i": 7}\n', ColumnMap(text="a", image="i"), "row 0: column 'i': not a usable image"),
        (
            '{"a": "x", "i": {"bytes": null, "path": null}}\n',
            ColumnMap(text="a", image="i"),
            "row 0: column 'i': not a usable image",
        ),
        ('{"a": "x", "i": {"size": 3}}\n', ColumnMap(text="a", image="i"), "row 0: column 'i': not a usable image"),
        (
            '{"a": "x", "i": ["one.png", "two.png"]}\n',
            ColumnMap(text="a", image="i"),
            "row 0: column 'i': not a usable image",
        ),
    ],
)
def test_a_bad_data_set_is_one_clear_line(tmp_path: Path, content: str, columns: ColumnMap, message: str) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "dot.png")
    (tmp_path / "bad.jsonl").write_text(content.replace("PICTURE", str(tmp_path / "dot.png")))
    source = PromptSource(5, path=str(tmp_path / "bad.jsonl"), domain="x", columns=columns)
    with pytest.raises(PromptFileError, match=message) as raised:
        load_prompts(source, tmp_path, 0)
    assert "\n" not in str(raised.value)
    assert "bad.jsonl" in str(raised.value)


def test_rows_without_a_conversation_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text('{"a": null}\n{"a": [{"role": "user", "content": "x"}]}\n')
    source = PromptSource(5, path=str(tmp_path / "some.jsonl"), domain="x", columns=ColumnMap(conversation="a"))
    assert [prompt.text for prompt in load_prompts(source, tmp_path, 0)] == ["x"]


@pytest.mark.parametrize(
    "bad",
    [{}, {"name": "mmlu"}, {"path": "x.jsonl"}, {"name": "deepmath", "path": "x"}, {"name": "deepmath", "count": 0}],
)
def test_a_bad_source_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"prompts\.sources"):
        PromptSource(**{"count": 1, **bad})
    with pytest.raises(ValueError, match="either 'text' or 'conversation'"):
        ColumnMap()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("7 - 5", "7 + 5"),
        ("x < 3", "x > 3"),
        ("C++", "C#"),
        ("C", "C#"),
        ("कि", "का"),
        ("2 * 3", "2 / 3"),
        ("5%", "5"),
        ("(2 + 3) * 4", "2 + 3 * 4"),
        ("What is 5!", "What is 5?"),
        ("What is (2+3)!?", "What is (2+3)?"),
    ],
)
def test_what_differs_in_a_symbol_is_another_prompt(one: str, other: str) -> None:
    assert prompt_key(user(one)) != prompt_key(user(other))


def test_what_differs_in_case_space_and_punctuation_is_one_prompt() -> None:
    assert (
        len({prompt_key(user(text)) for text in ("What is it?", " what  is it", "What, is it!", "“What” is_it.")}) == 1
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [("What is 1+1?", "What is 1 + 1?"), ("x=2", "x = 2"), ("2^3", "2 ^ 3"), ("well-known", "well\u2011known")],
)
def test_white_space_around_symbols_and_the_kind_of_dash_do_not_count(one: str, other: str) -> None:
    assert prompt_key(user(one)) == prompt_key(user(other))


def test_small_pictures_in_base64_are_told_from_paths(tmp_path: Path) -> None:
    digests = set()
    for index in range(300):
        stream = io.BytesIO()
        Image.frombytes("RGB", (12, 12), random.Random(index).randbytes(432)).save(stream, format="PNG")
        digests.add(save_image(base64.b64encode(stream.getvalue()).decode(), tmp_path, "row"))
    assert len(digests) == 300


def test_a_conversation_may_have_its_text_in_parts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "you"}]
    path = write_jsonl(tmp_path / "parts.jsonl", [{"c": [{"role": "user", "content": parts}]}])
    source = PromptSource(9, path=path, domain="d", columns=ColumnMap(conversation="c"))
    assert texts(load_prompts(source, tmp_path, 0)) == {"Hello, you"}
    path = write_jsonl(tmp_path / "image.jsonl", [{"c": [{"role": "user", "content": [{"type": "image"}]}]}])
    with pytest.raises(PromptFileError, match=r"image\.jsonl: row 0: a turn's content is not text alone"):
        load_prompts(replace(source, path=path), tmp_path, 0)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(max_size=8), max_size=40), st.integers(0, 5))
def test_the_split_is_by_prompt_and_whole(words: list[str], seed: int) -> None:
    prompts = [user(word) for word in words]
    train, held = split_prompts(prompts, 0.3, seed)
    keys = {prompt_key(prompt) for prompt in prompts}
    assert {prompt_key(prompt) for prompt in train} | {prompt_key(prompt) for prompt in held} == keys
    assert len(train) + len(held) == len(keys)
    more = split_prompts([*prompts, user("something else entirely")], 0.3, seed)
    assert set(texts(train)) <= texts(more[0])
    assert split_prompts(prompts[::-1], 0.3, seed)[1] or not held


def test_case_and_punctuation_make_no_other_prompt() -> None:
    train, held = split_prompts([user("What is  it?"), user("what is it"), user("Why?")], 0.5, 0)
    assert len(train) + len(held) == 2


def test_self_made_prompts_start_from_an_empty_user_turn() -> None:
    tokenizer = make_tokenizer()
    ids = EmptyTurnEncoder(tokenizer).encode(user("ignored"))
    assert ids == [2]
    rows = [
        {"sample": 0, "output_token_ids": [10, 11, 1], "finish_reason": "stop"},
        {"sample": 1, "output_token_ids": [10, 11, 1], "finish_reason": "stop"},
        {"sample": 2, "output_token_ids": [12], "finish_reason": "length"},
        {"sample": 3, "output_token_ids": [1], "finish_reason": "stop"},
    ]
    (prompt,) = prompts_from_turns(rows, tokenizer)
    assert prompt.messages == [{"role": "user", "content": "w10 w11"}]
    tokenizer.chat_template = "nothing"
    with pytest.raises(ValueError, match="does not keep the user's text"):
        EmptyTurnEncoder(tokenizer)
