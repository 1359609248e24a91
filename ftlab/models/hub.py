"""Where pretrained weights are: a folder of this machine, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ftlab.errors import ConfigError
from ftlab.models.stored import KEY

HUB_TIMEOUT_S = 10.0
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_SNAPSHOT = re.compile(r"[0-9a-f]{40}")
_DESCRIPTIONS = ["*.json", "*.model", "*.jinja"]
_WEIGHTS = ["*.safetensors"]


def resolve_checkpoint(name: str, *, weights: bool = True) -> Path:
    """The folder that ``model.checkpoint`` means: a local one, or a Hub repository's, downloaded if need be.

    Args:
        name: a folder, ``owner/repository``, or ``owner/repository@revision`` with a branch, tag or commit.
        weights: False leaves them out of a download, for who wants to know first what they are.

    Raises:
        ConfigError: when it is neither, or the Hub is unreachable, refuses (gated), or knows no such id or revision.
    """
    folder = Path(name).expanduser()
    if os.path.isdir(folder):  # `is_dir` would raise on a name too long for the system
        return folder
    if os.path.exists(folder):
        raise ConfigError(KEY, f"{name} is a file, not a folder", fix=f"{KEY}={folder.parent}")
    hub_id = _HUB_ID.fullmatch(name)
    if not hub_id:
        raise ConfigError(KEY, f"there is no folder {name}", fix=f"{KEY}=/path/to/folder")
    return _download(hub_id[1], hub_id[2], [*_DESCRIPTIONS, *(_WEIGHTS if weights else [])])


def commit_of(folder: Path) -> str | None:
    """The commit of a repository that ``folder``, as ``resolve_checkpoint`` gave it, is a copy of; None for others."""
    return folder.name if folder.parent.name == "snapshots" and _SNAPSHOT.fullmatch(folder.name) else None


def _download(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    fix = f"{KEY}=/path/to/folder"
    try:
        # One cheap question first: it fails within seconds where a download would retry file after file.
        HfApi().model_info(repo_id, revision=revision, timeout=HUB_TIMEOUT_S)
        return _snapshot(repo_id, revision, patterns, local_files_only=False)
    except GatedRepoError as error:
        raise ConfigError(
            KEY,
            f"{repo_id} is gated: accept its licence at https://huggingface.co/{repo_id} and log in, "
            "or give the path of a local copy",
            fix,
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(KEY, f"{repo_id} has no revision {revision}", f"{KEY}={repo_id}") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(KEY, f"there is no folder {repo_id}, nor such a Hub repository", fix) from error
    except Exception as unreachable:  # the transport's errors differ from one huggingface_hub to the next
        try:
            return _snapshot(repo_id, revision, patterns, local_files_only=True)
        except LocalEntryNotFoundError:
            reason = next(iter(str(unreachable).splitlines()), "") or type(unreachable).__name__
            wanted = repo_id if revision is None else f"{repo_id}@{revision}"
            raise ConfigError(
                KEY, f"{wanted} is not on this machine, and the Hub cannot be reached ({reason})", fix
            ) from unreachable


def _snapshot(repo_id: str, revision: str | None, patterns: list[str], *, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=["original/*"],  # Meta's layout of the same weights
            etag_timeout=HUB_TIMEOUT_S,
            local_files_only=local_files_only,
        )
    )
