"""Pretrained weights in, trained weights out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from ftlab.errors import ConfigError, ConfigErrors
from ftlab.models.layouts import (
    HF_CONFIG,
    INDEX,
    KEY,
    SINGLE,
    Layout,
    StoredTensor,
    described_sizes,
    hf_names,
    open_folder,
)
from ftlab.models.resize import with_new_rows
from ftlab.models.safetensors_stream import SafetensorsWriter
from ftlab.models.shards import all_rows, barrier, held_rows, this_rank
from ftlab.models.transformer import ModelConfig, Transformer

MAX_SHARD_BYTES = 5_000_000_000  # what the Hub's tools and transformers use
HUB_TIMEOUT_S = 10.0
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_checkpoint(name: str) -> Path:
    """The folder that ``model.checkpoint`` means: a local one, or a Hub repository's, downloaded if need be.

    Raises:
        ConfigError: when it is neither, or the Hub is unreachable, refuses (gated) or does not know the id.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConfigError(KEY, f"{name} is a file, not a folder", fix=f"{KEY}={folder.parent}")
    if not _HUB_ID.fullmatch(name):
        raise ConfigError(KEY, f"there is no folder {name}", fix=f"{KEY}=/path/to/folder")
    return _download(name)


def _download(repo_id: str) -> Path:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    fix = f"{KEY}=/path/to/folder"
    try:
        # One cheap question first: it fails within seconds where a download would retry file after file.
        HfApi().model_info(repo_id, timeout=HUB_TIMEOUT_S)
        return _snapshot(repo_id, local_files_only=False)
    except GatedRepoError as error:
        raise ConfigError(
            KEY,
            f"{repo_id} is gated: accept its licence at https://huggingface.co/{repo_id} and log in, "
            "or give the path of a local copy",
            fix,
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(KEY, f"there is no folder {repo_id}, nor such a Hub repository", fix) from error
    except Exception as unreachable:  # the transport's errors differ from one huggingface_hub to the next
        try:
            return _snapshot(repo_id, local_files_only=True)
        except LocalEntryNotFoundError:
            reason = next(iter(str(unreachable).splitlines()), "") or type(unreachable).__name__
            raise ConfigError(
                KEY, f"{repo_id} is not on this machine, and the Hub cannot be reached ({reason})", fix
            ) from unreachable


def _snapshot(repo_id: str, *, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repo_id,
            allow_patterns=["*.json", "*.safetensors", "*.model"],
            ignore_patterns=["original/*"],  # Meta's layout of the same weights
            etag_timeout=HUB_TIMEOUT_S,
            local_files_only=local_files_only,
        )
    )


def load_weights(model: Transformer, folder: Path, new_ids: range = range(0)) -> None:
    """Copy a folder's weights into the model's parameters, in place and in their dtype.

    The folder is compared with the model first (its config.json or params.json, then every tensor's shape),
    so nothing is changed when it does not fit. Of a sharded parameter each rank reads its own rows. Peak memory
    above the parameters: one tensor, or this rank's rows of it.

    Args:
        model: parameters allocated (``to_empty``), not on meta; whole or sharded.
        folder: Hugging Face (single file or index) or Meta (consolidated.NN.pth, any number of shards)
        layout.
        new_ids: tokens that the folder knows nothing of; their rows become the mean of the known ones.

    Raises:
        ConfigError: naming the contradiction, the first tensor that does not fit, or the damaged file.
        ConfigErrors: when the folder contradicts several keys at once.
    """
    _compare_sizes(model.config, folder, but=("vocab_size",) if new_ids else ())
    layout = open_folder(folder, model.config)
    if new_ids:
        layout = with_new_rows(layout, new_ids, model.embedding.num_embeddings)
    parameters = dict(model.named_parameters())
    _compare_shapes(parameters, layout, folder)
    ours = {theirs: ours for ours, theirs in layout.names.items()}
    for name, stored in layout.tensors.items():  # in the files' order: disks like it
        if ours.get(name) in parameters:
            assign(parameters[ours[name]], stored)


@torch.no_grad()
def assign(parameter: Tensor, stored: StoredTensor) -> None:
    """Fill one parameter from its files, reading only the rows that this rank holds."""
    assert not parameter.is_meta, "copying into a meta tensor does nothing: call to_empty first"
    local, rows = held_rows(parameter)
    if len(local):
        local.copy_(stored.read(rows))


def _compare_sizes(config: ModelConfig, folder: Path, but: Collection[str]) -> None:
    file, sizes = described_sizes(folder)
    problems = []
    for key, theirs in sizes.items():
        if key in but:
            continue
        value = getattr(config, key)
        same = value == theirs or (isinstance(theirs, float) and math.isclose(value, theirs, rel_tol=1e-6))
        if not same:
            problems.append(
                ConfigError(f"model.{key}", f"{value}, but {folder / file} says {theirs}", fix=f"model.{key}={theirs}")
            )
    if problems:
        raise problems[0] if len(problems) == 1 else ConfigErrors(problems)


def _compare_shapes(parameters: Mapping[str, Tensor], layout: Layout, folder: Path) -> None:
    """Refuse a folder that lacks a tensor, has one too many, or has one of another shape."""
    missing, misshaped = [], []
    for name, parameter in parameters.items():
        theirs, shape = layout.names[name], tuple(parameter.shape)
        if theirs not in layout.tensors:
            missing.append(f"{theirs} is absent, the model has {name} {shape}")
        elif layout.tensors[theirs].shape != shape:
            misshaped.append(f"{theirs} is {layout.tensors[theirs].shape}, the model's {name} is {shape}")
    # A tied model's files may repeat the embedding as head: known by name, and not needed.
    unexpected = [
        f"{name} {stored.shape} has no place in the model"
        for name, stored in layout.tensors.items()
        if name not in layout.names.values()
    ]
    problems = [*misshaped, *missing, *unexpected]
    if problems:
        raise ConfigError(
            KEY,
            f"{folder} holds another architecture: {problems[0]}; of the model's {len(parameters)} tensors "
            f"{len(misshaped)} differ in shape, {len(missing)} are absent; {len(unexpected)} are left over",
            fix="the model option that these weights belong to",
        )


def export_weights(
    model: Transformer,
    folder: Path,
    *,
    dtype: torch.dtype,
    bos_id: int | None,
    eos_id: int | None,
    pad_id: int | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the model as a Hugging Face folder, which ``transformers.AutoModelForCausalLM`` and vLLM open.

    Writes config.json, generation_config.json and model.safetensors, or files and their index; what an earlier
    export left in the folder is removed first. config.json comes last, so that a folder cut short does not open.
    Rank 0 writes, and every rank must call it: shards come to rank 0 in pieces and go to the file at once, so
    that peak memory above the model is a few times 4 MiB.

    Args:
        model: the weights to write, whole or sharded; tied heads are left out, as transformers expects.
        folder: created if absent.
        dtype: of the files' tensors.
        bos_id, eos_id, pad_id: the tokenizer's, for whoever generates with the folder.
        max_shard_bytes: largest file; a single larger tensor still gets a file of its own.
    """
    names = hf_names(model.config.n_layers)
    parameters = {names[name]: parameter for name, parameter in model.named_parameters()}
    files = _plan_files(parameters, dtype.itemsize, max_shard_bytes)
    writes = this_rank() == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        indexed = folder.glob("model-*-of-*.safetensors")
        for stale in [folder / "config.json", folder / SINGLE, folder / INDEX, *indexed]:
            stale.unlink(missing_ok=True)
    for file, tensors in files.items():
        _write_tensors(folder / file if writes else None, {name: parameters[name] for name in tensors}, dtype)
    if writes:
        if len(files) > 1:
            total = sum(parameter.numel() for parameter in parameters.values()) * dtype.itemsize
            weight_map = {name: file for file, tensors in files.items() for name in tensors}
            _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        token_ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
        _write_json(folder / "generation_config.json", token_ids)
        _write_json(folder / "config.json", _hf_config(model.config, dtype) | token_ids)
    barrier()  # no rank goes on as if the folder were there before it is


def _write_tensors(path: Path | None, parameters: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write one file; with no ``path``, send this rank's rows to the rank that writes."""
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    with nullcontext() if path is None else SafetensorsWriter(path, shapes, dtype) as file:
        for parameter in parameters.values():
            for piece in all_rows(parameter):  # there are some on rank 0 only
                assert file is not None
                file.write(piece)
            barrier()  # else a rank with little to send would wait for the disk in its next collective, and time out


def _plan_files(parameters: Mapping[str, Tensor], itemsize: int, max_bytes: int) -> dict[str, list[str]]:
    """File name -> the tensors it holds, filled in the model's order."""
    groups: list[list[str]] = []
    free = 0
    for name, parameter in parameters.items():
        size = parameter.numel() * itemsize
        if size > free or not groups:
            groups.append([])
            free = max_bytes
        groups[-1].append(name)
        free -= size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _hf_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, object]:
    sizes = {theirs: getattr(config, ours) for ours, theirs in HF_CONFIG.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "max_position_embeddings": config.max_seq_len,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
