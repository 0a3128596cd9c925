"""Push and pull against a local stand-in of the hub, by the library's own HTTP client in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lenvm_kernels.checkpoint import Head, load_head, save_head
from lenvm_kernels.heads import CandidateHead, HeadConfig, ValueHead
from lenvm_training.hub import push_folder
from local_hub import local_hub

CONFIG = HeadConfig("tiny", 16, 50, 0.97, 4, 64, 8, (), (2,))
CALL = "import sys; from pathlib import Path; from lenvm_training.hub import push_folder, pull_folder, HubError\n"


def call(code: str, endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return subprocess.run([sys.executable, "-c", CALL + code], env=environment, capture_output=True, text=True)


def test_a_head_goes_to_the_hub_and_comes_back(tmp_path: Path) -> None:
    head = Head(CONFIG, ValueHead(16), CandidateHead(CONFIG))
    save_head(head, tmp_path / "head")
    (tmp_path / "head" / "README.md").write_text("# A head\n")
    (tmp_path / "head" / "checkpoint-3").mkdir()
    (tmp_path / "head" / "checkpoint-3" / "optimizer.pt").write_bytes(b"x")
    with local_hub() as hub:
        source, target = tmp_path / "head", tmp_path / "back"
        code = f"print(push_folder(Path({str(source)!r}), 'me/head', True))\n"
        code += f"pull_folder('me/head', Path({str(target)!r}), None)"
        result = call(code, hub.url, tmp_path / "home")
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(f"{hub.url}/me/head/commit/")
        assert set(hub.files["me/head"]) == {path.name for path in source.iterdir() if path.is_file()}
    assert load_head(target).config == CONFIG
    assert (target / "value_head.safetensors").read_bytes() == (source / "value_head.safetensors").read_bytes()


def test_a_missing_repository_and_a_hub_that_is_down_are_one_line(tmp_path: Path) -> None:
    with local_hub() as hub:
        code = f"""
for name in ('me/none',):
    try: pull_folder(name, Path({str(tmp_path / "x")!r}), None)
    except HubError as error: print('HubError', error)
"""
        missing = call(code, hub.url, tmp_path / "home").stdout
        url = hub.url
    down = call(code, url, tmp_path / "home").stdout
    for output in (missing, down):
        assert output.startswith("HubError me/none: "), output
        assert output.count("\n") == 1


def test_only_heads_and_lenvms_are_pushed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no value_head\.safetensors"):
        push_folder(tmp_path, "me/x", False)
