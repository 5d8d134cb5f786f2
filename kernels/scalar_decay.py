"""Decays of one scalar per head between the tokens of a chunk, for Pallas kernel bodies and their launches.

Gates are summed as integers in units of 2^-17, in a kernel of their own where `chunk_sums` is used, so that the
difference of two sums is the exact sum between them. The sums of a constant decay are its multiples.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import triton_blocks
from kernels.triton_blocks import LOG2E, rows_and_columns

UNIT = 2.0**-17  # of gates summed as integers
WEAKEST = -127.0  # of one gate, in base 2: 2^-127 is 0 to float32, and 64 such gates stay within int32


@dataclasses.dataclass
class Decay:
  """Decays of one chunk of C tokens; each is None without decay.

  Attributes:
    upto, after: `[C]`, from the start of the chunk to the end of each token, and from there to the end of the chunk.
    total: of the whole chunk.
    sums: inclusive sums of the gates in `unit`s; integers, except for a constant gate.
  """

  upto: jax.Array | None
  after: jax.Array | None
  total: jax.Array | None
  sums: jax.Array | None = None
  unit: float = 1.0


def decay_of(g, C):
  """Decays of a chunk's gates `[C]`, its `decay_of_sums`, of the constant gate of all its tokens, or of None."""
  if g is None:
    return Decay(None, None, None)
  if isinstance(g, tuple):
    return decay_of_sums(*g)
  index = jax.lax.broadcasted_iota(jnp.int32, (C,), 0)
  if not g.shape:
    # The sums are floats, because integers in units of g would all stay in registers. A difference of two sums is off
    # by the rounding of the larger one, 2^-24 of it.
    g = jnp.maximum(g * LOG2E, WEAKEST)
    sums = (index + 1).astype(jnp.float32) * g
    return Decay(jnp.exp2(sums), jnp.exp2((C - 1 - index).astype(jnp.float32) * g), jnp.exp2(C * g), sums)
  sums = inclusive_sums(g)
  return decay_of_sums(sums, jnp.min(sums))


def load_gate(ref, n, C):
  """What `decay_of` takes for chunk n: of the `chunk_sums` of a head or of a constant gate, or None."""
  if ref is None or not ref.shape:
    return None if ref is None else ref[...]
  return ref[pl.ds(n * C, C)], ref[n * C + C - 1]


def inclusive_sums(g):
  """Sums of gates over the first axis in UNITs."""
  g = jnp.maximum(g * LOG2E, WEAKEST) / UNIT
  whole = jnp.floor(g)
  return (jnp.cumsum(whole.astype(jnp.int32), axis=0)
          + jnp.floor(jnp.cumsum(g - whole, axis=0) + 0.5).astype(jnp.int32))


def decay_of_sums(sums, last):
  """Decays of a chunk whose gates have these inclusive `sums`, integers in UNITs, of which `last` is the last."""
  decay = lambda x: jnp.exp2(x.astype(jnp.float32) * UNIT)
  return Decay(decay(sums), decay(last - sums), decay(last), sums, UNIT)


def between(decay, C, transposed):
  """D `[C, C]` of a chunk, the decay from token j to token i where i >= j and 0 elsewhere, or its transpose."""
  row, column = rows_and_columns(C)
  mask = column >= row if transposed else row >= column
  if decay.sums is None:
    return mask.astype(jnp.float32)
  difference = decay.sums[:, None] - decay.sums[None, :]
  if transposed:
    difference = -difference
  return jnp.where(mask, jnp.exp2(difference.astype(jnp.float32) * decay.unit), 0.0)


def weigh(x, *weights):
  """Rows of x times each weight that is not None."""
  for weight in weights:
    if weight is not None:
      x = x * (weight if jnp.ndim(weight) == 0 else weight[:, None])
  return x


def chunk_sums(log_decay, C, op):
  """What the kernels of `op` read for gates `[B, T, H]`: inclusive sums in chunks of C tokens, int32 `[B, H, T]`.

  Without gates, or for a constant one per head, it is `log_decay` itself. A kernel loads the sums of a chunk in every
  arrangement of its threads that it needs. If it formed them, they would go through shared memory for each arrangement.
  """
  if log_decay is None or log_decay.ndim == 1:
    return log_decay
  B, T, H = log_decay.shape
  return triton_blocks.launch(
      _sums_kernel, name=f"{op}_sums", grid=(T // C, H, B),
      in_specs=[pl.BlockSpec((None, C, None), lambda n, h, b: (b, n, h))],
      out_specs=pl.BlockSpec((None, None, C), lambda n, h, b: (b, h, n)),
      out_shape=jax.ShapeDtypeStruct((B, H, T), jnp.int32), num_warps=1, num_stages=1)(log_decay)


def _sums_kernel(g_ref, sums_ref, *, dot):
  sums_ref[...] = inclusive_sums(g_ref[...])


def sums_block(sums, rows, chunked):
  """Kernel operands and BlockSpecs for what `chunk_sums` gives, for `rows` tokens."""
  if sums is None or sums.ndim == 1:
    return gate_block(sums, rows, chunked)
  return [sums], [pl.BlockSpec((None, None, rows), lambda *i: (i[-1], i[-2], i[1] if chunked else 0))]


def gate_block(log_decay, rows, chunked):
  """Kernel operands and BlockSpecs for the gates: none, one per head, or one per token for `rows` tokens."""
  if log_decay is None:
    return [], []
  if log_decay.ndim == 1:
    return [log_decay], [pl.BlockSpec((None,), lambda *i: (i[-2],))]
  return [log_decay], [pl.BlockSpec((None, rows, None), lambda *i: (i[-1], i[1] if chunked else 0, i[-2]))]
