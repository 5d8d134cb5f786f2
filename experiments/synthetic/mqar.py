"""Multi-query associative recall (MQAR; Arora et al. 2023, arXiv:2312.04927, and its code, HazyResearch/zoology).

A sequence opens with `pairs` of a key and its value, k1 v1 k2 v2 .... Keys come from the lower half of the vocabulary
and values from the upper half, and all differ. Each key then comes once more as a query, and at that position the model
must say its value. Query i stands at 2 pairs + 2 g_i. The g are drawn without replacement from the slots that are left,
slot j = 1, 2, ... with a probability proportional to j^(power - 1), so that most queries follow soon and a few late.
The other positions hold token 0, or with `random_filler` any token.
"""

import dataclasses

import numpy as np

from .batch import Batch


@dataclasses.dataclass(frozen=True)
class MQAR:
  """The defaults are the easier of the two settings that the GLA and DeltaNet papers plot; the other is (512, 64)."""

  sequence_length: int = 256
  pairs: int = 16
  vocab_size: int = 8192
  power: float = 0.01
  random_filler: bool = False

  def __post_init__(self):
    if self.pairs < 1:
      raise ValueError(f"pairs={self.pairs}: must be at least 1")
    if self.sequence_length % 2 or self.sequence_length < 4 * self.pairs:
      raise ValueError(f"sequence_length={self.sequence_length}: must be even and at least 4 pairs = {4 * self.pairs}")
    if self.vocab_size // 2 <= self.pairs:
      raise ValueError(f"vocab_size={self.vocab_size}: half of it must exceed pairs={self.pairs}")
    if self.power <= 0:
      raise ValueError(f"power={self.power}: must be positive")

  def draw(self, rng: np.random.Generator, count: int) -> Batch:
    """`count` examples; tokens, targets and mask are [count, sequence_length]."""
    half, context = self.vocab_size // 2, 2 * self.pairs
    keys = distinct(rng, count, self.pairs, 1, half)
    values = distinct(rng, count, self.pairs, half, self.vocab_size)
    shape = count, self.sequence_length
    tokens, targets, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    if self.random_filler:
      tokens = rng.integers(self.vocab_size, size=shape, dtype=np.int32)
    tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
    positions = context + 2 * self._slots(rng, count)
    np.put_along_axis(tokens, positions, keys, axis=1)
    np.put_along_axis(targets, positions, values, axis=1)
    np.put_along_axis(mask, positions, np.float32(1), axis=1)
    return Batch(tokens, targets, mask)

  def slot_probabilities(self) -> np.ndarray:
    """Returns the probabilities of the first query's slot, [(sequence_length - 2 pairs) / 2]."""
    weights = np.arange(1, (self.sequence_length - 2 * self.pairs) // 2 + 1) ** (self.power - 1.0)
    return weights / weights.sum()

  def _slots(self, rng, count):
    # Each slot has an exponential clock of rate p, and the clocks ring in the order of draws without replacement.
    p = self.slot_probabilities()
    return np.argsort(rng.exponential(size=(count, len(p))) / p, axis=1)[:, :self.pairs]


def distinct(rng: np.random.Generator, count: int, size: int, low: int, high: int) -> np.ndarray:
  """Draws `count` rows of `size` different integers from [low, high), all equally likely: int32 [count, size]."""
  if size * size > 2 * (high - low):
    return (low + np.argsort(rng.random((count, high - low)), axis=1)[:, :size]).astype(np.int32)
  rows = rng.integers(low, high, (count, size), dtype=np.int32)
  # Fewer than two in three rows repeat a number. Drawing such rows again costs less than a permutation of the range.
  while (repeated := (np.diff(np.sort(rows, axis=1)) == 0).any(axis=1)).any():
    rows[repeated] = rng.integers(low, high, (repeated.sum(), size), dtype=np.int32)
  return rows
