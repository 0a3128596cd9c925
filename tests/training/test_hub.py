"""Push and pull against a local stand-in of the hub, by the library's own HTTP client in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from lenvm_kernels.checkpoint import Head, load_head, save_head
from lenvm_kernels.checkpoint_files import find_kind
from lenvm_kernels.heads import CandidateHead, HeadConfig, ValueHead
from lenvm_training.model import ModelSettings, build_lenvm, load_lenvm, save_lenvm
from lenvm_training.targets import TargetConfig
from local_hub import TOKEN, LocalHub, local_hub
from tiny import make_backbone, make_tokenizer

CONFIG = HeadConfig("tiny", 16, 50, 0.97, 4, 64, 8, (), (2,))
PART = 10_000
COMMANDS = """
import io, json, sys, time
from contextlib import redirect_stderr, redirect_stdout
time.sleep = lambda _: None  # the library's waits between its tries
from lenvm_training import commands
for line in sys.stdin:
    name, *arguments = json.loads(line)
    with redirect_stdout(io.StringIO()) as output, redirect_stderr(io.StringIO()) as errors:
        status = getattr(commands, name)(arguments)
    print(json.dumps([status, output.getvalue(), errors.getvalue()]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    status: int
    output: str
    errors: str

    @property
    def line(self) -> str:
        """The only one on standard error."""
        (line,) = self.errors.splitlines()
        return line


Lenvm = Callable[..., Ended]


@contextmanager
def commands_process(endpoint: str, home: Path) -> Iterator[Lenvm]:
    """Yields what runs a command, ``lenvm("pull", NAME, FOLDER)``, in a process whose hub is ``endpoint``."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command, pipe = [sys.executable, "-c", COMMANDS], subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin
        assert process.stdout
        requests, answers = process.stdin, process.stdout

        def run(*arguments: object) -> Ended:
            requests.write(json.dumps([str(argument) for argument in arguments]) + "\n")
            requests.flush()
            return Ended(*json.loads(answers.readline()))

        yield run
        requests.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalHub, Lenvm]]:
    with local_hub() as hub, commands_process(hub.url, tmp_path_factory.mktemp("home")) as lenvm:
        yield hub, lenvm


@pytest.fixture
def hub(running: tuple[LocalHub, Lenvm]) -> LocalHub:
    running[0].reset()
    return running[0]


@pytest.fixture
def lenvm(running: tuple[LocalHub, Lenvm]) -> Lenvm:
    return running[1]


def make_folder(kind: str, folder: Path) -> Path:
    """What training leaves: the result and what is beside it."""
    if kind == "heads":
        save_head(Head(CONFIG, ValueHead(16), CandidateHead(CONFIG)), folder)
    else:
        backbone = make_backbone(folder.parent / "backbone")
        save_lenvm(build_lenvm(ModelSettings(str(backbone), "served", kind=kind), TargetConfig(gamma=0.9)), folder)
        make_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A LenVM\n")
    (folder / "loss.png").write_bytes(b"\x89PNG" + bytes(range(256)))
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(b"x")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def puts(hub: LocalHub) -> list[str]:
    return [request for request in hub.requests if request.startswith("PUT ")]


@pytest.mark.parametrize("kind", ["full", "lora", "heads"])
@pytest.mark.parametrize("part_size", [0, PART])
def test_a_folder_goes_to_the_hub_and_comes_back(
    tmp_path: Path, hub: LocalHub, lenvm: Lenvm, kind: str, part_size: int
) -> None:
    source, target = make_folder(kind, tmp_path / "source"), tmp_path / "back"
    hub.part_size = part_size
    pushed = lenvm("push", source, "me/x", "--private")
    assert (pushed.status, pushed.errors) == (0, "")
    assert pushed.output.startswith(f"{hub.url}/me/x/commit/")
    pulled = lenvm("pull", "me/x", target)
    assert (pulled.status, pulled.errors) == (0, "")
    sent, back = contents(source), contents(target)
    assert back.pop(".gitattributes") == hub.files["me/x"].pop(".gitattributes")
    assert sent == hub.files["me/x"] == back
    weights = {name: content for name, content in sent.items() if name.endswith(".safetensors")}
    names = {"full": "model", "lora": "adapter_model", "heads": "candidate_head"}
    assert set(weights) == {"value_head.safetensors", f"{names[kind]}.safetensors"}
    assert set(hub.objects) == {hashlib.sha256(content).hexdigest() for content in weights.values()}
    parts = [-(-len(content) // PART) if part_size and len(content) > PART else 1 for content in weights.values()]
    assert len(puts(hub)) == sum(parts)
    assert (max(parts) > 2) == bool(part_size and kind != "heads")
    if kind == "heads":
        assert load_head(target).config == CONFIG
    else:
        first, again = (load_lenvm(folder).state_dict() for folder in (source, target))
        assert all(again[name].equal(first[name]) for name in first)


@pytest.mark.parametrize(
    ("refused", "damaged", "said"),
    [
        ("PUT /storage/", "", "500 Internal Server Error"),
        ("POST /lfs/verify", "", "500 Internal Server Error"),
        ("POST /me/x.git/info/lfs/objects/batch", "", "500 Internal Server Error"),
        ("POST /api/models/me/x/commit/main", "", "500 Internal Server Error"),
        ("", "PUT", "422 Unprocessable"),
    ],
)
@pytest.mark.parametrize("part_size", [0, 1000])
def test_a_broken_upload_is_one_line_and_goes_on(
    tmp_path: Path, hub: LocalHub, lenvm: Lenvm, refused: str, damaged: str, said: str, part_size: int
) -> None:
    source = make_folder("heads", tmp_path / "source")
    hub.part_size = part_size
    hub.refused, hub.damaged = ({refused: 500} if refused else {}), ({damaged} if damaged else set())
    broken = lenvm("push", source, "me/x")
    assert broken.status == 1
    assert broken.line.startswith("lenvm push: me/x: ")
    assert said in broken.line
    assert broken.line.endswith("(run the same command again to go on)")
    assert set(hub.files["me/x"]) == {".gitattributes"}, "all files are one commit"
    hub.refused, hub.damaged = {}, set()
    assert lenvm("push", source, "me/x").status == 0
    assert contents(source).items() <= hub.files["me/x"].items()


def test_what_is_uploaded_already_is_not_sent_again(tmp_path: Path, hub: LocalHub, lenvm: Lenvm) -> None:
    source = make_folder("heads", tmp_path / "source")
    oid = hashlib.sha256((source / "value_head.safetensors").read_bytes()).hexdigest()
    hub.refused = {f"PUT /storage/{oid}": 500}
    broken = lenvm("push", source, "me/x")
    assert broken.status == 1
    assert "value_head.safetensors" in broken.line
    hub.refused = {}
    hub.requests.clear()
    assert lenvm("push", source, "me/x").status == 0
    assert puts(hub) == [f"PUT /storage/{oid}"]


def test_a_damaged_download_is_one_line_and_is_fetched_again(tmp_path: Path, hub: LocalHub, lenvm: Lenvm) -> None:
    source, target = make_folder("heads", tmp_path / "source"), tmp_path / "back"
    assert lenvm("push", source, "me/x").status == 0
    hub.damaged = {"GET"}
    broken = lenvm("pull", "me/x", target)
    assert broken.status == 1
    assert "me/x: candidate_head.safetensors, value_head.safetensors: not what the hub has, removed" in broken.line
    assert broken.line.endswith("(run the same command again to go on)")
    hub.damaged = set()
    assert lenvm("pull", "me/x", target).status == 0
    assert contents(source).items() <= contents(target).items()


def test_a_hub_that_is_down_is_one_line_whatever_is_in_the_folder(tmp_path: Path) -> None:
    source = make_folder("heads", tmp_path / "source")
    with local_hub() as hub:
        url = hub.url
    with commands_process(url, tmp_path / "home") as lenvm:
        for call in (("pull", "me/x", source), ("pull", "me/x", tmp_path / "new"), ("push", source, "me/x")):
            down = lenvm(*call)
            assert down.status == 1
            assert down.line.startswith(f"lenvm {call[0]}: me/x: ")
            assert "refused" in down.line


def test_what_another_try_cannot_cure_is_bad_input(tmp_path: Path, hub: LocalHub, lenvm: Lenvm) -> None:
    source = make_folder("heads", tmp_path / "source")
    hub.refused = {"POST /api/models/me/closed/preupload": 403}
    missing = lenvm("pull", "me/none", tmp_path / "new")
    assert missing.status == 2
    assert missing.line.startswith("lenvm pull: me/none: 404 Client Error.")
    assert "Repository Not Found" in missing.line
    closed = lenvm("push", source, "me/closed")
    assert closed.status == 2
    assert closed.line.startswith("lenvm push: me/closed: 403 Forbidden")
    for name in ("me/..x", "a/b/c"):
        unusable = lenvm("push", source, name)
        assert unusable.status == 2
        assert unusable.line.startswith(f"lenvm push: {name}: Repo id must")


def test_only_heads_and_lenvms_are_pushed_and_pulled(tmp_path: Path, hub: LocalHub, lenvm: Lenvm) -> None:
    (tmp_path / "source").mkdir()
    hub.files["me/other"] = {"README.md": b"# Something else\n"}
    for call in (("push", tmp_path / "source", "me/x"), ("pull", "me/other", tmp_path / "new")):
        ended = lenvm(*call)
        assert ended.status == 2
        assert "no value_head.safetensors" in ended.line
    assert "me/x" not in hub.files


@pytest.mark.parametrize(("old", "new"), [("heads", "full"), ("lora", "full"), ("full", "lora"), ("full", "heads")])
def test_a_lenvm_of_another_kind_takes_the_place_of_the_old_one(
    tmp_path: Path, hub: LocalHub, lenvm: Lenvm, old: str, new: str
) -> None:
    first, second = (make_folder(kind, tmp_path / kind / "lenvm") for kind in (old, new))
    back = tmp_path / "back"
    for call in (("push", first, "me/x"), ("pull", "me/x", back)):
        assert lenvm(*call).status == 0
    hub.files["me/x"]["notes.md"] = b"kept"
    assert lenvm("push", second, "me/x").status == 0
    assert hub.files["me/x"]["notes.md"] == b"kept"
    assert lenvm("pull", "me/x", tmp_path / "new").status == 0
    assert find_kind(tmp_path / "new") is find_kind(second)
    before = contents(back)
    mixed = lenvm("pull", "me/x", back)
    assert mixed.status == 2
    left = {"heads": "candidate_head", "lora": "adapter_config.json, adapter_model", "full": "model"}[old]
    assert f"{left}.safetensors in {back}; pull into another folder" in mixed.line
    assert contents(back) == before


def test_a_head_beside_its_model_removes_nothing(tmp_path: Path, hub: LocalHub, lenvm: Lenvm) -> None:
    model = {"config.json": b"{}", "model.safetensors": b"weights"}
    hub.files["me/model"] = {".gitattributes": b"", **model}
    assert lenvm("push", make_folder("heads", tmp_path / "source"), "me/model").status == 0
    assert model.items() <= hub.files["me/model"].items()
    assert "candidate_head.safetensors" in hub.files["me/model"]


def test_what_a_checkpoint_resumes_from_stays_here(tmp_path: Path, hub: LocalHub, lenvm: Lenvm) -> None:
    source = make_folder("heads", tmp_path / "source")
    sent = set(contents(source))
    (source / "global_step3").mkdir()
    for name in (
        *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "trainer_state.json"),
        *("training_args.bin", "global_step3/states.pt"),
    ):
        (source / name).write_bytes(b"x")
    assert lenvm("push", source, "me/x").status == 0
    assert set(hub.files["me/x"]) == {*sent, ".gitattributes"}


def test_nothing_private_goes_into_a_public_repository(tmp_path: Path, hub: LocalHub, lenvm: Lenvm) -> None:
    source = make_folder("heads", tmp_path / "source")
    hub.files["me/public"] = {".gitattributes": b""}
    refused = lenvm("push", source, "me/public", "--private")
    assert refused.status == 2
    assert refused.line == "lenvm push: me/public: is there already, and public; nothing is uploaded"
    assert set(hub.files["me/public"]) == {".gitattributes"}
    assert not puts(hub)
    for call in (("me/public",), ("me/private", "--private"), ("me/private", "--private"), ("me/private",)):
        assert lenvm("push", source, *call).status == 0
    assert hub.private == {"me/private"}
