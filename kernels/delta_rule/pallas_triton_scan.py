"""The delta rule's scans over chunks as Pallas kernels: forward, reversed for cotangents, and the maps of pieces.

A program carries the transposed state of a tile of value channels in registers through all chunks. Letters as in
`README.md` of this folder.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import chunks, pieces, triton_blocks
from kernels.delta_rule.pallas_triton_chunk import Scan, forward_chunk, read_chunk, reverse_chunk
from kernels.delta_rule.pallas_triton_operands import take_per_token
from kernels.scalar_decay import gate_block
from kernels.triton_blocks import given, key_head, operand


def _scan_kernel(q_ref, k_ref, v_ref, y_ref, *refs, vectors, gated, values, save, reverse, scale, chunk, span, depth,
                 start, dot):
  """Output and exit state. With `values`, only exit states of pieces: so many columns, then the columns of a map."""
  sums_ref, per_token, refs = take_per_token(refs, vectors, gated)
  (T, K), block = k_ref.shape, v_ref.shape[1]
  tiles = [pl.ds(i * depth, depth) for i in range(K // depth)]
  # The column of the identity with which this program begins. Only the forward scan has columns of a map.
  first = None if values is None or reverse else pl.program_id(0) * block - values
  if values is None:
    initial_ref, o_ref = refs.pop(0), refs.pop(0)
    initial = tuple(initial_ref[tile, :].T for tile in tiles)
  else:
    o_ref = None
    initial = tuple(jnp.zeros((block, depth), jnp.float32) if reverse else identity(first, i * depth, (block, depth))
                    for i in range(K // depth))
  *saved_refs, final_ref = refs
  scan = Scan(q_ref, k_ref, v_ref, y_ref, sums_ref, per_token, o_ref, saved_refs, reverse, scale, chunk, span, depth,
               dot)
  run = reverse_chunk if reverse else forward_chunk

  def step(i, state):
    n = T // chunk - 1 - i if reverse else i
    return run(scan, read_chunk(scan, n, first), state)

  state = jax.lax.fori_loop(start, T // chunk, step, initial)
  for tile, s in zip(tiles, state):
    final_ref[tile, :] = s.T


def identity(row, column, shape):
  """A block of the identity matrix; zeros above it."""
  rows, columns = (jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in range(2))
  return jnp.where(rows + row == columns + column, 1.0, 0.0)


# Launches: one program per tile of value channels, head and row of the batch.


def scan(operands, v, initial_state, scale, config, *, save=True, reverse=False, kept=None):
  """Runs a scan over whole sequences, in reverse with dO in the place of `v`.

  Returns:
    The output, or -F in reverse. With `save`, E (not in reverse) and the states at the ends of the spans. The final
    state. `kept`, the map Phi of each piece if there are several, which is found forward and given in reverse.
  """
  run = functools.partial(_launch, operands, v, scale=scale, config=config, reverse=reverse)
  B, V = initial_state.shape[0], v.shape[3]
  if v.shape[0] > B:
    (final,) = run(None, save=False)
    update, kept = final[..., :V], jnp.swapaxes(kept, -1, -2) if reverse else final[..., V:V + initial_state.shape[2]]
    initial_state = entry_states(initial_state, kept, update, reverse)
  *found, final = run(initial_state, save=save)
  return *found, pieces.exit_state(final, B, reverse), kept


def entry_states(initial_state, kept, update, reverse):
  """The state that enters each piece, when a piece turns S into `kept` S + `update`."""
  B = initial_state.shape[0]
  kept, update = (x.reshape(B, -1, *x.shape[1:]) for x in (kept, update))
  states, count = [initial_state], kept.shape[1]
  for p in reversed(range(1, count)) if reverse else range(count - 1):
    states.append(chunks.einsum("bhij,bhjv->bhiv", kept[:, p], states[-1]) + update[:, p])
  return jnp.stack(states[::-1] if reverse else states, axis=1).reshape(-1, *initial_state.shape[1:])


def _launch(operands, v, initial_state, *, scale, config, reverse, save):
  (B, T, H, V), (G, K) = v.shape, operands.k.shape[2:]
  tile, key = config.reverse_scan if reverse else config.scan, key_head(H, G)
  block, C, N, dtype = min(tile.block, V), config.chunk, T // config.span, operand(operands.k.dtype)
  piece = initial_state is None
  columns, last = pl.cdiv(V + K * (piece and not reverse), block) * block, V // block - 1  # tiles are not masked
  keys = pl.BlockSpec((None, T, None, K), lambda t, h, b: (b, 0, key(h), 0))
  values = pl.BlockSpec((None, T, None, block), lambda t, h, b: (b, 0, h, jnp.minimum(t, last) if piece else t))
  whole = pl.BlockSpec((None, None, *operands.y.shape[2:]), lambda t, h, b: (b, h, 0, 0, 0, 0))
  state = pl.BlockSpec((None, None, K, block), lambda t, h, b: (b, h, 0, t))
  states = pl.BlockSpec((None, None, N, block, K), lambda t, h, b: (b, h, 0, t, 0))
  vectors, saves_e = operands.per_token(operands.sums), save and not reverse
  name = "piece" if piece else "reverse" if reverse else "scan"
  return triton_blocks.launch(
      functools.partial(_scan_kernel, vectors=len(vectors), gated=operands.log_decay is not None,
                        values=V if piece else None, save=save, reverse=reverse, scale=scale, chunk=C,
                        span=config.span, depth=min(config.depth, K)),
      name=f"delta_rule_{name}", grid=(columns // block, H, B), loop=True,
      in_specs=[keys, keys, values, whole, *[gate_block(x, T, chunked=False)[1][0] for x in vectors],
                *given(not piece, state)],
      out_specs=[*given(not piece, values), *given(saves_e, values), *given(save, states), state],
      out_shape=[*given(not piece, jax.ShapeDtypeStruct(v.shape, dtype if reverse else v.dtype)),
                 *given(saves_e, jax.ShapeDtypeStruct(v.shape, dtype)),
                 *given(save, jax.ShapeDtypeStruct((B, H, N, V, K), dtype)),
                 jax.ShapeDtypeStruct((B, H, K, columns), jnp.float32)],
      num_warps=tile.num_warps, num_stages=tile.num_stages)(
          operands.q, operands.k, v, operands.y, *vectors, *given(not piece, initial_state))
