"""Runs with a Hugging Face tokenizer: from the files beside a checkpoint to those beside the export."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from ftlab.cli import main as ftlab
from ftlab.data.tokenizers import ByteTokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture
def checkpoint(tiny_run):
    """A folder of weights of 262 rows, three more than its byte tokenizer has ids, without a tokenizer.model."""
    export = tiny_run("tokenizer=byte", "trainer.max_steps=1", name="first").folder / "export"
    path = export / "model.safetensors"
    from safetensors.torch import save_file

    weights = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.full((3, weights[name].shape[1]), 7.0)])
    save_file(weights, path)
    config = json.loads((export / "config.json").read_text()) | {"vocab_size": 262}
    (export / "config.json").write_text(json.dumps(config))
    return export


def test_a_padded_vocabulary_and_its_tokenizer_come_from_the_checkpoints_folder(tiny_run, checkpoint, capsys):
    run = tiny_run("tokenizer=huggingface", f"model.checkpoint={checkpoint}", "trainer.max_steps=2", name="second")
    assert run.exit_code == 0
    assert json.loads((run.folder / "export/config.json").read_text())["vocab_size"] == 262
    theirs = transformers.AutoTokenizer.from_pretrained(run.folder / "export")
    assert theirs("ab</s>", split_special_tokens=True).input_ids == ByteTokenizer().encode(
        "ab</s>", bos=True, eos=False
    )
    assert ftlab(["generate", str(run.folder), "Is 348 even or odd?", "--max-new-tokens", "2"]) == 0


def test_added_tokens_grow_the_model_and_are_in_its_export(tiny_run, checkpoint, caplog, capsys):
    quoted = ",".join(f"'<t{i}>'" for i in range(5))
    new = [f"tokenizer.added_tokens=[{quoted}]", "tokenizer.added_special_tokens=['<end>']"]
    run = tiny_run(
        "tokenizer=huggingface", f"model.checkpoint={checkpoint}", *new, "trainer.max_steps=1", name="second"
    )
    assert run.exit_code == 0
    assert "6 new tokens, ids 259 to 264" in (run.folder / "train.log").read_text()
    export = run.folder / "export"
    assert json.loads((export / "config.json").read_text())["vocab_size"] == 265
    theirs = transformers.AutoTokenizer.from_pretrained(export)
    assert (len(theirs), theirs("<t4><end>", add_special_tokens=False).input_ids) == (265, [263, 264])
    assert transformers.AutoModelForCausalLM.from_pretrained(export).get_input_embeddings().weight.shape[0] == 265
    assert ftlab(["generate", str(run.folder), "Is 348 even or odd?", "--max-new-tokens", "2"]) == 0
