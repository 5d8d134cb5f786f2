"""Recall of facts from the context: a field of a country page is named again, and the model has to repeat its text.

The split `recall` of the English corpus has pages of the World Factbook that no other split has, with lines `Field:
text`. The model reads a part of a page and then a field's name with its colon, and has to go on with the field's text.
FDA and SWDE ask in this way (Arora et al., arXiv:2312.04927 and 2402.18668), which GLA's and DeltaNet's papers report.

Which fields are asked. A field's name stands once in its page, in any case of letters. Its value is the text up to a
bracket, a semicolon or " ++", behind which pages put years and further values. A value has 3 to 16 tokens, stands
nowhere else in its page, and no other page of the split gives it for the same field. The pages are a seventh of all,
chosen by a hash, so a value that most training pages share is shared by some of these and is not asked.

Distance. It is the number of tokens from the value to its repetition, and falls into ranges that double: below 128, 128
to 256, and so on up to the context length. Each fact is asked once in each range, at places spread evenly over it, and
what is read fills the model's context at any distance. So nothing but the distance differs between ranges.

Controls. `line_removed` is the same text without the field's line, and shows what the weights and the rest of the page
tell. `other_page` is as much of another country's page without its line of that field, and shows what the field's name
tells, such as its unit. The value occurs in neither.

Scores. `right` is the share of questions whose value has the largest logit at each of its tokens, given those before.
Greedy decoding writes the whole value in exactly these cases, because it then has each of these tokens as context.
`loss` is the mean over all tokens of values, in nats per token. Nothing is drawn at random.
"""

import collections
import dataclasses
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lin_jax.config import DataConfig
from lin_jax.data import TokenDataset
from lin_jax.model import LanguageModel
from lin_jax.tokenizer import Tokenizer

SPLIT = "recall"
CONTEXTS = "page", "line_removed", "other_page"
SHORTEST, LONGEST = 3, 16  # tokens of a value
FIRST_RANGE = 128
PER_PAGE = 9  # facts, spread evenly over those that can be asked
_FIELD = re.compile(rb"([^\n]+?): ([^\n]+?)(?= \(|;| \+\+|\n)")
_NAMES = re.compile(rb"^(.+?): ", re.M)
_GOLDEN = (5**0.5 - 1) / 2  # its multiples modulo 1 are spread evenly, however many there are


@dataclasses.dataclass(frozen=True)
class Question:
  """A fact asked at one distance: the ids before the value by the kind of context, and the value's ids `answer`."""

  page: int
  name: str
  value: str
  distance: int
  contexts: dict[str, np.ndarray]
  answer: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Line:
  """The ids [start, stop) of a page, and the name of its field. The ids of a value that can be asked are [begin, end).
  """

  start: int
  stop: int
  name: bytes = b""
  value: bytes = b""
  begin: int = 0
  end: int = 0


@dataclasses.dataclass(frozen=True)
class _Page:
  ids: np.ndarray
  text: bytes
  lines: list[_Line]

  def before(self, stop: int, length: int, without: bytes = b"") -> np.ndarray:
    """The last `length` ids up to `stop`, less those of the lines whose field is `without`."""
    kept = np.ones(len(self.ids), bool)
    for line in self.lines:
      if without and line.name.lower() == without.lower():
        kept[line.start:line.stop] = False
    chosen = slice(max(0, stop - length), stop)
    return self.ids[chosen][kept[chosen]]


def ranges(length: int) -> list[tuple[int, int]]:
  """Returns the ranges of distances [start, stop) in a context of `length` tokens."""
  edges = [0]
  while (edge := FIRST_RANGE << len(edges) - 1) < length:
    edges.append(edge)
  return list(zip(edges, [*edges[1:], length], strict=True))


def questions(data: DataConfig) -> list[Question]:
  """Returns the questions on the dataset's split `recall`, for the config's context length.

  Raises ValueError if the dataset has no such split, or the split no fact that can be asked.
  """
  text, length, found = TokenDataset(data.path, SPLIT), data.sequence_length, []
  tokenizer, starts = text.tokenizer(), [*text.document_starts.tolist(), text.tokens]
  pages = [_page(text.read(*bounds), tokenizer) for bounds in zip(starts, starts[1:], strict=False)]
  given = collections.Counter(fact for page in pages for fact in {(line.name, line.value) for line in page.lines})
  for number, page in enumerate(pages):
    names = collections.Counter(name.lower() for name in _NAMES.findall(page.text))
    known = [line for line in page.lines if line.value and names[line.name.lower()] == 1
             and given[line.name, line.value] == page.text.count(line.value) == 1]
    asked = [(line, ends, other) for line in known if (ends := _ends(page, line, length))
             and (other := _other(pages[number + 1:] + pages[:number], line.value, length))]
    for i in sorted({i * len(asked) // PER_PAGE for i in range(PER_PAGE)}) if asked else ():
      found += _asked(number, page, *asked[i], length, len(found))
  if not found:
    raise ValueError(f"{data.path}: no page of split {SPLIT!r} has a field to ask at config.data.sequence_length="
                     f"{length}: pages must be longer than that, with lines 'Field: text'")
  return found


def _page(ids: np.ndarray, tokenizer: Tokenizer) -> _Page:
  spelled = [tokenizer.token_bytes(int(token), first=i == len(tokenizer.begin_ids)) for i, token in enumerate(ids)]
  text, places = b"".join(spelled), {}  # the first id at each byte with which an id begins
  for place, byte in enumerate(np.cumsum([0, *map(len, spelled)]).tolist()):
    places.setdefault(byte, place)
  lines, start = [], 0
  for newline in re.finditer(rb"\n", text):
    if (stop := newline.end()) in places:  # an id may reach into the next line
      lines.append(_line(text[start:stop], start, stop, places))
      start = stop
  return _Page(ids, text, lines)


def _line(text, start, stop, places):
  if not (field := _FIELD.match(text)):
    return _Line(places[start], places[stop])
  begin, end = (places.get(start + byte) for byte in (field.end(1) + 1, field.end(2)))
  fits = None not in (begin, end) and SHORTEST <= end - begin <= LONGEST
  return _Line(places[start], places[stop], field[1], *([field[2], begin, end] if fits else []))


def _ends(page, line, length):
  """Where a context may end, for each range of distances: after another line, and with enough of the page before it.
  Empty if a range has no such place."""
  size = line.end - line.start
  stops = [other.stop for other in page.lines if other.start >= line.stop and other.stop + size >= length
           and other.stop - line.start + size <= length]
  ends = [[stop for stop in stops if low <= stop - line.start < high] for low, high in ranges(length)]
  return ends if all(ends) else []


def _other(pages, value, length):
  """The first page that fills a context and lacks the value, or None."""
  return next((page for page in pages if page.lines and page.lines[-1].stop >= length and value not in page.text), None)


def _asked(number, page, line, ends, other, length, count):
  """The questions about one fact, one for each range; `count` questions were asked before."""
  size, name = line.end - line.start, page.ids[line.start:line.begin]
  for i, stops in enumerate(ends):
    stop = stops[int(len(stops) * ((count + i) * _GOLDEN % 1))]
    stop_other = max(row.stop for row in other.lines if row.stop <= max(stop, length))
    read = (page.before(stop, length - size), page.before(stop, length - size, line.name),
            other.before(stop_other, length - size, line.name))
    yield Question(number, line.name.decode(errors="replace"), line.value.decode(errors="replace"), stop - line.start,
                   {kind: np.concatenate([ids, name]) for kind, ids in zip(CONTEXTS, read, strict=True)},
                   page.ids[line.begin:line.end])


def recall(model: LanguageModel, asked: Sequence[Question], data: DataConfig) -> dict:
  """Reads the questions in batches of the config's shape.

  Returns the numbers of `facts`, `questions` and `value_tokens`, `right` and `loss` in a dict for each kind of context,
  and `distances`: the same but `facts` for each range, from its `start` to its `stop`.
  """
  answers = {kind: _answers(model, asked, kind, data) for kind in CONTEXTS}
  parts = [(low, high, [i for i, question in enumerate(asked) if low <= question.distance < high])
           for low, high in ranges(data.sequence_length)]
  return {"facts": len({(question.page, question.name) for question in asked}), **_scores(answers, range(len(asked))),
          "distances": [{"start": low, "stop": high, **_scores(answers, chosen)} for low, high, chosen in parts
                        if chosen]}


def _scores(answers, chosen):
  losses = {kind: np.concatenate([found[i][0] for i in chosen]) for kind, found in answers.items()}
  return {"questions": len(chosen), "value_tokens": len(losses[CONTEXTS[0]]),
          **{kind: {"right": sum(found[i][1] for i in chosen) / len(chosen), "loss": float(losses[kind].mean())}
             for kind, found in answers.items()}}


def _answers(model, asked, kind, data):
  """For each question the losses of its value's tokens, and whether all of these have the largest logit."""
  found = []
  for start in range(0, len(asked), data.batch_size):
    chosen = asked[start:start + data.batch_size]
    losses, largest = map(np.asarray, _read(model, *batch(chosen, kind, data)))
    for question, loss, best in zip(chosen, losses.astype(np.float64), largest, strict=False):
      size = len(question.answer)
      found.append((loss[:size], bool(best[:size].all())))
  return found


def batch(asked: Sequence[Question], kind: str, data: DataConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the tokens [B, T] of the questions, each with its value, and for the value [B, LONGEST] the places of the
  tokens before its own, and its own. Zeros fill up the rows, and no token of a value sees them."""
  tokens = np.zeros((data.batch_size, data.sequence_length), np.int32)
  places, targets = (np.zeros((data.batch_size, LONGEST), np.int32) for _ in range(2))
  for row, question in enumerate(asked):
    ids, size = np.concatenate([question.contexts[kind], question.answer]), len(question.answer)
    tokens[row, :len(ids)] = ids
    places[row, :size] = np.arange(len(ids) - size, len(ids)) - 1
    targets[row, :size] = question.answer
  return tokens, places, targets


@jax.jit
def _read(model, tokens, places, targets):
  hidden, _ = model.hidden(tokens)
  logits = model.logits(jnp.take_along_axis(hidden, places[..., None], axis=1))  # those of values alone fit in memory
  loss = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return loss, logits.argmax(axis=-1) == targets
