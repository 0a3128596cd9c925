"""The tokens known to end an answer are those at which SGLang's own check ends a request."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lenvm_kernels.checkpoint import Head, save_head
from lenvm_kernels.checkpoint_files import CheckpointError
from lenvm_kernels.heads import CandidateHead, HeadConfig, ValueHead
from tiny_lenvm import HIDDEN_SIZE, VOCABULARY, save_lenvm, word_tokenizer

Ids = int | list[int] | None


def make_scheduler(config: Ids, generation: Ids, tokenizer_eos: str | None, stops: tuple[str, ...] = ()) -> Any:
    """What SGLang's scheduler knows of the ends: its ModelConfig and its tokenizer, filled by SGLang's own code."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.utils.hf_transformers import attach_additional_stop_token_ids

    configs = SimpleNamespace(
        hf_config=SimpleNamespace(eos_token_id=config), hf_generation_config=SimpleNamespace(eos_token_id=generation)
    )
    tokenizer = word_tokenizer()
    tokenizer.eos_token = tokenizer_eos
    tokenizer.add_special_tokens({"additional_special_tokens": list(stops)})
    attach_additional_stop_token_ids(tokenizer)
    eos_ids = ModelConfig._get_hf_eos_token_id(configs)
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_eos_token_id=eos_ids, vocab_size=VOCABULARY + len(stops)), tokenizer=tokenizer
    )


def ends(scheduler: Any, token: int) -> bool:
    """Whether SGLang ends a request at this token."""
    from sglang.srt.managers.schedule_batch import Req

    params = SimpleNamespace(ignore_eos=False, stop_token_ids=None)
    eos_ids, tokenizer = scheduler.model_config.hf_eos_token_id, scheduler.tokenizer
    req = SimpleNamespace(sampling_params=params, eos_token_ids=eos_ids, tokenizer=tokenizer, output_ids=[token])
    return bool(Req._check_token_based_finish(req, [token]))


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer_eos", "stops", "expected"),
    [
        (2, None, "w2", (), [2]),
        (2, [5, 2], "w2", (), [2, 5]),
        ([3, 7], 9, "w2", (), [2, 3, 7, 9]),  # four ends of three sources
        (2, None, "w4", ("<|eom_id|>",), [2, 4, VOCABULARY]),
        (None, None, "w4", (), [4]),
        (2, None, None, (), [2]),
        (2, [VOCABULARY + 40], "w2", (), [2]),  # beyond the logits: never sampled
    ],
)
def test_every_source_counts(
    config: Ids, generation: Ids, tokenizer_eos: str | None, stops: tuple[str, ...], expected: list[int]
) -> None:
    from lenvm_runtime import compat

    scheduler = make_scheduler(config, generation, tokenizer_eos, stops)
    assert compat.eos_token_ids(scheduler) == expected
    assert [token for token in range(scheduler.model_config.vocab_size) if ends(scheduler, token)] == expected


def test_without_a_tokenizer_the_configuration_counts() -> None:
    from lenvm_runtime import compat

    scheduler = make_scheduler([2, 3], None, "w4")
    scheduler.tokenizer = None
    assert compat.eos_token_ids(scheduler) == [2, 3]
    assert not ends(scheduler, 4)


def test_a_model_without_an_end_is_refused() -> None:
    from lenvm_runtime import compat

    with pytest.raises(CheckpointError, match="names an EOS token"):
        compat.eos_token_ids(make_scheduler(None, None, None))


def test_a_separate_lenvm_knows_them_all(served_runner: Any, tmp_path: Path) -> None:
    from lenvm_runtime.value_model.hooks import ValueModelHooks
    from lenvm_runtime.value_model.source import read_source

    save_lenvm(tmp_path, "llama")
    hooks = ValueModelHooks(read_source(tmp_path), 1000)
    scheduler = make_scheduler(2, [2, 6], "w9")
    scheduler.tp_worker = SimpleNamespace(model_runner=served_runner)
    hooks._load(None, scheduler)
    assert hooks._guide.eos_token_ids.tolist() == [2, 6, 9]


def test_a_head_knows_them_all_and_refuses_ends_that_the_engine_has_not(
    served_runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lenvm_runtime import engine_hooks

    for holder in (served_runner, served_runner.model.logits_processor):  # what is set there goes with the test
        monkeypatch.setattr(holder, engine_hooks._RUNNER, None, raising=False)
    config = HeadConfig("tiny", HIDDEN_SIZE, VOCABULARY, 0.99, 8, 64, 8, (), (2,))
    save_head(Head(config, ValueHead(HIDDEN_SIZE), CandidateHead(config)), tmp_path)
    scheduler = make_scheduler(2, [2, 6], "w9")
    scheduler.tp_worker = SimpleNamespace(model_runner=served_runner)
    engine_hooks._attach_head(scheduler, tmp_path)
    runner = served_runner.lenvm_head_runner
    assert runner.eos_token_ids.tolist() == [2, 6, 9]
    features = torch.randn(1, HIDDEN_SIZE)
    with torch.inference_mode():
        values = runner.candidate_values(features, torch.tensor([[9, 8, 6, 2]]))[0]
    assert [value == 0 for value in values.tolist()] == [True, False, True, True]
    other = make_scheduler(6, None, "w9")
    other.tp_worker = scheduler.tp_worker
    with pytest.raises(CheckpointError, match=r"answers end with tokens \[2\], the served model's with \[6, 9\]"):
        engine_hooks._attach_head(other, tmp_path)
