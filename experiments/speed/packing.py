"""Packed documents for speed measurements: windows cut from a row of documents as long as the English corpus's.

The lengths are those of the 58,437 documents that `prepare_data.py --corpus=english --tier=full` makes, in tokens with
the end of each document. Half of the documents are shorter than 158 tokens, and 63% of the tokens are in documents of
at least 8,192. `LENGTHS` has quantiles, between which a drawn length is interpolated on a logarithmic scale. Of windows
of 2,048 tokens a third has a document's start behind its first token, and there are 2.3 documents per window.
"""

import numpy as np

DOCUMENTS = {"one": "one a window", "packed": "packed, of the English corpus's lengths"}
# The share of documents that are not longer, and their tokens.
LENGTHS = ((0, 52), (0.01, 68), (0.05, 76), (0.1, 82), (0.2, 94), (0.3, 107), (0.4, 126), (0.5, 157), (0.6, 225),
           (0.7, 415), (0.8, 1002), (0.9, 3582), (0.95, 9201), (0.98, 12055), (0.99, 20140), (0.995, 31750),
           (0.998, 49542), (0.999, 67897), (0.9995, 105870), (0.9999, 256781), (1, 441909))
MEAN = 1567  # tokens per document of the corpus


def windows(count: int, batch: int, length: int) -> np.ndarray:
  """Draws int32 arrays [count, batch, length] of segment ids, which number the documents of each window from 1."""
  random, tokens = np.random.default_rng(0), count * batch * length
  starts, end = np.zeros(tokens, np.int32), 0
  while end < tokens:
    starts[end] = 1
    end += drawn_length(random)
  starts = starts.reshape(count, batch, length)
  starts[..., 0] = 1
  return np.cumsum(starts, axis=2, dtype=np.int32)


def drawn_length(random: np.random.Generator) -> int:
  """Draws the tokens of a document."""
  shares, lengths = zip(*LENGTHS, strict=True)
  return round(np.exp(np.interp(random.random(), shares, np.log(lengths))))
