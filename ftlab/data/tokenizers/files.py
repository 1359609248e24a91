"""Where a tokenizer's files are: a file, a folder or a Hub repository; and what is said when they are not."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftlab.data.tokenizers.base import CHAT_TEMPLATE, TOKENIZER_CONFIG, TOKENIZER_JSON
from ftlab.errors import ConfigError
from ftlab.storage.disk import read_small_file

KEY = "tokenizer.path"
MODEL_FILE = "tokenizer.model"
BESIDE = (TOKENIZER_CONFIG, "special_tokens_map.json", CHAT_TEMPLATE, "generation_config.json", "config.json")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_TIMEOUT_S = 10
_MAX_BYTES = 2**30  # of one file; the largest vocabularies take a few dozen MiB


def find_file(path: str | None, names: Sequence[str]) -> Path:
    """The file that ``path`` means: itself, or the first of ``names`` that its folder holds.

    Args:
        path: a file, a folder, or a Hub id, whose files are fetched together with those ``BESIDE`` them.
        names: of the files that would do, best first.

    Raises:
        ConfigError: when there is none, saying which are expected and what is there instead.
    """
    fix = f"{KEY}=/path/to/{names[-1]}"
    if path is None:
        raise ConfigError(KEY, "is null and so is model.checkpoint, where it is looked for by default", fix)
    local = Path(path).expanduser()
    if os.path.isfile(local):  # `is_file` would raise on a name too long for the system
        return local
    if not os.path.isdir(local) and not _HUB_ID.fullmatch(path):
        expected = f"expected a {names[0]} file or a folder that holds {' or '.join(names)}"
        raise ConfigError(KEY, f"{local.absolute()} does not exist; {expected}", fix)
    folder = local.resolve() if local.is_dir() else _fetch(path, names)
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is not None:
        return found
    where = f"the folder {folder}" if local.is_dir() else f"the Hub's {path}"
    if TOKENIZER_JSON not in names and (folder / TOKENIZER_JSON).is_file():
        problem = f"{where} holds no {' or '.join(names)}, but {TOKENIZER_JSON}, which is for tokenizer=huggingface"
        raise ConfigError(KEY, problem, "tokenizer=huggingface")
    holds = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise ConfigError(KEY, f"{where} holds no {' or '.join(names)}; it holds {holds}", fix)


def read_bytes(file: Path) -> bytes:
    """The content of a tokenizer's file.

    Raises:
        ConfigError: for the pointer that git leaves where git-LFS did not fetch the file.
    """
    try:
        content = read_small_file(file, _MAX_BYTES)
    except OSError as error:
        raise ConfigError(KEY, f"{file} {error.strerror}") from error
    if content.startswith(b"version https://git-lfs"):
        problem = f"{file} is a git-LFS pointer of {len(content)} bytes, not the tokenizer"
        raise ConfigError(KEY, problem, f"git -C {file.parent} lfs pull")
    return content


def read_json_beside(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in the file ``name`` of ``folder``; empty where there is no such file.

    Raises:
        ConfigError: for a file that is no JSON object, a truncated one for example.
    """
    file = folder / name
    if not file.is_file():
        return {}
    content = read_bytes(file)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(KEY, f"{file} ({len(content)} bytes) is no JSON, or truncated: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(KEY, f"{file} is no JSON object")
    return found


def _fetch(repo_id: str, names: Sequence[str]) -> Path:
    """The folder in the Hub's cache that holds the tokenizer's files of ``repo_id``."""
    # Not needed for local files, and half a second to import.
    from huggingface_hub import HfApi, snapshot_download

    wanted = [*names, *BESIDE]
    try:
        try:
            # A plain request first: it fails at once without a network, where a download retries for 20 s.
            HfApi().model_info(repo_id, timeout=_HUB_TIMEOUT_S)
            return Path(snapshot_download(repo_id, allow_patterns=wanted))
        except Exception as unreachable:
            try:
                return Path(snapshot_download(repo_id, allow_patterns=wanted, local_files_only=True))
            except Exception:
                raise unreachable from None
    except Exception as error:  # the Hub's client, its HTTP library and the socket each raise their own kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            KEY,
            f"there is no local file {repo_id!r}, and {' or '.join(names)} of the Hub's {repo_id} "
            f"cannot be had: {reason}",
            f"{KEY}=/path/to/{names[-1]}   (a gated model also needs HF_TOKEN)",
        ) from error
