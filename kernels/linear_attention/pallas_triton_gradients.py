"""The gradients of queries, keys and gates per chunk as a Pallas kernel. Letters as in `README.md` of this folder.

A program of the first kernel holds one chunk and a tile of key channels, and loops over tiles of value channels. A
second kernel finds the gradient of a decay per token from the flows that the first one writes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import chunks, triton_blocks
from kernels.scalar_decay import between, decay_of, load_gate, sums_block, weigh
from kernels.triton_blocks import computed_once, given, key_head, loop_width, operand, rows_and_columns


def _dqk_kernel(*refs, gated, scale, block_v, dot):
  q_ref, k_ref, v_ref, do_ref, states_ref, dstates_ref, *refs = refs
  g_ref = refs.pop(0) if gated else None
  dq_ref, dk_ref, *flows_ref = refs
  (C, K), dtype = q_ref.shape, operand(q_ref.dtype)
  zeros = jnp.zeros((C, C), jnp.float32), jnp.zeros((C, K), jnp.float32)
  row, column = rows_and_columns(C)
  # Before the loop, these loads overlap with its own and do not come after them.
  q, k = q_ref[...].astype(dtype), k_ref[...].astype(dtype)
  gate = load_gate(g_ref, 0, C)
  dp, dpt, dq_state, dk_state, through = _sum_over_values(
      v_ref, do_ref, states_ref, dstates_ref, zeros, dtype, gates=bool(flows_ref), block_v=block_v, dot=dot)
  decay = decay_of(gate, C)
  dp = scale * between(decay, C, False) * dp
  if not flows_ref:
    dpt = scale * between(decay, C, True) * dpt
  dq_state, dk_state = weigh(dq_state, decay.upto, scale), weigh(dk_state, decay.after)
  if not flows_ref:
    dq_ref[...] = (dot(dp.astype(dtype), k) + dq_state).astype(dq_ref.dtype)
    dk_ref[...] = (dot(dpt.astype(dtype), q) + dk_state).astype(dk_ref.dtype)
    return
  # The pairs (i, i) come last: no gate lies between them, so the gates' gradient must not see them even as rounding.
  # Pairs on one side of a gate cancel to float32 rounding, because both their terms are products of the same operands.
  diagonal = jnp.sum(jnp.where(row == column, dp, 0.0), axis=1)[:, None]
  dp, = computed_once(jnp.where(row > column, dp, 0.0).astype(dtype))
  dq, dk = dot(dp, k) + dq_state, dot(dp.T, q)
  q, k = q.astype(jnp.float32), k.astype(jnp.float32)
  inside, leaving = jnp.sum(q * dq - k * dk, axis=1), jnp.sum(k * dk_state, axis=1)
  dq_ref[...] = (dq + diagonal * k).astype(dq_ref.dtype)
  dk_ref[...] = (dk + dk_state + diagonal * q).astype(dk_ref.dtype)
  # A flow through the whole chunk passes the same gates as a flow from its start to its last token.
  last = jax.lax.broadcasted_iota(jnp.int32, (C,), 0) == C - 1
  flows_ref, = flows_ref
  flows_ref[0, :] = inside + jnp.where(last, decay.total * jnp.sum(through), 0.0)
  flows_ref[1, :] = leaving


def _dgates_kernel(flows_ref, dg_ref, *, dot):
  """The flows through each gate: those inside the chunk to its token or a later one, and those that left before it.

  These are sums over rows and not differences of cumulative sums, because a token's own flow out may be many times the
  flow that passes its gate.
  """
  row, column = rows_and_columns(dg_ref.shape[0])
  inside, leaving = (sum(flows_ref[tile, i, :] for tile in range(flows_ref.shape[0])) for i in range(2))
  dg_ref[...] = jnp.sum(jnp.where(row >= column, inside[:, None], leaving[:, None]), axis=0)


def _sum_over_values(v_ref, do_ref, states_ref, dstates_ref, zeros, dtype, *, gates, block_v, dot):
  """The sums over value channels, without weights: dP, its transpose, the states' parts of dQ and dK, and S * dS' where
  `gates` get a gradient."""
  square, wide = zeros
  # The compiler would form a sum of zeros at run time. Without gates nobody reads it.
  none = jnp.zeros(wide.shape[1:], jnp.float32) if gates else jnp.sum(wide, axis=0)

  def add_tile(i, carry):
    dp, dpt, dq, dk, through = carry
    tile = pl.ds(i * block_v, block_v)
    v, do = v_ref[:, tile].astype(dtype), do_ref[:, tile].astype(dtype)
    state, dstate = states_ref[:, tile], dstates_ref[:, tile]
    if gates:
      through += jnp.sum(state.astype(jnp.float32) * dstate.astype(jnp.float32), axis=1)
    dp += dot(do, v.T)
    if not gates:  # beside gates there are no registers for a product of its own
      dpt += dot(v, do.T)
    return dp, dpt, dq + dot(do, state.T), dk + dot(v, dstate.T), through

  return jax.lax.fori_loop(
      0, v_ref.shape[1] // block_v, add_tile, (square, square, wide, wide, none))


# Launch: one program per tile of key channels, chunk, head and row of the batch.


def dqk(q, k, v, sums, do, states, dstates, scale, config, *, dgates):
  """dq, dk, and where `dgates` the gradient of a decay per token. `sums` is as `kernels.scalar_decay.chunk_sums` gives.
  """
  (B, T, H, V), (G, K) = v.shape, q.shape[2:]
  C, block, key = config.chunk, min(config.dqk.block, K), key_head(H, G)
  keys = pl.BlockSpec((None, C, None, block), lambda t, n, h, b: (b, n, key(h), t))
  dkeys = pl.BlockSpec((None, C, None, block), lambda t, n, h, b: (b, n, h, t))
  values = pl.BlockSpec((None, C, None, V), lambda t, n, h, b: (b, n, h, 0))
  state = pl.BlockSpec((None, None, None, block, V), lambda t, n, h, b: (b, h, n, t, 0))
  flow = pl.BlockSpec((None, None, None, None, 2, C), lambda t, n, h, b: (t, b, h, n, 0, 0))
  gate, gate_spec = sums_block(sums, C, chunked=True)
  dq, dk, *flows = triton_blocks.launch(
      functools.partial(_dqk_kernel, gated=bool(gate), scale=scale, block_v=loop_width(config.dqk.block, V)),
      name="linear_attention_dqk", grid=(K // block, T // C, H, B),
      in_specs=[keys, keys, values, values, state, state, *gate_spec],
      out_specs=[dkeys, dkeys, *given(dgates, flow)],
      out_shape=[jax.ShapeDtypeStruct((B, T, H, K), q.dtype), jax.ShapeDtypeStruct((B, T, H, K), k.dtype),
                 *given(dgates, jax.ShapeDtypeStruct((K // block, B, H, T // C, 2, C), jnp.float32))],
      num_warps=config.dqk.num_warps, num_stages=config.dqk.num_stages)(q, k, v, do, states, dstates, *gate)
  return chunks.sum_heads(dq, G), chunks.sum_heads(dk, G), _dgates(*flows) if dgates else None


def _dgates(flows):
  """The gradient `[B, T, H]` of the gates from the flows `[tiles, B, H, N, 2, C]` of every tile of key channels."""
  tiles, B, H, N, _, C = flows.shape
  return triton_blocks.launch(
      _dgates_kernel, name="linear_attention_dgates", grid=(N, H, B),
      in_specs=[pl.BlockSpec((tiles, None, None, None, 2, C), lambda n, h, b: (0, b, h, n, 0, 0))],
      out_specs=pl.BlockSpec((None, C, None), lambda n, h, b: (b, n, h)),
      out_shape=jax.ShapeDtypeStruct((B, N * C, H), jnp.float32), num_warps=1, num_stages=1)(flows)
