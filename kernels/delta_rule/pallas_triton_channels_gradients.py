"""The delta rule's gradients per chunk under a decay per key channel, as a Pallas kernel. Letters as in `README.md`.

A program holds one chunk and a tile of key channels. It loops over tiles of value channels, then over dyadic levels.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import chunks, triton_blocks
from kernels.chunks import wide
from kernels.delta_rule.pallas_triton_channels_factors import decay, each_level, is_bounded, level_of
from kernels.delta_rule.pallas_triton_norms import launch_through_norm, through_norm
from kernels.delta_rule.pallas_triton_operands import weigh_both
from kernels.scalar_decay import weigh
from kernels.triton_blocks import key_head, masked_sum, operand, rows_and_columns


def _gradients_kernel(q_ref, k_ref, sums_ref, e_ref, do_ref, minus_f_ref, beta_ref, *refs, scale, width, whole, dot):
  """With `whole` rows of keys in a tile the gradients also go through the norms."""
  *norm_refs, states_ref, dstates_ref, dq_ref, dk_ref, dg_ref, dbeta_ref, dv_ref = refs
  C, block = dq_ref.shape
  tile, first, dtype = pl.ds(pl.program_id(0) * block, block), pl.program_id(0) == 0, operand(k_ref.dtype)
  row, column = rows_and_columns(C)
  beta, (q_norm, k_norm) = beta_ref[...], [ref[...] for ref in norm_refs] or (None, None)
  dp, dx, dq, dk_entry, dk_exit, through = _sum_over_values(
      e_ref, do_ref, minus_f_ref, states_ref, dstates_ref, dv_ref, beta, first, width=width, dot=dot)
  dbeta_ref[...] = -jnp.sum(jnp.where(row == column, dx, 0.0), axis=1)
  dp, dx = weigh_both(dp, None, beta), weigh_both(dx, beta, beta)
  q = weigh(wide(q_ref[...]), scale, q_norm)
  k = weigh(wide(k_ref[...]), k_norm)
  sums = sums_ref[:, tile]
  total = sums_ref[C - 1, tile]
  dq, dk_entry = dq * decay(sums), weigh(dk_entry, beta) * decay(sums)
  dk_exit = weigh(dk_exit, beta) * decay(total[None] - sums)
  exact = functools.partial(masked_sum, dot=dot, parts=3 if dtype == jnp.float32 else 2)
  dg = (exact(jnp.where(row <= column, 1.0, 0.0), q * dq + k * dk_entry)
        + exact(jnp.where(row > column, 1.0, 0.0), k * dk_exit) + (decay(total) * through)[None])
  # No gate lies between a token and itself.
  diagonal = jnp.sum(jnp.where(row == column, dp, 0.0), axis=1)[:, None]
  initial = dq + diagonal * k, dk_entry + dk_exit + diagonal * q, dg
  dq, dk, dg = _through_pairs(initial, q, k, dp, dx, sums, sums_ref, tile, exact, dtype, dot)
  dg_ref[...] = dg
  for ref, norm, x, dx, factor in ((dq_ref, q_norm, q_ref, dq, scale), (dk_ref, k_norm, k_ref, dk, None)):
    dx = through_norm(wide(x[...]), norm if whole else None, weigh(dx, factor, norm))
    ref[...] = dx.astype(ref.dtype)


def _sum_over_values(e_ref, do_ref, minus_f_ref, states_ref, dstates_ref, dv_ref, beta, first, *, width, dot):
  """The sums over value channels, without weights: dP, dX with -dbeta on its diagonal, the part of dQ from the entry
  state, the parts of dK from the entry and the exit state, and S * dS'. The programs that are `first` write dV."""
  (C, V), block = e_ref.shape, states_ref.shape[1]
  square, keys = jnp.zeros((C, C), jnp.float32), jnp.zeros((C, block), jnp.float32)

  def add_tile(i, carry):
    dp, dx, dq, dk_entry, dk_exit, through = carry
    tile = pl.ds(i * width, width)
    e, do, minus_f = e_ref[:, tile], do_ref[:, tile].astype(e_ref.dtype), minus_f_ref[:, tile]
    state, dstate = states_ref[tile, :], dstates_ref[tile, :]

    @pl.when(first)
    def _():
      dv_ref[:, tile] = weigh(wide(minus_f), -beta).astype(dv_ref.dtype)

    through += jnp.sum(wide(state) * wide(dstate), axis=0)
    return (dp + dot(do, e.T), dx + dot(minus_f, e.T), dq + dot(do, state), dk_entry + dot(minus_f, state),
            dk_exit + dot(e, dstate), through)

  return jax.lax.fori_loop(0, V // width, add_tile, (square, square, keys, keys, keys, jnp.sum(keys, axis=0)))


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
    z, rows, columns = (x.astype(dtype) for x in (q * level.after_middle, k * level.after_middle,
                                                  k * level.before_middle))
    a, x = (jnp.where(level.pairs, x, 0.0).astype(dtype) for x in (dp, dx))
    dz, drows, dcolumns = dot(a, columns), dot(x, columns), dot(a.T, z) + dot(x.T, rows)
    flow = wide(z) * dz + wide(rows) * drows - wide(columns) * dcolumns
    return (dq + level.after_middle * dz, dk + level.after_middle * drows + level.before_middle * dcolumns,
            dg + exact(level.flows, jnp.where(level.second, flow, -flow)))

  return each_level(bounded, q.shape[0], add_level, initial)


# Launch: one program per tile of key channels, chunk, head and row of the batch.


def gradients(q, k, sums, norms, beta, e, do, minus_f, states, dstates, scale, config):
  """dq, dk, dv, dbeta and d log_decay; `norms` are two arrays or none."""
  (B, T, H, V), (G, K), C = do.shape, k.shape[2:], config.chunk
  block, key = min(config.gradients.block, K), key_head(H, G)
  keys = pl.BlockSpec((None, C, None, block), lambda t, n, h, b: (b, n, key(h), t))
  dkeys = pl.BlockSpec((None, C, None, block), lambda t, n, h, b: (b, n, h, t))
  all_keys = pl.BlockSpec((None, C, None, K), lambda t, n, h, b: (b, n, h, 0))
  values = pl.BlockSpec((None, C, None, V), lambda t, n, h, b: (b, n, h, 0))
  state = pl.BlockSpec((None, None, None, V, block), lambda t, n, h, b: (b, h, n, 0, t))
  token = pl.BlockSpec((None, C, None), lambda t, n, h, b: (b, n, h))
  whole = block == K
  dtype = jnp.float32 if norms and not whole else k.dtype
  dkey = lambda dtype: jax.ShapeDtypeStruct((B, T, H, K), dtype)
  dq, dk, dg, dbeta, dv = triton_blocks.launch(
      functools.partial(_gradients_kernel, scale=scale, width=min(config.width, V), whole=whole),
      name="delta_rule_channel_gradients", grid=(K // block, T // C, H, B),
      in_specs=[keys, keys, all_keys, values, values, values, token, *[token] * len(norms), state, state],
      out_specs=[dkeys, dkeys, dkeys, token, values],
      out_shape=[dkey(dtype), dkey(dtype), dkey(jnp.float32), jax.ShapeDtypeStruct((B, T, H), jnp.float32),
                 jax.ShapeDtypeStruct(do.shape, do.dtype)],
      num_warps=config.gradients.num_warps, num_stages=config.gradients.num_stages)(
          q, k, sums, e, do, minus_f, beta, *norms, states, dstates)
  dq, dk = (chunks.sum_heads(x, G) for x in (dq, dk))
  if norms and not whole:  # all value heads of a key head have its norms
    dq, dk = (launch_through_norm(x, norm[:, :, ::H // G], dx)
              for x, norm, dx in ((q, norms[0], dq), (k, norms[1], dk)))
  return dq, dk, dv, dbeta, dg
