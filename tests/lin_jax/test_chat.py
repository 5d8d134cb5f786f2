"""Chat templates. The expected texts in tests/fixtures/chat are those of `transformers`."""

import json
import pathlib
import re

import pytest

from lin_jax.chat import ChatTemplate
from lin_jax.tokenizer import ByteTokenizer, load_tokenizer
from tests.lin_jax.fast_tokenizers import byte_level, save

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "chat"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
CONVERSATIONS = json.loads((FIXTURES / "conversations.json").read_text())
TURNS = CONVERSATIONS["system and two turns"]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
  folder = save(tmp_path_factory.mktemp("fast"), byte_level())
  tokens = dict(bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>")
  return lambda template, **settings: ChatTemplate(load_tokenizer(folder, chat_template=template, **tokens | settings))


@pytest.fixture(scope="module")
def named(make):
  return {path.stem: make(path.read_text()) for path in FIXTURES.glob("*.jinja")}


def spelled(chat, ids):
  tokenizer = chat.tokenizer
  return b"".join(tokenizer.special[i].encode() if i in tokenizer.special else tokenizer.token_bytes(i)
                  for i in ids).decode()


@pytest.mark.parametrize("template", EXPECTED)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_texts_are_those_of_transformers(named, template, name):
  chat, messages, expected = named[template], CONVERSATIONS[name], EXPECTED[template][name]
  if "error" in expected:
    with pytest.raises(ValueError, match="without messages" if not messages else re.escape(expected["error"])):
      chat.encode(messages)
    return
  assert chat.render(messages) == expected["text"]
  assert chat.render(messages, add_generation_prompt=True) == expected["prompt"]
  assert spelled(chat, chat.prompt(messages)) == expected["prompt"]
  ids, mask = chat.encode(messages)
  assert spelled(chat, ids) == expected["text"] and len(mask) == len(ids)
  if template == "generation":
    assert spelled(chat, [i for i, inside in zip(ids, mask, strict=True) if inside]) == expected["answers"]


@pytest.mark.parametrize("template, answers", [
    ("chatml", " It was the best of times\n<|im_end|>it was the worst of times<|im_end|>"),
    ("alternating", " (hm)  It was the best of times\n<|im_end|> it was the worst of times<|im_end|>")])
def test_without_blocks_a_mask_has_the_answers_with_their_end_tokens(named, template, answers):
  ids, mask = named[template].encode(TURNS)
  assert spelled(named[template], [i for i, inside in zip(ids, mask, strict=True) if inside]) == answers
  assert named[template].stop_ids == (2,)


def test_an_end_token_of_turns_stops_beside_the_tokenizers(make):
  chat = make((FIXTURES / "chatml.jinja").read_text(), eos_token="<|endoftext|>")
  assert chat.stop_ids == (0, 2)
  assert make("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}").stop_ids == (2,)


def test_an_answer_without_an_end_token_is_masked_to_its_end(make):
  chat = make("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
              "{% if add_generation_prompt %}assistant:{% endif %}")
  ids, mask = chat.encode(CONVERSATIONS["one turn"])
  assert spelled(chat, [i for i, inside in zip(ids, mask, strict=True) if inside]) == " It was.\n"


def test_prefixes_that_do_not_agree_are_refused(make):
  last_only = "{% for m in messages %}<{{ m.content if loop.last or m.role == 'user' else '...' }}>{% endfor %}"
  assert make(last_only).encode(CONVERSATIONS["one turn"])[1]
  with pytest.raises(ValueError, match=r"messages\[2\]: the chat template writes the beginning of the conversation"):
    make(last_only).encode(TURNS)


FAILING = {
    "{{ messages[5].content.x }}": "the chat template failed: .* has no element 5",
    "{% if %}": "the chat template is not Jinja: line 1: ",
    "{{ raise_exception('no ' ~ messages|length) }}": "the chat template failed: no 2",
    "{{ 1 / 0 }}": "the chat template failed: division by zero",
    "{{ messages.append(1) }}": "the chat template failed: access to attribute 'append' of",
    "{{ ''.__class__.__mro__ }}": "the chat template failed: access to attribute '__class__' .* is unsafe",
    "{{ messages | no_filter }}": "the chat template is not Jinja: line 1: No filter named 'no_filter'",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "the chat template failed: maximum recursion depth",
}


@pytest.mark.parametrize("template, message", FAILING.items())
def test_a_failing_template_ends_in_one_message(make, template, message):
  with pytest.raises(ValueError, match=message):
    make(template).encode(CONVERSATIONS["one turn"])


@pytest.mark.parametrize("message, match", [
    ("a text", r"messages\[0\]='a text': must be an object with a text under 'role'"),
    ({"role": 3}, "must be an object with a text under 'role'"),
    ({"role": "user", "content": 3}, r"messages\[0\]: content=3: must be a text or a list of parts"),
    ({"role": "user", "content": "\ufdd0"}, r"holds U\+FDD0 or U\+FDD1"),
    ({"role": "user", "content": "\ud800"}, "no UTF-8 text has surrogates")])
def test_bad_messages_are_refused(named, message, match):
  with pytest.raises(ValueError, match=match):
    named["chatml"].encode([message])


def test_special_tokens_in_messages_are_refused_if_the_tokenizer_does(make):
  chat = make("{% for m in messages %}{{ m.content[0].text }}<|im_end|>{% endfor %}", special_tokens="refuse")
  assert chat.encode([{"role": "user", "content": [{"type": "text", "text": "it"}]}])[0][-1] == 2
  with pytest.raises(ValueError, match=r"holds the special token '<\|im_start\|>' at position 1"):
    chat.encode([{"role": "user", "content": [{"type": "text", "text": " <|im_start|>"}]}])


def test_a_tokenizer_without_a_template_is_refused(make):
  for tokenizer in (ByteTokenizer(), make("x").tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=f"tokenizer '{tokenizer.name}' has no chat template: it must be"):
      ChatTemplate(tokenizer)
