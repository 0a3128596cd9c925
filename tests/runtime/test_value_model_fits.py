"""What the launching process refuses before any model is loaded, and what the value model takes of the arguments."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from lenvm_kernels import torchvision_schema
from lenvm_kernels.checkpoint_files import ADAPTER_CONFIG_FILE, CheckpointError

torchvision_schema.declare_if_missing()

from lenvm_runtime import compat  # noqa: E402
from lenvm_runtime.value_model.hooks import ValueModelHooks, check_fits  # noqa: E402
from lenvm_runtime.value_model.source import read_source  # noqa: E402
from tiny_lenvm import SHAPE, save_adapter, save_lenvm, save_model, word_tokenizer  # noqa: E402


def server_args(model: Path, *arguments: str) -> Any:
    """SGLang's resolved arguments of a served model."""
    from sglang.srt.server_args import prepare_server_args

    from lenvm_runtime.cpu import attention_backend
    from lenvm_runtime.launch_engine import engine_arguments

    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        attention_backend.register()
    given = ["--model-path", str(model), "--dtype", "float32", *arguments]
    return prepare_server_args(engine_arguments(given, on_cpu))


@pytest.fixture
def folders(tmp_path: Path) -> SimpleNamespace:
    """A served model of 256 positions and a LenVM of 128, both with 4 heads and 2 KV heads."""
    served, lenvm = tmp_path / "served", tmp_path / "lenvm"
    save_model(served, "llama", context=256)
    save_lenvm(lenvm, "llama")
    return SimpleNamespace(served=served, lenvm=lenvm)


def test_a_context_longer_than_the_lenvms_is_refused_with_the_one_to_give(folders: SimpleNamespace) -> None:
    source = read_source(folders.lenvm)
    with pytest.raises(CheckpointError, match="256 tokens, the LenVM's 128; give --context-length 128 or less"):
        check_fits(source, server_args(folders.served))
    check_fits(source, server_args(folders.served, "--context-length", "128"))


def test_a_stretched_rope_counts_as_sglang_counts_it(folders: SimpleNamespace) -> None:
    write_config(folders.lenvm, rope_scaling={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    check_fits(read_source(folders.lenvm), server_args(folders.served))


def test_ranks_that_do_not_share_the_lenvms_heads_are_refused(folders: SimpleNamespace) -> None:
    arguments = server_args(folders.served, "--context-length", "128")
    arguments.override("test", tp_size=3)
    with pytest.raises(CheckpointError, match="--tp-size 3: cannot share the LenVM's 4 attention heads"):
        check_fits(read_source(folders.lenvm), arguments)


def test_a_served_model_that_takes_images_is_refused(folders: SimpleNamespace) -> None:
    save_vision_config(folders.served)
    with pytest.raises(CheckpointError, match="takes images, video or audio"):
        check_fits(read_source(folders.lenvm), server_args(folders.served, "--context-length", "128"))


def test_a_backbone_of_another_family_is_refused(folders: SimpleNamespace) -> None:
    save_model(folders.lenvm, "mistral")
    with pytest.raises(CheckpointError, match="a LenVM on a mistral backbone is not supported"):
        check_fits(read_source(folders.lenvm), server_args(folders.served, "--context-length", "128"))


def test_an_adapter_of_another_form_is_refused_before_anything_is_loaded(folders: SimpleNamespace) -> None:
    adapter = folders.lenvm.parent / "adapter"
    save_adapter(adapter, folders.served)
    check_fits(read_source(adapter), server_args(folders.served))
    path = adapter / ADAPTER_CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
    with pytest.raises(CheckpointError, match="use_dora = True is not supported"):
        check_fits(read_source(adapter), server_args(folders.served))


def test_an_adapter_on_the_served_model_takes_over_how_its_tokenizer_is_loaded(folders: SimpleNamespace) -> None:
    save_tokenizer_code(folders.served)
    adapter = folders.lenvm.parent / "adapter"
    save_adapter(adapter, folders.served)
    check_fits(read_source(adapter), server_args(folders.served, "--trust-remote-code"))


def test_the_launching_process_ends_with_one_line(folders: SimpleNamespace) -> None:
    hooks = ValueModelHooks(read_source(folders.lenvm), max_length=100)
    with pytest.raises(SystemExit, match=r"^lenvm: this LenVM cannot be served beside this model: .*$"):
        hooks._check_fits(server_args(folders.served))


def test_the_served_models_own_tokenizer_code_runs_if_it_is_trusted(folders: SimpleNamespace) -> None:
    save_tokenizer_code(folders.served)
    source = read_source(folders.lenvm)
    with pytest.raises(CheckpointError, match=f"{folders.served}: no usable tokenizer"):
        check_fits(source, server_args(folders.served, "--context-length", "128"))
    arguments = server_args(folders.served, "--context-length", "128", "--trust-remote-code")
    check_fits(source, arguments)
    texts = compat.token_texts(str(folders.served), **compat.tokenizer_options(arguments))
    assert texts[:3] == ["w0", "w1", "w2"]


def test_the_served_tokenizer_alone_is_loaded_as_the_arguments_say(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.utils import hf_transformers_utils

    calls: list[tuple[str, dict[str, Any]]] = []

    def get_tokenizer(model: str, **options: Any) -> Any:
        calls.append((model, options))
        return word_tokenizer()

    monkeypatch.setattr(hf_transformers_utils, "get_tokenizer", get_tokenizer)
    given = {"trust_remote_code": True, "revision": "abc", "tokenizer_mode": "slow"}
    options = compat.tokenizer_options(SimpleNamespace(**given, tokenizer_path="served"))
    compat.load_vocabulary("served", **options)
    compat.token_texts("served", **options)
    compat.load_vocabulary("lenvm")
    assert calls == [("served", given), ("served", given), ("lenvm", {})]


@pytest.mark.parametrize(
    ("served", "own"),
    [("dummy", "dummy"), ("auto", "auto"), ("gguf", "auto"), ("sharded_state", "auto"), ("remote", "auto")],
)
def test_the_lenvm_is_read_from_its_own_files(folders: SimpleNamespace, served: str, own: str) -> None:
    arguments = server_args(folders.served)
    extra = '{"pattern": "*.x"}'
    arguments.override("test", load_format=served, model_loader_extra_config=extra, weight_cache_mode="client")
    of_lenvm = compat.value_server_args(arguments, str(folders.lenvm), 128)
    assert (of_lenvm.load_format, of_lenvm.model_loader_extra_config, of_lenvm.weight_cache_mode) == (own, "{}", "off")
    assert (arguments.load_format, arguments.model_loader_extra_config) == (served, extra)


def write_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def save_vision_config(folder: Path) -> None:
    """In place of the model's configuration: that of a Qwen2.5-VL of the same text shape."""
    text = {**SHAPE, "max_position_embeddings": 256, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    config = AutoConfig.for_model("qwen2_5_vl", text_config=text)
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(folder)


def save_tokenizer_code(folder: Path) -> None:
    """Let the model's tokenizer be of a class in its own folder."""
    code = (
        "from transformers import PreTrainedTokenizerFast\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    (folder / "own_tokenizer.py").write_text(code)
    path = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
