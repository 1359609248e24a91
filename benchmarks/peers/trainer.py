"""transformers' Trainer, or with ``"packing": true`` TRL's SFTTrainer, as a contestant."""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import datasets
import tokenizers
import torch
import transformers

from benchmarks.peers.pacer import Pacer
from benchmarks.peers.rows import probe, read_rows


class Paced(transformers.TrainerCallback):
    """Counts the real tokens that go through the model, and keeps the pace."""

    def __init__(self, pacer: Pacer, model: torch.nn.Module):
        self.pacer, self.tokens = pacer, 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, inputs: dict[str, Any]) -> None:  # noqa: ARG002 -- torch's signature
        if "labels" in inputs:  # the probe has none
            self.tokens += int((inputs["labels"] != -100).sum())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 -- theirs
        self.pacer.step_done(self.tokens)
        self.tokens = 0
        control.should_training_stop = self.pacer.over


def main(setting: dict[str, Any]) -> None:
    pacer = Pacer()
    rows = read_rows(setting["rows"])
    dtype = torch.bfloat16 if setting.get("weights") == "bf16" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(setting["model"], dtype=dtype)
    shared = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": 10_000,
        "learning_rate": setting["lr"],
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.999,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": setting["batch_size"],
        "bf16": setting.get("bf16", False),
        "use_cpu": True,
        "torch_compile": setting.get("compile", False),
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    } | ({"train_sampling_strategy": "group_by_length"} if setting.get("grouped") else {})
    paced = Paced(pacer, model)
    trainer: Any
    if setting.get("packing"):
        import trl

        # The rows are token ids already: a tokenizer that has nothing to do.
        nothing = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, "<unk>"))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=nothing, pad_token="<unk>", eos_token="<unk>")
        trainer = trl.SFTTrainer(
            model,
            trl.SFTConfig(**shared, packing=True, max_length=setting["seq_len"], gradient_checkpointing=False),
            train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
            processing_class=tokenizer,
            callbacks=[paced],
        )
    else:

        def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in batch], True, -1)
            return {
                "input_ids": ids.clamp(min=0),
                "attention_mask": (ids >= 0).long(),
                "labels": ids.masked_fill(ids < 0, -100),
            }

        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(**shared),
            data_collator=collate,
            train_dataset=datasets.Dataset.from_dict({"input_ids": rows, "length": [len(row) for row in rows]}),
            callbacks=[paced],
        )
    pacer.ready(probe(lambda tokens: model(tokens).logits, rows))
    trainer.train()
    model.eval()
    pacer.finish(probe(lambda tokens: model(tokens).logits, rows))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
