"""Overlap of held-out documents with the training text, in n-grams of token ids."""

from collections.abc import Iterable, Iterator

import numpy as np

N = 13
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def ngrams(ids: np.ndarray) -> np.ndarray:
  """Returns uint64 hashes of the n-grams of `ids`: sum_j id_{i+j} m^(n-1-j) modulo 2^64, with its halves mixed."""
  if len(ids) < N:
    return np.zeros(0, np.uint64)
  count = len(ids) - N + 1
  values = np.zeros(count, np.uint64)
  for j in range(N):
    values *= _MULTIPLIER
    values += ids[j:j + count]
  return values ^ (values >> np.uint64(32))


def fractions(held_out: Iterable[np.ndarray], training: list[np.ndarray]) -> Iterator[float]:
  """Yields for each held-out document the fraction of its n-grams that occur in the training documents."""
  table = np.concatenate([ngrams(ids) for ids in training] or [np.zeros(0, np.uint64)])
  # This works in place, because np.unique on hundreds of millions of values takes minutes.
  table.sort()
  for ids in held_out:
    grams = np.sort(ngrams(ids))
    found = np.searchsorted(table, grams)
    hit = table[np.minimum(found, len(table) - 1)] == grams if len(table) else np.zeros(len(grams), bool)
    yield float(hit.mean()) if len(grams) else 0.0
