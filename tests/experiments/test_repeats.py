"""Pairs of tokens that repeat within a document, on which sweeps of language models report a loss of its own."""

import numpy as np

from language.repeats import repeated


def test_repeated_pairs_are_those_of_their_segment():
  batch = {"tokens": np.array([[1, 2, 3, 1, 2, 1, 2, 3], [1, 2, 3, 1, 2, 1, 2, 3]]),
           "targets": np.array([[2, 3, 1, 2, 1, 2, 3, 4], [2, 3, 1, 2, 1, 2, 3, 4]]),
           "segment_ids": np.array([[0] * 8, [0] * 5 + [1] * 3])}
  assert repeated(batch).tolist() == [[0, 0, 0, 1, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0, 0]]
