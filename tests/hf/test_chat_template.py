"""Chat templates: the published spellings, and foreign code kept in its sandbox."""

import json

import pytest

from dsjax.hf import ChatTemplate

TEMPLATE = """{{ bos_token }}{% for m in messages %}
{% if m['role'] == 'user' %}<U>{{ m['content'] }}{% elif m['role'] == 'assistant' %}
<A>{{ m['content'] }}{{ eos_token }}{% else %}{{ raise_exception('no role ' + m['role']) }}
{% endif %}{% endfor %}{% if add_generation_prompt %}<A>{% endif %}"""
TALK = [{"role": "user", "content": "a < b é"}, {"role": "assistant", "content": "yes"}]


def folder(tmp_path, **settings):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_renders_tokens_as_text_or_table(tmp_path):
    bos = {"content": "<s>", "lstrip": False}
    path = folder(tmp_path, chat_template=TEMPLATE, bos_token=bos, eos_token="</s>")
    chat = ChatTemplate.from_folder(path)
    assert chat.render(TALK) == "<s><U>a < b é<A>yes</s><A>"
    assert chat.render(TALK[:1], add_generation_prompt=False) == "<s><U>a < b é"


def test_other_spellings(tmp_path):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    assert ChatTemplate.from_folder(folder(tmp_path, chat_template=named)).render([]) == "y"
    (tmp_path / "chat_template.jinja").write_text("{{ {'é': '<'} | tojson }}{{ extra }}")
    chat = ChatTemplate.from_folder(tmp_path)
    assert chat.render([], extra=1) == '{"é": "<"}1'


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('refused') }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 1 + 'a' }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_template_that_fails_or_breaks_out(text):
    with pytest.raises(ValueError, match="the chat template failed"):
        ChatTemplate(text).render(TALK)


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: cannot be read"):
        ChatTemplate.from_folder(tmp_path)
    with pytest.raises(ValueError, match="no chat_template"):
        ChatTemplate.from_folder(folder(tmp_path))
    with pytest.raises(ValueError, match="not valid Jinja"):
        ChatTemplate.from_folder(folder(tmp_path, chat_template="{% if %}"))
    with pytest.raises(ValueError, match="bos_token is 3"):
        ChatTemplate.from_folder(folder(tmp_path, chat_template="", bos_token=3))
    with pytest.raises(ValueError, match="expected a mapping with a role"):
        ChatTemplate("").render([{"content": "x"}])
