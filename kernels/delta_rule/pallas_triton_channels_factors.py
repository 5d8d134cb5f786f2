"""What the delta rule's kernels read of a chunk under a decay per key channel, as Pallas kernels: sums of gates, P, X,
and decayed queries and keys. Letters as in `README.md`.

A program of factors holds one chunk of one head and loops over tiles of key channels. The sums of gates are integers,
so that the difference of two sums is the exact sum between them, and every exponent is such a difference.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels import triton_blocks
from kernels.delta_rule.inverse import EPSILON, chunk_square
from kernels.scalar_decay import UNIT, inclusive_sums, weigh
from kernels.triton_blocks import LOG2E, given, halves, key_head, operand, rows_and_columns

LIMIT = -60 * LOG2E  # of half a chunk, in base 2: factors up to 1e26, whose products with data and sums are finite


# In kernel bodies.


def decay(sums):
  """The decay of integer sums of gates."""
  return jnp.exp2(sums.astype(jnp.float32) * UNIT)


def parts(x, dtype):
  """float32 `x` as operands of 16 significant bits together where products take bfloat16."""
  return [x] if dtype == jnp.float32 else list(halves(x))


def product(a, b, dot):
  """a @ b of operands in parts; the product of both low parts is left out."""
  return sum(dot(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if i + j < 2)


def is_bounded(sums_ref):
  """Whether no channel decays by more than `LIMIT` in one half of the chunk."""
  C = sums_ref.shape[0]
  middle, last = sums_ref[C // 2 - 1, :], sums_ref[C - 1, :]
  return jnp.min(jnp.minimum(middle, last - middle).astype(jnp.float32)) * UNIT >= LIMIT


@dataclasses.dataclass(frozen=True)
class Level:
  """One dyadic level, or all of a bounded chunk at once.

  Attributes:
    after_middle, before_middle: `[C, depth]`, decays from the middle of a row's block to the row, and from the row to
      the middle. One of them is the decay, and both are where a level holds no pair of the row. In a bounded chunk one
      is the inverse of the other.
    pairs: `[C, C]`, True where row and column are a pair of the level.
    flows: `[C, C]`, 1 where the exponent of the column holds the gate of the row.
    second: `[C, 1]`, True in second halves.
  """

  after_middle: jax.Array
  before_middle: jax.Array
  pairs: jax.Array
  flows: jax.Array
  second: jax.Array


def each_level(bounded, C, visit, initial):
  """Carries a value through `visit(level, value)` of all levels, or of the last one alone if the chunk is bounded."""
  last = C.bit_length() - 2  # a product and no select, which Triton's backend gives the type of its condition here
  return jax.lax.fori_loop(bounded.astype(jnp.int32) * last, last + 1, visit, initial)


def level_of(level, bounded, sums_ref, tile, sums) -> Level:
  """Level number `level` of a tile of key channels, whose sums of gates are given."""
  C, depth = sums.shape
  index, channel = (jax.lax.broadcasted_iota(jnp.int32, (C, depth), i) for i in range(2))
  half = jnp.left_shift(jnp.int32(1), level)
  middle = (index & (-2 * half)) + half - 1  # the last row of the first half
  exponent = sums - plt.load(sums_ref.at[middle, channel + tile.start])
  far = -jnp.abs(exponent)
  row, column = rows_and_columns(C)
  halves_apart = (row >> level) ^ (column >> level)
  second = (column >> level) & 1 == 1
  return Level(after_middle=decay(jnp.where(bounded, exponent, far)),
               before_middle=decay(jnp.where(bounded, -exponent, far)),
               pairs=(row > column) & (bounded | (halves_apart == 1)),
               flows=jnp.where((halves_apart == 0) & (second == (row <= column)), 1.0, 0.0),
               second=(index >> level) & 1 == 1)


def _sums_kernel(g_ref, sums_ref, *, dot):
  sums_ref[...] = inclusive_sums(g_ref[...])


def _factors_kernel(q_ref, k_ref, sums_ref, p_ref, *refs, scale, depth, overlaps, normalized, dot):
  refs = list(refs)
  x_ref = refs.pop(0) if overlaps else None
  *up_refs, q_norm, k_norm = refs if normalized else (*refs, None, None)
  C, K, dtype = *k_ref.shape, operand(k_ref.dtype)
  row, column = rows_and_columns(C)
  if normalized:
    for ref, norm_ref in ((q_ref, q_norm), (k_ref, k_norm)):
      norm_ref[...] = _norm(ref, depth)
    q_norm, k_norm = _norm(q_ref, depth), _norm(k_ref, depth)
  bounded = is_bounded(sums_ref)
  found = (jnp.zeros((C, C), jnp.float32),) * (1 + overlaps)
  for tile in [pl.ds(i, depth) for i in range(0, K, depth)]:
    q = weigh(q_ref[:, tile].astype(jnp.float32), scale, q_norm)
    k = weigh(k_ref[:, tile].astype(jnp.float32), k_norm)
    sums = sums_ref[:, tile]
    upto, after = decay(sums), decay(sums_ref[C - 1, tile][None] - sums)
    for ref, x in zip(up_refs, (q * upto, k * upto, k * after)):
      for i, part in enumerate(parts(x, dtype)):
        ref[:, i, tile] = part
    p = found[0] + jnp.where(row == column, jnp.sum(q * k, axis=1)[:, None], 0.0)
    found = _add_pairs((p, *found[1:]), q, k, sums, bounded, sums_ref, tile, dtype, dot)
  for i, part in enumerate(parts(found[0], dtype)):
    p_ref[i] = part
  if overlaps:
    x_ref[...] = found[1]


def _norm(ref, depth):
  """1 / norm of the rows."""
  tiles = (ref[:, pl.ds(i, depth)].astype(jnp.float32) for i in range(0, ref.shape[1], depth))
  return jax.lax.rsqrt(sum(jnp.sum(x * x, axis=1) for x in tiles) + EPSILON)


def _add_pairs(found, q, k, sums, bounded, sums_ref, tile, dtype, dot):
  """Adds the pairs of all levels to P, and to X if it is `found` too."""

  def add_level(number, found):
    level = level_of(number, bounded, sums_ref, tile, sums)
    columns = [x.T for x in parts(k * level.before_middle, dtype)]
    return tuple(x + jnp.where(level.pairs, product(parts(rows * level.after_middle, dtype), columns, dot), 0.0)
                 for x, rows in zip(found, (q, k)))

  return each_level(bounded, sums.shape[0], add_level, found)


# Launches: one program per chunk, head and row of the batch.


def chunk_sums(log_decay, C):
  """Inclusive sums of gates `[B, T, H, K]` in chunks of C tokens, in `scalar_decay.UNIT`s."""
  B, T, H, K = log_decay.shape
  block = pl.BlockSpec((None, C, None, K), lambda n, h, b: (b, n, h, 0))
  return triton_blocks.launch(
      _sums_kernel, name="delta_rule_channel_sums", grid=(T // C, H, B), in_specs=[block], out_specs=block,
      out_shape=jax.ShapeDtypeStruct(log_decay.shape, jnp.int32), num_warps=4, num_stages=1)(log_decay)


@dataclasses.dataclass
class Factors:
  """Arrays of the scans: P `[B, H, N, parts, C, C]`, X `[B, H, N, C, C]` or None, decayed queries and keys `[B, T, H,
  parts, K]`, of which the queries are scaled, and 1 / norm of queries and keys `[B, T, H]` or None."""

  p: jax.Array
  x: jax.Array | None
  q_upto: jax.Array
  k_upto: jax.Array
  k_after: jax.Array
  q_norm: jax.Array | None
  k_norm: jax.Array | None


def factors(q, k, sums, scale, normalize_qk, config, *, overlaps) -> Factors:
  """The factors of all chunks, with X if `overlaps`."""
  (B, T, G, K), H, C, tile = q.shape, sums.shape[2], config.chunk, config.factors
  dtype, key = operand(q.dtype), key_head(H, G)
  count = 1 if dtype == jnp.float32 else 2
  keys = pl.BlockSpec((None, C, None, K), lambda n, h, b: (b, n, key(h), 0))
  rows = lambda *lead: pl.BlockSpec((None, C, None, *lead, K), lambda n, h, b: (b, n, h, *(0 for _ in lead), 0))
  token = pl.BlockSpec((None, C, None), lambda n, h, b: (b, n, h))
  up, norm = jax.ShapeDtypeStruct((B, T, H, count, K), dtype), jax.ShapeDtypeStruct((B, T, H), jnp.float32)
  p, *found = triton_blocks.launch(
      functools.partial(_factors_kernel, scale=scale, depth=min(tile.block, K), overlaps=overlaps,
                        normalized=normalize_qk),
      name="delta_rule_channel_factors", grid=(T // C, H, B), in_specs=[keys, keys, rows()],
      out_specs=[chunk_square(C, count), *given(overlaps, chunk_square(C)), *[rows(count)] * 3,
                 *given(normalize_qk, token, token)],
      out_shape=[jax.ShapeDtypeStruct((B, H, T // C, count, C, C), dtype),
                 *given(overlaps, jax.ShapeDtypeStruct((B, H, T // C, C, C), jnp.float32)),
                 *[up] * 3, *given(normalize_qk, norm, norm)],
      num_warps=tile.num_warps, num_stages=tile.num_stages)(q, k, sums)
  x = found.pop(0) if overlaps else None
  return Factors(p, x, *found, *given(not normalize_qk, None, None))
