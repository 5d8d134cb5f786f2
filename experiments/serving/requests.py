"""Requests as texts: the lines of a file, and what the server gets of each."""

import dataclasses
import json
import pathlib
from typing import Any

from lin_jax import typed_json
from lin_jax.chat import ChatTemplate
from lin_jax.generate import Sampling
from lin_jax.serving import Request, Server
from lin_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TextRequest:
  """A prompt and how to continue it. The answer ends before the first of the texts in `stop`, where the model ends the
  document or its turn, and after `max_tokens`."""

  prompt: str
  max_tokens: int
  temperature: float
  top_k: int
  top_p: float
  seed: int
  stop: Any = ()  # a text or a list of texts
  id: Any = 0  # a text or a whole number, by default the number of the request's line

  def __post_init__(self):
    stop = (self.stop,) if isinstance(self.stop, str) else self.stop
    if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text for text in stop):
      raise ValueError(f"stop={typed_json.shown(self.stop)}: must be a text or a list of texts that are not empty")
    if type(self.id) not in (int, str):
      raise ValueError(f"id={typed_json.shown(self.id)}: must be a text or a whole number")
    object.__setattr__(self, "stop", tuple(stop))


def load(path: pathlib.Path, defaults: TextRequest, server: Server, tokenizer: Tokenizer,
         chat: ChatTemplate | None = None) -> list[tuple[TextRequest, Request]]:
  """The requests of a file of JSON lines, whose fields are those of `TextRequest`, as texts and as ids.

  A line must have a prompt, and `defaults` has the other fields. Empty lines are skipped. Raises ValueError, naming the
  line, for the first that is no such object, that `server` has no room for, or whose id another line has.
  """
  try:
    lines = path.read_bytes().decode("utf-8-sig").split("\n")
  except UnicodeDecodeError as e:
    raise ValueError(f"{path}: must be UTF-8 ({e})") from e
  requests, known = [], set()
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      text = _parse(line, dataclasses.replace(defaults, id=number))
      request = to_ids(text, tokenizer, chat)
      server.check(request)
      if text.id in known:
        raise ValueError(f"id={text.id!r}: an earlier line has it too")
    except ValueError as e:
      raise ValueError(f"{path}: line {number}: {e}") from e
    known.add(text.id)
    requests.append((text, request))
  if not requests:
    raise ValueError(f"{path}: must hold at least one request")
  return requests


def to_ids(text: TextRequest, tokenizer: Tokenizer, chat: ChatTemplate | None = None) -> Request:
  """What the server gets."""
  sampling = Sampling(text.temperature, text.top_k, text.top_p, tokenizer.vocab_size)
  prompt, stop = read_prompt(text.prompt, tokenizer, chat)
  return Request(prompt, text.max_tokens, sampling, text.seed, stop)


def read_prompt(text: str, tokenizer: Tokenizer, chat: ChatTemplate | None) -> tuple[list[int], tuple[int, ...]]:
  """The ids of a prompt, and the ids that end what follows it.

  An empty prompt begins a document. With `chat` the prompt is the message of a user, and an answer follows it.
  """
  if chat:
    return chat.prompt([dict(role="user", content=text)]), chat.stop_ids
  return [*tokenizer.begin_ids, *tokenizer.encode(text)] or [tokenizer.eos_id], (tokenizer.eos_id,)


def _parse(line, defaults):
  try:
    values = json.loads(line)
  except json.JSONDecodeError as e:
    raise ValueError(f"{typed_json.shown(line)}: not JSON ({e.msg} at character {e.pos + 1})") from e
  if not isinstance(values, dict) or "prompt" not in values:
    raise ValueError(f"{typed_json.shown(values)}: must be an object with a prompt")
  return typed_json.build(TextRequest, vars(defaults) | values, "request")
