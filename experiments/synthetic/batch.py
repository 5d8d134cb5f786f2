"""The examples that every synthetic task gives."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Batch:
  """`count` sequences of `T` tokens, and the answers that a causal model must give at each position."""

  tokens: np.ndarray  # int32 [count, T]
  targets: np.ndarray  # int32 [count, T]: the answer at position t, after tokens[:, :t + 1] were read
  mask: np.ndarray  # float32 [count, T]: 1 where the answer counts, 0 elsewhere
  allowed: np.ndarray | None = None  # bool [count, T, vocab_size]: all right answers, if there are several
