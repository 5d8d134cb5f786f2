"""GLA's gradients of queries, keys and gates per chunk as a Pallas kernel. Letters as in `README.md` of this folder.

A program holds one chunk and a tile of key channels, and loops over tiles of value channels.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import triton_blocks
from kernels.gla.exact_chunks import exact_sums, gates
from kernels.gla.pallas_triton_factors import chunk_block, from_middle
from kernels.triton_blocks import key_head, loop_width, masked_sum, rows_and_columns


def _dqkg_kernel(x_ref, y_ref, g_ref, v_ref, do_ref, states_ref, dstates_ref, dq_ref, dk_ref, dg_ref, *, scale, block_v,
                 dot):
  C, K = x_ref.shape
  dtype, sums = x_ref.dtype, exact_sums(x_ref.dtype, dot)
  square, wide = jnp.zeros((C, C), jnp.float32), jnp.zeros((C, K), jnp.float32)
  row, column = rows_and_columns(C)
  f32 = lambda x: x.astype(jnp.float32)

  def add_tile(i, carry):
    dp, dpt, dx, dy, through = carry
    tile = pl.ds(i * block_v, block_v)
    v, do = v_ref[:, tile].astype(dtype), do_ref[:, tile].astype(dtype)
    state, dstate = states_ref[:, tile], dstates_ref[:, tile]
    through += jnp.sum(f32(state) * f32(dstate), axis=1)
    # P^T gets its own product: a transposed accumulator is miscompiled by some Triton versions.
    return dp + dot(do, v.T), dpt + dot(v, do.T), dx + dot(do, state.T), dy + dot(v, dstate.T), through

  dp, dpt, dx, dy_state, through = jax.lax.fori_loop(
      0, v_ref.shape[1] // block_v, add_tile, (square, square, wide, wide, jnp.sum(wide, axis=0)))
  exponent = sums(from_middle(C), gates(g_ref, ...))
  # The pairs (i, i) come last: no gate lies between them, so the gates' gradient must not see them even as rounding.
  diagonal = jnp.sum(jnp.where(row == column, dp, 0.0), axis=1)[:, None]
  y = y_ref[...]
  dx += dot(jnp.where(row > column, dp, 0.0).astype(dtype), y)
  dq_ref[...] = (scale * jnp.exp2(exponent) * (dx + diagonal * f32(y))).astype(dq_ref.dtype)
  x = x_ref[...]
  dy = dot(jnp.where(row < column, dpt, 0.0).astype(dtype), x)
  # A gate's gradient is the flow through it: the sum of P * dP, and of the same products for the states, over all that
  # it multiplies. These are pairs inside the chunk, pairs with the entry state and with the exit state, and M with dM.
  # Pairs on one side of the gate cancel to float32 rounding, because both their terms are products of the same rounded
  # factors.
  inside = f32(x) * dx
  dk_ref[...] = (jnp.exp2(-exponent) * (dy + dy_state + diagonal * f32(x))).astype(dk_ref.dtype)
  inside -= f32(y) * dy
  dg = sums(jnp.where(column >= row, 1.0, 0.0), inside)
  # These flows do not cancel in pairs as the flows inside do, so fewer bits of them are enough.
  leaving = masked_sum(jnp.where(column < row, 1.0, 0.0), f32(y) * dy_state, dot, 2 if dtype == jnp.float32 else 1)
  dg_ref[...] = dg + through[None] + leaving


# Launch: one program per tile of key channels, chunk, head and row of the batch.


def dqkg(x, y, g, v, do, states, dstates, scale, config, dtype):
  """dq, dk and d log_decay of each value head, the first two in `dtype`."""
  (B, T, H, V), (G, K), tile = v.shape, x.shape[2:], config.dqkg
  block = min(tile.block, K)
  keys, values = chunk_block(config, block, tiled=True, head=key_head(H, G)), chunk_block(config, V, tiled=False)
  dkeys = chunk_block(config, block, tiled=True)
  state = pl.BlockSpec((None, None, None, block, V), lambda t, n, h, b: (b, h, n, t, 0))
  return triton_blocks.launch(
      functools.partial(_dqkg_kernel, scale=scale, block_v=loop_width(tile.block, V)), name="gla_dqkg",
      grid=(K // block, T // config.chunk, H, B), in_specs=[keys, keys, keys, values, values, state, state],
      out_specs=[dkeys] * 3,
      out_shape=[jax.ShapeDtypeStruct((B, T, H, K), x) for x in (dtype, dtype, g.dtype)],
      num_warps=tile.num_warps, num_stages=tile.num_stages)(x, y, g, v, do, states, dstates)
