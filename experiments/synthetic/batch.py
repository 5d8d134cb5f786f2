"""What every synthetic task gives: `Batch`, and `Task` with what a task may change of the protocol."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Batch:
  """`count` sequences of `T` tokens, and what a causal model must say at each position."""

  tokens: np.ndarray  # int32 [count, T]
  targets: np.ndarray  # int32 [count, T]: what the model must say at position t, having read tokens[:, :t + 1]
  mask: np.ndarray  # float32 [count, T]: 1 where the answer counts, 0 elsewhere
  allowed: np.ndarray | None = None  # bool [count, T, vocab_size]: every answer that is right, if there are several


class Task:
  """A generator: subclasses are frozen dataclasses of a setting, whose rules `__post_init__` checks (ValueError)."""

  # The model answers all positions from its last activation, through a decoder, instead of each from its own.
  decodes_last = False

  @property
  def vocab_size(self) -> int:
    """Number of token ids."""
    raise NotImplementedError

  @property
  def sequence_length(self) -> int:
    """Tokens of each sequence."""
    raise NotImplementedError

  def draw(self, rng: np.random.Generator, count: int) -> Batch:
    """`count` sequences as the test scores them."""
    raise NotImplementedError

  def draw_training(self, rng: np.random.Generator, count: int) -> Batch:
    """`count` sequences to train on: those of `draw`, unless the task trains on more positions than it scores."""
    return self.draw(rng, count)
