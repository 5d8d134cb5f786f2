"""The scan over chunks as a Pallas kernel, forward and reversed, and the scores P of wide heads.

A program of the scan carries the state of a tile of value channels in registers through all chunks. Letters as in
`README.md` of this folder. In reverse, k, q and dO take the places of q, k and v.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import pieces, triton_blocks
from kernels.scalar_decay import UNIT, between, decay_of, load_gate, sums_block, weigh
from kernels.triton_blocks import given, key_head, operand


def _scores_kernel(*refs, gated, transposed, scale, depth, dot):
  q_ref, k_ref, *g_ref, p_ref = refs
  (C, K), dtype = q_ref.shape, p_ref.dtype
  decay = decay_of(load_gate(g_ref[0] if gated else None, 0, C), C)
  tiles = [pl.ds(i * depth, depth) for i in range(K // depth)]
  p = sum(dot(q_ref[:, tile].astype(dtype), k_ref[:, tile].astype(dtype).T) for tile in tiles)
  p_ref[...] = (between(decay, C, transposed) * (scale * p)).astype(dtype)


def _scan_kernel(*refs, gated, scores, outputs, save, reverse, scale, chunk, depth, start, dot):
  q_ref, k_ref, v_ref, *refs = refs
  g_ref = refs.pop(0) if gated else None
  p_ref = refs.pop(0) if scores else None
  initial_ref, *refs, final_ref = refs
  o_ref = refs.pop(0) if outputs else None
  states_ref = refs.pop(0) if save else None
  T, K = k_ref.shape
  tiles = [pl.ds(i * depth, depth) for i in range(K // depth)]
  run = functools.partial(_scan_chunk, q_ref, k_ref, v_ref, g_ref, p_ref, o_ref, states_ref, chunk=chunk, tiles=tiles,
                          reverse=reverse, scale=scale, dot=dot)
  states = jax.lax.fori_loop(start, T // chunk, lambda i, states: run(T // chunk - 1 - i if reverse else i, states),
                             tuple(initial_ref[tile, :] for tile in tiles))
  for tile, state in zip(tiles, states):
    final_ref[tile, :] = state


def _scan_chunk(q_ref, k_ref, v_ref, g_ref, p_ref, o_ref, states_ref, n, states, *, chunk, tiles, reverse, scale, dot):
  """The state behind chunk `n` from the one before it, with the chunk's output where there is an `o_ref`."""
  dtype, rows = operand(k_ref.dtype), pl.ds(n * chunk, chunk)
  weights = lambda decay: ((decay.after,), (decay.upto, scale)) if reverse else ((decay.upto, scale), (decay.after,))
  gate = load_gate(g_ref, n, chunk)
  decay = decay_of(gate, chunk)
  query_weights, key_weights = weights(decay)
  load = lambda ref, columns=slice(None): ref[rows, columns].astype(dtype)
  weighted = lambda v: weigh(v.astype(jnp.float32), *key_weights).astype(dtype)
  add = lambda k, u, state: dot(k.T, u) + (state if decay.total is None else decay.total * state)
  # Operands that are added to a state of several tiles are read when they are needed, because they spill when held from
  # the start. Where P is computed, k is there anyway.
  late = len(tiles) > 1 and (p_ref is not None or (dtype == jnp.float32 and o_ref is None))
  v = load(v_ref)
  p, o, next_states, u = 0.0, 0.0, [], None if late else weighted(v)
  for tile, state in zip(tiles, states):
    k, entry = None if late else load(k_ref, tile), state.astype(dtype)
    if states_ref is not None:
      states_ref[n, tile, :] = entry
    if o_ref is not None:
      q = load(q_ref, tile)
      o += dot(q, entry)
      if p_ref is None:
        p += dot(q, k.T)
    if late:
      dot.barrier(dtype)
    else:
      next_states.append(add(k, u, state))

  def add_late():
    v = load(v_ref)
    u = weighted(v)
    for tile, state in zip(tiles, states):
      next_states.append(add(load(k_ref, tile), u, state))
      dot.barrier(dtype)
    return v

  # The order of next state and output decides whether float32 or 16-bit operands spill.
  if late and dtype == jnp.float32:
    v = add_late()
  if o_ref is not None:
    if isinstance(gate, tuple):  # sums of a decay per token are read again, because they spill when held from the start
      decay = decay_of(load_gate(g_ref, n, chunk), chunk)
      query_weights, _ = weights(decay)
    p = p_ref[n] if p_ref is not None else (between(decay, chunk, transposed=reverse) * (scale * p)).astype(dtype)
    o_ref[rows, :] = (weigh(o, *query_weights) + dot(p, v)).astype(o_ref.dtype)
  if late and dtype != jnp.float32:
    add_late()
  return tuple(next_states)


# Launches: one program per tile of value channels, head and row of the batch; for scores one per chunk, head and row.


def scan(q, k, v, sums, initial_state, scale, config, *, outputs=True, save=True, reverse=False):
  """The output if `outputs`, the entry state of each chunk if `save`, and the final state, of consecutive pieces."""
  run = functools.partial(_launch, q, k, v, sums, scale=scale, config=config, reverse=reverse)
  B, T = initial_state.shape[0], v.shape[1]
  if v.shape[0] > B:
    (update,) = run(jnp.zeros((v.shape[0], *initial_state.shape[1:]), jnp.float32), outputs=False, save=False)
    kept = jnp.ones((v.shape[0], v.shape[2]), jnp.float32)
    if sums is not None:
      kept *= _total(sums, config.chunk) if sums.ndim == 3 else jnp.exp(T * sums[None])
    initial_state = pieces.entry_states(initial_state, kept[..., None, None], update, reverse)
  *found, final = run(initial_state, outputs=outputs, save=save)
  return found[0] if outputs else None, found[-1] if save else None, pieces.exit_state(final, B, reverse)


def _total(sums, C):
  """Decays `[B, H]` of whole sequences."""
  return jnp.exp2(jnp.sum(sums[:, :, C - 1::C].astype(jnp.float32) * UNIT, axis=2))


def _launch(q, k, v, sums, initial_state, *, scale, config, reverse, outputs, save):
  (B, T, H, V), (G, K) = v.shape, k.shape[2:]
  tile = config.reverse_scan if reverse else config.scan
  block, N, key = min(tile.block, V), T // config.chunk, key_head(H, G)
  keys = pl.BlockSpec((None, T, None, K), lambda t, h, b: (b, 0, key(h), 0))
  values = pl.BlockSpec((None, T, None, block), lambda t, h, b: (b, 0, h, t))
  state = pl.BlockSpec((None, None, K, block), lambda t, h, b: (b, h, 0, t))
  states = pl.BlockSpec((None, None, N, K, block), lambda t, h, b: (b, h, 0, 0, t))
  gate, gate_spec = sums_block(sums, T, chunked=False)
  p, p_spec = [], []
  if config.scores and outputs:
    heads = H if gate else G  # without a decay, the value heads of a key head share P
    p, shared = [_scores(q, k, sums, scale, config, reverse, heads)], key_head(H, heads)
    p_spec = [pl.BlockSpec((None, None, N, config.chunk, config.chunk), lambda t, h, b: (b, shared(h), 0, 0, 0))]
  return triton_blocks.launch(
      functools.partial(_scan_kernel, gated=bool(gate), scores=bool(p), outputs=outputs, save=save, reverse=reverse,
                        scale=scale, chunk=config.chunk, depth=min(config.depth, K)),
      name="linear_attention_scan" if outputs else "linear_attention_piece", grid=(V // block, H, B), loop=True,
      in_specs=[keys, keys, values, *gate_spec, *p_spec, state],
      out_specs=[*given(outputs, values), *given(save, states), state],
      out_shape=[*given(outputs, jax.ShapeDtypeStruct(v.shape, v.dtype)),
                 *given(save, jax.ShapeDtypeStruct((B, H, N, K, V), operand(v.dtype))),
                 jax.ShapeDtypeStruct(initial_state.shape, jnp.float32)],
      num_warps=tile.num_warps, num_stages=tile.num_stages)(q, k, v, *gate, *p, initial_state)


def _scores(q, k, sums, scale, config, transposed, heads):
  """P `[B, heads, N, C, C]`, or its transpose when q and k are exchanged."""
  (B, T, G, K), C, tile = q.shape, config.chunk, config.scores
  key = key_head(heads, G)
  keys = pl.BlockSpec((None, C, None, K), lambda t, n, h, b: (b, n, key(h), 0))
  gate, gate_spec = sums_block(sums, C, chunked=True)
  return triton_blocks.launch(
      functools.partial(_scores_kernel, gated=bool(gate), transposed=transposed, scale=scale, depth=min(tile.block, K)),
      name="linear_attention_scores", grid=(1, T // C, heads, B), in_specs=[keys, keys, *gate_spec],
      out_specs=pl.BlockSpec((None, None, None, C, C), lambda t, n, h, b: (b, h, n, 0, 0)),
      out_shape=jax.ShapeDtypeStruct((B, heads, T // C, C, C), operand(q.dtype)), num_warps=tile.num_warps,
      num_stages=tile.num_stages)(q, k, *gate)
