"""Chats as ids: conversations through a tokenizer's chat template, with a mask of the answers.

A conversation is a list of messages, objects with a `role`, such as "system", "user" or "assistant", and a `content`.
A chat template is a Jinja program that writes a conversation as one text. It sees what it sees in `transformers`
(`utils/chat_template_utils.py`), in a sandbox that keeps it from changing anything. Like there, it may ask for the
present date, and so write another text on another day.
"""

import datetime
import functools
import json
import re
from collections.abc import Sequence

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lin_jax.fast_tokenizer import FastTokenizer
from lin_jax.tokenizer import Tokenizer
from lin_jax.typed_json import shown

# Noncharacters of Unicode, which no text has, mark a template's `{% generation %}` blocks in what it writes.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_ANSWERED = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


class ChatTemplate:
  """The chat template of `tokenizer`, which must be a `FastTokenizer` with one.

  Special tokens in messages become their ids, unless the tokenizer refuses them.

  Every method raises ValueError for messages of another form, and if the template fails or refuses them. The
  constructor raises it for a tokenizer without a template, and for a template that is not Jinja.
  """

  def __init__(self, tokenizer: Tokenizer):
    if not isinstance(tokenizer, FastTokenizer) or tokenizer.chat_template is None:
      raise ValueError(f"tokenizer {tokenizer.name!r} has no chat template: it must be a tokenizer.json with "
                       "chat_template.jinja or a chat_template in tokenizer_config.json beside it")
    self.tokenizer = tokenizer
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[_GenerationBlocks, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals |= dict(raise_exception=_raise, strftime_now=_now)
    try:
      self._template = environment.from_string(tokenizer.chat_template)
    except jinja2.TemplateSyntaxError as e:
      raise ValueError(f"the chat template is not Jinja: line {e.lineno}: {e}") from e
    self._has_blocks = re.search(r"\{%[-+]?\s*generation\b", tokenizer.chat_template) is not None

  def render(self, messages: Sequence[dict], *, add_generation_prompt: bool = False) -> str:
    """The text of a conversation, and with `add_generation_prompt` the beginning of the answer that follows it."""
    return _cut_marks(self._marked(messages, add_generation_prompt))[0]

  def prompt(self, messages: Sequence[dict]) -> list[int]:
    """The ids after which a model answers the conversation."""
    return self.tokenizer.encode_chat(self.render(messages, add_generation_prompt=True))[0]

  def encode(self, messages: Sequence[dict]) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and for each whether it belongs to an answer of the assistant or ends one.

    Answers are what a template writes within `{% generation %}` blocks. A template without them is asked for each
    answer's beginning, by the conversation before it with a generation prompt, and for its end, by the conversation up
    to it. The end token that follows an answer belongs to it, and space after this token does not.

    Raises ValueError too if these texts are not beginnings of the whole conversation's text.
    """
    text, spans = _cut_marks(self._marked(messages, False))
    ids, offsets = self.tokenizer.encode_chat(text)
    mask = [False] * len(ids)
    for start, stop in spans if self._has_blocks else self._answers(messages, text):
      inside = [i for i, (first, end) in enumerate(offsets) if end > start and first < stop]
      ends = [i for i in inside if ids[i] in self.tokenizer.special]
      if not self._has_blocks and ends and not text[offsets[ends[-1]][1]:stop].strip():
        inside = [i for i in inside if i <= ends[-1]]
      for i in inside:
        mask[i] = True
    return ids, mask

  @functools.cached_property
  def stop_ids(self) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's end id, and the special token that the template writes after answers."""
    after, eos_id = self.render(_ANSWERED).rpartition(_ANSWERED[-1]["content"])[2], self.tokenizer.eos_id
    end = next((i for i in self.tokenizer.encode_chat(after)[0] if i in self.tokenizer.special), eos_id)
    return (eos_id,) if end == eos_id else (eos_id, end)

  def _answers(self, messages, text):
    for i, message in enumerate(messages):
      if message["role"] == "assistant":
        start = self.render(messages[:i], add_generation_prompt=True)
        stop = self.render(messages[:i + 1])
        if not (stop.startswith(start) and text.startswith(stop)):
          raise ValueError(f"messages[{i}]: the chat template writes the beginning of the conversation otherwise when "
                           "this answer follows or is followed, so answers cannot be told from the rest: give "
                           "conversations of one answer, or a template with {% generation %} blocks")
        yield len(start), len(stop)

  def _marked(self, messages, add_generation_prompt):
    if not messages:
      raise ValueError("a conversation without messages")
    messages = [self._checked(i, message) for i, message in enumerate(messages)]
    try:
      return self._template.render(messages=messages, tools=None, documents=None,
                                   add_generation_prompt=add_generation_prompt, **self.tokenizer.token_texts())
    except Exception as e:  # the template is a program, which may fail in any way
      raise ValueError(f"the chat template failed: {' '.join(str(e).split()) or type(e).__name__}") from e

  def _checked(self, i, message):
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
      raise ValueError(f"messages[{i}]={shown(message)}: must be an object with a text under 'role'")
    content = message.get("content")
    if not isinstance(content, str | list | None):
      raise ValueError(f"messages[{i}]: content={shown(content)}: must be a text or a list of parts")
    for text in _strings(message):
      if _BEGIN in text or _END in text:
        raise ValueError(f"messages[{i}]: holds U+FDD0 or U+FDD1, which no text has")
      self.tokenizer.require_allowed(text)
    return {key: value for key, value in message.items() if value is not None}


class _GenerationBlocks(jinja2.ext.Extension):
  """`{% generation %}` and `{% endgeneration %}`, around answers."""

  tags = {"generation"}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

  def _mark(self, caller):
    return _BEGIN + caller() + _END


def _strings(value):
  if isinstance(value, str):
    yield value
  elif isinstance(value, dict | list):
    for part in value.values() if isinstance(value, dict) else value:
      yield from _strings(part)


def _cut_marks(marked):
  """The text without marks, and the places [start, stop) between marks in it."""
  text, spans, start = "", [], 0
  for part in re.split(f"([{_BEGIN}{_END}])", marked):
    if part == _BEGIN:
      start = len(text)
    elif part == _END:
      spans.append((start, len(text)))
    else:
      text += part
  return text, spans


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  # Jinja's own filter escapes characters for HTML.
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message):
  raise jinja2.TemplateError(message)


def _now(form):
  return datetime.datetime.now().strftime(form)
