"""RegBench: regular languages learned in context (Akyürek et al. 2024, arXiv:2401.12973, section 3, and its code).

Every sequence has its own random automaton and lists strings of its language, `string|string|...`, from which a model
has to infer the language. A step of the automaton leaves its state by one of its edges, each with the same probability.
All states accept, so strings may end anywhere. An answer is right if it is the letter of an edge of the state. Bars and
padding are never the right answer.

The authors also minimise each automaton. That changes no string's probability and no set of right letters, so it is not
done here. As in their code, a language may come twice, and in both training and test, as small ones sometimes do.
"""

import dataclasses

import numpy as np

from .batch import Batch


@dataclasses.dataclass(frozen=True)
class Regbench:
  """Letters are the tokens 0 to `max_letters` - 1, and the bar and the padding follow. Ranges include both ends.

  The paper's figure has 1,000 to 40,000 training sequences. The default `sequence_length` is a multiple of 64 that
  holds the longest sequence, which has 949 symbols. A shorter `sequence_length` cuts sequences off.
  """

  sequence_length: int = 960
  train_examples: int = 10_000
  min_nodes: int = 4
  max_nodes: int = 12
  min_letters: int = 4
  max_letters: int = 18
  max_edges: int = 3
  min_strings: int = 10
  max_strings: int = 19
  max_string_length: int = 49
  training: bool = False

  def __post_init__(self):
    for name in ("sequence_length", "max_edges", "max_string_length", "min_strings"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
    for name in ("nodes", "letters", "strings"):
      least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
      if least > most:
        raise ValueError(f"min_{name}={least}: must not exceed max_{name}={most}")
    if self.min_letters < self.max_edges:
      raise ValueError(f"min_letters={self.min_letters}: {self.max_edges} edges of a state have different letters")
    if self.min_nodes <= self.max_edges:
      raise ValueError(f"min_nodes={self.min_nodes}: {self.max_edges} edges of a state lead to different other states")

  @property
  def vocab_size(self) -> int:
    return self.max_letters + 2

  def automata(self, rng: np.random.Generator, count: int) -> np.ndarray:
    """Draws automata as the state behind each letter, -1 where there is none: [count, max_nodes, max_letters].

    State 0 is the start. Each of `min_nodes` to `max_nodes` states has 1 to `max_edges` edges, with different letters
    of the automaton's alphabet, to different other states. Rows beyond its number of states are -1.
    """
    nodes = rng.integers(self.min_nodes, self.max_nodes + 1, size=count)
    letters = rng.integers(self.min_letters, self.max_letters + 1, size=count)
    alphabet = np.argsort(rng.random((count, self.max_letters)), axis=1) < letters[:, None]
    exists = np.arange(self.max_nodes) < nodes[:, None]
    others = exists[:, None] & ~np.eye(self.max_nodes, dtype=bool)
    labels = self._distinct(rng, np.repeat(alphabet[:, None], self.max_nodes, axis=1))
    targets = self._distinct(rng, others)
    edges = rng.integers(1, self.max_edges + 1, size=exists.shape) * exists
    table = np.full((count, self.max_nodes, self.max_letters), -1)
    np.put_along_axis(table, labels, np.where(np.arange(self.max_edges) < edges[..., None], targets, -1), axis=2)
    return table

  def draw(self, rng: np.random.Generator, count: int) -> Batch:
    """`count` sequences of `count` languages; tokens, targets and mask are [count, sequence_length].

    `allowed`, [count, sequence_length, vocab_size], has the right letters, which are equally probable. It is None for
    training, which does not need it.
    """
    automata = self.automata(rng, count)
    sequence = self._layout(rng, count)
    allowed = None if self.training else np.zeros((*sequence.shape, self.vocab_size), bool)
    rows, state = np.arange(count), np.zeros(count, int)
    for t in range(sequence.shape[1]):
      edges = automata[rows, state]  # [count, letters]
      if allowed is not None:
        allowed[:, t, :self.max_letters] = edges >= 0
      letter = np.where(edges >= 0, rng.random(edges.shape, np.float32), -1).argmax(axis=1)
      inside = sequence[:, t] < self.max_letters
      sequence[:, t] = np.where(inside, letter, sequence[:, t])
      state = np.where(inside, edges[rows, letter], 0)
    mask = (sequence[:, 1:] < self.max_letters).astype(np.float32)
    return Batch(sequence[:, :-1], sequence[:, 1:], mask, None if allowed is None else allowed[:, 1:])

  def _layout(self, rng, count):
    """Places bars and padding, with 0 in the place of letters: [count, sequence_length + 1]."""
    lengths = rng.integers(1, self.max_string_length + 1, size=(count, self.max_strings))
    strings = rng.integers(self.min_strings, self.max_strings + 1, size=count)
    ends = np.cumsum(lengths + 1, axis=1) - 1
    width = max(self.sequence_length + 1, self.max_strings * (self.max_string_length + 1))
    layout = np.zeros((count, width), np.int32)
    np.put_along_axis(layout, ends, np.int32(self.max_letters), axis=1)
    layout[np.arange(width) >= ends[np.arange(count), strings - 1][:, None]] = self.max_letters + 1
    return layout[:, :self.sequence_length + 1]

  def _distinct(self, rng, choices):
    """Draws `max_edges` different indices, in random order, at which `choices` is True along its last axis."""
    return np.argsort(np.where(choices, rng.random(choices.shape), 2.0), axis=-1)[..., :self.max_edges]
