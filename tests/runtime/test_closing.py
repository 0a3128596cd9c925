"""Which tokens close a sentence."""

from __future__ import annotations

import pytest

from lenvm_runtime.closing import closing_tokens


@pytest.mark.parametrize("text", [".", "!", "?", "...", '."', ".)", "。", "！", "？”", ".**", ".\n\n", " end."])
def test_these_close_a_sentence(text: str) -> None:
    assert closing_tokens([text], 1).item()


@pytest.mark.parametrize("text", ["", "a", ",", ":", ";", ".5", "e.g", '"', ")", "\n", "<|im_end|>"])
def test_these_do_not(text: str) -> None:
    assert not closing_tokens([text], 1).item()


def test_a_padded_vocabulary_has_no_text_at_its_end() -> None:
    assert closing_tokens(["a", "."], 4).tolist() == [False, True, False, False]
