"""A server: requests of any length share a fixed number of rows, which one compiled program decodes together.

A request is read in the parallel form, piece by piece, and the rows go on between its pieces. The state after its
prompt is then written into a free row. Reading compiles one program per padded length of a piece, and decoding one in
all. The memory is known when the server is made and does not grow. Per row, a recurrent layer keeps a state of fixed
size, attention with a window its last tokens, and attention without one up to `max_length` tokens.

  server = Server(model, rows=8)
  for prompt in prompts:
    server.submit(Request(prompt, max_tokens=100, stop=(tokenizer.eos_id,)))
  for progress in server.finish():
    print(progress.id, progress.tokens)
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lin_jax import generate, serving_rows
from lin_jax.generate import ENDLESS, Sampling, padded
from lin_jax.model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt of ids and how to continue it. Its answer equals that of `generate` with the key of `seed`, up to the
  first of the ids in `stop`."""

  prompt: Sequence[int]
  max_tokens: int
  sampling: Sampling = Sampling()
  seed: int = 0
  stop: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Progress:
  """New tokens of the request `id`. `ended` is "" if more will come, "stop" if a stop token came next, which is not
  among the tokens, and "length" after the request's `max_tokens`."""

  id: int
  tokens: list[int]
  ended: str


class Server:
  """Continues requests in `rows` rows of a model. The weights are copied once, in the compute dtype.

  Args:
    max_length: tokens of prompt and answer for which a row's cache has room, at least 2. It is the bound of models that
      have attention without a window. Other models read and write texts of any length and do not use it.
    piece: tokens of a prompt that are read at once, at most. About as many are read for each free row between two calls
      of the decoding program, so that the rows in use never wait for long, and few rows are free while prompts wait.
    stride: tokens that one call of the decoding program draws per row. An answer that ends within them leaves the rest
      of its row unused, and a new request waits for the end of the call.
  Raises:
    ValueError: an argument is too small, or the states need more memory than the device has.
  """

  def __init__(self, model: LanguageModel, *, rows: int, max_length: int = 0, piece: int = 512, stride: int = 8):
    for name, value in dict(rows=rows, piece=piece, stride=stride).items():
      if value < 1:
        raise ValueError(f"{name}={value}: must be at least 1")
    self.max_length = max_length if generate.has_growing_state(model) else None
    if self.max_length is not None and max_length < 2:
      raise ValueError(f"max_length={max_length}: must be at least 2, because this model's cache holds every token")
    self.model, self.rows, self.stride = model, rows, stride
    self._slots = self.max_length or ENDLESS
    self.piece = min(piece, self._slots)
    generate.require_memory(f"a server of {rows:,} rows" + (f" of {max_length:,} tokens" if self.max_length else ""),
                   self.total_bytes, "take fewer rows or a smaller max_length")
    self._decoder = serving_rows.prepare(model)
    self._state = serving_rows.empty_rows(model, rows, self._slots)
    self._submitted = 0
    self._queue: collections.deque[tuple[int, Request]] = collections.deque()
    self._reading: _Reading | None = None
    self._answers: dict[int, _Answer] = {}  # by row

  @property
  def row_bytes(self) -> tuple[int, int]:
    """Bytes of one row's state: of its recurrent layers, and of its caches of keys and values."""
    cache = generate.cache_bytes(self.model, 1, self._slots)
    return generate.state_bytes(self.model, 1, self._slots) - cache, cache

  @property
  def total_bytes(self) -> int:
    """Bytes of all rows' states, and of one more for the prompt that is being read."""
    return (self.rows + 1) * sum(self.row_bytes)

  @property
  def busy(self) -> bool:
    """Whether a submitted request has not ended."""
    return bool(self._queue or self._reading or self._answers)

  def submit(self, request: Request) -> int:
    """Puts a request behind those that wait, and returns its number: 0 for the first, 1 for the second and so on.

    Raises ValueError as `check` does.
    """
    self.check(request)
    self._queue.append((self._submitted, request))
    self._submitted += 1
    return self._submitted - 1

  def check(self, request: Request) -> None:
    """Raises ValueError for an empty prompt, for ids outside the vocabulary, and for a request that no row has room
    for."""
    length = len(request.prompt)
    if length < 1 or request.max_tokens < 1:
      raise ValueError(f"a prompt of {length} and max_tokens={request.max_tokens}: each must be at least 1")
    if not 0 <= request.seed < 2**32:
      raise ValueError(f"seed={request.seed}: must lie in [0, 2**32)")
    for name, ids in (("prompt", request.prompt), ("stop", request.stop)):
      if len(ids):
        generate.require_ids(self.model, np.asarray(ids), name)
    if self.max_length is not None and length + request.max_tokens > self.max_length:
      raise ValueError(f"a prompt of {length:,} and {request.max_tokens:,} new tokens: together they must not be more "
                       f"than max_length={self.max_length:,}, because this model's cache holds every token")

  def cancel(self, number: int) -> None:
    """Ends a request early. Nothing more of it comes, and its row is free. A request that has ended is left alone."""
    self._queue = collections.deque(pair for pair in self._queue if pair[0] != number)
    if self._reading and self._reading.id == number:
      self._reading = None
    self._answers = {row: answer for row, answer in self._answers.items() if answer.id != number}

  def step(self) -> list[Progress]:
    """Reads about a piece of the waiting prompts per free row, draws `stride` tokens in each row, and returns the news.
    """
    unread = self.piece * (self.rows - len(self._answers))
    # Without an answer under way, nothing waits for the end of the reading.
    while (self._queue or self._reading) and len(self._answers) < self.rows and (unread > 0 or not self._answers):
      unread -= self._read_piece()
    if not self._answers:
      return []
    self._state, tokens = serving_rows.decode(self._decoder, self._state, self.stride)
    tokens = np.asarray(tokens).tolist()
    news = [answer.take(tokens[row]) for row, answer in self._answers.items()]
    ended = {progress.id for progress in news if progress.ended}
    self._answers = {row: answer for row, answer in self._answers.items() if answer.id not in ended}
    return news

  def finish(self) -> Iterator[Progress]:
    """Yields the news of all requests, also of those that are submitted meanwhile, until the last has ended."""
    while self.busy:
      yield from self.step()

  def warm_up(self, lengths: Iterable[int]) -> None:
    """Compiles the programs for prompts of these lengths, by continuing such prompts with one token each. They count
    among the submitted requests. It must be called while the server is not busy."""
    # A prompt of many pieces is read by the same programs as one of two.
    shorter = (length if length <= self.piece else self.piece + self._first(length) for length in lengths)
    for length in {(padded(self._first(n)), n > self.piece): n for n in shorter}.values():
      self.submit(Request([0] * length, 1))
    collections.deque(self.finish(), maxlen=0)

  def _first(self, length):
    """The tokens of the first piece, which alone is padded."""
    return (length - 1) % self.piece + 1

  def _read_piece(self):
    """Reads the next piece of a prompt, and returns its padded length. After the last one, a row gets the state."""
    reading = self._reading or self._begin(*self._queue.popleft())
    tokens, segments = reading.pieces.popleft()
    logits, reading.state = serving_rows.read(self.model, tokens, segments, reading.state)
    self._reading = reading
    if not reading.pieces:
      row = min(set(range(self.rows)) - self._answers.keys())
      settings = serving_rows.settings(reading.request.sampling, reading.request.seed, self.model.embedding.shape[0])
      self._state = serving_rows.place(self._state, row, reading.state, logits, settings)
      self._answers[row], self._reading = _Answer(reading.id, reading.request), None
    return tokens.shape[1]

  def _begin(self, number, request):
    first = self._first(len(request.prompt))
    filler = min(padded(first), self.piece) - first
    tokens = np.concatenate([np.zeros(filler, np.int32), np.asarray(request.prompt, np.int32)])[None]
    segments = (np.arange(tokens.shape[1]) >= filler)[None].astype(np.int32)
    ends = range(filler + first, tokens.shape[1] + 1, self.piece)
    pieces = [tuple(ids[:, max(0, end - self.piece):end] for ids in (tokens, segments)) for end in ends]
    return _Reading(number, request, collections.deque(pieces), serving_rows.empty_state(self.model, self._slots))


@dataclasses.dataclass
class _Reading:
  """A request whose prompt is being read, the pieces of it that are left as (tokens, segments), and the state."""

  id: int
  request: Request
  pieces: collections.deque
  state: Any


@dataclasses.dataclass
class _Answer:
  """A request that has a row, and the number of its tokens so far."""

  id: int
  request: Request
  count: int = 0

  def take(self, tokens):
    """The progress by `tokens`, of which those after the answer's end are dropped."""
    tokens = tokens[:self.request.max_tokens - self.count]
    stop = next((i for i, token in enumerate(tokens) if token in self.request.stop), None)
    self.count += len(tokens)
    ended = "stop" if stop is not None else "length" if self.count == self.request.max_tokens else ""
    return Progress(self.id, tokens[:stop], ended)
