"""What must not be written: values that are secrets, masked wherever they turn up."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from ftlab.outputs.files import to_yaml
from ftlab.storage.disk import replace_file

MASK = "***"


# Environment variables whose *value* is a secret, wherever it turns up. AWS_REGION and AWS_PROFILE are no
# secrets, and masking "us-east-1" out of every bucket name would cost the reader more than it protects.
_SECRET_ENV = re.compile(r"(_TOKEN|_API_?KEY|_ACCESS_KEY(_ID)?|_SECRET.*|_PASSWORD|_PASSWD)$|^(TOKEN|PASSWORD)$")
_MIN_SECRET_LENGTH = 8  # shorter values ("none", "true", "x") would mask ordinary words

# Names under which a value is secret. `token` only as the whole name, or after a word that makes it an access
# token: eos_token, max_new_tokens, tokenizer and train/tokens are the daily bread of this project.
_SECRET_NAME = (
    r"(?:\w*(?:api_?key|password|passwd|credentials|secret(?:_(?:access_)?key)?|private_key|access_key(?:_id)?)"
    r"|(?:\w*_)?(?:access|auth|api|hf|hub)_token|token)"
)
_SECRET_KEY = re.compile(rf"(?:.*[./])?{_SECRET_NAME}", re.IGNORECASE)
# `name=value` and `name: "value"` inside a string: overrides, command lines, query strings, printed mappings.
# Numbers stay ("loss per token: 0.693147"), and so do interpolations, which hold a secret's name only, and the fields
# of a prompt ("Password: {input}").
_ASSIGNMENT = re.compile(
    rf"(?<!\w)({_SECRET_NAME}[\"']?\s?[=:]\s?[\"']?)(?!\$?\{{|[\d.]+\b(?!\w))[^\s\"',;&}}\]]{{6,}}",
    re.IGNORECASE,
)
_URL_LOGIN = re.compile(r"(\w://)[^\s/@:]*:[^\s/]+@")
_TOKEN_SHAPE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-(?=[\w-]*\d)[\w-]{16,}|AKIA[0-9A-Z]{12,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}|wandb_v1_\w{16,})"
)


def mask_secrets(obj: Any) -> Any:
    """A copy of ``obj`` in which every secret reads ``***``; what is not a secret comes back unchanged.

    Masked are: values of environment variables that hold secrets, logins in URLs, the shapes of well-known
    access tokens, and whatever stands under a name that says secret (``api_key``, ``password``, ``token``).

    Args:
        obj: str, or dict / list / tuple of such, nested at will; other types pass through.
    """
    return _mask(obj, _environment_secrets())


def _environment_secrets() -> list[str]:
    found = {v for k, v in os.environ.items() if _SECRET_ENV.search(k) and len(v) >= _MIN_SECRET_LENGTH}
    return sorted(found, key=len, reverse=True)  # a secret that contains another one goes first


def _mask(obj: Any, secrets: list[str]) -> Any:
    match obj:
        case str():
            return _mask_text(obj, secrets)
        case dict():
            return {_mask(key, secrets): _mask_item(key, value, secrets) for key, value in obj.items()}
        case list() | tuple():
            return type(obj)(_mask(item, secrets) for item in obj)
        case _:
            return obj


def _mask_item(key: Any, value: Any, secrets: list[str]) -> Any:
    if value in (None, "") or isinstance(value, bool) or not isinstance(key, str):
        return _mask(value, secrets)
    return MASK if _SECRET_KEY.fullmatch(key) else _mask(value, secrets)


def _mask_text(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, MASK)
    text = _URL_LOGIN.sub(rf"\1{MASK}@", text)
    text = _TOKEN_SHAPE.sub(MASK, text)
    return _ASSIGNMENT.sub(rf"\1{MASK}", text)


def mask_files(folder: Path) -> None:
    """Mask the YAML files directly in ``folder`` in place; a file without a secret is not touched.

    For ``.hydra/``, which Hydra writes by itself before ftlab gets a say.
    """
    for path in sorted(folder.glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        masked = mask_secrets(content)
        if masked != content:
            replace_file(path, to_yaml(masked))
