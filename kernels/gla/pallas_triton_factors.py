"""GLA's factors of queries and keys per chunk, and the scores P of wide heads, as Pallas kernels.

A program of factors holds one chunk and a tile of key channels. Letters as in `README.md` of this folder. The chunks
whose gates are too strong for factors are left to `exact_chunks`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import triton_blocks
from kernels.gla import exact_chunks
from kernels.gla.exact_chunks import LIMIT, after, exact_sums, gates, upto
from kernels.triton_blocks import operand, rows_and_columns


def _halves(g):
  """Sums of g over the first and the second half of its rows."""
  second = jax.lax.broadcasted_iota(jnp.int32, g.shape, 0) >= g.shape[0] // 2
  return jnp.sum(jnp.where(second, 0.0, g), axis=0), jnp.sum(jnp.where(second, g, 0.0), axis=0)


def from_middle(C):
  """Signs of the terms of x: 1 from the middle through a later row, -1 between an earlier row and the middle."""
  row, column = rows_and_columns(C)
  middle = C // 2
  return jnp.where((column >= middle) & (column <= row), 1.0, jnp.where((column < middle) & (column > row), -1.0, 0.0))


def _factors_kernel(q_ref, k_ref, g_ref, x_ref, y_ref, decays_ref, bounded_ref, *, scale, dot):
  C, dtype, sums = q_ref.shape[0], operand(q_ref.dtype), exact_sums(q_ref.dtype, dot)
  g = gates(g_ref, ...)
  first, second = _halves(g)
  bounded = jnp.minimum(jnp.min(first), jnp.min(second)) >= LIMIT
  x = sums(jnp.where(bounded, from_middle(C), upto(C)), g)
  y = jax.lax.cond(bounded, lambda: -x, lambda: sums(after(C), g))
  x_ref[...] = (q_ref[...].astype(jnp.float32) * scale * jnp.exp2(x)).astype(dtype)
  y_ref[...] = (k_ref[...].astype(jnp.float32) * jnp.exp2(y)).astype(dtype)
  bounded_ref[...] = bounded.astype(jnp.int32)
  decays_ref[0, :] = jnp.exp2(jnp.where(bounded, first, 0.0))
  decays_ref[1, :] = jnp.exp2(jnp.where(bounded, 0.0, first + second))
  decays_ref[2, :] = jnp.exp2(jnp.where(bounded, second, 0.0))


def _scores_kernel(bounded_ref, x_ref, y_ref, _, p_ref, *, depth, dot):
  tiles = [pl.ds(i * depth, depth) for i in range(x_ref.shape[1] // depth)]

  @pl.when(bounded_ref[...] == 1)
  def _():
    p_ref[...] = sum(dot(x_ref[:, tile], y_ref[:, tile].T) for tile in tiles).astype(p_ref.dtype)


# Launches: one program per tile of key channels, chunk, head and row of the batch.


def chunk_block(config, width, tiled, head=lambda h: h):
  """Block of a [B, T, H, width] array in a chunk kernel: the tile's columns or all.

  `head` maps the head of the program to the head of the array.
  """
  return pl.BlockSpec((None, config.chunk, None, width), lambda t, n, h, b: (b, n, head(h), t if tiled else 0))


def factors(q, k, g, scale, config):
  """X and Y, the decays enter, keep and exit `[B, G, N, 3, K]`, flags of the bounded chunks `[B, G, N]`, and P.

  P covers the unbounded chunks, or all chunks if the configuration has `scores`.
  """
  B, T, G, K = q.shape
  N, dtype, tile = T // config.chunk, operand(q.dtype), config.factors
  block = min(tile.block, K)
  keys = chunk_block(config, block, tiled=True)
  x, y, decays, bounded = triton_blocks.launch(
      functools.partial(_factors_kernel, scale=scale), name="gla_factors", grid=(K // block, N, G, B),
      in_specs=[keys] * 3,
      out_specs=[keys, keys, pl.BlockSpec((None, None, None, 3, block), lambda t, n, h, b: (b, h, n, 0, t)),
                 pl.BlockSpec((None, None, None, None), lambda t, n, h, b: (t, b, h, n))],
      out_shape=[jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct(k.shape, dtype),
                 jax.ShapeDtypeStruct((B, G, N, 3, K), jnp.float32),
                 jax.ShapeDtypeStruct((K // block, B, G, N), jnp.int32)],
      num_warps=tile.num_warps, num_stages=tile.num_stages)(q, k, g)
  bounded = jnp.min(bounded, axis=0)
  p = exact_chunks.scores(bounded, q, k, g, scale, config.chunk)
  return x, y, decays, bounded, _scores(bounded, x, y, p, config) if config.scores else p


def _scores(bounded, x, y, p, config):
  """`p` with the P of the bounded chunks added; entries above the diagonal have no meaning."""
  (B, T, G, K), tile = x.shape, config.scores
  keys = chunk_block(config, K, tiled=True)
  square = pl.BlockSpec((None, None, None, *p.shape[3:]), lambda t, n, h, b: (b, h, n, 0, 0))
  return triton_blocks.launch(
      functools.partial(_scores_kernel, depth=min(tile.block, K)), name="gla_scores",
      grid=(1, T // config.chunk, G, B), aliases={3: 0},
      in_specs=[pl.BlockSpec((None, None, None), lambda t, n, h, b: (b, h, n)), keys, keys, square], out_specs=square,
      out_shape=jax.ShapeDtypeStruct(p.shape, p.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages)(
          bounded, x, y, p)
