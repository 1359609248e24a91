"""Builds the packaged tokenizer of the embedded data:  python -m ftlab.data.build_tiny_tokenizer

The result is committed; run this again after a change of ``tiny.py`` or of the Alpaca template.
"""

from __future__ import annotations

import io

import sentencepiece

from ftlab.data.templates import AlpacaTemplate
from ftlab.data.tiny import tiny_rows
from ftlab.data.tokenizers import TINY_MODEL

VOCAB_SIZE = 640


def train_model() -> bytes:
    """A BPE model over the rendered training rows, with the special pieces and byte fallback of Llama 2."""
    template = AlpacaTemplate()
    rows, _ = tiny_rows()
    lines = [line for row in rows for line in (template.render(row.instruction, row.input) + row.output).split("\n")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,  # a number is read digit by digit, else each number would be a word to learn
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


if __name__ == "__main__":
    TINY_MODEL.write_bytes(train_model())
    print(f"{TINY_MODEL}: {TINY_MODEL.stat().st_size} bytes")
