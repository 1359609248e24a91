"""torchtune's model, packed dataset, loss and order of a step (its single-device recipe's) as a contestant."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torchtune import training
from torchtune.data import padded_collate_packed, padded_collate_sft
from torchtune.datasets import PackedDataset
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama2 import llama2
from torchtune.modules.loss import CEWithChunkedOutputLoss

from benchmarks.peers.pacer import Pacer
from benchmarks.peers.rows import probe, read_rows


def main(setting: dict[str, Any]) -> None:
    pacer = Pacer()
    rows = read_rows(setting["rows"])
    shape = json.loads((Path(setting["model"]) / "config.json").read_text())
    dtype = torch.bfloat16 if setting.get("weights") == "bf16" else torch.float32
    with training.set_default_dtype(dtype):
        model = llama2(
            vocab_size=shape["vocab_size"],
            num_layers=shape["num_hidden_layers"],
            num_heads=shape["num_attention_heads"],
            num_kv_heads=shape["num_key_value_heads"],
            embed_dim=shape["hidden_size"],
            max_seq_len=setting["seq_len"],
            intermediate_dim=shape["intermediate_size"],
            norm_eps=shape["rms_norm_eps"],
        )
    weights = hf_to_tune(
        load_file(Path(setting["model"]) / "model.safetensors"),
        num_heads=shape["num_attention_heads"],
        num_kv_heads=shape["num_key_value_heads"],
        dim=shape["hidden_size"],
    )
    model.load_state_dict(weights)
    loss_fn = CEWithChunkedOutputLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting["lr"], weight_decay=0.0, fused=True)
    pacer.ready(probe(model, rows))
    model.set_num_output_chunks(loss_fn.num_output_chunks)
    if setting.get("compile"):
        training.compile_model(model, verbose=False)
        training.compile_loss(loss_fn, verbose=False)
    batches = batches_of(rows, setting)
    while not pacer.over:
        batch = next(batches)
        labels = batch.pop("labels")
        n_tokens = (labels != loss_fn.ignore_index).sum()
        logits = model(**batch)
        shifted = torch.hstack((labels[..., 1:], torch.full((len(labels), 1), loss_fn.ignore_index)))
        loss = loss_fn(logits, shifted) * n_tokens
        del logits
        loss.backward()
        training.scale_grads(model, 1 / n_tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pacer.step_done(int(n_tokens), loss.item() / int(n_tokens))
    model.set_num_output_chunks(0)
    pacer.finish(probe(model, rows))


def batches_of(rows: list[list[int]], setting: dict[str, Any]) -> Iterator[dict[str, torch.Tensor]]:
    """Epoch after epoch, in batches as their recipe makes them."""
    data: Any = [{"tokens": row, "labels": row} for row in rows]
    collate: Any = partial(padded_collate_sft, padding_idx=0)
    if setting.get("packing"):
        data, collate = PackedDataset(data, max_seq_len=setting["seq_len"]), padded_collate_packed
    order = list(range(len(data)))
    while True:
        random.Random(0).shuffle(order)
        for start in range(0, len(order), setting["batch_size"]):
            batch = collate([data[i] for i in order[start : start + setting["batch_size"]]])
            yield dict(batch)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
