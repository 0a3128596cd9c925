"""Heads and LenVMs to and from the hub, by huggingface_hub (HF_TOKEN, HF_ENDPOINT and its other variables hold)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from huggingface_hub import HfApi, ModelInfo, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects

from lenvm_kernels.checkpoint_files import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    BACKBONE_CONFIG_FILE,
    CANDIDATE_FILE,
    CONFIG_FILE,
    VALUE_FILE,
)

OF_RESUMING = (
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json", "training_args.bin"),
    "global_step*/*",
)
"""What a checkpoint holds beside its LenVM."""
LEFT_OUT = ("checkpoint-*", "runs/*", "*.partial", ".cache/*", *OF_RESUMING)
CONFIG_FILES = (BACKBONE_CONFIG_FILE, CONFIG_FILE)
BACKBONE_WEIGHTS = tuple(
    name + suffix
    for name, end in (("model", ".safetensors"), ("pytorch_model", ".bin"))
    for suffix in (end, f"-?????-of-?????{end}", f"{end}.index.json")
)
OF_ONE_KIND = (*CONFIG_FILES, CANDIDATE_FILE, ADAPTER_CONFIG_FILE, ADAPTER_FILE, *BACKBONE_WEIGHTS)
"""Files that make a folder this or that kind of LenVM: none may be left from another one."""
PASSING_STATUS = frozenset({408, 409, 423, 425, 429})
"""Refusals that another try can cure, as those of 500 and above."""
DAMAGED_UPLOAD = 422
"""Of a file that did not come as it was announced."""
FOR_MORE = "For more information check: "
"""How httpx begins a line on what a status means."""


class HubError(RuntimeError):
    """The hub did not answer, or an upload or download broke off; the message is one line."""


class HubRefusalError(ValueError):
    """The hub refused what another try would ask for again (no such repository, no right to it)."""


def push_folder(folder: Path, repository: str, private: bool) -> str:
    """Upload a head or LenVM folder as a model repository, made if it is not there; returns the commit's address.

    What an earlier push that broke off has uploaded is not sent again. Of a LenVM that the repository holds already,
    the files that this one does not have are removed. Raises ValueError when the folder holds none, the name is
    unusable, or the repository is public and must be ``private``; HubRefusalError, HubError.
    """
    _check_folder(folder)
    with _hub_errors(repository):
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        there = api.model_info(repository)
        if private and not there.private:
            raise ValueError("is there already, and public; nothing is uploaded")
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=list(LEFT_OUT),
            delete_patterns=list(OF_ONE_KIND) if VALUE_FILE in _file_names(there) else None,
            commit_message="LenVM",
        )
    return str(commit.commit_url)


def pull_folder(repository: str, folder: Path, revision: str | None) -> None:
    """Download a repository into ``folder``: files that are there as the hub has them are not fetched again.

    Raises ValueError when it holds no LenVM or ``folder`` one of other files, HubRefusalError, HubError.
    """
    with _hub_errors(repository):
        api = HfApi()
        info = api.model_info(repository, revision=revision)
        commit = info.sha  # without it, an old folder would do for a hub down
        _check_none_left(folder, _file_names(info))
        snapshot_download(repository, revision=commit, local_dir=folder)
        found = api.verify_repo_checksums(repository, revision=commit, local_dir=folder)
    damaged = [mismatch["path"] for mismatch in found.mismatches]
    for path in damaged:
        (folder / path).unlink()
    if damaged:
        raise HubError(f"{repository}: {', '.join(damaged)}: not what the hub has, removed")
    _check_folder(folder)


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """What the library raises as one line that names the repository."""
    try:
        yield
    except (HfHubHTTPError, RuntimeError) as error:  # RuntimeError: the library's own where an upload by LFS fails
        raise _kind(error)(f"{repository}: {_text(error)}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.HTTPError) as error:
        raise HubError(f"{repository}: {_text(error)}") from None
    except OSError as error:  # without a number: the library's own for a download of another length
        if error.errno is not None:
            raise
        raise HubError(f"{repository}: {_text(error)}") from None
    except ValueError as error:
        raise ValueError(f"{repository}: {_text(error)}") from None


def _kind(error: Exception) -> type[Exception]:
    """Whether another try can help."""
    cause = error if isinstance(error, HfHubHTTPError) else error.__cause__
    if not isinstance(cause, HfHubHTTPError):
        return HubError
    status = cause.response.status_code
    passing = status >= 500 or status in PASSING_STATUS or (cause is not error and status == DAMAGED_UPLOAD)
    return HubError if passing else HubRefusalError


def _file_names(repository: ModelInfo) -> set[str]:
    return {file.rfilename for file in repository.siblings or ()}


def _check_none_left(folder: Path, pulled: set[str]) -> None:
    """Raises ValueError where files of another LenVM would stay in ``folder``."""
    there = filter_repo_objects((path.name for path in sorted(folder.glob("*"))), allow_patterns=list(OF_ONE_KIND))
    left = [name for name in there if name not in pulled]
    if left:
        raise ValueError(f"does not have the {', '.join(left)} in {folder}; pull into another folder")


def _check_folder(folder: Path) -> None:
    if not (folder / VALUE_FILE).is_file():
        raise ValueError(f"{folder}: no {VALUE_FILE}: not a head or LenVM folder")
    if not any((folder / name).is_file() for name in CONFIG_FILES):
        raise ValueError(f"{folder}: neither {' nor '.join(CONFIG_FILES)}")


def _text(error: BaseException) -> str:
    """The first two lines that say something (the first of many hub errors is a status), and what caused it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith(FOR_MORE)]
    text = " ".join(lines[:2]) or repr(error)
    return f"{text} ({_text(error.__cause__)})" if isinstance(error, RuntimeError) and error.__cause__ else text
