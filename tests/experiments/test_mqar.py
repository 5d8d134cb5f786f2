"""Multi-query associative recall: every answer follows from its sequence, and the draws have their distributions."""

import numpy as np
import pytest

import synthetic
from synthetic.mqar import MQAR, distinct


@pytest.mark.parametrize("task", [MQAR(), MQAR(512, 64), MQAR(32, 8, vocab_size=18, random_filler=True)])
def test_answers_follow_from_the_sequence(task):
  batch = task.draw(np.random.default_rng(0), 50)
  half = task.vocab_size // 2
  assert batch.tokens.dtype == batch.targets.dtype == np.int32 and batch.mask.dtype == np.float32
  assert batch.tokens.shape == batch.targets.shape == batch.mask.shape == (50, task.sequence_length)
  for tokens, targets, mask in zip(batch.tokens, batch.targets, batch.mask):
    context = tokens[:2 * task.pairs].tolist()
    memory = dict(zip(context[::2], context[1::2]))
    assert len(memory) == len(set(memory.values())) == task.pairs  # all different
    assert all(1 <= key < half <= value < task.vocab_size for key, value in memory.items())
    asked = np.flatnonzero(mask)
    assert sorted(tokens[asked]) == sorted(memory) and asked.min() >= 2 * task.pairs and not (asked % 2).any()
    assert [memory[key] for key in tokens[asked].tolist()] == targets[asked].tolist()
    rest = np.delete(tokens[2 * task.pairs:], asked - 2 * task.pairs)
    assert (len(set(rest.tolist())) > 1) == task.random_filler


def test_gaps_follow_the_power_law():
  task, count = MQAR(64, 4, vocab_size=64, power=0.5), 20000
  batch = task.draw(np.random.default_rng(1), count)
  first = (batch.tokens[:, 8:] == batch.tokens[:, :1]).argmax(axis=1) // 2  # the slot of the first key
  p = np.arange(1, 29) ** -0.5
  p /= p.sum()
  np.testing.assert_allclose(task.slot_probabilities(), p)
  observed = np.bincount(first, minlength=28)
  assert ((observed - count * p) ** 2 / (count * p)).sum() < 60  # chi-square of 27 degrees: 1 in 4,000 exceeds it
  # The second key, given the first one's slot, follows the same law without that slot.
  second = (batch.tokens[:, 8:] == batch.tokens[:, 2:3]).argmax(axis=1) // 2
  q = (p[None] * p[:, None] / (1 - p[:, None]))
  np.fill_diagonal(q, 0)
  expected = count * q.sum(axis=0)
  assert ((np.bincount(second, minlength=28) - expected) ** 2 / expected).sum() < 60


@pytest.mark.parametrize("size, high", [(3, 20), (5, 8)])
def test_distinct_rows_are_uniform(size, high):
  rows = distinct(np.random.default_rng(2), 30000, size, 3, high)
  assert all(len(set(row)) == size for row in rows.tolist())
  for column in rows.T:
    observed, expected = np.bincount(column - 3, minlength=high - 3), 30000 / (high - 3)
    assert ((observed - expected) ** 2 / expected).sum() < 45


def test_seeds_and_rules():
  draw = lambda seed: synthetic.TASKS["mqar"]().draw(np.random.default_rng(seed), 3).tokens
  assert (draw(0) == draw(0)).all() and (draw(0) != draw(1)).any()
  for fields, message in [(dict(pairs=0), "pairs=0: "), (dict(sequence_length=62), "at least 4 pairs = 64"),
                          (dict(sequence_length=255), "must be even"), (dict(vocab_size=32), "must exceed pairs=16"),
                          (dict(power=0.0), "power=0.0: must be positive")]:
    with pytest.raises(ValueError, match=message):
      MQAR(**fields)
