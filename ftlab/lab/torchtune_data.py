"""The data of a torchtune configuration: which set, which columns, what is put around a row, how long it may be."""

from __future__ import annotations

from typing import Any

from ftlab.errors import ConfigError
from ftlab.lab.torchtune_parts import Translation

# What torchtune's tokenizers wrap around the messages of a row, unless prompt_template says otherwise.
_TEMPLATES = {
    "llama2": "Llama2ChatTemplate",
    "llama3": "Llama3Template",
    "mistral": "MistralTemplate",
    "qwen2": "ChatMLTemplate",
    "qwen2_5": "ChatMLTemplate",
    "phi3": "PhiTemplate",
}

_DATASETS = {
    "alpaca_dataset": "alpaca",
    "alpaca_cleaned_dataset": "alpaca_cleaned",
    "instruct_dataset": "instruct",
    "chat_dataset": "chat",
    "text_completion_dataset": "text",
    "samsum_dataset": "samsum",
    "grammar_dataset": "grammar",
    "slimorca_dataset": "slimorca",
    "cnn_dailymail_articles_dataset": "cnn_dailymail",
    "wikitext_dataset": "wikitext",
}
_SEQ_LEN = 2048  # where torchtune sets no bound: Alpaca's longest row has about 1,100 tokens
_PLAIN = ("text", "cnn_dailymail", "wikitext", "grammar", "samsum")


def data(done: Translation) -> None:
    if not isinstance(done.tree["dataset"], dict):
        problem = "lists several sets"
        raise ConfigError("dataset", problem, "one set here; then python train.py dataset=mixture, see docs/data.md")
    component = done.component("dataset").rpartition(".")[2]
    if component not in _DATASETS:
        known = ", ".join(_DATASETS)
        raise ConfigError("dataset._component_", f"{component} is not one of {known}", "dataset=torchtune.datasets.…")
    option = _DATASETS[component]
    done.choose("dataset", option)
    settings = done.take_all("dataset")
    _source(done, settings)
    _columns(done, option, settings)
    if option in ("instruct", "chat"):
        _template(done, option)
    else:
        _wrapped(done, option)
    if "train_on_input" in settings:
        done.set("dataset.train_on_input", settings.pop("train_on_input"))
    if not done.take("shuffle", True):
        done.set("dataset.shuffle", False)
    if settings.pop("packed", False):
        done.set("dataset.packing", "greedy")
    settings.pop("split_across_pack", None)
    _length(done, option)
    done.set("dataset.val_fraction", 0)
    done.note(
        "differs",
        "dataset",
        "torchtune does not validate, and all rows train; dataset.val_fraction=0.02 holds some out",
    )
    if (expression := settings.pop("filter_fn", None)) is not None:
        done.note("absent", f"dataset.filter_fn={expression}", 'dataset.filter takes an expression: "len(output) > 10"')
    for key, value in settings.items():
        done.note("absent", f"dataset.{key}={value}", "no such setting here")


def _source(done: Translation, settings: dict[str, Any]) -> None:
    for theirs, ours in {
        "source": "source", "data_files": "data_files", "split": "split", "subset": "subset", "name": "subset",
        "revision": "revision",
    }.items():  # fmt: skip
        if (value := settings.pop(theirs, None)) is not None and (theirs, value) != ("split", "train"):
            done.set(f"dataset.{ours}", value)


def _columns(done: Translation, option: str, settings: dict[str, Any]) -> None:
    columns = {key.removeprefix("column_map."): settings.pop(key) for key in list(settings) if "column_map." in key}
    settings.pop("column_map", None)
    if option == "instruct":  # a question and an answer, under these names
        columns = {
            "instruction": columns.get("input", "input"), "input": None, "output": columns.get("output", "output")
        }  # fmt: skip
    elif option == "chat":
        columns = {"messages": settings.pop("conversation_column", "messages")}
        settings.pop("conversation_style", None)  # told apart by itself
    elif (column := settings.pop("column", None)) is not None:
        columns = {"text": column}
    for name, column in columns.items():
        done.set(f"dataset.column_map.{name}", column)


def _tokenizer_family(done: Translation) -> str:
    component = str(done.tree.get("tokenizer", {}).get("_component_", ""))
    return component.removeprefix("torchtune.models.").partition(".")[0]


def _template(done: Translation, option: str) -> None:
    """The one that torchtune's tokenizer brings, unless its configuration names another."""
    family, named = _tokenizer_family(done), done.take("tokenizer.prompt_template")
    done.take("tokenizer._component_")
    template = _TEMPLATES.get(family)
    if named is not None and not str(named).endswith(("Llama2ChatTemplate", "MistralChatTemplate", "ChatMLTemplate")):
        done.note("absent", f"tokenizer.prompt_template={named}", "see dataset.template._target_ in docs/data.md")
    elif named is not None:
        template = {"MistralChatTemplate": "MistralTemplate"}.get(name := str(named).rpartition(".")[2], name)
    if template is None:
        done.note(
            "absent",
            f"tokenizer={family}",
            f"dataset={option} uses its own template; dataset=chat_own_template the model's",
        )
    else:
        done.set("dataset.template._target_", f"ftlab.data.templates.{template}")


def _wrapped(done: Translation, option: str) -> None:
    """Sets with a prompt of their own, around which torchtune puts the tokenizer's template all the same."""
    family = _tokenizer_family(done)
    done.take("tokenizer._component_")
    if (named := done.take("tokenizer.prompt_template")) is not None:
        done.note("absent", f"tokenizer.prompt_template={named}", "see dataset.template._target_ in docs/data.md")
    template = _TEMPLATES.get(family)
    if template is not None and option not in ("text", "cnn_dailymail", "wikitext", "slimorca"):
        name = template.removesuffix("Template")
        why = f"the set's own prompt alone; torchtune puts the tokenizer's ({name}) around it too"
        done.note("differs", "tokenizer", why)


def _length(done: Translation, option: str) -> None:
    bound = done.take("tokenizer.max_seq_len")
    done.set("seq_len", bound or _SEQ_LEN)
    if option in ("text", "cnn_dailymail", "wikitext"):
        return  # split, not cut
    done.set("dataset.too_long", "truncate_keep_eos" if bound else "error")
    if not bound:
        why = "a row has at most seq_len tokens; a longer one stops the run with its number, none is cut silently"
        done.note("differs", "tokenizer.max_seq_len=null", why)
