"""Pretrained weights in, trained weights out."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from ftlab.errors import ConfigError, ConfigErrors
from ftlab.models.config import ModelConfig
from ftlab.models.hf import HFTransformer
from ftlab.models.hf_layout import CONFIG, INDEX, SINGLE
from ftlab.models.layouts import Layout, described_sizes, open_folder
from ftlab.models.meta_layout import PARAMS, is_rotated, meta_names, meta_params, pairs_from_halves
from ftlab.models.resize import with_new_rows
from ftlab.models.safetensors_stream import SafetensorsWriter
from ftlab.models.shards import all_rows, barrier, held_rows, this_rank
from ftlab.models.stored import KEY, StoredTensor
from ftlab.models.transformer import Transformer

PIECE_BYTES = 2**20  # read together
MAX_SHARD_BYTES = 5_000_000_000  # what the Hub's tools and transformers use


def load_weights(model: Transformer | HFTransformer, folder: Path, new_ids: range = range(0)) -> None:
    """Copy a folder's weights into the model's parameters, in place and in their dtype.

    The folder is compared with the model first (its config.json or params.json, then every tensor's shape),
    so nothing is changed when it does not fit. Of a sharded parameter each rank reads its own rows. Peak memory
    above the parameters: some pieces of 1 MiB of one tensor.

    Args:
        model: parameters allocated (``to_empty``), not on meta; whole or sharded.
        folder: Hugging Face (single file or index) or Meta (consolidated.NN.pth, any number of shards)
        layout.
        new_ids: tokens that the folder knows nothing of; their rows become the mean of the known ones.

    Raises:
        ConfigError: naming the contradiction, the first tensor that does not fit, or the damaged file.
        ConfigErrors: when the folder contradicts several keys at once.
    """
    for _, parameter, stored in stored_tensors(model, folder, new_ids):
        assign(parameter, stored)


def stored_tensors(
    model: Transformer | HFTransformer, folder: Path, new_ids: range = range(0)
) -> Iterator[tuple[str, Tensor, StoredTensor]]:
    """Name, parameter, and what the folder holds for it, in the files' order: disks like it.

    Raises:
        ConfigError, ConfigErrors: as `load_weights`, before the first is given.
    """
    if isinstance(model, Transformer):
        compare_sizes(model.config, folder, but=("vocab_size",) if new_ids else ())
        layout = open_folder(folder, model.config)
        if new_ids:
            layout = with_new_rows(layout, new_ids, model.embedding.num_embeddings)
    elif new_ids:
        raise ConfigError("tokenizer.added_tokens", "model=hf keeps the vocabulary of its checkpoint")
    else:
        layout = model.open_folder(folder)
    parameters = dict(model.named_parameters())
    if misfit := _misfit(parameters, layout):
        raise _another_architecture(folder, misfit)
    ours = {theirs: ours for ours, theirs in layout.names.items()}
    for name, stored in layout.tensors.items():
        if ours.get(name) in parameters:
            yield ours[name], parameters[ours[name]], stored


@torch.no_grad()
def assign(parameter: Tensor, stored: StoredTensor) -> None:
    """Fill one parameter from its files, reading only the rows that this rank holds."""
    assert not parameter.is_meta, "copying into a meta tensor does nothing: call to_empty first"
    local, rows = held_rows(parameter)
    # In pieces: what is read goes through memory once more, and an embedding can be a tenth of a model.
    n_rows = max(1, PIECE_BYTES * len(local) // max(local.nbytes, 1))
    for start in range(rows.start, rows.stop, n_rows):
        piece = slice(start, min(start + n_rows, rows.stop))
        local[piece.start - rows.start : piece.stop - rows.start].copy_(stored.read(piece))


def compare_sizes(config: ModelConfig, folder: Path, but: Collection[str]) -> None:
    """Refuse a folder whose config.json or params.json contradicts ``config``, in other keys than ``but``.

    Raises:
        ConfigError: naming the key and both values; or, for a folder of quite another model, all of them.
        ConfigErrors: when it contradicts two keys.
    """
    file, sizes = described_sizes(folder)
    differing = {key: (getattr(config, key), theirs) for key, theirs in sizes.items() if key not in but}
    differing.pop("max_seq_len", None)  # a user's to choose
    differing = {key: (ours, theirs) for key, (ours, theirs) in differing.items() if not _equal(ours, theirs)}
    if not differing:
        return
    rows = sizes.get("vocab_size", config.vocab_size) if "vocab_size" in but else config.vocab_size
    misfit = _first_misfit(config.replace(vocab_size=rows), folder)
    if len(differing) > 2:
        values = ", ".join(f"{key} {theirs} instead of {ours}" for key, (ours, theirs) in differing.items())
        raise _another_architecture(folder, f"{file} says {values}" + (f"; {misfit}" if misfit else ""))
    problems: list[ConfigError] = []
    for key, (ours, theirs) in differing.items():
        plain = theirs is None or isinstance(theirs, (int, float))
        fix = f"model.{key}={'null' if theirs is None else theirs}" if plain else "model=auto"
        problem = f"{ours}, but {folder / file} says {theirs}" + (f"; {misfit}" if misfit and not problems else "")
        problems.append(ConfigError(f"model.{key}", problem, fix))
    raise problems[0] if len(problems) == 1 else ConfigErrors(problems)


def _equal(ours: object, theirs: object) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return ours == theirs


def _another_architecture(folder: Path, how: str) -> ConfigError:
    return ConfigError(KEY, f"{folder} holds another architecture: {how}", f"model=auto {KEY}={folder}")


def _first_misfit(config: ModelConfig, folder: Path) -> str | None:
    """As ``_misfit``, of a model that is not built, and weights that may not be here yet."""
    try:
        with torch.device("meta"):
            parameters = dict(config.build().named_parameters())
        return _misfit(parameters, open_folder(folder, config))
    except ConfigError:
        return None


def _misfit(parameters: Mapping[str, Tensor], layout: Layout) -> str | None:
    """The first tensor that a folder lacks, has one too many of, or has in another shape, and how many there are."""
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
    if not problems:
        return None
    return (
        f"{problems[0]}; of the model's {len(parameters)} tensors "
        f"{len(misshaped)} differ in shape, {len(missing)} are absent; {len(unexpected)} are left over"
    )


def export_weights(
    model: Transformer | HFTransformer,
    folder: Path,
    *,
    dtype: torch.dtype,
    bos_id: int | None,
    eos_id: int | Sequence[int] | None,
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
        bos_id, eos_id, pad_id: for whoever generates with the folder; several that end an answer are a list there.
        max_shard_bytes: largest file; a single larger tensor still gets a file of its own.
    """
    names = model.hf_names()
    parameters = {names[name]: parameter for name, parameter in model.named_parameters()}
    files = _plan_files(parameters, dtype.itemsize, max_shard_bytes)
    writes = this_rank() == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        indexed = folder.glob("model-*-of-*.safetensors")
        for stale in [folder / CONFIG, folder / SINGLE, folder / INDEX, *indexed]:
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
        described = model.hf_config(str(dtype).removeprefix("torch."))
        known = {key: token for key, token in token_ids.items() if token is not None}
        _write_json(folder / CONFIG, token_ids | described | known)
    barrier()  # no rank goes on as if the folder were there before it is


def export_meta_weights(model: Transformer, folder: Path, *, dtype: torch.dtype) -> None:
    """Write the model in Meta's layout: consolidated.00.pth and params.json.

    Every rank must call it, and rank 0 writes; it holds the whole model in ``dtype`` while it does, as the format
    wants. A tied head is written out, as Meta's own files have it.

    Raises:
        ConfigError: for a family that Meta's code does not compute.
    """
    config = model.config
    if config.family != "llama":
        raise ConfigError("model.family", f"Meta's layout is for Llamas, and this is a {config.family}")
    assert config.head_dim is not None  # ModelConfig resolved it
    state = {}
    for name, theirs in meta_names(config).items():
        tied = name == "head.weight" and config.tie_embeddings
        pieces = list(all_rows(model.get_parameter("embedding.weight" if tied else name)))
        if pieces:  # on rank 0
            whole = torch.cat(pieces).to(dtype)
            state[theirs] = pairs_from_halves(whole, config.head_dim) if is_rotated(theirs) else whole
        barrier()
    if this_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in [folder / PARAMS, *folder.glob("consolidated.*.pth")]:
            stale.unlink(missing_ok=True)
        torch.save(state, folder / "consolidated.00.pth")
        _write_json(folder / PARAMS, meta_params(config))
    barrier()


def _write_tensors(path: Path | None, parameters: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write one file; with no ``path``, send this rank's rows to the rank that writes."""
    with nullcontext() if path is None else path.open("wb") as file:
        shapes = {name: (tuple(parameter.shape), dtype) for name, parameter in parameters.items()}
        writer = None if file is None else SafetensorsWriter(file, shapes)
        for parameter in parameters.values():
            for piece in all_rows(parameter):  # there are some on rank 0 only
                assert writer is not None
                writer.write(piece.to(dtype))
            barrier()  # else a rank with little to send would wait for the disk in its next collective, and time out
        if writer is not None:
            writer.finish()


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


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
