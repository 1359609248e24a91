"""Exports that were proven: written, read back, compared with the trained model, and only then called done."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftlab.data.loader import permutation
from ftlab.data.tokenizers import Tokenizer
from ftlab.distributed.base import Parallelism
from ftlab.distributed.precision import Precision
from ftlab.errors import ConfigError, FtlabError
from ftlab.models.auto import AnyModel
from ftlab.models.shards import held_rows, this_rank
from ftlab.models.transformer import Transformer
from ftlab.models.weights import export_meta_weights, export_weights, load_weights, stored_tensors
from ftlab.outputs.files import to_json
from ftlab.storage import disk

MANIFEST = "MANIFEST.json"
_PROBES, _PROBE_TOKENS, _PROBE_SEED = 4, 32, 20_261_124


class ExportError(FtlabError):
    """What was written does not read back as what was trained."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What reading an export back showed.

    Attributes:
        max_abs_diff: of the logits of the exported model from those of the trained one, over all probes: what
            the files' dtype costs, and 0.0 where it is the weights' own.
        max_abs_logit: for scale.
        n_probes, n_probe_tokens: sequences of fixed tokens, and the length of each.
    """

    max_abs_diff: float
    max_abs_logit: float
    n_probes: int
    n_probe_tokens: int


def export_model(
    model: AnyModel,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    dtype: torch.dtype,
    precision: Precision,
    parallel: Parallelism,
    end_ids: Sequence[int],
    about: Mapping[str, Any],
    card: str | None = None,
    layout: str = "hf",
) -> Proof:
    """Write model and tokenizer as one folder, complete for transformers and vLLM, or in Meta's layout.

    It is written aside, and takes the place of an earlier export only when

    - every tensor in its files is, to the bit, the trained one in the files' dtype, and
    - the model with the weights read back from there gives, to the bit, the logits that the trained weights give
      in that dtype.

    Memory above the model: the rows of one tensor. Every rank must call it, each compares its own rows; rank 0
    writes. **The model's weights are those of the files afterwards**: rounded, where the dtype is smaller.

    Args:
        end_ids: tokens that end an answer.
        about: what the manifest should say beside: the run, the step.
        card: the folder's README.md.
        layout: ``hf``, or ``meta`` for consolidated.00.pth and params.json (rank 0 then holds the whole model).

    Raises:
        ExportError: with the first tensor that differs, or the logits' difference.
    """
    aside = folder.with_name(f"{folder.name}.tmp")
    if this_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        tokenizer.save(aside)
    if layout == "meta":
        if not isinstance(model, Transformer):
            raise ConfigError("--layout", "Meta's layout is for Llamas, not for models of transformers", "--layout hf")
        export_meta_weights(model, aside, dtype=dtype)
    else:
        ends = list(end_ids) if len(end_ids) > 1 else end_ids[0]
        export_weights(model, aside, dtype=dtype, bos_id=tokenizer.bos_id, eos_id=ends, pad_id=None)
    if card is not None and this_rank() == 0:
        (aside / "README.md").write_text(card, encoding="utf-8")
    proof = _prove(model, aside, dtype, precision, parallel)
    if this_rank() == 0:
        files = {path.name: path for path in sorted(aside.iterdir())}
        entries = {name: {"bytes": p.stat().st_size, "sha256": disk.file_sha256(p)} for name, p in files.items()}
        content = {**about, "dtype": str(dtype).removeprefix("torch."), "proof": proof.__dict__, "files": entries}
        disk.replace_file(aside / MANIFEST, to_json(content, indent=2) + "\n")
        for path in files.values():
            disk.flush_file(path)
        disk.sync_folder(aside)
        _put_in_place(aside, folder)
    parallel.barrier()
    return proof


def _prove(model: AnyModel, folder: Path, dtype: torch.dtype, precision: Precision, parallel: Parallelism) -> Proof:
    trained = _logits(model, precision, parallel)
    problem = _compare(model, folder, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            local, _ = held_rows(parameter)
            local.copy_(local.to(dtype))
    rounded = _logits(model, precision, parallel)
    load_weights(model, folder)
    read_back = _logits(model, precision, parallel)
    if problem is None and not torch.equal(read_back, rounded):
        difference = (read_back - rounded).abs().max().item()
        problem = f"its logits differ from the trained model's by {difference:.3g}"
    found = [problem for problem in parallel.gather(problem) if problem]
    if found:
        raise ExportError(f"the export in {folder} does not read back as what was trained: {found[0]}")
    return Proof(
        max_abs_diff=(read_back - trained).abs().max().item(),
        max_abs_logit=trained.abs().max().item(),
        n_probes=_PROBES,
        n_probe_tokens=min(_PROBE_TOKENS, model.config.max_seq_len),
    )


def _compare(model: AnyModel, folder: Path, dtype: torch.dtype) -> str | None:
    """The first of this rank's rows that the files hold otherwise; None when there is none."""
    for name, parameter, stored in stored_tensors(model, folder):
        local, rows = held_rows(parameter)
        if len(local) and not _same_bits(stored.read(rows), local.to("cpu", dtype)):
            return f"{name} is not the trained one"
    return None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Unlike ``==``, true of NaN and NaN, and false of 0 and -0."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@torch.no_grad()
def _logits(model: AnyModel, precision: Precision, parallel: Parallelism) -> Tensor:
    """(probes, tokens, vocabulary) float32: of tokens drawn from the whole vocabulary, the same ones always."""
    n, vocab_size = min(_PROBE_TOKENS, model.config.max_seq_len), model.config.vocab_size
    assert vocab_size is not None  # the tokenizer is known
    drawn = [permutation(vocab_size, _PROBE_SEED, probe)[:n] for probe in range(_PROBES)]
    n = min(map(len, drawn))
    tokens = torch.stack([torch.from_numpy(ids[:n]) for ids in drawn]).to(parallel.device)
    was_training = model.training
    model.eval()
    with precision.autocast(parallel.device):
        logits: Tensor = model(tokens)
    model.train(was_training)
    return logits.float().cpu()


def _put_in_place(aside: Path, folder: Path) -> None:
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    disk.rename(aside, folder)
    shutil.rmtree(old, ignore_errors=True)
