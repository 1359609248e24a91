"""What one family of models computes that another does not; everything else is sizes, in ``conf/model``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """The few ways in which models of the one Transformer differ.

    Attributes:
        architecture: the class of transformers that computes the same, for ``config.json``.
        qkv_bias: queries, keys and values have a bias.
        qk_norm: every head's query and key goes through an RMSNorm before it is rotated.
        windows: its ``config.json`` can say that attention slides.
        whole_heads: transformers refuses a ``dim`` that is no multiple of ``n_heads``, even where head_dim is free.
    """

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    windows: bool = True
    whole_heads: bool = False


# By the ``model_type`` of their config.json.
FAMILIES = {
    "llama": Family(architecture="LlamaForCausalLM", windows=False, whole_heads=True),
    "mistral": Family(architecture="MistralForCausalLM"),
    "qwen2": Family(architecture="Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family(architecture="Qwen3ForCausalLM", qk_norm=True),
}
