"""Held-out loss of a model: perplexity, bits per byte, and the loss by position."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from lin_jax.data import Batch
from lin_jax.layers import segment_runs
from lin_jax.loss import next_token_loss
from lin_jax.metrics import bits_per_byte, perplexity
from lin_jax.model import LanguageModel, keep_rows


def evaluate(model: LanguageModel, batches: Iterable[Batch], *, bytes_per_token: float | None = None,
             bucket_width: int = 0, piece: int = 0) -> dict:
  """Mean next-token loss over every unmasked target of `batches` (see `lin_jax.data`), which all have one shape.

  The position of a target is the number of tokens of its segment before its input token, so it is how far back the
  model can look. Without segment resets it is the place in the window.

  Args:
    bytes_per_token: of the text, for bits per byte.
    piece: tokens per forward pass. The windows are read in pieces of this size, from state to state, so that long
      windows need less memory. With 0 each window is read in one pass.
    bucket_width: positions per bucket. With 0 the width doubles from bucket to bucket: [0, 16), [16, 32), [32, 64), ...
  Returns:
    `targets`, `loss` (nats per token), `perplexity`, `bits_per_byte` (None without bytes_per_token), and `buckets`: a
    list of dicts with `start`, `stop`, `targets`, `loss`, `perplexity`, without empty buckets.
  Raises:
    ValueError: no unmasked target, a negative bucket_width, or windows that pieces do not divide.
  """
  if bucket_width < 0:
    raise ValueError(f"bucket_width={bucket_width}: must not be negative (0 doubles from bucket to bucket)")
  loss = count = 0
  for batch in batches:
    # float64 on the host: a float32 sum of millions of losses would lose digits.
    length = batch["tokens"].shape[1]
    if piece < 0 or (piece and length % piece):
      raise ValueError(f"piece={piece}: must divide the windows' {length} tokens (0 reads them in one pass)")
    sums, counts = (np.asarray(x, np.float64) for x in _position_sums(model, batch, piece or length))
    loss, count = loss + sums, count + counts
  if not np.sum(count):
    raise ValueError("nothing to evaluate: no batch holds an unmasked target")
  edges = _edges(len(count), bucket_width)
  buckets = [_summary(loss[a:b], count[a:b]) | {"start": a, "stop": b}
             for a, b in zip(edges, edges[1:], strict=False) if count[a:b].any()]
  total = _summary(loss, count)
  bits = None if bytes_per_token is None else bits_per_byte(total["loss"], bytes_per_token)
  return total | {"bits_per_byte": bits, "buckets": buckets}


@functools.partial(jax.jit, static_argnames="piece")
def _position_sums(model, batch, piece):
  """Loss sum and count of targets at each position: two float32 arrays [T]."""
  length = batch["tokens"].shape[1]
  token_loss = _token_loss(model, batch, None)[0] if piece == length else _token_loss_in_pieces(model, batch, piece)
  position = _positions(batch["segment_ids"]).ravel()
  return tuple(jax.ops.segment_sum(x.ravel(), position, length) for x in (token_loss, batch["mask"]))


def _token_loss(model, batch, state):
  hidden, state = model.hidden(batch["tokens"], state, batch["segment_ids"])
  return next_token_loss(hidden, model.unembedding(), batch["targets"], batch["mask"])[1]["token_loss"], state


def _token_loss_in_pieces(model, batch, piece):
  rows, length = batch["tokens"].shape
  empty, ids = model.init_state(rows, length), batch["segment_ids"]
  pieces = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(rows, -1, piece), 1, 0), batch)
  # A segment that ends with its piece leaves nothing to the next.
  goes_on = (ids == jnp.roll(ids, -1, axis=1))[:, piece - 1::piece].T

  def one(state, inputs):
    batch, goes_on = inputs
    token_loss, state = _token_loss(model, batch, state)
    return keep_rows(goes_on, state, empty), token_loss

  _, token_loss = jax.lax.scan(one, empty, (pieces, goes_on))
  return jnp.moveaxis(token_loss, 0, 1).reshape(rows, length)


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
  return {"targets": int(count.sum()), "loss": mean, "perplexity": perplexity(mean)}
