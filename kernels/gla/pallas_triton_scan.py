"""GLA's scan over chunks as a Pallas kernel, forward and reversed. Letters as in `README.md` of this folder.

On factors, GLA is linear attention with a decay for each row of the state. A program carries the state of a tile of
value channels in registers through all chunks. In reverse, dO takes the place of V, the factors are exchanged, and the
outputs are dV and dM.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels import chunks, pieces, triton_blocks
from kernels.triton_blocks import given, key_head, rows_and_columns


def _scan_kernel(x_ref, y_ref, decays_ref, *refs, scores, outputs, save, reverse, chunk, depth, start, dot):
  bounded_ref, p_ref, *refs = refs if outputs else (None, None, *refs)
  v_ref, initial_ref, *refs, final_ref = refs
  o_ref = refs.pop(0) if outputs else None
  states_ref = refs.pop(0) if save else None
  T, K = y_ref.shape
  row, column = rows_and_columns(chunk)
  causal = column >= row if reverse else row >= column
  tiles = [pl.ds(i * depth, depth) for i in range(K // depth)]
  run = functools.partial(_scan_chunk, x_ref, y_ref, v_ref, bounded_ref, p_ref, o_ref, states_ref,
                          causal=causal, tiles=tiles, scores=scores, reverse=reverse, dot=dot)
  count, (enter, keep, exit) = T // chunk, (2, 1, 0) if reverse else (0, 1, 2)
  place = lambda i: count - 1 - i if reverse else i
  load = lambda i: [tuple(decays_ref[place(i), which, tile] for tile in tiles) for which in (enter, keep, exit)]

  def step(i, carry):
    states, entering, keeping, leaving = carry
    # The next chunk's decays are loaded beside this chunk's products. The state on its way between two chunks takes
    # both decays at once, so that the last product has until the next chunk to finish.
    next_entering, next_keeping, next_leaving = load(jnp.minimum(i + 1, count - 1))
    states = run(place(i), states, entering, keeping)
    return states, tuple(x * y for x, y in zip(leaving, next_entering)), next_keeping, next_leaving

  initial = tuple(initial_ref[tile, :] for tile in tiles)
  states, *_, leaving = jax.lax.fori_loop(start, count, step, (initial, *load(start)))
  for tile, state, decay in zip(tiles, states, leaving):
    final_ref[tile, :] = decay[:, None] * state


def _scan_chunk(x_ref, y_ref, v_ref, bounded_ref, p_ref, o_ref, states_ref, n, states, entering, keeping,
                *, causal, tiles, scores, reverse, dot):
  """The state behind the middle of chunk `n` from the one before it, and the chunk's output where there is an `o_ref`.

  Both states lack the decay from there to the end of their chunk, which is part of `entering`.
  """
  C, dtype = causal.shape[0], y_ref.dtype
  rows = pl.ds(n * C, C)
  v = v_ref[rows, :].astype(dtype)
  # Beside the parts of float32 products, loads fit into the registers only right before their use.
  late = scores and dtype == jnp.float32
  load = lambda ref: [None if late else ref[rows, tile] for tile in tiles]
  ys = load(y_ref)
  if o_ref is not None:
    xs = load(x_ref)
    p = _scores(p_ref, bounded_ref, n, xs, ys, computed=not scores, reverse=reverse, dot=dot)
    o = dot(jnp.where(causal, p, 0.0).astype(dtype), v)
  entered = []
  for i, (tile, state) in enumerate(zip(tiles, states)):
    dot.barrier(dtype)
    state = entering[i][:, None] * state
    middle = state.astype(dtype)
    if o_ref is not None:
      o += dot(x_ref[rows, tile] if late else xs[i], middle)
    if states_ref is not None:
      states_ref[n, tile, :] = middle
    entered.append(state)
  if o_ref is not None:
    o_ref[rows, :] = o.astype(o_ref.dtype)
  left = []
  for i, (tile, state) in enumerate(zip(tiles, entered)):
    dot.barrier(dtype)
    y = y_ref[rows, tile] if late else ys[i]
    left.append(keeping[i][:, None] * state + dot(y.T, v))
  return tuple(left)


def _scores(p_ref, bounded_ref, n, xs, ys, *, computed, reverse, dot):
  """P of chunk n, or in reverse its transpose. It is read, or `computed` unless the chunk is one of `exact_chunks`."""
  if not computed:
    return p_ref[n].T if reverse else p_ref[n]
  p = sum(dot(x, y.T) for x, y in zip(xs, ys)).astype(ys[0].dtype)
  bounded = bounded_ref[n] == 1
  exact = plt.load(p_ref.at[n], mask=jnp.broadcast_to(jnp.logical_not(bounded), p.shape), other=0.0)
  return jnp.where(bounded, p, exact.T if reverse else exact)


# Launches: one program per tile of value channels, head and row of the batch.


def scan(factors, v, initial_state, config, *, save=True, reverse=False):
  """The output (or dV), the state in the middle of each chunk if `save`, and the final state, of consecutive pieces."""
  x, y, decays, bounded, p = factors
  if reverse:
    x, y = y, x
  tile = config.reverse_scan if reverse else config.scan
  run = functools.partial(_launch, config=config, tile=tile, reverse=reverse)
  B = initial_state.shape[0]
  if v.shape[0] > B:
    empty = jnp.zeros((v.shape[0], *initial_state.shape[1:]), jnp.float32)
    (update,) = run([x, y, decays], v, empty, outputs=False, save=False)
    kept = chunks.repeat_heads(jnp.prod(decays, axis=(2, 3))[:, None], v.shape[2])[:, 0]
    initial_state = pieces.entry_states(initial_state, kept[..., None], update, reverse)
  output, *states, final = run([x, y, decays, bounded, p], v, initial_state, outputs=True, save=save)
  return output, states[0] if save else None, pieces.exit_state(final, B, reverse)


def _launch(factors, v, initial_state, *, config, tile, reverse, outputs, save):
  (B, T, H, V), (G, K), dtype = v.shape, factors[0].shape[2:], factors[0].dtype
  block, C, N, key = min(tile.block, V), config.chunk, T // config.chunk, key_head(H, G)
  keys = pl.BlockSpec((None, T, None, K), lambda t, h, b: (b, 0, key(h), 0))
  values = pl.BlockSpec((None, T, None, block), lambda t, h, b: (b, 0, h, t))
  all_chunks = lambda *shape: pl.BlockSpec((None, None, N, *shape), lambda t, h, b: (b, key(h), 0, *(0 for _ in shape)))
  state = pl.BlockSpec((None, None, K, block), lambda t, h, b: (b, h, 0, t))
  states = pl.BlockSpec((None, None, N, K, block), lambda t, h, b: (b, h, 0, 0, t))
  out_shape = [*given(outputs, jax.ShapeDtypeStruct(v.shape, v.dtype)),
               *given(save, jax.ShapeDtypeStruct((B, H, N, K, V), dtype)),
               jax.ShapeDtypeStruct(initial_state.shape, jnp.float32)]
  return triton_blocks.launch(
      functools.partial(_scan_kernel, scores=bool(config.scores), outputs=outputs, save=save, reverse=reverse,
                        chunk=C, depth=min(config.depth, K)),
      name="gla_scan" if outputs else "gla_piece", grid=(V // block, H, B), loop=True,
      in_specs=[keys, keys, all_chunks(3, K), *given(outputs, all_chunks(), all_chunks(C, C)), values, state],
      out_specs=[*given(outputs, values), *given(save, states), state], out_shape=out_shape, num_warps=tile.num_warps,
      num_stages=tile.num_stages)(*factors, v, initial_state)
