"""Chat templates of released checkpoints: rendered as their authors meant, and held in a sandbox."""

import json

import pytest

from dsv3_jax.interop.chat import begins_with_bos, chat_template, names_bos

# Of the form of the released one: control tokens around the turns.
TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<U>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<A>{{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Unknown role ' + m['role']) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A>{% endif %}"
)


@pytest.fixture
def beside(tmp_path):
    def write(**settings):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return tmp_path

    return write


def test_turns_stand_between_their_marks(beside):
    template = chat_template(
        beside(chat_template=TEMPLATE, bos_token={"content": "<B>", "special": True}, eos_token="<E>")
    )
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "{{ three }}"},
    ]
    assert template(messages) == "<B><U>one<A>two<E><U>{{ three }}<A>"
    assert template.begun(messages[:2]) == "<B><U>one<A>two"
    assert messages[1]["content"] == "two"


def test_messages_that_the_template_refuses_are_refused_with_its_words(beside):
    with pytest.raises(ValueError, match="Unknown role tool"):
        chat_template(beside(chat_template=TEMPLATE))([{"role": "tool", "content": ""}])


@pytest.mark.parametrize(
    "source",
    ["{{ messages.__class__.__mro__[1] }}", "{{ messages.append(1) }}", "{{ ''.__class__.__base__() }}"],
)
def test_a_template_reaches_nothing_but_the_messages(beside, source):
    with pytest.raises(ValueError, match="does not take these messages"):
        chat_template(beside(chat_template=source))([{"role": "user", "content": ""}])


def test_a_template_that_cannot_be_read_or_is_missing_is_said(beside):
    with pytest.raises(ValueError, match="cannot be read"):
        chat_template(beside(chat_template="{% if %}"))
    with pytest.raises(ValueError, match="leave out --chat"):
        chat_template(beside(add_bos_token=True))
    assert names_bos(beside(bos_token="<B>")) and not names_bos(beside(bos_token=None))
    assert begins_with_bos(beside(add_bos_token=True)) and not begins_with_bos(beside())
    folder = beside()
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="fetch it again"):
        begins_with_bos(folder)
