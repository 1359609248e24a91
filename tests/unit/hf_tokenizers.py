"""Small tokenizers of every kind that the supported families have, trained on the spot, as transformers saves them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ftlab.data.tokenizers.byte import byte_level_alphabet
from ftlab.data.tokenizers.ranks import SPLIT

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim"
    " + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}\n{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role']"
    " + '<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content']"
    " + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ raise_exception('no ' + message['role'] + ' here') }}{% endif %}{% endfor %}"
)


def corpus() -> Iterator[str]:
    """Text enough to learn some merges from: words, numbers, indentation, other scripts."""
    words = re.findall(
        r"\S+", "the a model learns from text and tests 12 2024 naïve Zażółć 漢字 🙂 it's we'll def if (x):"
    )
    rng = random.Random(0)
    for _ in range(400):
        yield rng.choice(["", "  ", "\n\n", "\t"]) + " ".join(rng.choices(words, k=12)) + rng.choice([".", "!\n", "  "])


def _byte_level(*, normalizer: normalizers.Normalizer | None, post: bool, specials: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = list(byte_level_alphabet().values())
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    if post:
        bos = specials[0]
        template = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def _metaspace(*, first_only: bool, eos_too: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if first_only:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=pieces, show_progress=False, max_token_length=8)
    tokenizer.train_from_iterator((text.replace(" ", "▁") for text in corpus()), trainer)
    for piece in pieces[3:]:  # pieces of the model, but not control tokens
        assert tokenizer.token_to_id(piece) is not None
    content = tokenizer.to_str()
    fresh = Tokenizer.from_str(content)
    fresh.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if eos_too else "<s> $A",
        pair="<s> $A <s> $B",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    return fresh


def _without_byte_specials(tokenizer: Tokenizer) -> Tokenizer:
    """The trainer calls every initial piece special; in Llama 2 only the first three are."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(content))


_QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def _qwen() -> Tokenizer:
    tokenizer = _byte_level(normalizer=normalizers.NFC(), post=False, specials=_QWEN)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return tokenizer


KINDS: dict[str, tuple[Callable[[], Tokenizer], dict[str, str]]] = {
    "llama3": (
        lambda: _byte_level(normalizer=None, post=True, specials=_LLAMA3),
        {"bos_token": _LLAMA3[0], "eos_token": _LLAMA3[1], "chat_template": LLAMA3},
    ),
    "qwen": (_qwen, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}),
    "llama2": (
        lambda: _without_byte_specials(_metaspace(first_only=False, eos_too=False)),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": MISTRAL},
    ),
    "mistral": (
        lambda: _without_byte_specials(_metaspace(first_only=True, eos_too=True)),
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>", "chat_template": MISTRAL},
    ),
}


def save_kind(kind: str, folder: Path) -> Path:
    """Have transformers write one of ``KINDS`` into ``folder``."""
    from transformers import PreTrainedTokenizerFast

    build, config = KINDS[kind]
    PreTrainedTokenizerFast(tokenizer_object=build(), **config).save_pretrained(folder)
    return folder
