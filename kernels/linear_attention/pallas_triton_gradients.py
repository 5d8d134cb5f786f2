"""The gradients of queries, keys and gates per chunk as a Pallas kernel. Letters as in `README.md` of this folder.

A program holds one chunk and a tile of key channels, and loops over tiles of value channels.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import chunks, triton_blocks
from kernels.scalar_decay import between, decay_of, gate_block, weigh
from kernels.triton_blocks import given, key_head, loop_width, operand, rows_and_columns


def _dqk_kernel(*refs, gated, scale, block_v, dot):
  q_ref, k_ref, v_ref, do_ref, states_ref, dstates_ref, *refs = refs
  g_ref = refs.pop(0) if gated else None
  dq_ref, dk_ref, *dg_ref = refs
  (C, K), dtype = q_ref.shape, operand(q_ref.dtype)
  zeros = jnp.zeros((C, C), jnp.float32), jnp.zeros((C, K), jnp.float32)
  row, column = rows_and_columns(C)
  # Before the loop, these loads overlap with its own and do not come after them.
  q, k = q_ref[...].astype(dtype), k_ref[...].astype(dtype)
  gate = g_ref[...] if gated else None
  dp, dpt, dq_state, dk_state, through = _sum_over_values(
      v_ref, do_ref, states_ref, dstates_ref, zeros, dtype, gates=bool(dg_ref), block_v=block_v, dot=dot)
  decay = decay_of(gate, C)
  dp, dpt = (scale * between(decay, C, transposed) * x for transposed, x in ((False, dp), (True, dpt)))
  dq_state, dk_state = weigh(dq_state, decay.upto, scale), weigh(dk_state, decay.after)
  if not dg_ref:
    dq_ref[...] = (dot(dp.astype(dtype), k) + dq_state).astype(dq_ref.dtype)
    dk_ref[...] = (dot(dpt.astype(dtype), q) + dk_state).astype(dk_ref.dtype)
    return
  # The pairs (i, i) come last: no gate lies between them, so the gates' gradient must not see them even as rounding.
  # Pairs on one side of a gate cancel to float32 rounding, because both their terms are products of the same operands.
  diagonal = jnp.sum(jnp.where(row == column, dp, 0.0), axis=1)[:, None]
  dq = dot(jnp.where(row > column, dp, 0.0).astype(dtype), k) + dq_state
  dk = dot(jnp.where(row < column, dpt, 0.0).astype(dtype), q)
  q, k = q.astype(jnp.float32), k.astype(jnp.float32)
  inside, leaving = jnp.sum(q * dq - k * dk, axis=1), jnp.sum(k * dk_state, axis=1)
  dq_ref[...] = (dq + diagonal * k).astype(dq_ref.dtype)
  dk_ref[...] = (dk + dk_state + diagonal * q).astype(dk_ref.dtype)
  # These are sums over rows and not differences of cumulative sums, because a token's own flow out may be many times
  # the flow that passes its gate.
  passing = jnp.where(column >= row, inside[None, :], leaving[None, :])
  dg_ref[0][...] = decay.total * jnp.sum(through) + jnp.sum(passing, axis=1)


def _sum_over_values(v_ref, do_ref, states_ref, dstates_ref, zeros, dtype, *, gates, block_v, dot):
  """The sums over value channels, without weights: dP, its transpose, the states' parts of dQ and dK, and S * dS' where
  `gates` get a gradient."""
  square, wide = zeros

  def add_tile(i, carry):
    dp, dpt, dq, dk, through = carry
    tile = pl.ds(i * block_v, block_v)
    v, do = v_ref[:, tile].astype(dtype), do_ref[:, tile].astype(dtype)
    state, dstate = states_ref[:, tile], dstates_ref[:, tile]
    if gates:
      through += jnp.sum(state.astype(jnp.float32) * dstate.astype(jnp.float32), axis=1)
    # P^T gets its own product: a transposed accumulator is miscompiled by some Triton versions.
    return dp + dot(do, v.T), dpt + dot(v, do.T), dq + dot(do, state.T), dk + dot(v, dstate.T), through

  return jax.lax.fori_loop(
      0, v_ref.shape[1] // block_v, add_tile, (square, square, wide, wide, jnp.sum(wide, axis=0)))


# Launch: one program per tile of key channels, chunk, head and row of the batch.


def dqk(q, k, v, log_decay, do, states, dstates, scale, config, *, flows):
  """dq, dk, and if the `flows` through a decay per token are wanted, its gradient as the sum of all tiles of keys."""
  (B, T, H, V), (G, K) = v.shape, q.shape[2:]
  C, block, key = config.chunk, min(config.dqk.block, K), key_head(H, G)
  keys = pl.BlockSpec((None, C, None, block), lambda t, n, h, b: (b, n, key(h), t))
  dkeys = pl.BlockSpec((None, C, None, block), lambda t, n, h, b: (b, n, h, t))
  values = pl.BlockSpec((None, C, None, V), lambda t, n, h, b: (b, n, h, 0))
  state = pl.BlockSpec((None, None, None, block, V), lambda t, n, h, b: (b, h, n, t, 0))
  dgate = pl.BlockSpec((None, None, C, None), lambda t, n, h, b: (t, b, n, h))
  gate, gate_spec = gate_block(log_decay, C, chunked=True)
  dq, dk, *dg = triton_blocks.launch(
      functools.partial(_dqk_kernel, gated=bool(gate), scale=scale, block_v=loop_width(config.dqk.block, V)),
      name="linear_attention_dqk", grid=(K // block, T // C, H, B),
      in_specs=[keys, keys, values, values, state, state, *gate_spec],
      out_specs=[dkeys, dkeys, *given(flows, dgate)],
      out_shape=[jax.ShapeDtypeStruct((B, T, H, K), q.dtype), jax.ShapeDtypeStruct((B, T, H, K), k.dtype),
                 *given(flows, jax.ShapeDtypeStruct((K // block, B, T, H), jnp.float32))],
      num_warps=config.dqk.num_warps, num_stages=config.dqk.num_stages)(q, k, v, do, states, dstates, *gate)
  return chunks.sum_heads(dq, G), chunks.sum_heads(dk, G), jnp.sum(dg[0], axis=0) if flows else None
