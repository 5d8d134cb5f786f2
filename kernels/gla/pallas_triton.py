"""Gated linear attention as Pallas kernels for the Triton backend: forward, backward, and their `custom_vjp`.

Per head, with q scaled, g = log_decay in base 2, and chunks of C tokens (arXiv:2312.06635, section 4.3):

  S' = diag(2^total) S + (K * 2^after)^T V          state leaving a chunk; `after[j]` sums g over the tokens after j
  O  = (Q * 2^upto) S + P V                         `upto[i]` sums g up to and including i
  P_ij = sum_d Q_id K_jd 2^(sum of g_d over (j, i])  for i >= j

P is a sum over dyadic levels s = 1, 2, ..., C/2. A pair belongs to level s when i lies in the second and j in the first
half of one block of 2s tokens; its exponent then splits at the middle of the block into two sums of the same sign. With
E_s the sum of g between the middle of the block and a row,

  P = lower triangle of sum_s (pairs of s) * ((Q * 2^E_s) (K * 2^E_s)^T) + diag(Q K^T)

All exponents are sums of terms <= 0, never differences of cumulative sums, so the scheme is exact for any gate (a reset
included) and consists of matrix products only. Its backward takes dP mirrored into a symmetric matrix: with Z_s the
rows of Q * 2^E_s in second and of K * 2^E_s in first halves, (pairs of s) * dP Z_s holds those of dQ and dK likewise.

| pass | kernel | reads | writes |
| forward, backward | `gla_scores` | q, k, g | P [C, C] a chunk |
| forward, backward | `gla_states` | k, v, g | entry state of each chunk, final state |
| forward | `gla_output` | q, g, v, P, states | o |
| backward | `gla_dstates` | q, do, g | dS of each chunk's exit state, d initial_state |
| backward | `gla_dscores` | do, v | dP [C, C] a chunk, mirrored |
| backward | `gla_dqkg` | q, k, g, v, do, dP, states, dS | dq, dk, dlog_decay |
| backward | `gla_dv` | k, g, do, P, dS | dv |

Residuals are the inputs. 16-bit inputs use bfloat16 operands, states and scores; float32 inputs keep float32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import triton_blocks
from kernels.triton_blocks import LOG2E, masked_sum, rows_and_columns

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
CHUNKS = (16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Config:
  """Tile sizes and launch parameters: `chunk` tokens, `block_k` x `block_v` tiles of the state, and `loop_v` columns of
  the state at a time where a program loops over all of them."""

  chunk: int
  block_k: int
  block_v: int
  loop_v: int
  num_warps: int = 4
  num_stages: int = 3


def heuristic(K: int, V: int, dtype, chunk_size: int | None) -> Config:
  """A configuration that compiles for every supported shape: the widest tiles that fit, narrower for narrow heads."""
  widest_k, widest_v, chunk = (32, 32, 32) if dtype == jnp.float32 else (64, 128, 64)
  tile = lambda size, widest: min(widest, max(16, pl.next_power_of_2(size)))
  return Config(chunk_size or chunk, tile(K, widest_k), tile(V, widest_v), tile(V, widest_k))


def supports(q, k, v, log_decay, *, chunk_size=None) -> str | None:
  """Why these inputs cannot run here, or None."""
  if q.dtype not in DTYPES:
    return f"dtype {q.dtype} is not one of bfloat16, float16, float32"
  if chunk_size is not None and chunk_size not in CHUNKS:
    return f"chunk_size={chunk_size} is not one of {', '.join(map(str, CHUNKS))}"
  return None


def gla(q, k, v, log_decay, initial_state, *, scale, chunk_size=None):
  """See `kernels.gla`. Heads are equal, the state is given, segments are already resets in `log_decay`."""
  T, K, V = q.shape[1], q.shape[3], v.shape[3]
  config = heuristic(K, V, q.dtype, chunk_size)
  dT, dK, dV = -T % config.chunk, -K % config.block_k, -V % config.block_v
  pad = lambda x, extra: jnp.pad(x, ((0, 0), (0, dT), (0, 0), (0, extra)))
  state = jnp.pad(initial_state, ((0, 0), (0, 0), (0, dK), (0, dV)))
  output, final_state = _gla(pad(q, dK), pad(k, dK), pad(v, dV), pad(log_decay, dK), state, scale, config)
  return output[:, :T, :, :V], final_state[:, :, :K, :V]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _gla(q, k, v, log_decay, initial_state, scale, config):
  states, final_state = _states(k, v, log_decay, initial_state, config)
  return _output(q, log_decay, v, _scores(q, k, log_decay, scale, config), states, scale, config), final_state


def _forward(q, k, v, log_decay, initial_state, scale, config):
  return _gla(q, k, v, log_decay, initial_state, scale, config), (q, k, v, log_decay, initial_state)


def _backward(scale, config, residuals, cotangents):
  q, k, v, log_decay, initial_state = residuals
  do, dfinal_state = cotangents
  states, _ = _states(k, v, log_decay, initial_state, config)
  dstates, dinitial_state = _dstates(q, do, log_decay, dfinal_state, scale, config)
  dq, dk, dlog_decay = _dqkg(q, k, log_decay, v, do, _dscores(do, v, config), states, dstates, scale,
                             config)
  dv = _dv(k, log_decay, do, _scores(q, k, log_decay, scale, config), dstates, config)
  return dq, dk, dv, dlog_decay, dinitial_state


_gla.defvjp(_forward, _backward, optimize_remat=True)


# Gates and exponents. `g` is in base 2; masks are [C, C] with a row for each result and a column for each term.


def _operand(dtype):
  return jnp.float32 if dtype == jnp.float32 else jnp.bfloat16


def _parts(dtype):
  return 3 if dtype == jnp.float32 else 2


def _upto(g, **sums):
  """Sum of g from the start of the chunk up to and including each row: decay between entry state and query."""
  row, column = rows_and_columns(g.shape[0])
  return masked_sum(column <= row, g, **sums)


def _after(g, **sums):
  """Sum of g over the rows after each row: decay between key and exit state."""
  row, column = rows_and_columns(g.shape[0])
  return masked_sum(column > row, g, **sums)


def _levels(C):
  """How many dyadic levels a chunk has."""
  return C.bit_length() - 1


def _level(level, g, **sums):
  """`(pairs, second, decay)` of one dyadic level: which [C, C] entries pair its halves (in either order), which rows
  are in second halves, and 2^E_s of every row."""
  row, column = rows_and_columns(g.shape[0])
  apart = (row ^ column) >> level  # 0 in the same half, 1 in the two halves of one block
  terms = (apart == 0) & (_is_second(level, row) == (column <= row))
  second = _is_second(level, jax.lax.broadcasted_iota(jnp.int32, g.shape, 0))
  return apart == 1, second, jnp.exp2(masked_sum(terms, g, **sums))


def _is_second(level, row):
  return ((row >> level) & 1) == 1


# Kernel bodies. A ref holds one head's chunk [C, .] or, in the two scans, all T tokens.


def _scores_kernel(q_ref, k_ref, g_ref, p_ref, *, scale, block_k, dot):
  C, K = q_ref.shape
  operand, sums = _operand(q_ref.dtype), dict(dot=dot, parts=_parts(q_ref.dtype))
  row, column = rows_and_columns(C)

  def add_tile(i, scores):
    tile = pl.ds(i * block_k, block_k)
    q, k = q_ref[:, tile].astype(jnp.float32) * scale, k_ref[:, tile].astype(jnp.float32)
    g = g_ref[:, tile] * LOG2E

    def add_level(level, scores):
      pairs, _, decay = _level(level, g, **sums)
      return scores + jnp.where(pairs, dot((q * decay).astype(operand), (k * decay).astype(operand).T), 0.0)

    scores += jnp.where(row == column, jnp.sum(q * k, axis=1)[:, None], 0.0)
    return jax.lax.fori_loop(0, _levels(C), add_level, scores)

  scores = jax.lax.fori_loop(0, K // block_k, add_tile, jnp.zeros((C, C), jnp.float32))
  p_ref[...] = jnp.where(row >= column, scores, 0.0).astype(p_ref.dtype)


def _states_kernel(k_ref, v_ref, g_ref, initial_ref, states_ref, final_ref, *, chunk, dot):
  operand, sums = _operand(k_ref.dtype), dict(dot=dot, parts=_parts(k_ref.dtype))

  def step(n, state):
    states_ref[n] = state.astype(states_ref.dtype)
    rows = pl.ds(n * chunk, chunk)
    g = g_ref[rows, :] * LOG2E
    k = (k_ref[rows, :].astype(jnp.float32) * jnp.exp2(_after(g, **sums))).astype(operand)
    return jnp.exp2(jnp.sum(g, axis=0))[:, None] * state + dot(k.T, v_ref[rows, :].astype(operand))

  final_ref[...] = jax.lax.fori_loop(0, states_ref.shape[0], step, initial_ref[...])


def _output_kernel(q_ref, g_ref, v_ref, p_ref, states_ref, o_ref, *, scale, block_k, dot):
  operand, sums = _operand(q_ref.dtype), dict(dot=dot, parts=_parts(q_ref.dtype))

  def add_tile(i, output):
    tile = pl.ds(i * block_k, block_k)
    q = q_ref[:, tile].astype(jnp.float32) * scale * jnp.exp2(_upto(g_ref[:, tile] * LOG2E, **sums))
    return output + dot(q.astype(operand), states_ref[tile, :])

  intra = dot(p_ref[...], v_ref[...].astype(operand))
  o_ref[...] = jax.lax.fori_loop(0, q_ref.shape[1] // block_k, add_tile, intra).astype(o_ref.dtype)


def _dstates_kernel(q_ref, do_ref, g_ref, dfinal_ref, dstates_ref, dinitial_ref, *, scale, chunk, dot):
  operand, sums = _operand(q_ref.dtype), dict(dot=dot, parts=_parts(q_ref.dtype))
  N = dstates_ref.shape[0]

  def step(i, dstate):
    n = N - 1 - i
    dstates_ref[n] = dstate.astype(dstates_ref.dtype)
    rows = pl.ds(n * chunk, chunk)
    g = g_ref[rows, :] * LOG2E
    q = (q_ref[rows, :].astype(jnp.float32) * scale * jnp.exp2(_upto(g, **sums))).astype(operand)
    return jnp.exp2(jnp.sum(g, axis=0))[:, None] * dstate + dot(q.T, do_ref[rows, :].astype(operand))

  dinitial_ref[...] = jax.lax.fori_loop(0, N, step, dfinal_ref[...])


def _dscores_kernel(do_ref, v_ref, dp_ref, *, loop_v, dot):
  C = do_ref.shape[0]
  operand = _operand(do_ref.dtype)

  def add_tile(i, carry):
    # P^T gets its own product: a transposed accumulator is miscompiled by some Triton versions.
    dp, dp_transposed = carry
    do, v = (ref[:, pl.ds(i * loop_v, loop_v)].astype(operand) for ref in (do_ref, v_ref))
    return dp + dot(do, v.T), dp_transposed + dot(v, do.T)

  zeros = jnp.zeros((C, C), jnp.float32)
  dp, dp_transposed = jax.lax.fori_loop(0, v_ref.shape[1] // loop_v, add_tile, (zeros, zeros))
  row, column = rows_and_columns(C)
  dp_ref[...] = jnp.where(row >= column, dp, dp_transposed).astype(dp_ref.dtype)


def _dqkg_kernel(q_ref, k_ref, g_ref, v_ref, do_ref, dp_ref, states_ref, dstates_ref, dq_ref, dk_ref, dg_ref, *,
                 scale, loop_v, dot):
  C, K = q_ref.shape
  operand, sums = _operand(q_ref.dtype), dict(dot=dot, parts=_parts(q_ref.dtype))
  zeros = jnp.zeros((C, K), jnp.float32)

  def add_tile(i, carry):
    dq, dk, dtotal = carry
    tile = pl.ds(i * loop_v, loop_v)
    state, dstate = states_ref[:, tile], dstates_ref[:, tile]
    dtotal += jnp.sum(state.astype(jnp.float32) * dstate.astype(jnp.float32), axis=1)
    return (dq + dot(do_ref[:, tile].astype(operand), state.T), dk + dot(v_ref[:, tile].astype(operand), dstate.T),
            dtotal)

  dq, dk, dtotal = jax.lax.fori_loop(0, v_ref.shape[1] // loop_v, add_tile, (zeros, zeros, jnp.sum(zeros, axis=0)))

  # A gate multiplies what enters the chunk and every pair (i, j) with j before it and i not before it: terms that end
  # in its chunk count through q * dq, terms that leave it through k * dk. No sum of terms without it is subtracted
  # except pairs on one side of it, which cancel to rounding.
  g = g_ref[...] * LOG2E
  q = lambda: q_ref[...].astype(jnp.float32) * scale
  k = lambda: k_ref[...].astype(jnp.float32)
  row, column = rows_and_columns(C)
  dq, dk = dq * jnp.exp2(_upto(g, **sums)), dk * jnp.exp2(_after(g, **sums))

  def add_level(level, carry):
    dq, dk_intra = carry
    pairs, second, decay = _level(level, g, **sums)
    dp = jnp.where(pairs, dp_ref[...].astype(jnp.float32), 0.0).astype(operand)
    dz = decay * dot(dp, (jnp.where(second, q(), k()) * decay).astype(operand))
    return dq + jnp.where(second, dz, 0.0), dk_intra + jnp.where(second, 0.0, dz)

  dq, dk_intra = jax.lax.fori_loop(0, _levels(C), add_level, (dq, zeros))
  dg = masked_sum(column >= row, q() * dq - k() * dk_intra, **sums) + masked_sum(column < row, k() * dk, **sums)
  dg_ref[...] = dg + (dtotal * jnp.exp2(jnp.sum(g, axis=0)))[None]
  # The pairs (i, i) come last: no gate lies between them, so the gates' gradient must not see them even as rounding.
  diagonal = jnp.sum(jnp.where(row == column, dp_ref[...].astype(jnp.float32), 0.0), axis=1)[:, None]
  dq_ref[...] = ((dq + diagonal * k()) * scale).astype(dq_ref.dtype)
  dk_ref[...] = (dk + dk_intra + diagonal * q()).astype(dk_ref.dtype)


def _dv_kernel(k_ref, g_ref, do_ref, p_ref, dstates_ref, dv_ref, *, block_k, dot):
  operand, sums = _operand(k_ref.dtype), dict(dot=dot, parts=_parts(k_ref.dtype))

  def add_tile(i, dv):
    tile = pl.ds(i * block_k, block_k)
    k = k_ref[:, tile].astype(jnp.float32) * jnp.exp2(_after(g_ref[:, tile] * LOG2E, **sums))
    return dv + dot(k.astype(operand), dstates_ref[tile, :])

  intra = dot(p_ref[...].T, do_ref[...].astype(operand))
  dv_ref[...] = jax.lax.fori_loop(0, k_ref.shape[1] // block_k, add_tile, intra).astype(dv_ref.dtype)


# Launches. A chunk kernel has one program a (tile, chunk, head, row of the batch), a scan one a (K tile, V tile, head,
# row). In `_chunk` and `_state` below, block sizes select the tile axis or the whole extent.


def _chunk(config, width, tiled):
  """Block of a [B, T, H, width] array in a chunk kernel."""
  return pl.BlockSpec((None, config.chunk, None, width), lambda t, n, h, b: (b, n, h, t if tiled else 0))


def _scores_block(config):
  """Block of the [B, H, N, C, C] scores in a chunk kernel."""
  return pl.BlockSpec((None, None, None, config.chunk, config.chunk), lambda t, n, h, b: (b, h, n, 0, 0))


def _state_block(K, V, index):
  """Block of the [B, H, N, K, V] chunk states in a chunk kernel; `index` maps the tile to a (K, V) block."""
  return pl.BlockSpec((None, None, None, K, V), lambda t, n, h, b: (b, h, n, *index(t)))


def _scan_specs(T, N, config):
  """Blocks of a scan kernel: all tokens of a K tile, of a V tile, all chunk states of a tile, one state of a tile."""
  bk, bv = config.block_k, config.block_v
  return (pl.BlockSpec((None, T, None, bk), lambda i, j, h, b: (b, 0, h, i)),
          pl.BlockSpec((None, T, None, bv), lambda i, j, h, b: (b, 0, h, j)),
          pl.BlockSpec((None, None, N, bk, bv), lambda i, j, h, b: (b, h, 0, i, j)),
          pl.BlockSpec((None, None, bk, bv), lambda i, j, h, b: (b, h, i, j)))


def _launch(kernel, name, grid, in_specs, out_specs, out_shape, config):
  return triton_blocks.launch(kernel, name=name, grid=grid, in_specs=in_specs, out_specs=out_specs,
                              out_shape=out_shape, num_warps=config.num_warps, num_stages=config.num_stages)


def _scores(q, k, g, scale, config):
  B, T, H, K = q.shape
  N, C = T // config.chunk, config.chunk
  whole = _chunk(config, K, tiled=False)
  return _launch(functools.partial(_scores_kernel, scale=scale, block_k=config.block_k), "gla_scores", (1, N, H, B),
                 [whole] * 3, _scores_block(config), jax.ShapeDtypeStruct((B, H, N, C, C), _operand(q.dtype)),
                 config)(q, k, g)


def _states(k, v, g, initial_state, config):
  B, T, H, K = k.shape
  V, N = v.shape[3], T // config.chunk
  keys, values, states, state = _scan_specs(T, N, config)
  out_shape = (jax.ShapeDtypeStruct((B, H, N, K, V), _operand(k.dtype)),
               jax.ShapeDtypeStruct((B, H, K, V), jnp.float32))
  return _launch(functools.partial(_states_kernel, chunk=config.chunk), "gla_states",
                 (K // config.block_k, V // config.block_v, H, B), [keys, values, keys, state], (states, state),
                 out_shape, config)(k, v, g, initial_state)


def _dstates(q, do, g, dfinal_state, scale, config):
  B, T, H, K = q.shape
  V, N = do.shape[3], T // config.chunk
  keys, values, states, state = _scan_specs(T, N, config)
  out_shape = (jax.ShapeDtypeStruct((B, H, N, K, V), _operand(q.dtype)),
               jax.ShapeDtypeStruct((B, H, K, V), jnp.float32))
  return _launch(functools.partial(_dstates_kernel, scale=scale, chunk=config.chunk), "gla_dstates",
                 (K // config.block_k, V // config.block_v, H, B), [keys, values, keys, state], (states, state),
                 out_shape, config)(q, do, g, dfinal_state)


def _output(q, g, v, scores, states, scale, config):
  B, T, H, K = q.shape
  V = v.shape[3]
  keys, values = _chunk(config, K, tiled=False), _chunk(config, config.block_v, tiled=True)
  state = _state_block(K, config.block_v, lambda t: (0, t))
  return _launch(functools.partial(_output_kernel, scale=scale, block_k=config.block_k), "gla_output",
                 (V // config.block_v, T // config.chunk, H, B), [keys, keys, values, _scores_block(config), state],
                 values, jax.ShapeDtypeStruct(v.shape, v.dtype), config)(q, g, v, scores, states)


def _dscores(do, v, config):
  B, T, H, V = v.shape
  N, C = T // config.chunk, config.chunk
  return _launch(functools.partial(_dscores_kernel, loop_v=config.loop_v), "gla_dscores", (1, N, H, B),
                 [_chunk(config, V, tiled=False)] * 2, _scores_block(config),
                 jax.ShapeDtypeStruct((B, H, N, C, C), _operand(v.dtype)), config)(do, v)


def _dqkg(q, k, g, v, do, dscores, states, dstates, scale, config):
  B, T, H, K = q.shape
  V = v.shape[3]
  keys, values = _chunk(config, config.block_k, tiled=True), _chunk(config, V, tiled=False)
  state = _state_block(config.block_k, V, lambda t: (t, 0))
  out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, g)]
  return _launch(functools.partial(_dqkg_kernel, scale=scale, loop_v=config.loop_v), "gla_dqkg",
                 (K // config.block_k, T // config.chunk, H, B),
                 [keys, keys, keys, values, values, _scores_block(config), state, state], [keys] * 3, out_shape,
                 config)(q, k, g, v, do, dscores, states, dstates)


def _dv(k, g, do, scores, dstates, config):
  B, T, H, K = k.shape
  V = do.shape[3]
  keys, values = _chunk(config, K, tiled=False), _chunk(config, config.block_v, tiled=True)
  state = _state_block(K, config.block_v, lambda t: (0, t))
  return _launch(functools.partial(_dv_kernel, block_k=config.block_k), "gla_dv",
                 (V // config.block_v, T // config.chunk, H, B), [keys, keys, values, _scores_block(config), state],
                 values, jax.ShapeDtypeStruct(do.shape, do.dtype), config)(k, g, do, scores, dstates)
