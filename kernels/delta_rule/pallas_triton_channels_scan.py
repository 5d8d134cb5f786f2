"""The delta rule's scans over chunks under a decay per key channel, as Pallas kernels: forward, reversed, and for the
maps of pieces. Letters as in `README.md`.

A program carries the transposed state of a tile of value channels in registers through all chunks. Decayed queries and
keys, P and Y come from memory, so that each product takes a value just computed and an operand as it was loaded.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import pieces, triton_blocks
from kernels.delta_rule.pallas_triton_channels_factors import decay, parts, product
from kernels.delta_rule.pallas_triton_chunk import load_lower
from kernels.delta_rule.pallas_triton_operands import weigh_columns
from kernels.delta_rule.pallas_triton_scan import entry_states, identity
from kernels.triton_blocks import given


@dataclasses.dataclass(frozen=True)
class Scan:
  """Refs of one head and settings of a scan. `o`, `states` and `e` are None where a scan does not write them."""

  q_upto: Any
  k_upto: Any
  k_after: Any
  sums: Any
  p: Any
  y: Any
  beta: Any
  v: Any
  o: Any
  e: Any
  states: Any
  chunk: int
  depth: int
  dot: Callable

  @property
  def dtype(self):
    return self.k_upto.dtype

  @property
  def tiles(self):
    return [pl.ds(i, self.depth) for i in range(0, self.k_upto.shape[2], self.depth)]


def _forward_chunk(scan, n, first, state):
  """Writes O and E of chunk n, and gives the exit state."""
  rows = pl.ds(n * scan.chunk, scan.chunk)
  beta = scan.beta[rows]
  y = [load_lower(scan.y.at[n, jnp.int32(i)]).T for i in range(scan.y.shape[1])]
  v = scan.v[rows, :].T
  if first is not None:  # no values are added in a map's columns, which begin in the program where `first` is 0
    v = jnp.where(first < 0, v, jnp.zeros_like(v))
  e = v.astype(jnp.float32) - _held(scan, rows, state, scan.k_upto)
  e = e + product(parts(weigh_columns(-e, beta), scan.dtype), y, scan.dot)
  if scan.e is not None:
    scan.e[rows, :] = e.astype(scan.e.dtype).T
  u = weigh_columns(e, beta)
  if scan.o is not None:
    o = sum((scan.dot(u.astype(scan.dtype), scan.p[n, i].T) for i in range(scan.p.shape[1])),
            start=_held(scan, rows, state, scan.q_upto))
    scan.o[rows, :] = o.astype(scan.o.dtype).T
  return _next_state(scan, n, rows, state, [(parts(u, scan.dtype), scan.k_after)])


def _reverse_chunk(scan, n, first, dstate):
  """Writes -F of chunk n, and gives the cotangent of the entry state from that of the exit state."""
  rows = pl.ds(n * scan.chunk, scan.chunk)
  beta, do = scan.beta[rows], scan.v[rows, :].T
  y = [load_lower(scan.y.at[n, jnp.int32(i)]) for i in range(scan.y.shape[1])]
  du = _held(scan, rows, dstate, scan.k_after)
  du = sum((scan.dot(do.astype(scan.dtype), scan.p[n, i]) for i in range(scan.p.shape[1])), start=du)
  minus_f = product(parts(weigh_columns(du, beta), scan.dtype), y, scan.dot) - du
  if scan.o is not None:
    scan.o[rows, :] = minus_f.astype(scan.o.dtype).T
  added = [([do.astype(scan.dtype)], scan.q_upto), (parts(weigh_columns(minus_f, beta), scan.dtype), scan.k_upto)]
  return _next_state(scan, n, rows, dstate, added)


def _held(scan, rows, state, ref):
  """The values that the state holds under decayed rows, transposed: products of S^T with their transpose.

  The state is rounded once for all rows, but the rounding of decayed keys would differ from token to token. Their
  operands therefore have 16 significant bits.
  """
  held = 0.0
  for s, tile in zip(state, scan.tiles):
    scan.dot.barrier(scan.dtype)
    s = s.astype(scan.dtype)
    for i in range(ref.shape[1]):
      held += scan.dot(s, ref[rows, i, tile].T)
  return held


def _next_state(scan, n, rows, state, added):
  """The state behind chunk n, in which products are `added`, given by parts of left operands and the ref of the rows;
  saves the state before it.

  Every later token reads the state, so the operands of these products have 16 significant bits too.
  """
  left = []
  for s, tile in zip(state, scan.tiles):
    scan.dot.barrier(scan.dtype)
    if scan.states is not None:
      scan.states[n, :, tile] = s.astype(scan.states.dtype)
    total = decay(scan.sums[n * scan.chunk + scan.chunk - 1, tile])
    left.append(sum((product(x, [ref[rows, i, tile] for i in range(ref.shape[1])], scan.dot) for x, ref in added),
                    start=weigh_columns(s, total)))
  return tuple(left)


def _scan_kernel(q_upto_ref, k_upto_ref, k_after_ref, sums_ref, p_ref, y_ref, beta_ref, v_ref, *refs, values, save,
                 reverse, chunk, depth, start, dot):
  """Output and exit state. With `values`, only exit states of pieces: so many columns, then the columns of a map."""
  (T, block), K, refs = v_ref.shape, k_upto_ref.shape[2], list(refs)
  final_ref = refs.pop()
  # The column of the identity with which this program begins. Only the forward scan has columns of a map.
  first = None if values is None or reverse else pl.program_id(0) * block - values
  initial_ref = refs.pop(0) if values is None else None
  o_ref = refs.pop(0) if values is None else None
  e_ref = refs.pop(0) if save and not reverse else None
  states_ref = refs.pop(0) if save else None
  scan = Scan(q_upto_ref, k_upto_ref, k_after_ref, sums_ref, p_ref, y_ref, beta_ref, v_ref, o_ref, e_ref, states_ref,
              chunk, depth, dot)
  if values is None:
    initial = tuple(initial_ref[tile, :].T for tile in scan.tiles)
  else:
    initial = tuple(jnp.zeros((block, depth), jnp.float32) if reverse else identity(first, i, (block, depth))
                    for i in range(0, K, depth))
  run, count = _reverse_chunk if reverse else _forward_chunk, T // chunk
  states = jax.lax.fori_loop(start, count, lambda i, state: run(scan, count - 1 - i if reverse else i, first, state),
                             initial)
  for tile, state in zip(scan.tiles, states):
    final_ref[tile, :] = state.T


# Launches: one program per tile of value channels, head and row of the batch.


def scan(factors, sums, y, beta, v, initial_state, config, *, save=True, reverse=False, kept=None):
  """Runs a scan over whole sequences, in reverse with dO in the place of `v`.

  Returns:
    The output, or -F in reverse. With `save`, E (not in reverse) and the states at the beginning of the chunks, or in
    reverse their cotangents at the end. The final state. `kept`, the map Phi of each piece if there are several, which
    is found forward and given in reverse.
  """
  run = functools.partial(_launch, factors, sums, y, beta, v, config=config, reverse=reverse)
  B, V = initial_state.shape[0], v.shape[3]
  if v.shape[0] > B:
    (final,) = run(None, save=False)
    update, kept = final[..., :V], jnp.swapaxes(kept, -1, -2) if reverse else final[..., V:V + initial_state.shape[2]]
    initial_state = entry_states(initial_state, kept, update, reverse)
  *found, final = run(initial_state, save=save)
  return *found, pieces.exit_state(final, B, reverse), kept


def _launch(factors, sums, y, beta, v, initial_state, *, config, reverse, save):
  (B, T, H, V), (parts_of_keys, K), dtype = v.shape, factors.k_upto.shape[3:], factors.k_upto.dtype
  tile, C, N = config.reverse_scan if reverse else config.scan, config.chunk, T // config.chunk
  block, piece = min(tile.block, V), initial_state is None
  columns, last = pl.cdiv(V + K * (piece and not reverse), block) * block, V // block - 1  # tiles are not masked
  rows = lambda *lead: pl.BlockSpec((None, T, None, *lead, K), lambda t, h, b: (b, 0, h, *(0 for _ in lead), 0))
  values = pl.BlockSpec((None, T, None, block), lambda t, h, b: (b, 0, h, jnp.minimum(t, last) if piece else t))
  whole = lambda x: pl.BlockSpec((None, None, *x.shape[2:]), lambda t, h, b: (b, h, 0, 0, 0, 0))
  state = pl.BlockSpec((None, None, K, block), lambda t, h, b: (b, h, 0, t))
  states = pl.BlockSpec((None, None, N, block, K), lambda t, h, b: (b, h, 0, t, 0))
  saves_e = save and not reverse
  return triton_blocks.launch(
      functools.partial(_scan_kernel, values=V if piece else None, save=save, reverse=reverse, chunk=C,
                        depth=min(config.depth, K)),
      name=f"delta_rule_channel_{'piece' if piece else 'reverse' if reverse else 'scan'}",
      grid=(columns // block, H, B), loop=True,
      in_specs=[*[rows(parts_of_keys)] * 3, rows(), whole(factors.p), whole(y),
                pl.BlockSpec((None, T, None), lambda t, h, b: (b, 0, h)), values, *given(not piece, state)],
      out_specs=[*given(not piece, values), *given(saves_e, values), *given(save, states), state],
      out_shape=[*given(not piece, jax.ShapeDtypeStruct(v.shape, dtype if reverse else v.dtype)),
                 *given(saves_e, jax.ShapeDtypeStruct(v.shape, dtype)),
                 *given(save, jax.ShapeDtypeStruct((B, H, N, V, K), dtype)),
                 jax.ShapeDtypeStruct((B, H, K, columns), jnp.float32)],
      num_warps=tile.num_warps, num_stages=tile.num_stages)(
          factors.q_upto, factors.k_upto, factors.k_after, sums, factors.p, y, beta, v,
          *given(not piece, initial_state))
