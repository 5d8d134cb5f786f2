"""Measures of the answers to a test."""

import jax
import jax.numpy as jnp
import numpy as np

from .batch import Batch


def score(said: np.ndarray, batch: Batch) -> float:
  """Returns the share of the masked positions at which `said` [count, T] is right."""
  if batch.allowed is None:
    right = said == batch.targets
  else:
    right = np.take_along_axis(batch.allowed, said[..., None], axis=-1)[..., 0]
  return float((right * batch.mask).sum() / batch.mask.sum())


def class_accuracy(said: np.ndarray, batch: Batch) -> float:
  """Returns MAD's measure, the share of right answers for each target token, averaged over these tokens.

  As its authors compute it, a token that was said but is never a target counts with 0.
  """
  counted = batch.mask > 0
  said, targets = said[counted], batch.targets[counted]
  tokens = np.union1d(said, targets)
  return float(np.mean([(said[targets == token] == token).mean() if (targets == token).any() else 0.0
                        for token in tokens]))


def batch_class_accuracy(said: np.ndarray, batch: Batch, size: int) -> float:
  """Returns `class_accuracy` as MAD's authors log it: of each `size` examples, then averaged over the examples."""
  parts = [slice(first, first + size) for first in range(0, len(said), size)]
  scores = [class_accuracy(said[part], Batch(batch.tokens[part], batch.targets[part], batch.mask[part]))
            for part in parts]
  return float(np.average(scores, weights=[len(said[part]) for part in parts]))


def total_variation(logits: jax.Array, allowed: jax.Array) -> jax.Array:
  """Returns half the sum of differences between softmax(logits) [B, M, V] and equal shares of `allowed`: [B, M]."""
  allowed = allowed.astype(jnp.float32)
  shares = allowed / jnp.maximum(allowed.sum(axis=-1, keepdims=True), 1)
  return 0.5 * jnp.abs(jax.nn.softmax(logits) - shares).sum(axis=-1)
