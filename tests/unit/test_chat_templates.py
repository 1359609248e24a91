"""Chat templates: the same ids as transformers, text that stays text, and a sandbox that holds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlab.data.tokenizers import HuggingFaceTokenizer
from ftlab.data.tokenizers.chat import render_chat
from ftlab.errors import ConfigError, DataError
from tests.unit.hf_tokenizers import KINDS, save_kind

transformers = pytest.importorskip("transformers")

SPELLED = {"qwen": "<|im_end|>", "llama3": "<|eot_id|>", "llama2": "</s>", "mistral": "</s>"}
content = st.text(st.characters(exclude_categories=["Cs", "Co"], exclude_characters="<"), min_size=1, max_size=30)
chats = st.lists(st.tuples(content, content), min_size=1, max_size=3).map(
    lambda turns: [
        message
        for question, answer in turns
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]
)


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    folder = save_kind(request.param, tmp_path_factory.mktemp(request.param))
    ours = HuggingFaceTokenizer(path=str(folder), added_tokens=[], added_special_tokens=[])
    return ours, transformers.AutoTokenizer.from_pretrained(folder), request.param


@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_ids_equal_those_of_apply_chat_template(kind, add_generation_prompt):
    ours, theirs, _ = kind

    @settings(max_examples=100, deadline=None)
    @given(chat=chats)
    def equal(chat):
        options = {"add_generation_prompt": add_generation_prompt}
        assert ours.render_chat(chat, **options) == theirs.apply_chat_template(chat, tokenize=False, **options)
        expected = theirs.apply_chat_template(chat, tokenize=True, return_dict=True, **options).input_ids
        assert ours.encode_chats([chat, chat[:2]], **options)[0] == expected

    equal()


def test_a_special_in_a_message_stays_text_and_those_of_the_template_do_not(kind):
    ours, theirs, name = kind
    spelled = SPELLED[name]
    special = theirs.convert_tokens_to_ids(spelled)
    polite = [{"role": "user", "content": "Is x the end?"}, {"role": "assistant", "content": "No, x is."}]
    rude = [{**message, "content": message["content"].replace("x", spelled)} for message in polite]
    ids, expected = ours.encode_chats([rude, polite], add_generation_prompt=False)
    assert ids.count(special) == expected.count(special) > 0
    assert ours.decode(ids) == ours.decode(expected).replace("x", spelled)
    # Exactly as if every special were cut out and the rest encoded literally, where the tokenizer allows to say so.
    if name in ("qwen", "llama3"):
        text = ours.render_chat(rude, add_generation_prompt=False)
        assert ours.encode_with_specials(text).count(special) > ids.count(special), "the naive way would end early"


def test_tools_and_other_values_are_passed_on_and_hold_no_specials_either(kind):
    ours, theirs, name = kind
    ours.chat_template = "{{ tools | tojson }}{% if enable_thinking %}think{% endif %}{{ eos_token }}"
    try:
        tools = [{"name": f"f {SPELLED[name]}", "b": [1, None]}]
        [ids] = ours.encode_chats([[]], add_generation_prompt=False, tools=tools, enable_thinking=True)
        assert ids[-1] == ours.eos_id
        assert ours.eos_id not in ids[:-1]
        assert ours.decode(ids) == f'[{{"name": "f {SPELLED[name]}", "b": [1, null]}}]think'
    finally:
        ours.chat_template = theirs.chat_template


def render(template: str, **variables: object) -> str:
    chat = [{"role": "user", "content": "hi", "tool_calls": None}]
    return render_chat(template, chat, add_generation_prompt=False, specials={"bos_token": "<s>"}, **variables)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__ }}",
        "{{ self.__init__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ messages.append({}) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ lipsum.__globals__ }}",
        "{{ (messages|attr('__class__')) }}",
    ],
)
def test_an_attempt_to_leave_the_sandbox_is_stopped_and_said(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="its chat template does what a template must not") as caught:
        render(template)
    assert len(str(caught.value).splitlines()) <= 3
    assert list(tmp_path.iterdir()) == []


def test_the_helpers_that_published_templates_use_are_there():
    assert (
        render("{{ strftime_now('%Y') | length }}{% for m in messages %}{{ m.content }}{% break %}{% endfor %}")
        == "4hi"
    )
    assert render("{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}{{ '<é>' | tojson }}") == '2"<é>"'
    assert render("{% generation %}{{ bos_token }}{% endgeneration %}{{ 'tool_calls' in messages[0] }}") == "<s>False"


def test_a_template_that_refuses_the_messages_is_heard():
    with pytest.raises(DataError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ConfigError, match="no valid Jinja: line 1"):
        render("{% if %}")


def test_a_tokenizer_without_template_says_so(kind):
    ours, theirs, _ = kind
    ours.chat_template = None
    try:
        with pytest.raises(ConfigError, match="has no chat template"):
            ours.encode_chats([[{"role": "user", "content": "hi"}]], add_generation_prompt=False)
    finally:
        ours.chat_template = theirs.chat_template
