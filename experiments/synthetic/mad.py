"""The six tasks of mechanistic architecture design (MAD; arXiv:2403.17844, section 3.1 and its appendix on the tasks).

Each class is one task. Its defaults are the paper's baseline, and `changes` has the values to which the paper sets one
field at a time. Where the text leaves something open, the authors' code decides: recall asks for the value of every key
that was seen before and not of the last one alone, and blanks never stand behind the last token to copy.

A recall task trains on every next token of the sequence but tests the answers alone, and its field `training` chooses
between the two. The other tasks test the same positions that they train on. The paper's protocol has 1,280 test
examples, batches of 128, 200 epochs, and accuracy averaged over the classes.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from .batch import Batch

SIZES = (32, 64, 128)
LENGTHS = (256, 512, 1024)
EXAMPLES = (6400, 3200, 1600, 800)


@dataclasses.dataclass(frozen=True)
class InContextRecall:
  """Pairs of a key and a value that is drawn anew for every sequence. A key that came before asks for its value.

  Noise has the highest tokens of the vocabulary. Keys have the lower half of the other tokens, and values the upper
  half. With the probability `noise_fraction` two noise tokens take the place of a pair, but at least one pair stays,
  and the last pair repeats a key. Position 2i holds the key of pair i and says its value. The last position says
  nothing.
  """

  vocab_size: int = 16
  sequence_length: int = 128
  train_examples: int = 12800
  noise_vocab_size: int = 0
  noise_fraction: float = 0.0
  training: bool = False

  changes: ClassVar = {"vocab_size": SIZES, "sequence_length": LENGTHS, "train_examples": EXAMPLES}

  def __post_init__(self):
    _require_vocabulary(self.vocab_size, self.noise_vocab_size + 2, "a key, a value and the noise")
    if self.sequence_length < 4 or self.sequence_length % 2:
      raise ValueError(f"sequence_length={self.sequence_length}: must be even and at least 4, two pairs")
    if not 0 <= self.noise_fraction < 1:
      raise ValueError(f"noise_fraction={self.noise_fraction}: must be in [0, 1)")
    if self.noise_vocab_size < 0 or (self.noise_fraction and not self.noise_vocab_size):
      raise ValueError(f"noise_vocab_size={self.noise_vocab_size}: noise needs at least one token of its own")

  def draw(self, rng: np.random.Generator, count: int) -> Batch:
    """`count` examples; tokens, targets and mask are [count, sequence_length]."""
    symbols = self.vocab_size - self.noise_vocab_size
    keys, rows = symbols // 2, np.arange(count)
    values = rng.integers(keys, symbols, size=(count, keys))
    pairs = self.sequence_length // 2
    asked = rng.integers(keys, size=(count, pairs))
    noisy = rng.random((count, pairs)) < self.noise_fraction
    noisy[rows, rng.integers(pairs - 1, size=count)] = False
    noisy[:, -1] = False

    seen, known = np.zeros((count, keys), bool), np.zeros((count, pairs), bool)
    for i in range(pairs - 1):
      known[:, i] = seen[rows, asked[:, i]] & ~noisy[:, i]
      seen[rows, asked[:, i]] |= ~noisy[:, i]
    asked[:, -1] = np.where(seen, rng.random(seen.shape), -1).argmax(axis=1)
    known[:, -1] = True

    content = np.stack([asked, values[rows[:, None], asked]], axis=-1)  # [count, pairs, 2]
    noise = rng.integers(symbols, self.vocab_size, size=content.shape) if self.noise_vocab_size else content
    sequence = np.where(noisy[..., None], noise, content).reshape(count, -1)
    answers = np.stack([np.zeros_like(known), known], axis=-1).reshape(count, -1)
    return _next_token(sequence, answers | self.training)


@dataclasses.dataclass(frozen=True)
class NoisyRecall(InContextRecall):
  """In-context recall between tokens of noise, which have their own vocabulary."""

  vocab_size: int = 32
  noise_vocab_size: int = 16
  noise_fraction: float = 0.2

  changes: ClassVar = {**InContextRecall.changes, "vocab_size": (48, 80, 144), "noise_fraction": (0.4, 0.6, 0.8)}


@dataclasses.dataclass(frozen=True)
class FuzzyRecall:
  """In-context recall whose keys and values are motifs of several tokens, which differ within a motif.

  The last token of the vocabulary pads on the left. Keys are ordered motifs over the lower half of the other tokens,
  and values over the upper half. Their sizes are uniform between one token and the largest motif, but in tests all keys
  have the largest size. A sequence holds as many pairs as leave room for the largest pair, and then one of them again.
  Each token of a value is said one position early. The last position says nothing.
  """

  vocab_size: int = 16
  sequence_length: int = 128
  train_examples: int = 12800
  key_motif: int = 3
  value_motif: int = 3
  training: bool = False

  changes: ClassVar = {"vocab_size": SIZES, "sequence_length": LENGTHS, "train_examples": EXAMPLES}

  def __post_init__(self):
    if min(self.key_motif, self.value_motif) < 1:
      raise ValueError(f"key_motif={self.key_motif}, value_motif={self.value_motif}: each must be at least 1")
    if (self.vocab_size - 1) // 2 < self.key_motif or self.vocab_size // 2 < self.value_motif:
      raise ValueError(f"vocab_size={self.vocab_size}: half of it without the padding must hold motifs of "
                       f"{self.key_motif} and {self.value_motif} different tokens")
    if self.sequence_length < 2 * (self.key_motif + self.value_motif):
      raise ValueError(f"sequence_length={self.sequence_length}: must hold two pairs of "
                       f"{self.key_motif} + {self.value_motif} tokens")

  def draw(self, rng: np.random.Generator, count: int) -> Batch:
    """`count` examples; tokens, targets and mask are [count, sequence_length]."""
    keys, rows = (self.vocab_size - 1) // 2, np.arange(count)
    smallest_key = 1 if self.training else self.key_motif
    shape = (count, self.sequence_length // (smallest_key + 1))  # no sequence holds more pairs
    key = _motifs(rng, np.arange(keys), smallest_key, self.key_motif, shape)
    value = _motifs(rng, np.arange(keys, self.vocab_size - 1), 1, self.value_motif, shape)
    first = _first_equal(key)
    value = np.take_along_axis(value, first[..., None], axis=1)

    pair = np.concatenate([key, value], axis=-1)  # [count, pairs, key_motif + value_motif], -1 where a motif is shorter
    known = first < np.arange(shape[1])
    ends = np.cumsum((pair >= 0).sum(axis=-1), axis=1)
    kept = ends <= self.sequence_length - pair.shape[-1]
    probe = pair[rows, rng.integers(kept.sum(axis=1))]
    pair = np.concatenate([np.where(kept[..., None], pair, -1), probe[:, None]], axis=1)
    known = np.concatenate([known, np.ones((count, 1), bool)], axis=1)
    answer = known[..., None] & (np.arange(pair.shape[-1]) >= self.key_motif)
    pair, answer = pair.reshape(count, -1), answer.reshape(count, -1)

    # Each token's distance from the end, which is the number of tokens from it on.
    used = pair >= 0
    place = self.sequence_length - np.cumsum(used[:, ::-1], axis=1)[:, ::-1]
    at = (np.nonzero(used)[0], place[used])
    sequence = np.full((count, self.sequence_length), self.vocab_size - 1)
    sequence[at] = pair[used]
    answers = np.zeros(sequence.shape, bool)
    answers[at] = answer[used]
    return _next_token(sequence, answers | self.training)


@dataclasses.dataclass(frozen=True)
class SelectiveCopying:
  """Tokens between blanks, then a token that asks for them in their order, then as many blanks, which say them.

  The last token of the vocabulary asks, and the one before it is the blank. Each blank among the tokens stands before
  one of them, which is chosen uniformly. The last `copies` positions say the tokens.
  """

  vocab_size: int = 16
  sequence_length: int = 256
  train_examples: int = 12800
  copies: int = 16

  changes: ClassVar = {"vocab_size": SIZES, "sequence_length": (512, 1024), "train_examples": EXAMPLES,
                       "copies": (32, 64, 96)}

  def __post_init__(self):
    _require_vocabulary(self.vocab_size, 3, "a token to copy, the blank and the one that asks")
    if self.copies < 1 or self.sequence_length <= 2 * self.copies + 1:
      raise ValueError(f"sequence_length={self.sequence_length}, copies={self.copies}: copies must be positive and the "
                       "length greater than 2 * copies + 1")

  def draw(self, rng: np.random.Generator, count: int) -> Batch:
    """`count` examples; tokens, targets and mask are [count, sequence_length]."""
    ask, blank, n = self.vocab_size - 1, self.vocab_size - 2, self.copies
    copied = rng.integers(blank, size=(count, n))
    blanks = np.full((count, self.sequence_length - 2 * n - 1), blank)
    # Sorted by these keys, a blank with key i stands before token i, whose key is i + 0.5.
    order = np.argsort(np.concatenate([rng.integers(n, size=blanks.shape), np.tile(np.arange(n) + 0.5, (count, 1))],
                                      axis=1), axis=1)
    spread = np.take_along_axis(np.concatenate([blanks, copied], axis=1), order, axis=1)
    tokens = np.concatenate([spread, np.full((count, 1), ask), np.full((count, n), blank)], axis=1)
    targets, mask = np.zeros_like(tokens), np.zeros(tokens.shape)
    targets[:, -n:], mask[:, -n:] = copied, 1
    return _batch(tokens, targets, mask)


@dataclasses.dataclass(frozen=True)
class Compression:
  """Random tokens and one that asks to compress them, whose output alone must give back the whole sequence.

  The last token of the vocabulary asks, and it stands last. The targets are the tokens themselves at every position.
  The model is an encoder: a decoder reads its last output and a position's encoding, and says the token of that
  position.
  """

  decodes_last = True

  vocab_size: int = 16
  sequence_length: int = 32
  train_examples: int = 12800

  changes: ClassVar = {"vocab_size": SIZES, "sequence_length": (64, 128, 256), "train_examples": EXAMPLES}

  def __post_init__(self):
    _require_vocabulary(self.vocab_size, 2, "a token to compress and the one that asks")
    if self.sequence_length < 2:
      raise ValueError(f"sequence_length={self.sequence_length}: must be at least 2")

  def draw(self, rng: np.random.Generator, count: int) -> Batch:
    """`count` examples; tokens, targets and mask are [count, sequence_length]."""
    tokens = rng.integers(self.vocab_size - 1, size=(count, self.sequence_length))
    tokens[:, -1] = self.vocab_size - 1
    return _batch(tokens, tokens, np.ones(tokens.shape))


@dataclasses.dataclass(frozen=True)
class Memorization:
  """Keys whose values are the same in all sequences, so that only the parameters can hold them.

  Sequences alternate a random key and the last token of the vocabulary, at which the model must say the key's value.
  Keys are the lower half of the other tokens. Values all differ and lie in the upper half. `table_seed` draws the
  table.
  """

  vocab_size: int = 256
  sequence_length: int = 32
  train_examples: int = 256
  table_seed: int = 12345

  changes: ClassVar = {"vocab_size": (512, 1024, 2048, 4096, 8192)}

  def __post_init__(self):
    _require_vocabulary(self.vocab_size, 3, "a key, a value and the token that asks")
    if self.sequence_length < 2 or self.sequence_length % 2:
      raise ValueError(f"sequence_length={self.sequence_length}: must be even and at least 2")

  def table(self) -> np.ndarray:
    """Returns the value of each key, [(vocab_size - 1) // 2]."""
    keys = (self.vocab_size - 1) // 2
    return np.random.default_rng(self.table_seed).permutation(np.arange(keys, self.vocab_size - 1))[:keys]

  def draw(self, rng: np.random.Generator, count: int) -> Batch:
    """`count` examples; tokens, targets and mask are [count, sequence_length]."""
    table = self.table()
    keys = rng.integers(len(table), size=(count, self.sequence_length // 2))
    tokens = np.full((count, self.sequence_length), self.vocab_size - 1)
    tokens[:, ::2] = keys
    targets, mask = np.zeros_like(tokens), np.zeros(tokens.shape)
    targets[:, 1::2], mask[:, 1::2] = table[keys], 1
    return _batch(tokens, targets, mask)


def _batch(tokens, targets, mask):
  return Batch(tokens.astype(np.int32), targets.astype(np.int32), mask.astype(np.float32))


def _next_token(sequence, counted):
  """Makes every position say the next token, which counts where `counted` has that token."""
  targets, mask = np.zeros_like(sequence), np.zeros(sequence.shape)
  targets[:, :-1], mask[:, :-1] = sequence[:, 1:], counted[:, 1:]
  return _batch(sequence, targets, mask)


def _motifs(rng, symbols, smallest, largest, shape):
  """Draws ordered motifs of different symbols and of uniform size: [*shape, largest], -1 where a motif is shorter."""
  drawn = np.empty((*shape, largest), np.int32)
  for i in range(largest):
    drawn[..., i] = rng.integers(len(symbols) - i, size=shape)
    for earlier in np.moveaxis(np.sort(drawn[..., :i]), -1, 0):
      drawn[..., i] += drawn[..., i] >= earlier
  sizes = rng.integers(smallest, largest + 1, size=shape)
  return np.where(np.arange(largest) < sizes[..., None], symbols[drawn], -1)


def _first_equal(motifs):
  """Finds for each motif of [count, pairs, size] the first equal one in its row: [count, pairs]."""
  codes = np.zeros(motifs.shape[:-1], np.int64)
  for part in np.moveaxis(motifs, -1, 0):
    codes = codes * (motifs.max() + 2) + part + 1
  places = []
  for row in codes:
    _, first, inverse = np.unique(row, return_index=True, return_inverse=True)
    places.append(first[inverse])
  return np.array(places).reshape(codes.shape)


def _require_vocabulary(vocab_size, least, holds):
  if vocab_size < least:
    raise ValueError(f"vocab_size={vocab_size}: must be at least {least} to hold {holds}")
