"""The delta rule's gradients per chunk under a decay per key channel, as a Pallas kernel. Letters as in `README.md`.

One kernel finds dP and dX, another the gradients that have key channels. A program of the latter holds one chunk and a
tile of key channels, and loops over tiles of value channels, then over dyadic levels. Its arrays of keys are
transposed. Where products feed products, Triton spreads the rows of a result over all warps, and a chunk has fewer
tokens than the warps have rows: each row would be computed several times.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import chunks, triton_blocks
from kernels.chunks import wide
from kernels.delta_rule.inverse import chunk_square
from kernels.delta_rule.pallas_triton_channels_factors import decay, each_level, is_bounded, level_of
from kernels.delta_rule.pallas_triton_norms import launch_through_norm, through_norm
from kernels.delta_rule.pallas_triton_operands import weigh_both, weigh_columns
from kernels.scalar_decay import weigh
from kernels.triton_blocks import key_head, leading_bits, operand, rows_and_columns


def _pairs_kernel(e_ref, do_ref, minus_f_ref, beta_ref, dp_ref, dx_ref, dbeta_ref, dv_ref, *, width, dot):
  """dP and dX with their weights, and all gradients without key channels."""
  (C, V), beta = e_ref.shape, beta_ref[...]

  def add_tile(i, carry):
    dp, dx = carry
    tile = pl.ds(i * width, width)
    e, do, minus_f = e_ref[:, tile], do_ref[:, tile].astype(e_ref.dtype), minus_f_ref[:, tile]
    dv_ref[:, tile] = weigh(wide(minus_f), -beta).astype(dv_ref.dtype)
    return dp + dot(do, e.T), dx + dot(minus_f, e.T)

  dp, dx = jax.lax.fori_loop(0, V // width, add_tile, (jnp.zeros((C, C), jnp.float32),) * 2)
  row, column = rows_and_columns(C)
  dbeta_ref[...] = -jnp.sum(jnp.where(row == column, dx, 0.0), axis=1)
  dp_ref[...] = weigh_both(dp, None, beta)
  dx_ref[...] = weigh_both(dx, beta, beta)


def _gradients_kernel(q_ref, k_ref, sums_ref, e_ref, do_ref, minus_f_ref, beta_ref, dp_ref, dx_ref, *refs, scale, width,
                      whole, dot):
  """With `whole` rows of keys in a tile the gradients also go through the norms."""
  *norm_refs, states_ref, dstates_ref, dq_ref, dk_ref, dg_ref = refs
  C, block = dq_ref.shape
  tile, dtype = pl.ds(pl.program_id(0) * block, block), operand(k_ref.dtype)
  row, column = rows_and_columns(C)
  beta, (q_norm, k_norm) = beta_ref[...], [ref[...] for ref in norm_refs] or (None, None)
  dq, dk_entry, dk_exit, through = _sum_over_values(
      e_ref, do_ref, minus_f_ref, states_ref, dstates_ref, width=width, dot=dot)
  q = weigh(wide(q_ref[...]), scale, q_norm).T
  k = weigh(wide(k_ref[...]), k_norm).T
  sums = sums_ref[:, tile]
  total = sums_ref[C - 1, tile]
  upto, after = decay(sums).T, decay(total[None] - sums).T
  dq, dk_entry, dk_exit = dq * upto, weigh_columns(dk_entry, beta) * upto, weigh_columns(dk_exit, beta) * after
  exact = functools.partial(_masked_sum, dot=dot, parts=3 if dtype == jnp.float32 else 2)
  dg = (exact(q * dq + k * dk_entry, jnp.where(row >= column, 1.0, 0.0))
        + exact(k * dk_exit, jnp.where(row < column, 1.0, 0.0)) + (decay(total) * through)[:, None])
  dp, dx = dp_ref[...], dx_ref[...]
  # No gate lies between a token and itself.
  diagonal = jnp.sum(jnp.where(row == column, dp, 0.0), axis=0)[None]
  initial = dq + diagonal * k, dk_entry + dk_exit + diagonal * q, dg
  dq, dk, dg = _through_pairs(initial, q, k, dp, dx, sums, sums_ref, tile, exact, dtype, dot)
  dg_ref[...] = dg.T
  for ref, norm, x, dx, factor in ((dq_ref, q_norm, q_ref, dq, scale), (dk_ref, k_norm, k_ref, dk, None)):
    dx = through_norm(wide(x[...]), norm if whole else None, weigh(dx.T, factor, norm))
    ref[...] = dx.astype(ref.dtype)


def _sum_over_values(e_ref, do_ref, minus_f_ref, states_ref, dstates_ref, *, width, dot):
  """The sums over value channels, without weights: the part of dQ from the entry state, the parts of dK from the entry
  and the exit state, and S * dS'."""
  (C, V), block = e_ref.shape, states_ref.shape[1]
  keys = jnp.zeros((block, C), jnp.float32)

  def add_tile(i, carry):
    dq, dk_entry, dk_exit, through = carry
    tile = pl.ds(i * width, width)
    e, do, minus_f = e_ref[:, tile], do_ref[:, tile].astype(e_ref.dtype), minus_f_ref[:, tile]
    state, dstate = states_ref[tile, :], dstates_ref[tile, :]
    return (dq + dot(state.T, do.T), dk_entry + dot(state.T, minus_f.T), dk_exit + dot(dstate.T, e.T),
            through + jnp.sum(wide(state) * wide(dstate), axis=0))

  return jax.lax.fori_loop(0, V // width, add_tile, (keys, keys, keys, jnp.sum(keys, axis=1)))


def _through_pairs(initial, q, k, dp, dx, sums, sums_ref, tile, exact, dtype, dot):
  """Adds to dQ, dK and the gradient of the gates all that comes through P and X, level by level.

  Each factor times its own cotangent is the flow through the gates of its exponent, so that none is a difference of
  larger flows. Only in a bounded chunk, where one exponent serves all pairs, flows on one side of a gate cancel, to
  float32 rounding.
  """
  bounded = is_bounded(sums_ref)

  def add_level(number, carry):
    dq, dk, dg = carry
    level = level_of(number, bounded, sums_ref, tile, sums)
    after, before = level.after_middle.T, level.before_middle.T
    z, rows, columns = (x.astype(dtype) for x in (q * after, k * after, k * before))
    a, x = (jnp.where(level.pairs, x, 0.0).astype(dtype) for x in (dp, dx))
    dz, drows, dcolumns = dot(columns, a.T), dot(columns, x.T), dot(z, a) + dot(rows, x)
    flow = wide(z) * dz + wide(rows) * drows - wide(columns) * dcolumns
    return (dq + after * dz, dk + after * drows + before * dcolumns,
            dg + exact(jnp.where(level.second.T, flow, -flow), level.flows.T))

  return each_level(bounded, q.shape[1], add_level, initial)


def _masked_sum(x, mask, dot, parts):
  """`x @ mask`, cut and summed as in `triton_blocks.masked_sum`."""
  mask, total = mask.astype(jnp.bfloat16), 0.0
  for _ in range(parts - 1):
    high = leading_bits(x)
    total, x = total + dot(high.astype(jnp.bfloat16), mask), x - high
  return total + dot(x.astype(jnp.bfloat16), mask)


# Launches.


def pairs(e, do, minus_f, beta, config):
  """dP and dX `[B, H, N, C, C]`, dbeta and dv, in one program per chunk, head and row of the batch."""
  (B, T, H, V), C = do.shape, config.chunk
  values = pl.BlockSpec((None, C, None, V), lambda n, h, b: (b, n, h, 0))
  token = pl.BlockSpec((None, C, None), lambda n, h, b: (b, n, h))
  square = jax.ShapeDtypeStruct((B, H, T // C, C, C), jnp.float32)
  return triton_blocks.launch(
      functools.partial(_pairs_kernel, width=min(config.width, V)), name="delta_rule_channel_pairs",
      grid=(T // C, H, B), in_specs=[values, values, values, token],
      out_specs=[chunk_square(C), chunk_square(C), token, values],
      out_shape=[square, square, jax.ShapeDtypeStruct((B, T, H), jnp.float32),
                 jax.ShapeDtypeStruct(do.shape, do.dtype)], num_warps=4, num_stages=2)(e, do, minus_f, beta)


def gradients(q, k, sums, norms, beta, e, do, minus_f, states, dstates, scale, config):
  """dq, dk, dv, dbeta and d log_decay; `norms` are two arrays or none.

  One program per tile of key channels, chunk, head and row of the batch finds dq, dk and d log_decay.
  """
  (B, T, H, V), (G, K), C = do.shape, k.shape[2:], config.chunk
  dp, dx, dbeta, dv = pairs(e, do, minus_f, beta, config)
  block, key = min(config.gradients.block, K), key_head(H, G)
  keys = pl.BlockSpec((None, C, None, block), lambda t, n, h, b: (b, n, key(h), t))
  dkeys = pl.BlockSpec((None, C, None, block), lambda t, n, h, b: (b, n, h, t))
  all_keys = pl.BlockSpec((None, C, None, K), lambda t, n, h, b: (b, n, h, 0))
  values = pl.BlockSpec((None, C, None, V), lambda t, n, h, b: (b, n, h, 0))
  state = pl.BlockSpec((None, None, None, V, block), lambda t, n, h, b: (b, h, n, 0, t))
  square = pl.BlockSpec((None, None, None, C, C), lambda t, n, h, b: (b, h, n, 0, 0))
  token = pl.BlockSpec((None, C, None), lambda t, n, h, b: (b, n, h))
  whole = block == K
  dtype = jnp.float32 if norms and not whole else k.dtype
  dkey = lambda dtype: jax.ShapeDtypeStruct((B, T, H, K), dtype)
  dq, dk, dg = triton_blocks.launch(
      functools.partial(_gradients_kernel, scale=scale, width=min(config.width, V), whole=whole),
      name="delta_rule_channel_gradients", grid=(K // block, T // C, H, B),
      in_specs=[keys, keys, all_keys, *[values] * 3, token, square, square, *[token] * len(norms), state, state],
      out_specs=[dkeys, dkeys, dkeys], out_shape=[dkey(dtype), dkey(dtype), dkey(jnp.float32)],
      num_warps=config.gradients.num_warps, num_stages=config.gradients.num_stages)(
          q, k, sums, e, do, minus_f, beta, dp, dx, *norms, states, dstates)
  dq, dk = (chunks.sum_heads(x, G) for x in (dq, dk))
  if norms and not whole:  # all value heads of a key head have its norms
    dq, dk = (launch_through_norm(x, norm[:, :, ::H // G], dx)
              for x, norm, dx in ((q, norms[0], dq), (k, norms[1], dk)))
  return dq, dk, dv, dbeta, dg
