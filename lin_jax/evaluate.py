"""Held-out loss of a model: perplexity, bits per byte, and the loss by position."""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from lin_jax.data import Batch
from lin_jax.layers import segment_runs
from lin_jax.loss import next_token_loss
from lin_jax.metrics import bits_per_byte
from lin_jax.model import LanguageModel


def evaluate(model: LanguageModel, batches: Iterable[Batch], *, bytes_per_token: float | None = None,
             bucket_width: int = 0) -> dict:
  """Mean next-token loss over every unmasked target of `batches` (see `lin_jax.data`; all of one shape).

  The position of a target is how many tokens of its segment come before its input token, so it is how far back the
  model can look; without segment resets it is the place in the window.

  Args:
    bytes_per_token: of the text, for bits per byte.
    bucket_width: positions per bucket; 0 doubles the width from bucket to bucket: [0, 16), [16, 32), [32, 64), ...
  Returns:
    `targets`, `loss` (nats per token), `perplexity`, `bits_per_byte` (None without bytes_per_token), and `buckets`: a
    list of dicts with `start`, `stop`, `targets`, `loss`, `perplexity`; empty buckets are left out.
  Raises:
    ValueError: no unmasked target, or a negative bucket_width.
  """
  if bucket_width < 0:
    raise ValueError(f"bucket_width={bucket_width}: must not be negative (0 doubles from bucket to bucket)")
  loss = count = 0
  for batch in batches:
    # float64 on the host: a float32 sum of millions of losses would lose digits.
    sums, counts = (np.asarray(x, np.float64) for x in _position_sums(model, batch))
    loss, count = loss + sums, count + counts
  if not np.sum(count):
    raise ValueError("nothing to evaluate: no batch holds an unmasked target")
  edges = _edges(len(count), bucket_width)
  buckets = [_summary(loss[a:b], count[a:b]) | {"start": a, "stop": b}
             for a, b in zip(edges, edges[1:], strict=False) if count[a:b].any()]
  total = _summary(loss, count)
  bits = None if bytes_per_token is None else bits_per_byte(total["loss"], bytes_per_token)
  return total | {"bits_per_byte": bits, "buckets": buckets}


@jax.jit
def _position_sums(model, batch):
  """Loss sum and count of targets at each position: two float32 arrays [T]."""
  hidden, _ = model.hidden(batch["tokens"], segment_ids=batch["segment_ids"])
  _, metrics = next_token_loss(hidden, model.unembedding(), batch["targets"], batch["mask"])
  position = _positions(batch["segment_ids"]).ravel()
  length = batch["tokens"].shape[1]
  return tuple(jax.ops.segment_sum(x.ravel(), position, length) for x in (metrics["token_loss"], batch["mask"]))


def _positions(segment_ids):
  runs = segment_runs(segment_ids)
  time = jnp.arange(segment_ids.shape[1])[None]
  starts = jnp.where(jnp.diff(runs, axis=1, prepend=-1) != 0, time, 0)
  return time - jax.lax.cummax(starts, axis=1)


def _edges(length, width):
  if width:
    return [*range(0, length, width), length]
  edges, edge = [0], 16
  while edge < length:
    edges.append(edge)
    edge *= 2
  return [*edges, length]


def _summary(loss, count):
  mean = float(loss.sum() / count.sum())
  # exp overflows beyond 709 nats, where perplexity says nothing any more.
  return {"targets": int(count.sum()), "loss": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf}
