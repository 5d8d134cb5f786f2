"""The examples of a run: new ones in every batch, or a fixed set in a new order every epoch."""

import functools
import itertools
from collections.abc import Iterator

import jax
import numpy as np

from .batch import Batch
from .runs import Run


def batches(run: Run, first: int = 0) -> Iterator[tuple[dict, np.ndarray]]:
  """Yields examples, and their rows [evaluate_every, batch_size] for the next steps, without the `first` items."""
  examples, needed = run.training_examples(), run.evaluate_every * run.batch_size
  if not examples:
    rows = np.arange(needed, dtype=np.int32).reshape(run.evaluate_every, -1)
    for i in range(first, -(-run.steps // run.evaluate_every)):
      yield compact(run.training_task().draw(np.random.default_rng([run.seed, 2, i]), needed)), rows
    return
  data = _fixed(run.training_task(), examples, run.seed)
  rng, order = np.random.default_rng([run.seed, 3]), np.zeros(0, np.int32)
  for i in itertools.count():
    while len(order) < needed:
      epoch = rng.permutation(examples)[:examples // run.batch_size * run.batch_size]
      order = np.concatenate([order, epoch.astype(np.int32)])
    if i >= first:
      yield data, order[:needed].reshape(run.evaluate_every, -1)
    order = order[needed:]


@functools.lru_cache(maxsize=2)
def _fixed(task, examples, seed):
  return jax.device_put(compact(task.draw(np.random.default_rng([seed, 0]), examples)))


def compact(batch: Batch) -> dict[str, np.ndarray]:
  """Reduces a batch to its tokens and the positions that count, with their targets and weights, each [count, M]."""
  counts = (batch.mask > 0).sum(axis=1)
  # If their number varies, all positions stay, so that new batches share one compiled program.
  kept = counts[0] if counts.min() == counts.max() else batch.mask.shape[1]
  positions = np.argsort(batch.mask == 0, axis=1, kind="stable")[:, :kept].astype(np.int32)
  targets, weights = (np.take_along_axis(a, positions, axis=1) for a in (batch.targets, batch.mask))
  found = {"tokens": batch.tokens, "positions": positions, "targets": targets, "weights": weights}
  if batch.allowed is not None:
    found["allowed"] = np.take_along_axis(batch.allowed, positions[..., None], axis=1)
  return found
