"""Linear attention with scalar decay as Pallas kernels for the Triton backend, with their `custom_vjp`.

Per head, for a chunk of C tokens with entry state S and exit state S', g = log_decay in base 2, and

  upto_i = 2^(sum of g up to and including i)      after_j = 2^(sum of g after j)      total = 2^(sum of g)
  D_ij = 2^(sum of g over (j, i]) for i >= j, else 0                                   (arXiv:2405.17381, section 3)

  P = scale D * (Q K^T)        O = P V + scale upto * (Q S)              S' = total S + K^T (after * V)
  dA = scale D * (dO V^T)      dQ = dA K + scale upto * (dO S^T)         dK = dA^T Q + after * (V dS'^T)
                               dV = P^T dO + after * (K dS')             dS = total dS' + Q^T (scale upto * dO)

The line of dV and dS is that of O and S' with time reversed, (K, Q, dO) for (Q, K, V), and the two row weights
exchanged: one scan kernel computes both. It carries the state of a tile of V's columns in registers over all chunks.

| pass | kernel | reads | writes | bytes a token-head at K = V = 128, bfloat16, C = 64 |
| forward | `linear_attention_scan` | q, k, v, g | o, final state; for a gradient S of each chunk | 1024 + 512 |
| backward | `linear_attention_scan`, reversed | k, q, do, g | dv, dS' of each chunk, d initial_state | 1024 + 512 |
| backward | `linear_attention_dqk` | q, k, v, g, do, S, dS' | dq, dk, dg | 2560 |

Where few heads leave the GPU idle, `kernels.split` cuts the sequence, and `linear_attention_piece`, the scan without
outputs, finds each piece's entry state. For wide heads `linear_attention_scores` computes P once, in both passes (reads
q, k, g, writes P, C elements a token-head), and not each V tile.

Residuals: the inputs and the chunk states, 2 K V / C bytes a token-head for 16-bit inputs (512 at K = V = 128). 16-bit
inputs use bfloat16 operands and states; float32 inputs keep float32.

`kernels.scalar_decay` forms the decays. A gate's gradient is the flow through it, the sum of P * dP and of the like for
the states over all that it multiplies: pairs inside the chunk, pairs with the entry state, with the exit state, and S
with dS'.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import split, triton_blocks, tuned
from kernels.scalar_decay import between, decay_of, gate_block, weigh
from kernels.triton_blocks import operand, rows_and_columns, tile_width
from kernels.tuned import Tile


@dataclasses.dataclass(frozen=True)
class Config:
  """Tokens a chunk, K columns of one product in the scans, and the tile of each kernel: K columns of a product of
  scores (None: the scans compute P), V columns of the scans, K columns of a dqk program, which takes as many V columns
  at a time."""

  chunk: int
  depth: int
  scores: Tile | None
  scan: Tile
  reverse_scan: Tile
  dqk: Tile


def heuristic(K: int, V: int, dtype, chunk_size: int | None = None) -> Config:
  """The answer for what is not listed: tiles for the smallest supported GPU, slow on larger ones."""
  wide = dtype == jnp.float32
  # Stages keep the loads of the scan in shared memory: in registers they spill, on sm_80 first. Narrower tiles of
  # float32 spill too, so V is padded.
  warps, stages = 8 if K > 128 else 4, 3 if K <= 32 and V > 256 else 2
  scan = Tile(32, 8, 2) if wide else Tile(tile_width(V, 16 if K > 64 else 32), warps, stages)
  chunk = 16 if wide else 32 if K > 128 else 64
  keys = Tile(tile_width(K, 16), 4, 1) if wide else Tile(tile_width(K, 32), 4 if K > 16 else 8, 2)
  scores = Tile(64, 4, 1) if wide and K > 64 else None
  return Config(chunk_size or chunk, 64, scores, scan, scan, keys)


def candidates(K: int, V: int, dtype) -> dict[str, list]:
  """The values worth timing for each field, around those that were fastest on an H100."""
  wide = dtype == jnp.float32
  tiles = lambda size, *values: list(dict.fromkeys(Tile(tile_width(size, w), *launch) for w, *launch in values))
  if wide:
    scan, keys = tiles(V, (16, 4, 1), (32, 4, 1), (32, 8, 1)), tiles(K, (16, 4, 1), (32, 4, 1))
  else:
    scan = tiles(V, (64, 4, 2), (64, 4, 1), (64, 8, 2), (32, 4, 2), (32, 4, 1), *([(128, 8, 2)] if K > 128 else []))
    # With 4 warps and a single tile of 64 columns the loop over tiles is unrolled into more than the registers hold.
    keys = tiles(K, (32, 4, 2), (32, 4, 1), (64, 8, 2), *([(64, 4, 1), (64, 4, 2), (64, 4, 3)] if V > 64 else []))
  # Where many V tiles would each compute P again, and its accumulator costs the registers of a second program.
  scores = [Tile(64, 4, 2)] if not wide and K > 128 else []
  return {"chunk": [16 if wide else 64], "scores": scores, "depth": sorted({32 if wide else 64, tile_width(K)}),
          "scan": scan, "reverse_scan": scan, "dqk": keys}


def supports(q, k, v, log_decay=None, *, chunk_size=None) -> str | None:
  """Why these inputs cannot run here, or None."""
  return triton_blocks.declines(q, chunk_size)


def linear_attention(q, k, v, log_decay, initial_state, *, scale, chunk_size=None):
  """See `kernels.linear_attention`. Heads are equal, the state is given, segments are already resets in `log_decay`."""
  K, V = q.shape[3], v.shape[3]
  gate = tuned.gate_key(log_decay)
  config = None if chunk_size else tuned.lookup("linear_attention", Config, gate=gate, K=K, V=V, dtype=q.dtype)
  config = config or heuristic(K, V, q.dtype, chunk_size)
  return configured(q, k, v, log_decay, initial_state, scale=scale, config=config)


def configured(q, k, v, log_decay, initial_state, *, scale, config):
  """The op under an explicit configuration."""
  (B, T, H, K), V = q.shape, v.shape[3]
  # Powers of two, of which the widest is a multiple of the tiles of every kernel.
  widest = max(min(block, tile_width(V)) for block in (
      config.scan.block, config.reverse_scan.block, config.dqk.block, heuristic(K, V, jnp.float32).scan.block))
  dK, dV = tile_width(K) - K, -V % widest
  pieces = split.pieces(B * H * (V + dV) // config.scan.block, T, config.chunk)
  fold = functools.partial(split.fold, count=pieces, chunk=config.chunk)
  pad = lambda x, extra: fold(jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, extra))))
  state = jnp.pad(initial_state, ((0, 0), (0, 0), (0, dK), (0, dV)))
  if log_decay is not None and log_decay.ndim == 3:
    log_decay = fold(log_decay)
  # What fills up the last chunk must not decay the final state.
  whole = T % (pieces * config.chunk) == 0
  real = None if whole else fold(jnp.ones((B, T, 1), bool))
  output, final_state = _linear_attention(pad(q, dK), pad(k, dK), pad(v, dV), log_decay, state, real, scale, config)
  return split.unfold(output, B)[:, :T, :, :V], final_state[:, :, :K, :V]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _linear_attention(q, k, v, log_decay, initial_state, real, scale, config):
  """`real` [B, T, 1] says which tokens are no filling, and makes a constant decay one per token; None if all are."""
  output, _, final_state = _scan(q, k, v, _filled(log_decay, real), initial_state, scale, config, save=False)
  return output, final_state


def _forward(q, k, v, log_decay, initial_state, real, scale, config):
  output, states, final_state = _scan(q, k, v, _filled(log_decay, real), initial_state, scale, config)
  return (output, final_state), (q, k, v, log_decay, initial_state, real, states)


def _backward(scale, config, residuals, cotangents):
  q, k, v, log_decay, initial_state, real, states = residuals
  do, dfinal_state = cotangents
  gate = _filled(log_decay, real)
  dv, dstates, dinitial_state = _scan(k, q, do, gate, dfinal_state, scale, config, reverse=True)
  dq, dk, dlog_decay = _dqk(q, k, v, gate, do, states, dstates, scale, config)
  if log_decay is not None and log_decay.ndim == 1:
    dlog_decay = _dconstant(q, k, v, log_decay, initial_state, real, do, dfinal_state, scale)
  return dq, dk, dv, dlog_decay, dinitial_state, None


_linear_attention.defvjp(_forward, _backward, optimize_remat=True)


def _filled(log_decay, real):
  """The gates that the kernels read: a constant decay becomes one per token where a chunk is filled up."""
  if log_decay is None or log_decay.ndim == 3 or real is None:
    return log_decay
  return jnp.where(real, log_decay[None, None], 0.0)


def _dconstant(q, k, v, log_decay, initial_state, real, do, dfinal_state, scale):
  """Gradient of a constant decay: the sum of those of a decay per token. Most of the sum cancels, so its terms need
  float32 products. The compiler drops all of this when nobody asks for the gradient."""
  q, k, v, do = (x.astype(jnp.float32) for x in (q, k, v, do))
  config = heuristic(q.shape[3], v.shape[3], q.dtype, 16)  # 16 tokens divide every chunk
  real = jnp.ones((*do.shape[:2], 1), bool) if real is None else real
  gate = _filled(log_decay, real)
  _, states, _ = _scan(q, k, v, gate, initial_state, scale, config, outputs=False)
  _, dstates, _ = _scan(k, q, do, gate, dfinal_state, scale, config, outputs=False, reverse=True)
  return jnp.sum(jnp.where(real, _dqk(q, k, v, gate, do, states, dstates, scale, config)[2], 0.0), axis=(0, 1))


# Kernel bodies. A ref holds one head: all T tokens or one chunk of them.


def _scores_kernel(*refs, gated, transposed, scale, depth, dot):
  q_ref, k_ref, *g_ref, p_ref = refs
  (C, K), dtype = q_ref.shape, p_ref.dtype
  decay = decay_of(g_ref[0][...] if gated else None, C)
  tiles = [pl.ds(i * depth, depth) for i in range(K // depth)]
  p = sum(dot(q_ref[:, tile].astype(dtype), k_ref[:, tile].astype(dtype).T) for tile in tiles)
  p_ref[...] = (between(decay, C, transposed) * (scale * p)).astype(dtype)


def _scan_kernel(*refs, gated, scores, outputs, save, reverse, scale, chunk, depth, start, dot):
  q_ref, k_ref, v_ref, *refs = refs
  g_ref = refs.pop(0) if gated else None
  p_ref = refs.pop(0) if scores else None
  initial_ref, *refs, final_ref = refs
  C, dtype, (T, K) = chunk, operand(k_ref.dtype), k_ref.shape
  tiles = [pl.ds(i * depth, depth) for i in range(K // depth)]
  # What is added to a state of several K tiles is read when it is needed: held from the start it spills. With P to
  # compute, k is there anyway.
  late = len(tiles) > 1 and (bool(scores) or (dtype == jnp.float32 and not outputs))

  def step(i, states):
    n = T // C - 1 - i if reverse else i
    rows = pl.ds(n * C, C)
    decay = decay_of(g_ref[rows if g_ref.shape else ...] if gated else None, C)
    query_weights, key_weights = (decay.upto, scale), (decay.after,)
    if reverse:
      query_weights, key_weights = key_weights, query_weights
    v = v_ref[rows, :].astype(dtype)
    weighted = lambda v: weigh(v.astype(jnp.float32), *key_weights).astype(dtype)
    add = lambda k, u, state: dot(k.T, u) + (state if decay.total is None else decay.total * state)
    p, o, next_states, u = 0.0, 0.0, [], None if late else weighted(v)
    for tile, state in zip(tiles, states):
      k, entry = None if late else k_ref[rows, tile].astype(dtype), state.astype(dtype)
      if save:
        refs[-1][n, tile, :] = entry
      if outputs:
        q = q_ref[rows, tile].astype(dtype)
        o += dot(q, entry)
        if not scores:
          p += dot(q, k.T)
      if late:
        dot.barrier(dtype)
      else:
        next_states.append(add(k, u, state))

    def add_late():
      v = v_ref[rows, :].astype(dtype)
      u = weighted(v)
      for tile, state in zip(tiles, states):
        next_states.append(add(k_ref[rows, tile].astype(dtype), u, state))
        dot.barrier(dtype)
      return v

    # Which comes first, the next state or the output, decides whether float32 or 16-bit operands spill.
    if late and dtype == jnp.float32:
      v = add_late()
    if outputs:
      p = p_ref[n] if scores else (between(decay, C, transposed=reverse) * (scale * p)).astype(dtype)
      refs[0][rows, :] = (weigh(o, *query_weights) + dot(p, v)).astype(refs[0].dtype)
    if late and dtype != jnp.float32:
      add_late()
    return tuple(next_states)

  states = jax.lax.fori_loop(start, T // C, step, tuple(initial_ref[tile, :] for tile in tiles))
  for tile, state in zip(tiles, states):
    final_ref[tile, :] = state


def _dqk_kernel(*refs, gated, scale, block_v, dot):
  q_ref, k_ref, v_ref, do_ref, states_ref, dstates_ref, *refs = refs
  g_ref = refs.pop(0) if gated else None
  dq_ref, dk_ref, *dg_ref = refs
  C, K = q_ref.shape
  dtype = operand(q_ref.dtype)
  square, wide = jnp.zeros((C, C), jnp.float32), jnp.zeros((C, K), jnp.float32)
  row, column = rows_and_columns(C)
  f32 = lambda x: x.astype(jnp.float32)
  # Loads that stand here wait beside those of the loop, not after them.
  q, k = q_ref[...].astype(dtype), k_ref[...].astype(dtype)
  gate = g_ref[...] if gated else None

  def add_tile(i, carry):
    dp, dpt, dq, dk, through = carry
    tile = pl.ds(i * block_v, block_v)
    v, do = v_ref[:, tile].astype(dtype), do_ref[:, tile].astype(dtype)
    state, dstate = states_ref[:, tile], dstates_ref[:, tile]
    if dg_ref:
      through += jnp.sum(f32(state) * f32(dstate), axis=1)
    # P^T gets its own product: a transposed accumulator is miscompiled by some Triton versions.
    return dp + dot(do, v.T), dpt + dot(v, do.T), dq + dot(do, state.T), dk + dot(v, dstate.T), through

  dp, dpt, dq_state, dk_state, through = jax.lax.fori_loop(
      0, v_ref.shape[1] // block_v, add_tile, (square, square, wide, wide, jnp.sum(wide, axis=0)))
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
  q, k = f32(q), f32(k)
  inside, leaving = jnp.sum(q * dq - k * dk, axis=1), jnp.sum(k * dk_state, axis=1)
  dq_ref[...] = (dq + diagonal * k).astype(dq_ref.dtype)
  dk_ref[...] = (dk + dk_state + diagonal * q).astype(dk_ref.dtype)
  # Sums over rows, not differences of cumulative sums: a token's own flow out may be many times what passes its gate.
  passing = jnp.where(column >= row, inside[None, :], leaving[None, :])
  dg_ref[0][...] = decay.total * jnp.sum(through) + jnp.sum(passing, axis=1)


# Launches. A scan has one program a (V tile, head, row of the batch), dqk one a (K tile, chunk, head, row).


def _scan(q, k, v, log_decay, initial_state, scale, config, *, outputs=True, save=True, reverse=False):
  """Output if `outputs`, entry state of each chunk if `save`, and final state, of pieces that follow each other."""
  run = functools.partial(_launch_scan, q, k, v, log_decay, scale=scale, config=config, reverse=reverse)
  B, T = initial_state.shape[0], v.shape[1]
  if v.shape[0] > B:
    (update,) = run(jnp.zeros((v.shape[0], *initial_state.shape[1:]), jnp.float32), outputs=False, save=False)
    kept = jnp.ones((v.shape[0], v.shape[2]), jnp.float32)
    if log_decay is not None:
      kept *= jnp.exp(jnp.sum(log_decay, axis=1) if log_decay.ndim == 3 else T * log_decay[None])
    initial_state = split.entry_states(initial_state, kept[..., None, None], update, reverse)
  *found, final = run(initial_state, outputs=outputs, save=save)
  return found[0] if outputs else None, found[-1] if save else None, split.exit_state(final, B, reverse)


def _launch_scan(q, k, v, log_decay, initial_state, *, scale, config, reverse, outputs, save):
  (B, T, H, K), V = k.shape, v.shape[3]
  tile = config.reverse_scan if reverse else config.scan
  block, N = min(tile.block, V), T // config.chunk
  keys = pl.BlockSpec((None, T, None, K), lambda t, h, b: (b, 0, h, 0))
  values = pl.BlockSpec((None, T, None, block), lambda t, h, b: (b, 0, h, t))
  state = pl.BlockSpec((None, None, K, block), lambda t, h, b: (b, h, 0, t))
  states = pl.BlockSpec((None, None, N, K, block), lambda t, h, b: (b, h, 0, 0, t))
  gate, gate_spec = gate_block(log_decay, T, chunked=False)
  p, p_spec = [], []
  if config.scores and outputs:
    p = [_scores(q, k, log_decay, scale, config, reverse)]
    p_spec = [pl.BlockSpec((None, None, N, config.chunk, config.chunk), lambda t, h, b: (b, h, 0, 0, 0))]
  return triton_blocks.launch(
      functools.partial(_scan_kernel, gated=bool(gate), scores=bool(p), outputs=outputs, save=save, reverse=reverse,
                        scale=scale, chunk=config.chunk, depth=min(config.depth, K)),
      name="linear_attention_scan" if outputs else "linear_attention_piece", grid=(V // block, H, B), loop=True,
      in_specs=[keys, keys, values, *gate_spec, *p_spec, state],
      out_specs=[*[values] * outputs, *[states] * save, state],
      out_shape=[*[jax.ShapeDtypeStruct(v.shape, v.dtype)] * outputs,
                 *[jax.ShapeDtypeStruct((B, H, N, K, V), operand(v.dtype))] * save,
                 jax.ShapeDtypeStruct(initial_state.shape, jnp.float32)],
      num_warps=tile.num_warps, num_stages=tile.num_stages)(q, k, v, *gate, *p, initial_state)


def _scores(q, k, log_decay, scale, config, transposed):
  """P `[B, H, N, C, C]`, or its transpose when q and k are exchanged."""
  (B, T, H, K), C, tile = q.shape, config.chunk, config.scores
  keys = pl.BlockSpec((None, C, None, K), lambda t, n, h, b: (b, n, h, 0))
  gate, gate_spec = gate_block(log_decay, C, chunked=True)
  return triton_blocks.launch(
      functools.partial(_scores_kernel, gated=bool(gate), transposed=transposed, scale=scale, depth=min(tile.block, K)),
      name="linear_attention_scores", grid=(1, T // C, H, B), in_specs=[keys, keys, *gate_spec],
      out_specs=pl.BlockSpec((None, None, None, C, C), lambda t, n, h, b: (b, h, n, 0, 0)),
      out_shape=jax.ShapeDtypeStruct((B, H, T // C, C, C), operand(q.dtype)), num_warps=tile.num_warps,
      num_stages=tile.num_stages)(q, k, *gate)


def _dqk(q, k, v, log_decay, do, states, dstates, scale, config):
  """dq, dk, and for a decay per token its gradient, of which each K tile has its part."""
  (B, T, H, K), V = q.shape, v.shape[3]
  C, block = config.chunk, min(config.dqk.block, K)
  keys = pl.BlockSpec((None, C, None, block), lambda t, n, h, b: (b, n, h, t))
  values = pl.BlockSpec((None, C, None, V), lambda t, n, h, b: (b, n, h, 0))
  state = pl.BlockSpec((None, None, None, block, V), lambda t, n, h, b: (b, h, n, t, 0))
  dgate = pl.BlockSpec((None, None, C, None), lambda t, n, h, b: (t, b, n, h))
  gate, gate_spec = gate_block(log_decay, C, chunked=True)
  per_token = bool(gate) and log_decay.ndim == 3
  dq, dk, *dg = triton_blocks.launch(
      functools.partial(_dqk_kernel, gated=bool(gate), scale=scale, block_v=min(config.dqk.block, V)),
      name="linear_attention_dqk", grid=(K // block, T // C, H, B),
      in_specs=[keys, keys, values, values, state, state, *gate_spec], out_specs=[keys, keys, *[dgate] * per_token],
      out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(k.shape, k.dtype),
                 *[jax.ShapeDtypeStruct((K // block, B, T, H), jnp.float32)] * per_token],
      num_warps=config.dqk.num_warps, num_stages=config.dqk.num_stages)(q, k, v, do, states, dstates, *gate)
  return dq, dk, jnp.sum(dg[0], axis=0) if per_token else None
