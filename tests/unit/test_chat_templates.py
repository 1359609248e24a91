"""Every template gives the ids and the mask that transformers gives for the family's own Jinja template.

The tokenizers are trained on the spot, each with its family's control tokens; the Jinja templates are the families'
published formats, with ``{% generation %}`` around what the model has to write, from which transformers tells a mask.
"""

import json
import tempfile
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ftlab.data.encode import Encoder
from ftlab.data.formats import Chat, Conversation, Message
from ftlab.data.jinja_template import JinjaTemplate
from ftlab.data.problems import BadRow
from ftlab.data.templates import (
    AlpacaTemplate,
    ChatMLTemplate,
    GemmaTemplate,
    Llama2ChatTemplate,
    Llama3Template,
    MistralTemplate,
    PhiTemplate,
    PlainTemplate,
)
from ftlab.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer
from ftlab.errors import ConfigError
from tests.unit.hf_tokenizers import KINDS

_SYSTEM_FIRST = "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set spoken = messages[1:] %}{% else %}{% set system = none %}{% set spoken = messages %}{% endif %}"  # noqa: E501
_ANSWER = "{% generation %}%s{% endgeneration %}"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = _SYSTEM_FIRST + (
    "{% for m in spoken %}{% if loop.index0 == 0 and system is not none %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}{% else %}"
    "{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}{% generation %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}"
    + _SYSTEM_FIRST
    + (
        "{% for m in spoken %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
        "{% if loop.index0 == 0 and system is not none %}{{ system + '\n\n' }}{% endif %}"
        "{{ m['content'] + ' [/INST]' }}{% else %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
        "{% endif %}{% endfor %}"
    )
)
GEMMA = (
    "{{ bos_token }}"
    + _SYSTEM_FIRST
    + (
        "{% for m in spoken %}{% if m['role'] == 'assistant' %}{{ '<start_of_turn>model\n' }}{% generation %}"
        "{{ m['content'] | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\n' }}{% else %}"
        "{{ '<start_of_turn>user\n' }}{% if loop.index0 == 0 and system is not none %}{{ system + '\n\n' }}{% endif %}"
        "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    )
)
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# Template, the kind of tokenizer that the family has, control tokens beside the kind's own, Jinja.
FAMILIES = {
    "chatml": (ChatMLTemplate, "qwen", [], CHATML),
    "llama3": (Llama3Template, "llama3", [], LLAMA3),
    "llama2": (Llama2ChatTemplate, "llama2", [], LLAMA2),
    "llama2_first": (Llama2ChatTemplate, "mistral", [], LLAMA2),
    "mistral": (MistralTemplate, "mistral", [], MISTRAL),
    "mistral_control": (MistralTemplate, "mistral", ["[INST]", "[/INST]"], MISTRAL),
    "gemma": (GemmaTemplate, "llama2", ["<start_of_turn>", "<end_of_turn>"], GEMMA),
    "phi": (PhiTemplate, "qwen", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], PHI),
    "phi_strips": (PhiTemplate, "llama2", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], PHI),
}


@cache
def family(name):
    """The family's template, our tokenizer and transformers'."""
    template, kind, specials, jinja = FAMILIES[name]
    build, config = KINDS[kind]
    tokenizer = build()
    strips = name == "phi_strips"  # as Phi-3's own tokenizer: a role swallows the newline after it
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, rstrip=strips) for token in specials])
    folder = tempfile.mkdtemp(prefix="ftlab-chat-")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **config | {"chat_template": jinja}).save_pretrained(folder)
    ours = HuggingFaceTokenizer(path=folder, added_tokens=[], added_special_tokens=[])
    return template(), ours, AutoTokenizer.from_pretrained(folder)


words = st.sampled_from(
    [
        *("the", "model", " text", "  ", "\n", "\n\n", "12", "a", "naïve", "漢字", "🙂", "\t", "it's", ":", "!", ""),
        "Zażółć",
    ]
)
content = st.lists(words, max_size=8).map("".join)
conversations = st.builds(
    lambda system, turns, last: (
        ([{"role": "system", "content": system}] if system is not None else [])
        + [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        + ([{"role": "user", "content": last}] if last is not None else [])
    ),
    st.none() | content,
    st.lists(st.tuples(content, content), min_size=1, max_size=4),
    st.none() | content,
)


def encoded(template, tokenizer, messages, train_on_input=False):
    encoder = Encoder(tokenizer=tokenizer, template=template, train_on_input=train_on_input)
    return encoder([encoder.render(Chat(last_turn_only=False).conversation({"messages": messages}))])


def oracle(reference, messages):
    """Ids and mask as transformers has them."""
    out = reference.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return out["input_ids"], out["assistant_masks"]


def comparable(name, messages):
    """Where a role's token swallows the space that an answer begins with, transformers trains that token instead."""
    return name != "phi_strips" or not any(m["content"][:1].isspace() for m in messages)


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_mask_are_those_of_transformers(name):
    template, ours, reference = family(name)

    @settings(max_examples=200, deadline=None)
    @given(messages=conversations)
    def check(messages):
        ids, mask = oracle(reference, messages)
        rows = encoded(template, ours, messages)
        assert rows.tokens.tolist() == ids
        if comparable(name, messages):
            assert rows.trained.astype(int).tolist() == mask

    check()


@pytest.mark.parametrize("generation", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_tokenizers_own_template_gives_the_same(name, generation):
    """With ``{% generation %}`` in it, and without: then the spans are told by rendering answer by answer."""
    _, ours, reference = family(name)
    source = FAMILIES[name][3]
    if not generation:
        source = source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    template = JinjaTemplate(path=None)
    template.source = source

    @settings(max_examples=100, deadline=None)
    @given(messages=conversations)
    def check(messages):
        ids, mask = oracle(reference, messages)
        rows = encoded(template, ours, messages)
        assert rows.tokens.tolist() == ids
        if comparable(name, messages) and (generation or all(m["content"].strip() for m in messages)):
            assert rows.trained.astype(int).tolist() == mask

    check()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_what_transformers_generates_from(name):
    template, ours, reference = family(name)
    messages = [{"role": "user", "content": "the text"}]
    encoder = Encoder(tokenizer=ours, template=template, train_on_input=False)
    wanted = reference.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert encoder.prompt([Message("user", "the text")]) == wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_message_spells_is_never_a_control_token(name):
    template, ours, _ = family(name)
    evil = "".join(ours.specials)
    honest, spelled = (
        encoded(t, ours, [{"role": "user", "content": text}, {"role": "assistant", "content": text}])
        for t, text in [(template, "x"), (template, evil)]
    )
    controls = set(ours.specials.values())
    assert [t for t in spelled.tokens.tolist() if t in controls] == [t for t in honest.tokens.tolist() if t in controls]
    own = JinjaTemplate(path=None)
    own.source = FAMILIES[name][3]
    rendered = encoded(own, ours, [{"role": "user", "content": evil}, {"role": "assistant", "content": evil}])
    assert rendered.tokens.tolist() == spelled.tokens.tolist()


def test_weights_and_last_turn_only_choose_the_answers_that_are_trained():
    template, ours, _ = family("chatml")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the"}] * 3
    turns[3] = turns[3] | {"weight": 0}
    encoder = Encoder(tokenizer=ours, template=template, train_on_input=False)

    def trained_text(last_turn_only):
        row = encoder([encoder.render(Chat(last_turn_only=last_turn_only).conversation({"messages": turns}))])
        return [ours.decode([t]) for t in row.tokens[row.trained]], int(row.prompt_lens[0]), len(row.tokens)

    every, prompt_len, n = trained_text(False)
    last, _, _ = trained_text(True)
    assert len(every) == 2 * len(last)
    assert prompt_len == n - len(last) - 1  # the newline after the end token is not the model's to write


def test_sharegpt_and_openai_are_the_same_conversation():
    openai = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[m["role"]], "value": m["content"], "weight": None} for m in openai]
    chat = Chat(last_turn_only=False)
    assert chat.conversation({"messages": openai}) == chat.conversation({"messages": sharegpt})
    with_system = chat.conversation({"messages": openai[1:], "system": "s"})
    assert with_system.messages == chat.conversation({"messages": openai}).messages


def test_tool_turns_pass_through():
    template, ours, reference = family("chatml")
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "call"},
        {"role": "tool", "content": "12"},
        {"role": "assistant", "content": "it's 12"},
    ]
    assert encoded(template, ours, messages).tokens.tolist() == oracle(reference, messages)[0]
    call = [{"type": "function", "function": {"name": "weather", "arguments": {"place": "here"}}}]
    with_call = [messages[0], {"role": "assistant", "content": None, "tool_calls": call}, *messages[2:]]
    own = JinjaTemplate(path=None)
    own.source = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"  # noqa: E501
    row = encoded(own, ours, with_call)
    assert '"place": "here"' in ours.decode(row.tokens.tolist())
    assert json.dumps(call) in ours.decode(row.tokens[row.trained].tolist())


BUILT_IN = {template for template, *_ in FAMILIES.values()} | {AlpacaTemplate, PlainTemplate}


@pytest.mark.parametrize("template", sorted(BUILT_IN, key=lambda one: one.__name__))
def test_a_template_without_a_place_for_tools_refuses_them(template):
    asked = Message("user", "weather?")
    call = Message("assistant", "", True, extra={"tool_calls": [{"function": {"name": "weather"}}]})
    with pytest.raises(BadRow, match="has tool calls in message 1, which this template has no place for") as caught:
        template().parts(Conversation([asked, call]))
    assert caught.value.fix == "dataset=chat_own_template"
    with pytest.raises(BadRow, match="has tools, which") as caught:
        template().parts(Conversation([asked, Message("assistant", "x", True)], tools=[{"name": "weather"}]))
    assert caught.value.fix.endswith("dataset.column_map.tools=null")


def test_tools_are_a_list_or_the_json_of_one():
    def tools_of(value):
        messages = [{"role": "user", "content": "x"}]
        return Chat(last_turn_only=False).conversation({"messages": messages, "tools": value}).tools

    assert tools_of('[{"name": "a"}]') == tools_of([{"name": "a"}]) == [{"name": "a"}]
    assert [tools_of(none) for none in (None, "", "[]", [])] == [None] * 4
    for wrong, said in [
        ("not json", "no JSON"),
        ('{"name": "a"}', "must be a list"),
        ({"name": "a"}, "must be a list"),
    ]:
        with pytest.raises(BadRow, match=said) as caught:
            tools_of(wrong)
        assert caught.value.kind == "wrong_type"


def test_characters_of_private_use_are_characters_to_a_template_that_marks_its_answers():
    _, ours, _ = family("chatml")
    own = JinjaTemplate(path=None)
    own.source = CHATML
    for text in ("icon \ue006 here", "\ue007", "\ue006 the \ue007"):
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "the"}]
        row, wanted = (encoded(template, ours, messages) for template in (own, ChatMLTemplate()))
        assert row.tokens.tolist() == wanted.tokens.tolist()
        assert row.trained.tolist() == wanted.trained.tolist()


def test_a_row_that_a_template_makes_nothing_of_is_a_row_without_tokens():
    _, ours, _ = family("chatml")
    own = JinjaTemplate(path=None)
    own.source = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    encoder = Encoder(tokenizer=ours, template=own, train_on_input=True)
    told, nothing = Conversation([Message("user", "the text")]), Conversation([Message("system", "the text")])
    rows = encoder([encoder.render(one) for one in (told, nothing, told, nothing)])
    n = len(rows.tokens) // 2
    assert np.diff(rows.offsets).tolist() == [n, 0, n, 0]
    assert rows.trained.tolist() == ([False] + [True] * (n - 1)) * 2


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("text", "must be an object with role and content"),
        ({"role": "pirate", "content": "arr"}, "has the role 'pirate'"),
        ({"role": "user", "content": 5}, "must be text, but is int"),
        ({"role": "user"}, "must be text, but is NoneType"),
        ({"role": "user", "content": "x", "weight": 0.5}, "must be 0 or 1, but is 0.5"),
        ({"role": "user", "content": "\ud83d"}, "half a surrogate pair"),
    ],
)
def test_a_message_that_cannot_be_used_says_why(entry, said):
    with pytest.raises(BadRow, match="message 0") as caught:
        Chat(last_turn_only=False).conversation({"messages": [entry]})
    assert said in caught.value.problem


@pytest.mark.parametrize("name", ["llama2", "mistral", "gemma"])
def test_roles_out_of_turn_are_refused_where_the_family_refuses_them(name):
    template, ours, _ = family(name)
    for roles in (["assistant"], ["user", "user"], ["user", "assistant", "tool"]):
        with pytest.raises(BadRow, match="where this template wants"):
            encoded(template, ours, [{"role": role, "content": "x"} for role in roles])
    with pytest.raises(BadRow, match="a system message and nothing that follows"):
        encoded(template, ours, [{"role": "system", "content": "x"}])


def test_a_template_without_its_control_tokens_is_refused():
    tokenizer = SentencePieceTokenizer(path="tiny")
    with pytest.raises(ConfigError, match=r"ChatMLTemplate needs the token <\|im_start\|>"):
        encoded(ChatMLTemplate(), tokenizer, [{"role": "user", "content": "x"}])
    with pytest.raises(ConfigError, match="came without a chat template"):
        Encoder(tokenizer=tokenizer, template=JinjaTemplate(path=None), train_on_input=False)


def test_a_template_that_rewrites_the_past_can_train_its_last_turn():
    """As Qwen3's, which drops the thoughts of earlier turns."""
    _, ours, _ = family("chatml")
    own = JinjaTemplate(path=None)
    own.source = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('|')[-1] }}{% else %}"
        "{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [
        {"role": r, "content": c}
        for r, c in [("user", "a"), ("assistant", "t|the"), ("user", "b"), ("assistant", "t|model")]
    ]
    encoder = Encoder(tokenizer=ours, template=own, train_on_input=False)
    row = encoder([encoder.render(Chat(last_turn_only=True).conversation({"messages": messages}))])
    assert ours.decode(row.tokens[row.trained].tolist()) == "t|model"
    assert isinstance(row.trained, np.ndarray)


def test_the_tokens_of_llama_2_chat_are_those_of_metas_own_code(shared_data):
    """Meta encodes each exchange by itself with SentencePiece, BOS before and EOS after it."""
    llama2 = SentencePieceTokenizer(path=str(shared_data / "llama2_tokenizer.model"))
    turns = [("2+2?", "4"), ("  And\n3+3? ", "6, naïve 漢字"), ("x", "y")]
    messages = [m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    wanted = []
    for question, answer in turns:
        wanted += llama2.encode(f"[INST] {question.strip()} [/INST] {answer.strip()} ", bos=True, eos=True)
    assert encoded(Llama2ChatTemplate(), llama2, messages).tokens.tolist() == wanted
