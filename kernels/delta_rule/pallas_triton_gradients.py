"""The delta rule's gradients per chunk as a Pallas kernel, from what the scans have saved. Letters as in `README.md`.

A program holds one chunk of `Config.span` tokens and a tile of key channels, and loops over tiles of value channels.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import chunks, triton_blocks
from kernels.delta_rule.pallas_triton_norms import launch_through_norm, through_norm
from kernels.delta_rule.pallas_triton_operands import row_weights, take_per_token, weigh_both
from kernels.scalar_decay import between, decay_of, gate_block, weigh
from kernels.triton_blocks import computed_once, given, key_head, operand, rows_and_columns


def _gradients_kernel(q_ref, k_ref, e_ref, do_ref, minus_f_ref, *refs, vectors, gated, flows, scale, width,
                      whole, dot):
  """With `whole` rows of keys in a tile the gradients also go through the norms, and with `flows` gates get one too."""
  gate_ref, per_token, refs = take_per_token(refs, vectors, gated)
  states_ref, dstates_ref, dq_ref, dk_ref, dbeta_ref, *dg_ref, dv_ref = refs
  C, dtype = k_ref.shape[0], operand(k_ref.dtype)
  row, column = rows_and_columns(C)
  first = pl.program_id(0) == 0
  decay = decay_of(gate_ref[...] if gated else None, C)
  beta, q_norm, k_norm = row_weights(per_token, slice(None))
  dp, doverlaps, dq, dk_entry, dk_exit, through = _sum_over_values(
      e_ref, do_ref, minus_f_ref, states_ref, dstates_ref, dv_ref, beta, first, flows=flows, width=width, dot=dot)
  # Before the loop these loads would overlap with its own, but the registers are worth more.
  q, k = q_ref[...].astype(dtype), k_ref[...].astype(dtype)
  dbeta_ref[...] = -jnp.sum(jnp.where(row == column, doverlaps, 0.0), axis=1)
  d = between(decay, C, transposed=False)
  weight = beta if k_norm is None else beta * k_norm
  dp = scale * weigh_both(d * dp, q_norm, weight)
  doverlaps = jnp.where(row > column, weigh_both(d * doverlaps, weight, weight), 0.0).astype(dtype)
  dq, dk_entry = weigh(dq, decay.upto, scale, q_norm), weigh(dk_entry, decay.upto, weight)
  dk_exit = weigh(dk_exit, decay.after, weight)
  write_dq = functools.partial(_write, dq_ref, q_norm if whole else None)
  write_dk = functools.partial(_write, dk_ref, k_norm if whole else None)
  if not flows:
    _write_without_flows(q, k, dp, doverlaps, dq, dk_entry, dk_exit, write_dq, write_dk, dot)
    return
  inside, leaving = _write_beside_flows(q, k, dp, doverlaps, dq, dk_entry, dk_exit, row, column, write_dq, write_dk,
                                        dot)
  passing = jnp.where(row >= column, inside[:, None], leaving[:, None])
  dg_ref[0][...] = decay.total * through + jnp.sum(passing, axis=0)


def _sum_over_values(e_ref, do_ref, minus_f_ref, states_ref, dstates_ref, dv_ref, beta, first, *, flows, width, dot):
  """The sums over value channels, without weights: dP, dX with -dbeta on its diagonal, the part of dQ from the entry
  state, the parts of dK from the entry and the exit state, and S * dS'. The programs that are `first` write dV."""
  (C, V), block = e_ref.shape, states_ref.shape[1]
  square, wide = jnp.zeros((C, C), jnp.float32), jnp.zeros((C, block), jnp.float32)

  def add_tile(i, carry):
    dp, doverlaps, dq, dk_entry, dk_exit, through = carry
    tile = pl.ds(i * width, width)
    e, do, minus_f = e_ref[:, tile], do_ref[:, tile].astype(e_ref.dtype), minus_f_ref[:, tile]
    state, dstate = states_ref[tile, :], dstates_ref[tile, :]

    @pl.when(first)
    def _():
      dv_ref[:, tile] = weigh(_float32(minus_f), -beta).astype(dv_ref.dtype)

    if flows:
      through += jnp.sum(_float32(state) * _float32(dstate))
    return (dp + dot(do, e.T), doverlaps + dot(minus_f, e.T), dq + dot(do, state), dk_entry + dot(minus_f, state),
            dk_exit + dot(e, dstate), through)

  return jax.lax.fori_loop(0, V // width, add_tile, (square, square, wide, wide, wide, jnp.float32(0)))


def _write_without_flows(q, k, dp, doverlaps, dq, dk_entry, dk_exit, write_dq, write_dk, dot):
  dp, doverlaps = computed_once(dp.astype(k.dtype), doverlaps)
  dq += dot(dp, k)
  dk = dk_entry + dk_exit + dot(dp.T, q) + dot(doverlaps, k) + dot(doverlaps.T, k)
  write_dq(_float32(q), dq)
  write_dk(_float32(k), dk)


def _write_beside_flows(q, k, dp, doverlaps, dq, dk_entry, dk_exit, row, column, write_dq, write_dk, dot):
  """The flow of each token through the gates inside the chunk, and through all later ones to the exit state."""
  # The pairs (i, i) come last: no gate lies between them, so the gates' gradient must not see them even as rounding.
  # Pairs on one side of a gate cancel to float32 rounding, because both their terms are products of the same operands.
  diagonal = jnp.sum(jnp.where(row == column, dp, 0.0), axis=1)[:, None]
  dp, doverlaps = computed_once(jnp.where(row > column, dp, 0.0).astype(k.dtype), doverlaps)
  # In this order nothing spills.
  dk_rows = dot(doverlaps, k) + dk_entry
  inside = jnp.sum(_float32(k) * dk_rows, axis=1)
  dq += dot(dp, k)
  inside += jnp.sum(_float32(q) * dq, axis=1)
  write_dq(_float32(q), dq + diagonal * _float32(k))
  dk_columns = dot(dp.T, q) + dot(doverlaps.T, k)
  inside -= jnp.sum(_float32(k) * dk_columns, axis=1)
  leaving = jnp.sum(_float32(k) * dk_exit, axis=1)
  write_dk(_float32(k), dk_rows + dk_columns + dk_exit + diagonal * _float32(q))
  return inside, leaving


def _float32(x):
  return x.astype(jnp.float32)


def _write(ref, norm, x, dx):
  ref[...] = through_norm(x, norm, dx).astype(ref.dtype)


# Launch: one program per tile of key channels, chunk, head and row of the batch.


def gradients(operands, e, do, minus_f, states, dstates, scale, config, flows):
  """dq, dk, dv, dbeta and, if the `flows` through gates are wanted, d log_decay from the parts of all tiles of keys."""
  (B, T, H, V), (G, K) = do.shape, operands.k.shape[2:]
  C, tile = config.span, config.gradients
  block, key = min(tile.block, K), key_head(H, G)
  keys = pl.BlockSpec((None, C, None, block), lambda t, n, h, b: (b, n, key(h), t))
  dkeys = pl.BlockSpec((None, C, None, block), lambda t, n, h, b: (b, n, h, t))
  values = pl.BlockSpec((None, C, None, V), lambda t, n, h, b: (b, n, h, 0))
  state = pl.BlockSpec((None, None, None, V, block), lambda t, n, h, b: (b, h, n, 0, t))
  token = pl.BlockSpec((None, None, C, None), lambda t, n, h, b: (t, b, n, h))
  vectors, gated = operands.per_token(operands.log_decay), operands.log_decay is not None
  normalized, whole = operands.q_norm is not None, block == K
  dtype = jnp.float32 if normalized and not whole else operands.k.dtype
  dkey = jax.ShapeDtypeStruct((B, T, H, K), dtype)
  dtoken = jax.ShapeDtypeStruct((K // block, B, T, H), jnp.float32)
  dq, dk, dbeta, *dg, dv = triton_blocks.launch(
      functools.partial(_gradients_kernel, vectors=len(vectors), gated=gated, flows=flows, scale=scale,
                        width=min(config.width, V), whole=whole),
      name="delta_rule_gradients", grid=(K // block, T // C, H, B),
      in_specs=[keys, keys, values, values, values, *[gate_block(x, C, chunked=True)[1][0] for x in vectors],
                state, state],
      out_specs=[dkeys, dkeys, token, *given(flows, token), values],
      out_shape=[dkey, dkey, dtoken, *given(flows, dtoken), jax.ShapeDtypeStruct(do.shape, do.dtype)],
      num_warps=tile.num_warps, num_stages=tile.num_stages)(
          operands.q, operands.k, e, do, minus_f, *vectors, states, dstates)
  dq, dk = (chunks.sum_heads(x, G) for x in (dq, dk))
  if normalized and not whole:  # all value heads of a key head have its norms
    dq, dk = (launch_through_norm(x, norm[:, :, ::H // G], dx)
              for x, norm, dx in ((operands.q, operands.q_norm, dq), (operands.k, operands.k_norm, dk)))
  return dq, dk, dv, dbeta[0], jnp.sum(dg[0], axis=0) if flows else None
