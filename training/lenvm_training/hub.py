"""Heads and LenVMs to and from the hub, by huggingface_hub (HF_TOKEN, HF_ENDPOINT and its other variables hold)."""

from __future__ import annotations

from pathlib import Path

import httpx
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from lenvm_kernels.checkpoint_files import BACKBONE_CONFIG_FILE, CONFIG_FILE, VALUE_FILE

LEFT_OUT = ("checkpoint-*", "runs/*", "*.partial", ".cache/*")
CONFIG_FILES = (BACKBONE_CONFIG_FILE, CONFIG_FILE)


class HubError(RuntimeError):
    """The hub refused or did not answer; the message is one line."""


def push_folder(folder: Path, repository: str, private: bool) -> str:
    """Upload a head or LenVM folder as a model repository, made if it is not there; returns the commit's address.

    Raises ValueError when the folder holds none, HubError.
    """
    _check_folder(folder)
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, ignore_patterns=list(LEFT_OUT), commit_message="LenVM"
        )
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, httpx.HTTPError) as error:
        raise HubError(f"{repository}: {_first_line(error)}") from None
    return str(commit.commit_url)


def pull_folder(repository: str, folder: Path, revision: str | None) -> None:
    """Download a repository into ``folder``. Raises ValueError when it holds no LenVM, HubError."""
    try:
        snapshot_download(repository, revision=revision, local_dir=folder)
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        httpx.HTTPError,
    ) as error:
        raise HubError(f"{repository}: {_first_line(error)}") from None
    _check_folder(folder)


def _check_folder(folder: Path) -> None:
    if not (folder / VALUE_FILE).is_file():
        raise ValueError(f"{folder}: no {VALUE_FILE}: not a head or LenVM folder")
    if not any((folder / name).is_file() for name in CONFIG_FILES):
        raise ValueError(f"{folder}: neither {' nor '.join(CONFIG_FILES)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
