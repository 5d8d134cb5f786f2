"""What every synthetic task gives."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Batch:
  """`count` sequences of `T` tokens, and what a causal model must say at each position."""

  tokens: np.ndarray  # int32 [count, T]
  targets: np.ndarray  # int32 [count, T]: what the model must say at position t, having read tokens[:, :t + 1]
  mask: np.ndarray  # float32 [count, T]: 1 where the answer counts, 0 elsewhere
  allowed: np.ndarray | None = None  # bool [count, T, vocab_size]: every answer that is right, if there are several
