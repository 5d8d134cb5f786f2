"""The gradients of queries, keys and gates per chunk as a Pallas kernel. Letters as in `README.md` of this folder.

A program of the first kernel holds one chunk and a tile of key channels, and loops over tiles of value channels. Where
value heads share a key head, it also loops over some of them and sums their dq and dk. A second kernel finds the
gradient of a decay per token from the flows that the first one writes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import chunks, triton_blocks
from kernels.scalar_decay import between, decay_of, load_gate, sums_block, weigh
from kernels.triton_blocks import computed_once, given, key_head, loop_width, operand, rows_and_columns
from kernels.tuned import Tile

# Programs that must be left for one of them to sum over heads. The registers of a multiprocessor hold one such program,
# so that 132 multiprocessors work on 2048 programs in 16 rounds, and are idle only in a part of the last.
WANTED = 2048
SUMMING_WARPS, SUMMING_STAGES = 8, 2  # with 4 warps, or 3 stages for wide values, sums over heads spill on an H100


def _dqk_kernel(q_ref, k_ref, v_ref, do_ref, states_ref, dstates_ref, *refs, gated, heads, start=0, **options):
  """dq and dk of one value head, or their sums over the `heads` of a part of a group."""
  g_ref, (dq_ref, dk_ref, *flows_ref) = refs[0] if gated else None, refs[gated:]
  inputs = q_ref, k_ref, v_ref, do_ref, states_ref, dstates_ref, g_ref, dq_ref, dk_ref, flows_ref
  if heads == 1:
    _gradients(*inputs, head=(), give=_store, **options)
    return

  def add_head(h, sums):
    found = []
    _gradients(*inputs, head=(h,), give=lambda _, x: found.append(x), **options)
    return tuple(total + x for total, x in zip(sums, found, strict=True))

  zeros = jnp.zeros(q_ref.shape, jnp.float32)
  for ref, total in zip((dq_ref, dk_ref), jax.lax.fori_loop(start, heads, add_head, (zeros, zeros))):
    _store(ref, total)


def _store(ref, x):
  ref[...] = x.astype(ref.dtype)


def _gradients(q_ref, k_ref, v_ref, do_ref, states_ref, dstates_ref, g_ref, dq_ref, dk_ref, flows_ref, *, head, give,
               scale, block_v, dot):
  """Gives `give` dq and dk of a value head, each with the ref it belongs to, and writes the head's flows, if any.

  `head` is its index in the refs that have several heads, or empty.
  """
  (C, K), dtype = q_ref.shape, operand(q_ref.dtype)
  zeros = jnp.zeros((C, C), jnp.float32), jnp.zeros((C, K), jnp.float32)
  row, column = rows_and_columns(C)
  # Before the loop, these loads overlap with its own and do not come after them.
  q, k = q_ref[...].astype(dtype), k_ref[...].astype(dtype)
  gate = load_gate(g_ref, 0, C, head)
  dp, dpt, dq_state, dk_state, through = _sum_over_values(
      v_ref, do_ref, states_ref, dstates_ref, zeros, dtype, head=head, gates=bool(flows_ref), block_v=block_v, dot=dot)
  decay = decay_of(gate, C)
  dp = scale * between(decay, C, False) * dp
  if not flows_ref:
    dpt = scale * between(decay, C, True) * dpt
  dq_state, dk_state = weigh(dq_state, decay.upto, scale), weigh(dk_state, decay.after)
  if not flows_ref:
    give(dq_ref, dot(dp.astype(dtype), k) + dq_state)
    give(dk_ref, dot(dpt.astype(dtype), q) + dk_state)
    return
  # The pairs (i, i) come last: no gate lies between them, so the gates' gradient must not see them even as rounding.
  # Pairs on one side of a gate cancel to float32 rounding, because both their terms are products of the same operands.
  diagonal = jnp.sum(jnp.where(row == column, dp, 0.0), axis=1)[:, None]
  dp, = computed_once(jnp.where(row > column, dp, 0.0).astype(dtype), index=head[0] if head else None)
  dq, dk = dot(dp, k) + dq_state, dot(dp.T, q)
  q, k = q.astype(jnp.float32), k.astype(jnp.float32)
  inside, leaving = jnp.sum(q * dq - k * dk, axis=1), jnp.sum(k * dk_state, axis=1)
  give(dq_ref, dq + diagonal * k)
  give(dk_ref, dk + dk_state + diagonal * q)
  # A flow through the whole chunk passes the same gates as a flow from its start to its last token.
  last = jax.lax.broadcasted_iota(jnp.int32, (C,), 0) == C - 1
  flows_ref, = flows_ref
  flows_ref[*head, 0, :] = inside + jnp.where(last, decay.total * jnp.sum(through), 0.0)
  flows_ref[*head, 1, :] = leaving


def _dgates_kernel(flows_ref, dg_ref, *, dot):
  """The flows through each gate: those inside the chunk to its token or a later one, and those that left before it.

  These are sums over rows and not differences of cumulative sums, because a token's own flow out may be many times the
  flow that passes its gate.
  """
  row, column = rows_and_columns(dg_ref.shape[0])
  inside, leaving = (sum(flows_ref[tile, i, :] for tile in range(flows_ref.shape[0])) for i in range(2))
  dg_ref[...] = jnp.sum(jnp.where(row >= column, inside[:, None], leaving[:, None]), axis=0)


def _sum_over_values(v_ref, do_ref, states_ref, dstates_ref, zeros, dtype, *, head, gates, block_v, dot):
  """The sums over value channels, without weights: dP, its transpose, the states' parts of dQ and dK, and S * dS' where
  `gates` get a gradient."""
  square, wide = zeros
  # The compiler would form a sum of zeros at run time. Without gates nobody reads it.
  none = jnp.zeros(wide.shape[1:], jnp.float32) if gates else jnp.sum(wide, axis=0)

  def add_tile(i, carry):
    dp, dpt, dq, dk, through = carry
    tile = pl.ds(i * block_v, block_v)
    v, do = v_ref[:, *head, tile].astype(dtype), do_ref[:, *head, tile].astype(dtype)
    state, dstate = states_ref[*head, :, tile], dstates_ref[*head, :, tile]
    if gates:
      through += jnp.sum(state.astype(jnp.float32) * dstate.astype(jnp.float32), axis=1)
    dp += dot(do, v.T)
    if not gates:  # beside gates there are no registers for a product of its own
      dpt += dot(v, do.T)
    return dp, dpt, dq + dot(do, state.T), dk + dot(v, dstate.T), through

  return jax.lax.fori_loop(
      0, v_ref.shape[-1] // block_v, add_tile, (square, square, wide, wide, none))


# Launch: one program per tile of key channels, chunk, part of a group of heads and row of the batch.


def _summed_heads(group, programs):
  """How many value heads of a `group` one program takes, where `programs` would take a whole group each.

  More heads per program leave fewer partial sums to write and to add up, but also fewer programs than keep all
  multiprocessors busy. The answer is the largest divisor of the group with WANTED programs or more, else 1.
  """
  parts = (parts for parts in range(1, group) if group % parts == 0 and programs * parts >= WANTED)
  return group // next(parts, group)


def dqk(q, k, v, sums, do, states, dstates, scale, config, *, dgates):
  """dq, dk, and where `dgates` the gradient of a decay per token. `sums` is as `kernels.scalar_decay.chunk_sums` gives.
  """
  (B, T, H, V), (G, K) = v.shape, q.shape[2:]
  C, tile, block = config.chunk, config.dqk, min(config.dqk.block, K)
  heads = _summed_heads(H // G, K // block * (T // C) * G * B)
  several, parts, block_v = heads if heads > 1 else None, H // heads, loop_width(tile.block, V)
  if several:
    tile = Tile(tile.block, SUMMING_WARPS, min(tile.num_stages, SUMMING_STAGES))
    # With one tile of value channels, the loop over heads is the innermost, whose next loads are always under way.
    # Narrow tiles of keys are for GPUs that hold the operands of products in registers, where wide values spill.
    block_v = min(tile.block if tile.block >= 64 else 16, V)
  key = key_head(parts, G)
  keys = pl.BlockSpec((None, C, None, block), lambda t, n, h, b: (b, n, key(h), t))
  dkeys = pl.BlockSpec((None, C, None, block), lambda t, n, h, b: (b, n, h, t))
  values = pl.BlockSpec((None, C, several, V), lambda t, n, h, b: (b, n, h, 0))
  state = pl.BlockSpec((None, several, None, block, V), lambda t, n, h, b: (b, h, n, t, 0))
  flow = pl.BlockSpec((None, None, several, None, 2, C), lambda t, n, h, b: (t, b, h, n, 0, 0))
  gate, gate_spec = sums_block(sums, C, chunked=True, heads=several)
  dq, dk, *flows = triton_blocks.launch(
      functools.partial(_dqk_kernel, gated=bool(gate), heads=heads, scale=scale, block_v=block_v),
      name="linear_attention_dqk", grid=(K // block, T // C, parts, B), loop=bool(several),
      in_specs=[keys, keys, values, values, state, state, *gate_spec],
      out_specs=[dkeys, dkeys, *given(dgates, flow)],
      out_shape=[jax.ShapeDtypeStruct((B, T, parts, K), q.dtype), jax.ShapeDtypeStruct((B, T, parts, K), k.dtype),
                 *given(dgates, jax.ShapeDtypeStruct((K // block, B, H, T // C, 2, C), jnp.float32))],
      num_warps=tile.num_warps, num_stages=tile.num_stages)(q, k, v, do, states, dstates, *gate)
  return chunks.sum_heads(dq, G), chunks.sum_heads(dk, G), _dgates(*flows) if dgates else None


def _dgates(flows):
  """The gradient `[B, T, H]` of the gates from the flows `[tiles, B, H, N, 2, C]` of every tile of key channels."""
  tiles, B, H, N, _, C = flows.shape
  return triton_blocks.launch(
      _dgates_kernel, name="linear_attention_dgates", grid=(N, H, B),
      in_specs=[pl.BlockSpec((tiles, None, None, None, 2, C), lambda n, h, b: (0, b, h, n, 0, 0))],
      out_specs=pl.BlockSpec((None, C, None), lambda n, h, b: (b, n, h)),
      out_shape=jax.ShapeDtypeStruct((B, N * C, H), jnp.float32), num_warps=1, num_stages=1)(flows)
