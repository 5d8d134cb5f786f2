"""The loss by the place in a document, and its control with resets, on batches whose segments are known."""

import numpy as np

from language import positions


def test_the_control_cuts_documents_and_compares_the_same_targets(monkeypatch):
  segments = np.array([[1] * 5 + [2] * 11, [1] * 16], np.int32)
  mask = np.ones((2, 16), np.float32)
  mask[0, 4] = 0
  read = []
  monkeypatch.setattr(positions, "evaluate", lambda model, batches: read.append(batches[0]) or {
      "loss": float(len(read)), "targets": int(batches[0]["mask"].sum())})
  found = positions.losses_by_place(None, [dict(tokens=segments, segment_ids=segments, mask=mask)], reset_every=4)
  assert found == [{"start": 4, "stop": 8, "targets": 8, "loss": 1.0, "reset_loss": 2.0},
                   {"start": 8, "stop": 16, "targets": 11, "loss": 3.0, "reset_loss": 4.0}]
  whole, reset, _, far = read
  np.testing.assert_array_equal(whole["segment_ids"], segments)
  np.testing.assert_array_equal(reset["segment_ids"], [[1] * 4 + [2] + [3] * 4 + [4] * 4 + [5] * 3,
                                                       [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4])
  np.testing.assert_array_equal(whole["mask"], reset["mask"])
  np.testing.assert_array_equal(far["mask"], [[0] * 13 + [1] * 3, [0] * 8 + [1] * 8])
