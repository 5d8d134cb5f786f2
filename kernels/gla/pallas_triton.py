"""Gated linear attention as Pallas kernels for the Triton backend: forward, backward, and their `custom_vjp`.

Per head, with q scaled, g = log_decay in base 2, and chunks of C tokens (arXiv:2312.06635, section 4.3):

  S' = diag(2^total) S + (K * 2^after)^T V          state leaving a chunk; `after[j]` sums g over the tokens after j
  O  = (Q * 2^upto) S + P V                         `upto[i]` sums g up to and including i
  P_ij = sum_d Q_id K_jd 2^(sum of g_d over (j, i])  for i >= j

Let x_i be the sum of g from the middle of the chunk to row i, positive before the middle, and M the state as it would
be there if the chunk held no keys. With the factors

  X = Q * 2^x    Y = K * 2^-x    enter = 2^(sum over the first half)    exit = 2^(sum over the second half)

every decay splits: M = enter * S, P = lower triangle of X Y^T, O = P V + X M, S' = exit * (M + Y^T V). The gates are
gone: what remains is linear attention with a decay of the state's rows. Its gradients are

  dX = dP Y + dO M^T    dY = dP^T X + V dM^T    dP = lower triangle of dO V^T    dQ = 2^x * dX    dK = 2^-x * dY

and dV and dM obey the line of O and M with time reversed: Y and X for X and Y, exit and enter for enter and exit. The
factors stay in float32's range while no half of a chunk decays by more than `LIMIT`, which is the rule in trained
models. A chunk that decays by more takes X = Q * 2^upto, Y = K * 2^after, enter = exit = 1 and keep = 2^total for M in
S', which never overflow; its P and gradients come from `kernels.gla.exact_chunks`. Gates below e^-40 count as e^-40.

| pass | kernel | reads | writes | bytes a token-head at K = V = 128, bfloat16, C = 64 |
| both | `gla_factors` | q, k, g | X, Y, enter, keep, exit | 1536 |
| forward | `gla_scan` | X, Y, v | o, final state; for a gradient M of each chunk | 1024 + 512 |
| backward | `gla_scan`, reversed | Y, X, do | dv, dM of each chunk, d initial_state | 1024 + 512 |
| backward | `gla_dqkg` | X, Y, g, v, do, M, dM | dq, dk, dlog_decay | 3584 |

The scan carries a tile of V's columns of the state in registers over all chunks; where few heads leave the GPU idle,
`kernels.split` cuts the sequence, and `gla_piece`, the scan without outputs, finds each piece's entry state. For wide
heads `gla_scores` computes P once, in both passes (reads X, Y, writes P, C elements a token-head), and not each V tile.

Residuals: the inputs and the chunk states, 2 K V / C bytes a token-head for 16-bit inputs (512 at K = V = 128). 16-bit
inputs use bfloat16 operands, states and factors; float32 inputs keep float32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels import split, triton_blocks, tuned
from kernels.gla import exact_chunks
from kernels.gla.exact_chunks import LIMIT, after, exact_sums, gates, upto
from kernels.triton_blocks import masked_sum, operand, rows_and_columns, tile_width
from kernels.tuned import Tile


@dataclasses.dataclass(frozen=True)
class Config:
  """Tokens a chunk, K columns of one product in the scans, and the tile of each kernel: K columns of a product of
  scores (None: the scans compute P), K columns of factors, V columns of the scans, K columns of a dqkg program, which
  takes as many V columns at a time."""

  chunk: int
  depth: int
  scores: Tile | None
  factors: Tile
  scan: Tile
  reverse_scan: Tile
  dqkg: Tile


def heuristic(K: int, V: int, dtype, chunk_size: int | None = None) -> Config:
  """The answer for what is not listed: tiles for the smallest supported GPU, slow on larger ones."""
  wide, most = dtype == jnp.float32, K > 128
  # Stages keep the loads of the scan in shared memory: in registers they spill, on sm_80 first.
  scan = Tile(tile_width(V, 16 if wide or most else 32), 8 if wide or most else 4, 3 if wide and most else 2)
  # With 4 warps and a single tile of V the loop over tiles is unrolled into more than the registers hold.
  keys = Tile(tile_width(K, 16 if wide else 32), 4 if wide or V > 32 else 8, 1)
  scores = Tile(64, 4, 1) if wide and K > 64 else None
  depth = 64 if wide else tile_width(K)
  return Config(chunk_size or (16 if wide else 64), depth, scores, keys, scan, scan, keys)


def candidates(K: int, V: int, dtype) -> dict[str, list]:
  """The values worth timing for each field, around those that were fastest on an H100."""
  wide = dtype == jnp.float32
  tiles = lambda size, *values: list(dict.fromkeys(Tile(tile_width(size, w), *launch) for w, *launch in values))
  if wide:
    scan, keys = tiles(V, (16, 4, 1), (32, 4, 1), (32, 8, 1)), tiles(K, (16, 4, 1), (32, 4, 1))
  else:
    scan = tiles(V, (64, 4, 2), (64, 4, 1), (64, 8, 2), (32, 4, 2), (32, 4, 1))
    # With 4 warps and a single tile of 64 columns the loop over tiles is unrolled into more than the registers hold.
    keys = tiles(K, (32, 4, 2), (32, 4, 1), (64, 8, 2), *([(64, 4, 1), (64, 4, 2), (64, 4, 3)] if V > 64 else []))
  # Where many V tiles would each compute P again, and its accumulator costs the registers of a second program.
  scores = [Tile(64, 4, 2)] if not wide and K > 128 else []
  return {"scores": scores, "depth": sorted({32 if wide else 64, tile_width(K)}), "scan": scan, "reverse_scan": scan,
          "dqkg": keys, "factors": tiles(K, (64, 4, 1), (128, 4, 1))}


def supports(q, k, v, log_decay, *, chunk_size=None) -> str | None:
  """Why these inputs cannot run here, or None."""
  return triton_blocks.declines(q, chunk_size)


def gla(q, k, v, log_decay, initial_state, *, scale, chunk_size=None):
  """See `kernels.gla`. Heads are equal, the state is given, segments are already resets in `log_decay`."""
  K, V = q.shape[3], v.shape[3]
  config = None if chunk_size else tuned.lookup("gla", Config, gate="channel", K=K, V=V, dtype=q.dtype)
  config = config or heuristic(K, V, q.dtype, chunk_size)
  return configured(q, k, v, log_decay, initial_state, scale=scale, config=config)


def configured(q, k, v, log_decay, initial_state, *, scale, config):
  """The op under an explicit configuration."""
  (B, T, H, K), V = q.shape, v.shape[3]
  widest = max(config.scan.block, config.reverse_scan.block, min(config.dqkg.block, tile_width(V)))
  dK, dV = tile_width(K) - K, -V % widest
  pieces = split.pieces(B * H * (V + dV) // config.scan.block, T, config.chunk)
  pad = lambda x, extra: split.fold(jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, extra))), pieces, config.chunk)
  state = jnp.pad(initial_state, ((0, 0), (0, 0), (0, dK), (0, dV)))
  output, final_state = _gla(pad(q, dK), pad(k, dK), pad(v, dV), pad(log_decay, dK), state, scale, config)
  return split.unfold(output, B)[:, :T, :, :V], final_state[:, :, :K, :V]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _gla(q, k, v, log_decay, initial_state, scale, config):
  output, _, final_state = _scan(_factors(q, k, log_decay, scale, config), v, initial_state, config, save=False)
  return output, final_state


def _forward(q, k, v, log_decay, initial_state, scale, config):
  factors = _factors(q, k, log_decay, scale, config)
  output, states, final_state = _scan(factors, v, initial_state, config)
  return (output, final_state), (q, k, v, log_decay, states)


def _backward(scale, config, residuals, cotangents):
  q, k, v, log_decay, states = residuals
  do, dfinal_state = cotangents
  x, y, decays, bounded, _ = factors = _factors(q, k, log_decay, scale, config)
  dv, dstates, dinitial_state = _scan(factors, do, dfinal_state, config, reverse=True)
  gradients = _dqkg(x, y, log_decay, v, do, states, dstates, scale, config, q.dtype)
  dq, dk, dlog_decay = exact_chunks.dqkg(
      bounded, decays, q, k, log_decay, v, do, states, dstates, gradients, scale, config.chunk)
  return dq, dk, dv, dlog_decay, dinitial_state


_gla.defvjp(_forward, _backward, optimize_remat=True)


def _halves(g):
  """Sums of g over the first and the second half of its rows."""
  second = jax.lax.broadcasted_iota(jnp.int32, g.shape, 0) >= g.shape[0] // 2
  return jnp.sum(jnp.where(second, 0.0, g), axis=0), jnp.sum(jnp.where(second, g, 0.0), axis=0)


def _from_middle(C):
  """Signs of the terms of x: the rows from the middle up to and including a row, or back from it, not included."""
  row, column = rows_and_columns(C)
  middle = C // 2
  return jnp.where((column >= middle) & (column <= row), 1.0, jnp.where((column < middle) & (column > row), -1.0, 0.0))


# Kernel bodies. A ref holds one head's chunk [C, .] or, in the scan, all T tokens.


def _factors_kernel(q_ref, k_ref, g_ref, x_ref, y_ref, decays_ref, bounded_ref, *, scale, dot):
  C, dtype, sums = q_ref.shape[0], operand(q_ref.dtype), exact_sums(q_ref.dtype, dot)
  g = gates(g_ref, ...)
  first, second = _halves(g)
  bounded = jnp.minimum(jnp.min(first), jnp.min(second)) >= LIMIT
  x = sums(jnp.where(bounded, _from_middle(C), upto(C)), g)
  y = jax.lax.cond(bounded, lambda: -x, lambda: sums(after(C), g))
  x_ref[...] = (q_ref[...].astype(jnp.float32) * scale * jnp.exp2(x)).astype(dtype)
  y_ref[...] = (k_ref[...].astype(jnp.float32) * jnp.exp2(y)).astype(dtype)
  bounded_ref[...] = bounded.astype(jnp.int32)
  decays_ref[0, :] = jnp.exp2(jnp.where(bounded, first, 0.0))
  decays_ref[1, :] = jnp.exp2(jnp.where(bounded, 0.0, first + second))
  decays_ref[2, :] = jnp.exp2(jnp.where(bounded, second, 0.0))


def _scores_kernel(bounded_ref, x_ref, y_ref, _, p_ref, *, depth, dot):
  tiles = [pl.ds(i * depth, depth) for i in range(x_ref.shape[1] // depth)]

  @pl.when(bounded_ref[...] == 1)
  def _():
    p_ref[...] = sum(dot(x_ref[:, tile], y_ref[:, tile].T) for tile in tiles).astype(p_ref.dtype)


def _scan_kernel(x_ref, y_ref, decays_ref, *refs, scores, outputs, save, reverse, chunk, depth, start, dot):
  if outputs:
    bounded_ref, p_ref, *refs = refs
  z_ref, initial_ref, *refs, final_ref = refs
  C, dtype, (T, K) = chunk, y_ref.dtype, y_ref.shape
  row, column = rows_and_columns(C)
  causal = column >= row if reverse else row >= column
  enter, keep, exit = (2, 1, 0) if reverse else (0, 1, 2)
  decay = lambda n, which, tile: decays_ref[n, which, tile][:, None]
  tiles = [pl.ds(i * depth, depth) for i in range(K // depth)]

  def step(i, states):
    n = T // C - 1 - i if reverse else i
    rows = pl.ds(n * C, C)
    z = z_ref[rows, :].astype(dtype)
    # Beside the pieces of float32 products, loads that are not right before their use do not fit the registers.
    late = scores and dtype == jnp.float32
    load = lambda ref: [None if late else ref[rows, tile] for tile in tiles]
    ys = load(y_ref)
    if outputs:
      xs = load(x_ref)
      if scores:
        p = p_ref[n].T if reverse else p_ref[n]
      else:
        p = sum(dot(x, y.T) for x, y in zip(xs, ys)).astype(dtype)
        bounded = bounded_ref[n] == 1
        exact = plt.load(p_ref.at[n], mask=jnp.broadcast_to(jnp.logical_not(bounded), (C, C)), other=0.0)
        p = jnp.where(bounded, p, exact.T if reverse else exact)
      o = dot(jnp.where(causal, p, 0.0).astype(dtype), z)
    entered = []
    for i, (tile, state) in enumerate(zip(tiles, states)):
      dot.barrier(dtype)
      state = decay(n, enter, tile) * state
      middle = state.astype(dtype)
      if outputs:
        o += dot(x_ref[rows, tile] if late else xs[i], middle)
      if save:
        refs[-1][n, tile, :] = middle
      entered.append(state)
    if outputs:
      refs[0][rows, :] = o.astype(refs[0].dtype)
    left = []
    for i, (tile, state) in enumerate(zip(tiles, entered)):
      dot.barrier(dtype)
      y = y_ref[rows, tile] if late else ys[i]
      left.append(decay(n, exit, tile) * (decay(n, keep, tile) * state + dot(y.T, z)))
    return tuple(left)

  states = jax.lax.fori_loop(start, T // C, step, tuple(initial_ref[tile, :] for tile in tiles))
  for tile, state in zip(tiles, states):
    final_ref[tile, :] = state


def _dqkg_kernel(x_ref, y_ref, g_ref, v_ref, do_ref, states_ref, dstates_ref, dq_ref, dk_ref, dg_ref, *, scale, block_v,
                 dot):
  C, K = x_ref.shape
  dtype, sums = x_ref.dtype, exact_sums(x_ref.dtype, dot)
  square, wide = jnp.zeros((C, C), jnp.float32), jnp.zeros((C, K), jnp.float32)
  row, column = rows_and_columns(C)
  f32 = lambda x: x.astype(jnp.float32)

  def add_tile(i, carry):
    dp, dpt, dx, dy, through = carry
    tile = pl.ds(i * block_v, block_v)
    v, do = v_ref[:, tile].astype(dtype), do_ref[:, tile].astype(dtype)
    state, dstate = states_ref[:, tile], dstates_ref[:, tile]
    through += jnp.sum(f32(state) * f32(dstate), axis=1)
    # P^T gets its own product: a transposed accumulator is miscompiled by some Triton versions.
    return dp + dot(do, v.T), dpt + dot(v, do.T), dx + dot(do, state.T), dy + dot(v, dstate.T), through

  dp, dpt, dx, dy_state, through = jax.lax.fori_loop(
      0, v_ref.shape[1] // block_v, add_tile, (square, square, wide, wide, jnp.sum(wide, axis=0)))
  exponent = sums(_from_middle(C), gates(g_ref, ...))
  # The pairs (i, i) come last: no gate lies between them, so the gates' gradient must not see them even as rounding.
  diagonal = jnp.sum(jnp.where(row == column, dp, 0.0), axis=1)[:, None]
  y = y_ref[...]
  dx += dot(jnp.where(row > column, dp, 0.0).astype(dtype), y)
  dq_ref[...] = (scale * jnp.exp2(exponent) * (dx + diagonal * f32(y))).astype(dq_ref.dtype)
  x = x_ref[...]
  dy = dot(jnp.where(row < column, dpt, 0.0).astype(dtype), x)
  # A gate's gradient is the flow through it, the sum of P * dP and of the like for the states over all that it
  # multiplies: pairs inside the chunk, pairs with the entry state, with the exit state, and M with dM. Pairs on one
  # side of it cancel to float32 rounding, because both their terms are products of the same rounded factors.
  inside = f32(x) * dx
  dk_ref[...] = (jnp.exp2(-exponent) * (dy + dy_state + diagonal * f32(x))).astype(dk_ref.dtype)
  inside -= f32(y) * dy
  dg = sums(jnp.where(column >= row, 1.0, 0.0), inside)
  # These flows do not cancel in pairs as those inside do, so fewer bits of them are enough.
  leaving = masked_sum(jnp.where(column < row, 1.0, 0.0), f32(y) * dy_state, dot, 2 if dtype == jnp.float32 else 1)
  dg_ref[...] = dg + through[None] + leaving


# Launches. A chunk kernel has one program a (K tile, chunk, head, row of the batch), a scan one a (V tile, head, row).


def _chunk(config, width, tiled):
  """Block of a [B, T, H, width] array in a chunk kernel: the tile's columns or all."""
  return pl.BlockSpec((None, config.chunk, None, width), lambda t, n, h, b: (b, n, h, t if tiled else 0))


def _factors(q, k, g, scale, config):
  """X, Y; enter, keep and exit [B, H, N, 3, K]; which chunks are bounded [B, H, N]; P of those that are not."""
  B, T, H, K = q.shape
  N, dtype, tile = T // config.chunk, operand(q.dtype), config.factors
  block = min(tile.block, K)
  keys = _chunk(config, block, tiled=True)
  x, y, decays, bounded = triton_blocks.launch(
      functools.partial(_factors_kernel, scale=scale), name="gla_factors", grid=(K // block, N, H, B),
      in_specs=[keys] * 3,
      out_specs=[keys, keys, pl.BlockSpec((None, None, None, 3, block), lambda t, n, h, b: (b, h, n, 0, t)),
                 pl.BlockSpec((None, None, None, None), lambda t, n, h, b: (t, b, h, n))],
      out_shape=[*[jax.ShapeDtypeStruct(q.shape, dtype)] * 2, jax.ShapeDtypeStruct((B, H, N, 3, K), jnp.float32),
                 jax.ShapeDtypeStruct((K // block, B, H, N), jnp.int32)],
      num_warps=tile.num_warps, num_stages=tile.num_stages)(q, k, g)
  bounded = jnp.min(bounded, axis=0)
  p = exact_chunks.scores(bounded, q, k, g, scale, config.chunk)
  return x, y, decays, bounded, _scores(bounded, x, y, p, config) if config.scores else p


def _scores(bounded, x, y, p, config):
  """`p` with the P of every other chunk; entries above the diagonal are no part of it."""
  (B, T, H, K), tile = x.shape, config.scores
  keys = _chunk(config, K, tiled=True)
  square = pl.BlockSpec((None, None, None, *p.shape[3:]), lambda t, n, h, b: (b, h, n, 0, 0))
  return triton_blocks.launch(
      functools.partial(_scores_kernel, depth=min(tile.block, K)), name="gla_scores",
      grid=(1, T // config.chunk, H, B), aliases={3: 0},
      in_specs=[pl.BlockSpec((None, None, None), lambda t, n, h, b: (b, h, n)), keys, keys, square], out_specs=square,
      out_shape=jax.ShapeDtypeStruct(p.shape, p.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages)(
          bounded, x, y, p)


def _scan(factors, z, initial_state, config, *, save=True, reverse=False):
  """Output (dv), the state in the middle of each chunk if `save`, and final state, of pieces that follow each other."""
  x, y, decays, bounded, p = factors
  if reverse:
    x, y = y, x
  tile = config.reverse_scan if reverse else config.scan
  run = functools.partial(_launch_scan, config=config, tile=tile, reverse=reverse)
  B = initial_state.shape[0]
  if z.shape[0] > B:
    empty = jnp.zeros((z.shape[0], *initial_state.shape[1:]), jnp.float32)
    (update,) = run([x, y, decays], z, empty, outputs=False, save=False)
    kept = jnp.prod(decays, axis=(2, 3))[..., None]
    initial_state = split.entry_states(initial_state, kept, update, reverse)
  output, *states, final = run([x, y, decays, bounded, p], z, initial_state, outputs=True, save=save)
  return output, states[0] if save else None, split.exit_state(final, B, reverse)


def _launch_scan(factors, z, initial_state, *, config, tile, reverse, outputs, save):
  (B, T, H, V), (K, dtype) = z.shape, (factors[0].shape[3], factors[0].dtype)
  block, C, N = min(tile.block, V), config.chunk, T // config.chunk
  keys = pl.BlockSpec((None, T, None, K), lambda t, h, b: (b, 0, h, 0))
  values = pl.BlockSpec((None, T, None, block), lambda t, h, b: (b, 0, h, t))
  all_chunks = lambda *shape: pl.BlockSpec((None, None, N, *shape), lambda t, h, b: (b, h, 0, *(0 for _ in shape)))
  state = pl.BlockSpec((None, None, K, block), lambda t, h, b: (b, h, 0, t))
  states = pl.BlockSpec((None, None, N, K, block), lambda t, h, b: (b, h, 0, 0, t))
  out_shape = [*[jax.ShapeDtypeStruct(z.shape, z.dtype)] * outputs,
               *[jax.ShapeDtypeStruct((B, H, N, K, V), dtype)] * save,
               jax.ShapeDtypeStruct(initial_state.shape, jnp.float32)]
  return triton_blocks.launch(
      functools.partial(_scan_kernel, scores=bool(config.scores), outputs=outputs, save=save, reverse=reverse,
                        chunk=C, depth=min(config.depth, K)),
      name="gla_scan" if outputs else "gla_piece", grid=(V // block, H, B), loop=True,
      in_specs=[keys, keys, all_chunks(3, K), *[all_chunks(), all_chunks(C, C)] * outputs, values, state],
      out_specs=[*[values] * outputs, *[states] * save, state], out_shape=out_shape, num_warps=tile.num_warps,
      num_stages=tile.num_stages)(*factors, z, initial_state)


def _dqkg(x, y, g, v, do, states, dstates, scale, config, dtype):
  B, T, H, K = x.shape
  V, tile = v.shape[3], config.dqkg
  block = min(tile.block, K)
  keys, values = _chunk(config, block, tiled=True), _chunk(config, V, tiled=False)
  state = pl.BlockSpec((None, None, None, block, V), lambda t, n, h, b: (b, h, n, t, 0))
  return triton_blocks.launch(
      functools.partial(_dqkg_kernel, scale=scale, block_v=min(tile.block, V)), name="gla_dqkg",
      grid=(K // block, T // config.chunk, H, B), in_specs=[keys, keys, keys, values, values, state, state],
      out_specs=[keys] * 3,
      out_shape=[*[jax.ShapeDtypeStruct(x.shape, dtype)] * 2, jax.ShapeDtypeStruct(g.shape, g.dtype)],
      num_warps=tile.num_warps, num_stages=tile.num_stages)(x, y, g, v, do, states, dstates)
