"""``model=hf``: any causal language model of transformers, behind the interface of our own Transformer."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftlab.errors import ConfigError
from ftlab.models.hf_layout import CONFIG, open_safetensors
from ftlab.models.layouts import Layout
from ftlab.models.stored import KEY, read_json_object

NO_LIMIT = 2**31 - 1  # tokens, for models whose positions are not counted (ALiBi)


@dataclass(frozen=True, kw_only=True)
class HFModelConfig:
    """A model that transformers builds from a folder's config.json.

    Args:
        checkpoint: the name it was asked for by.
        folder: where its config.json and weights are.
        vocab_size: rows of the embedding.
    """

    checkpoint: str
    folder: Path
    vocab_size: int

    @cached_property
    def theirs(self) -> Any:
        """transformers' configuration of it, with dropout off: recomputed blocks must repeat themselves."""
        config = _transformers().AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        for key, value in vars(config).items():
            if ("dropout" in key or key.endswith("_pdrop")) and isinstance(value, float):
                setattr(config, key, 0.0)
        return config

    @property
    def n_layers(self) -> int:
        return self.theirs.get_text_config().num_hidden_layers

    @property
    def dim(self) -> int:
        return self.theirs.get_text_config().hidden_size

    @property
    def n_heads(self) -> int:
        return self.theirs.get_text_config().num_attention_heads

    @property
    def head_dim(self) -> int:
        return getattr(self.theirs.get_text_config(), "head_dim", None) or self.dim // self.n_heads

    @property
    def max_seq_len(self) -> int:
        return getattr(self.theirs.get_text_config(), "max_position_embeddings", None) or NO_LIMIT

    def build(self) -> HFTransformer:
        """The model with its parameters under the caller's ``torch.device`` context, best meta; buffers are real."""
        return HFTransformer(self)

    def n_params(self) -> int:
        """Exact number of parameters, those of a tied head once."""
        return sum(parameter.numel() for parameter in self._on_meta.parameters())

    def n_matmul_params(self) -> int:
        """Parameters that multiply activations: matrices, of the embeddings only one that is also the head."""
        model = self._on_meta.model
        head = model.get_output_embeddings()
        tied = head is not None and head.weight is model.get_input_embeddings().weight
        looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        if tied:
            looked_up -= {id(head.weight)}
        return sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in looked_up)

    @cached_property
    def _on_meta(self) -> HFTransformer:
        with torch.device("meta"):
            return self.build()


@dataclass(frozen=True, kw_only=True)
class HFModel:
    """``model=hf``: what the checkpoint's config.json names, as transformers builds it.

    Args:
        checkpoint: folder, or Hub id with or without ``@revision``.
    """

    checkpoint: str

    def read(self, folder: Path) -> HFModelConfig:
        """The model of ``folder``; no weights are read.

        Raises:
            ConfigError: when transformers is not installed, does not know the architecture, or would have to run
                code that came with the weights.
        """
        if not (folder / CONFIG).is_file():
            raise ConfigError(KEY, f"{folder} has no {CONFIG}: model=hf needs a folder in Hugging Face's layout")
        raw = read_json_object(folder / CONFIG)
        config = HFModelConfig(checkpoint=self.checkpoint, folder=folder, vocab_size=0)
        try:
            theirs = config.theirs
            known = type(theirs) in _transformers().AutoModelForCausalLM._model_mapping
        except ConfigError:
            raise
        except Exception as error:  # what it says of a file it cannot use differs from one release to the next
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise ConfigError(KEY, f"transformers cannot build {folder / CONFIG}: {reason}") from error
        if not known:
            kind = next(iter(raw.get("architectures") or []), raw.get("model_type"))
            raise ConfigError(KEY, f"{folder / CONFIG} describes {kind}, which transformers has no causal model for")
        return HFModelConfig(checkpoint=self.checkpoint, folder=folder, vocab_size=theirs.get_text_config().vocab_size)


class HFTransformer(nn.Module):
    """A causal model of transformers that is sharded, recomputed, trained, loaded and exported like ours.

    Parameters have transformers' names behind ``model.``; those of a folder are the same without it. Dropout is off.

    transformers' modules keep tables in buffers (rotary frequencies, masks) that are a function of the
    configuration and in no file. They are made real at once, and every move of the module (``to_empty`` from meta,
    ``.to(bfloat16)``) puts them back as they were; tied parameters, which ``to_empty`` would part, are tied again.
    """

    def __init__(self, config: HFModelConfig):
        super().__init__()
        self.config = config
        device = torch.empty(0).device  # the caller's context
        settings: dict[str, Any] = {"trust_remote_code": False, "dtype": torch.float32}
        if getattr(config.theirs, "attn_logit_softcapping", None):
            settings["attn_implementation"] = "eager"  # the only one that caps scores (Gemma 2)
        with torch.device("cpu"), _parameters_on(device):
            self.place_holder = _Place()
            self.model = _transformers().AutoModelForCausalLM.from_config(config.theirs, **settings)
        for module in self.model.modules():
            if type(module) is nn.LayerNorm:
                module.__class__ = _LayerNorm
        embeddings = self.model.get_input_embeddings().weight
        if embeddings.shape[0] != config.vocab_size:
            raise ConfigError("model.vocab_size", f"model=hf keeps the {embeddings.shape[0]} rows of the checkpoint")
        self._tables = {name: buffer.clone() for name, buffer in self.named_buffers() if not buffer.is_meta}
        self._ties = [names for names in _names_of_parameters(self).values() if len(names) > 1]

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks: the largest list of ``n_layers`` modules."""
        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == self.config.n_layers]
        if not lists:
            raise ConfigError(KEY, f"{type(self.model).__name__} has no list of its {self.config.n_layers} blocks")
        return max(lists, key=lambda blocks: sum(parameter.numel() for parameter in blocks.parameters()))

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        loss: Any = None,
        *,
        doc_ids: Tensor | None = None,
        n_targets: int | None = None,  # noqa: ARG002 -- every model's signature
        weights: Tensor | None = None,
        tree: Any = None,
        cache: TokenCache | None = None,
    ) -> Tensor:
        """As ``Transformer.forward``, but without packed rows; transformers makes the logits, capped and
        scaled as the model has it, so the loss is asked for its ``of_logits``."""
        if tree is not None:
            problem = "true, but model=hf computes every row whole"
            raise ConfigError("trainer.share_prefixes", problem, "trainer.share_prefixes=false")
        if doc_ids is not None:
            raise ConfigError(
                "dataset.packing", "model=hf does not keep packed documents apart", "dataset.packing=none"
            )
        n_new = tokens.shape[1]
        if cache is not None:
            tokens = cache.append(tokens)
        if tokens.shape[1] > self.config.max_seq_len:
            raise ConfigError(
                "seq_len",
                f"a sequence of {tokens.shape[1]} tokens is longer than the model's {self.config.max_seq_len}",
                fix=f"seq_len={self.config.max_seq_len}",
            )
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits[:, -n_new:]
        if loss is None:
            return logits
        assert targets is not None, "a loss needs targets"
        return loss.of_logits(logits.flatten(0, 1), targets.flatten(), None if weights is None else weights.flatten())

    def new_cache(self, capacity: int) -> TokenCache:  # noqa: ARG002 -- every model's signature
        """For ``forward``, in generation: earlier tokens are kept, and computed again."""
        return TokenCache()

    def hf_names(self) -> dict[str, str]:
        """Our parameter names -> those of a folder; both names of tied ones."""
        names = [name.removeprefix("model.") for tied in _names_of_parameters(self).values() for name in tied]
        return {f"model.{name}": stored for name, stored in _stored_names(self.model, names).items()}

    def open_folder(self, folder: Path) -> Layout:
        """The weights in ``folder``, also of one that a bare base model or an older release wrote."""
        names, tensors = self.hf_names(), open_safetensors(folder)
        for ours, theirs in names.items():
            module = ours.removeprefix("model.")
            spellings = (theirs, module, theirs.removeprefix(f"{self.model.base_model_prefix}."))
            names[ours] = next((name for name in spellings if name in tensors), theirs)
        # Tables that older releases saved: transformers has a list of them, a little too wide.
        obsolete = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_unexpected or ()]
        needed = set(names.values())
        tables = {name for name in tensors.keys() - needed if any(pattern.search(name) for pattern in obsolete)}
        return Layout(names, {name: tensor for name, tensor in tensors.items() if name not in tables})

    def hf_config(self, dtype: str) -> dict[str, Any]:
        """The checkpoint's own config.json, for weights of another dtype."""
        raw = read_json_object(self.config.folder / CONFIG)
        return raw | {key: dtype for key in ("dtype", "torch_dtype") if key in raw}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for name, table in self._tables.items():
            module, _, buffer = name.rpartition(".")
            owner = self.get_submodule(module)
            device = owner._buffers[buffer].device  # type: ignore[union-attr]
            if device.type != "meta":
                owner._buffers[buffer] = table.to(device)
        for first, *others in self._ties:
            for name in others:
                module, _, parameter = name.rpartition(".")
                self.get_submodule(module)._parameters[parameter] = self.get_parameter(first)
        return self


class _LayerNorm(nn.LayerNorm):
    """With gain and bias in the input's dtype: under sharding they come in another, see ``layers.RMSNorm``."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class TokenCache:
    """The tokens (B, T) that generation has seen so far."""

    def __init__(self) -> None:
        self._tokens: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self._tokens is None else self._tokens.shape[1]

    def append(self, tokens: Tensor) -> Tensor:
        """Take the next tokens; return all."""
        self._tokens = tokens if self._tokens is None else torch.cat((self._tokens, tokens), dim=1)
        return self._tokens


class _Place(nn.Module):
    """A buffer that says where the model computes, also in models without one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("nothing", torch.empty(0), persistent=False)


def _names_of_parameters(model: nn.Module) -> Mapping[int, list[str]]:
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return names


def _stored_names(model: Any, names: list[str]) -> dict[str, str]:
    """Names of parameters -> those that transformers saves them under, which for some architectures differ.

    Raises:
        ConfigError: where it saves other tensors than the model has (experts, split).
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5 a model was saved as it is
        return {name: name for name in names}
    try:
        saved = revert_weight_conversion(model, {name: torch.tensor([i]) for i, name in enumerate(names)})
        stored = {names[tag.item()]: theirs for theirs, tag in saved.items()}
    except (RuntimeError, ValueError, IndexError, KeyError):  # an operation on tensors, which numbers do not survive
        stored = {}
    if len(stored) != len(names):
        raise ConfigError(KEY, f"transformers stores {type(model).__name__} in other tensors than it computes with")
    return stored


@contextmanager
def _parameters_on(device: torch.device) -> Iterator[None]:
    """Modules made inside have their parameters on ``device`` and all else where the context says."""
    register = nn.Module.register_parameter

    def register_there(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device != device:  # a tied one is there already, and stays itself
            parameter = nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_there  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("model", "model=hf needs transformers", 'pip install "ftlab[hf]"') from error
    return transformers
