"""Pallas kernels for the chunks of gated linear attention whose gates are too strong for factors.

A chunk of which one half decays by more than `LIMIT` overflows the factors of `pallas_triton_factors`. Here its P
comes from the dyadic levels of `README.md`. All exponents are sums of terms <= 0, never differences of cumulative
sums, so the scheme is exact for any gate (a reset included) and consists of matrix products only. The backward pass
mirrors dP into a symmetric matrix. Z_s holds the rows of Q * 2^E_s in second halves and the rows of K * 2^E_s in first
halves, and (pairs of s) * dP Z_s holds the rows of dQ and dK in the same places.

The kernels read the flags of all chunks and skip the bounded ones. In trained models they find no work.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels import triton_blocks
from kernels.triton_blocks import LOG2E, key_head, masked_sum, operand, rows_and_columns

WEAKEST = -40 * LOG2E  # of one gate, in base 2: a decay of 4e-18
LIMIT = -60 * LOG2E  # of half a chunk, in base 2: factors up to 1e26, whose products with data and sums are finite
GROUP = 32  # chunks that a program looks through
# Key channels of a product of scores and of a program of gradients, value channels of a product, and warps. These
# values spill least.
KEYS = {"scores": 32, "dqkg": 16}
VALUES = {"dscores": 32, "dqkg": 16}
WARPS = 8


# Gates and exponents. `g` is in base 2; matrices are [C, C] with a row for each result and a column for each term.


def gates(g_ref, *index):
  return jnp.maximum(g_ref[index] * LOG2E, WEAKEST)


def exact_sums(dtype, dot):
  """Products of 0/1 matrices and gates: with 16 bits of each gate for 16-bit inputs, all 24 for float32."""
  return functools.partial(masked_sum, dot=dot, parts=3 if dtype == jnp.float32 else 2)


def upto(C):
  row, column = rows_and_columns(C)
  return jnp.where(column <= row, 1.0, 0.0)


def after(C):
  row, column = rows_and_columns(C)
  return jnp.where(column > row, 1.0, 0.0)


def _level(level, masks_ref, g, sums):
  """`(pairs, second, decay)` of one dyadic level: `pairs` `[C, C]` is 1 where an entry pairs two halves, in either
  order, `second` says which rows are in second halves, and `decay` is 2^E_s of every row."""
  second = _is_second(1 << level, jax.lax.broadcasted_iota(jnp.int32, g.shape, 0))
  return masks_ref[1, level], second, jnp.exp2(sums(masks_ref[0, level], g))


def _masks(C):
  """The terms of E_s and the pairs of every level, [2, levels, C, C] of 0 and 1.

  They are read from memory. Made from indices, all levels at once would stay in registers and spill.
  """
  row, column = np.indices((C, C))
  half = 2 ** np.arange(_levels(C))[:, None, None]
  terms = (row // half == column // half) & (_is_second(half, row) == (column <= row))
  pairs = (row // half ^ column // half) == 1
  return jnp.asarray(np.stack([terms, pairs]), jnp.bfloat16)


def _levels(C):
  """How many dyadic levels a chunk has."""
  return C.bit_length() - 1


def _is_second(half, row):
  return row // half % 2 == 1


# Kernel bodies. A ref holds a group of chunks of one head.


def _each_unbounded(bounded_ref, start, run):
  """Calls `run` with the index of each chunk, from `start` on, whose flag is 0."""

  def visit(n, _):
    @pl.when(bounded_ref[n] == 0)
    def _():
      run(n)

  @pl.when(jnp.min(bounded_ref[...]) == 0)
  def _():
    jax.lax.fori_loop(start, bounded_ref.shape[0], visit, None)


def _scores_kernel(bounded_ref, masks_ref, q_ref, k_ref, g_ref, p_ref, *, scale, block, start, dot):
  C, K, dtype, sums = p_ref.shape[1], q_ref.shape[1], operand(q_ref.dtype), exact_sums(q_ref.dtype, dot)
  row, column = rows_and_columns(C)

  def run(n):
    rows = pl.ds(n * C, C)

    def add_tile(i, p):
      tile = pl.ds(i * block, block)
      q, k = q_ref[rows, tile].astype(jnp.float32) * scale, k_ref[rows, tile].astype(jnp.float32)
      g = gates(g_ref, rows, tile)

      def add_level(level, p):
        pairs, _, decay = _level(level, masks_ref, g, sums)
        return p + pairs.astype(jnp.float32) * dot((q * decay).astype(dtype), (k * decay).astype(dtype).T)

      p += jnp.where(row == column, jnp.sum(q * k, axis=1)[:, None], 0.0)
      return jax.lax.fori_loop(0, _levels(C), add_level, p)

    p_ref[n] = jax.lax.fori_loop(0, K // block, add_tile, jnp.zeros((C, C), jnp.float32)).astype(dtype)

  _each_unbounded(bounded_ref, start, run)


def _dscores_kernel(bounded_ref, v_ref, do_ref, dp_ref, *, block, start, dot):
  C, V, dtype = dp_ref.shape[1], v_ref.shape[1], dp_ref.dtype
  row, column = rows_and_columns(C)

  def run(n):
    rows = pl.ds(n * C, C)

    def add_tile(i, dp):
      tile = pl.ds(i * block, block)
      v, do = v_ref[rows, tile].astype(dtype), do_ref[rows, tile].astype(dtype)
      return dp + jnp.where(row >= column, dot(do, v.T), dot(v, do.T))

    dp_ref[n] = jax.lax.fori_loop(0, V // block, add_tile, jnp.zeros((C, C), jnp.float32)).astype(dtype)

  _each_unbounded(bounded_ref, start, run)


def _dqkg_kernel(bounded_ref, masks_ref, decays_ref, dp_ref, q_ref, k_ref, g_ref, v_ref, do_ref, states_ref,
                 dstates_ref, *refs, scale, block_v, start, dot):
  C, K, dtype, sums = dp_ref.shape[1], q_ref.shape[1], dp_ref.dtype, exact_sums(q_ref.dtype, dot)
  dq_ref, dk_ref, dg_ref = refs[3:]  # the first three are the same arrays as they come in
  row, column = rows_and_columns(C)
  wide = jnp.zeros((C, K), jnp.float32)

  def run(n):
    rows = pl.ds(n * C, C)
    dq, dk, through = _from_states(v_ref, do_ref, states_ref, dstates_ref, n, rows, wide, dtype, block_v, dot)
    g = gates(g_ref, rows, slice(None))
    q = lambda: q_ref[rows, :].astype(jnp.float32) * scale
    k = lambda: k_ref[rows, :].astype(jnp.float32)
    diagonal = jnp.sum(jnp.where(row == column, dp_ref[n].astype(jnp.float32), 0.0), axis=1)[:, None]
    # In the channels that are bounded by themselves, the states belong to the middle of the chunk.
    enter, keep, exit = (decays_ref[n, i, :][None] for i in range(3))
    dq, dk = dq * jnp.exp2(sums(upto(C), g) - jnp.log2(enter)), dk * jnp.exp2(sums(after(C), g) - jnp.log2(exit))

    # Pairs on one side of a gate cancel in its gradient to float32 rounding: both their terms are products of the same
    # rounded factors.
    def add_level(level, carry):
      dq, dk, inside = carry
      pairs, second, decay = _level(level, masks_ref, g, sums)
      z = (jnp.where(second, q(), k()) * decay).astype(dtype)
      dz = dot(pairs.astype(dtype) * dp_ref[n], z)
      flow, dz = z.astype(jnp.float32) * dz, decay * dz
      return (dq + jnp.where(second, dz, 0.0), dk + jnp.where(second, 0.0, dz),
              inside + jnp.where(second, flow, -flow))

    leaving = k() * dk
    dq, dk, inside = jax.lax.fori_loop(0, _levels(C), add_level, (dq, dk, q() * dq))
    dg = sums(jnp.where(column >= row, 1.0, 0.0), inside) + sums(jnp.where(column < row, 1.0, 0.0), leaving)
    dg_ref[rows, :] = dg + keep * through[None]
    dq_ref[rows, :] = ((dq + diagonal * k()) * scale).astype(dq_ref.dtype)
    dk_ref[rows, :] = (dk + diagonal * q()).astype(dk_ref.dtype)

  _each_unbounded(bounded_ref, start, run)


def _from_states(v_ref, do_ref, states_ref, dstates_ref, n, rows, wide, dtype, block_v, dot):
  """The states' parts of dQ and dK of chunk n, without decays, and the sums of M * dM over value channels."""

  def add_tile(i, carry):
    dq, dk, through = carry
    tile = pl.ds(i * block_v, block_v)
    v, do = v_ref[rows, tile].astype(dtype), do_ref[rows, tile].astype(dtype)
    state, dstate = states_ref[n, :, tile], dstates_ref[n, :, tile]
    through += jnp.sum(state.astype(jnp.float32) * dstate.astype(jnp.float32), axis=1)
    return dq + dot(do, state.T), dk + dot(v, dstate.T), through

  return jax.lax.fori_loop(0, v_ref.shape[1] // block_v, add_tile, (wide, wide, jnp.sum(wide, axis=0)))


# Launches: one program per tile of key channels, group of chunks, head and row of the batch.


def _group(N):
  return math.gcd(N, GROUP)


def _tokens(rows, width, tiled=False, head=lambda h: h):
  return pl.BlockSpec((None, rows, None, width), lambda t, n, h, b: (b, n, head(h), t if tiled else 0))


def _whole(x):
  return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)


def _flags(N, head):
  return pl.BlockSpec((None, None, _group(N)), lambda t, n, h, b: (b, head(h), n))


def _squares(N, C):
  return pl.BlockSpec((None, None, _group(N), C, C), lambda t, n, h, b: (b, h, n, 0, 0))


def scores(bounded, q, k, g, scale, chunk):
  """P `[B, G, N, C, C]` of the chunks whose flag `bounded[B, G, N]` is 0; the others are left unwritten."""
  block = min(KEYS["scores"], q.shape[3])
  return _launch_square(functools.partial(_scores_kernel, scale=scale, block=block), "gla_exact_scores",
                        bounded, (q, k, g), chunk, [_masks(chunk)])


def dscores(bounded, v, do, chunk):
  """dP `[B, H, N, C, C]` of the same chunks, mirrored into a symmetric matrix."""
  block = min(VALUES["dscores"], v.shape[3])
  return _launch_square(functools.partial(_dscores_kernel, block=block), "gla_exact_dscores", bounded, (v, do), chunk)


def _launch_square(kernel, name, bounded, inputs, C, masks=()):
  (B, G, N), H = bounded.shape, inputs[0].shape[2]
  return triton_blocks.launch(
      kernel, name=name, grid=(1, N // _group(N), H, B), loop=True,
      in_specs=[_flags(N, key_head(H, G)), *[_whole(x) for x in masks],
                *[_tokens(_group(N) * C, x.shape[3]) for x in inputs]],
      out_specs=_squares(N, C),
      out_shape=jax.ShapeDtypeStruct((B, H, N, C, C), operand(inputs[0].dtype)),
      num_warps=WARPS, num_stages=1)(
          bounded, *masks, *inputs)


def dqkg(bounded, decays, q, k, g, v, do, states, dstates, gradients, scale, chunk):
  """`gradients` of q, k and g for each value head, replaced in the chunks whose flag is 0."""
  (B, T, H, V), (G, K) = v.shape, q.shape[2:]
  N, block, masks, key = T // chunk, min(KEYS["dqkg"], K), _masks(chunk), key_head(H, G)
  keys, dkeys = (_tokens(_group(N) * chunk, block, tiled=True, head=head) for head in (key, key_head(H, H)))
  values = _tokens(_group(N) * chunk, V)
  state = pl.BlockSpec((None, None, _group(N), block, V), lambda t, n, h, b: (b, h, n, t, 0))
  rows = pl.BlockSpec((None, None, _group(N), 3, block), lambda t, n, h, b: (b, key(h), n, 0, t))
  return triton_blocks.launch(
      functools.partial(_dqkg_kernel, scale=scale, block_v=VALUES["dqkg"]), name="gla_exact_dqkg",
      grid=(K // block, N // _group(N), H, B), loop=True,
      in_specs=[_flags(N, key), _whole(masks), rows, _squares(N, chunk), keys, keys, keys, values, values, state, state,
                dkeys, dkeys, dkeys],
      out_specs=[dkeys] * 3,
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in gradients], aliases={11: 0, 12: 1, 13: 2},
      num_warps=WARPS, num_stages=1)(
          bounded, masks, decays, dscores(bounded, v, do, chunk), q, k, g, v, do, states, dstates, *gradients)
