"""The delta rule, gated or not, as Pallas kernels for the Triton backend, with their `custom_vjp`.

Per head, for a chunk of C tokens with entry state S and exit state S', `upto`, `after`, `total` and D as in
`kernels.scalar_decay`, and a_t k_t S_{t-1} what the state holds under a key (arXiv:2406.06484, section 3.2):

  T = (I + strictly lower part of diag(beta) K K^T)^-1       M = D * T * beta_j        P = scale D * (Q K^T)
  V' = M (V - upto * (K S))        O = P V' + scale upto * (Q S)        S' = total S + K^T (after * V')

T knows no gate: a decay multiplies its entries, because along every path from token j to token i the gates are the
same. Row i of V' is beta_i times the error that token i corrects. Backward, with dV = M^T dV',

  dV' = P^T dO + after * (K dS')        dS = total dS' + Q^T (scale upto * dO) - K^T (upto * dV)
  dP = dO V'^T        E = -dV V'^T        (scale D * dP on and below the diagonal, D * E below it)
  dQ = dP K + scale upto * (dO S^T)     dK = dP^T Q + E K + E^T K + after * (V' dS'^T) - upto * (dV S^T)
  dbeta_i = dV_i . V'_i / beta_i^2

No gradient passes through the inverse by itself: -T^T dT T^T is an outer product of vectors that are there anyway. For
dbeta the backward pass takes a beta of 0 as 2^-40, and clears what else that would change. `normalize_qk` multiplies
the rows of the products by 1 / norm; q and k are never written again.

| pass | kernel | reads | writes | bytes a token-head at K = V = 128, bfloat16, C = 64 |
| forward | `delta_rule_inverse` | k, beta | T | 512 |
| forward | `delta_rule_scan` | q, k, v, T, beta, g | o, final state; for a gradient S of each chunk | 1280 + 512 |
| backward | `delta_rule_reverse` | q, k, do, T, beta, g | dv, dS' of each chunk, d initial_state | 1280 + 512 |
| backward | `delta_rule_gradients` | q, k, v, do, dv, T, beta, g, S, dS' | dq, dk, dbeta, dg; 0 in dv | 3072 |

Where few heads leave the GPU idle, the sequence is cut into pieces. A piece maps its entry state to Phi S + Psi; the
kernel `delta_rule_piece` finds both as the exit state from the columns [0, I] without outputs, and the pieces' entry
states follow exactly.

Residuals: q, k, v, beta, the gates, T (4 C bytes a token-head) and the chunk states (2 K V / C): 256 + 512 at K = V =
128. 16-bit inputs use bfloat16 operands and states; float32 inputs keep float32. Where keys are alike, what M and its
transpose multiply all but cancels, so T stays in float32, and P^T dO and the products with M take 16 bits of their
operands. A gate's gradient is the flow through it, as in `kernels.linear_attention`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import chunks, split, triton_blocks, tuned
from kernels.delta_rule.inverse import inverse
from kernels.scalar_decay import between, decay_of, gate_block, weigh
from kernels.triton_blocks import operand, rows_and_columns, tile_width
from kernels.tuned import Tile

LEAST_BETA = 2.0**-40


@dataclasses.dataclass(frozen=True)
class Config:
  """Tokens a chunk, K columns of one product in the scans, V columns of one product of gradients, and the tile of each
  kernel: V columns of the scans, K columns of a program of gradients."""

  chunk: int
  depth: int
  width: int
  scan: Tile
  reverse_scan: Tile
  gradients: Tile


def heuristic(K: int, V: int, dtype, chunk_size: int | None = None) -> Config:
  """The answer for what is not listed: tiles for the smallest supported GPU, slow on larger ones."""
  wide = dtype == jnp.float32
  scan = Tile(16, 8, 3 if wide else 2)
  return Config(chunk_size or (16 if wide else 32), 64, 16, scan, scan, Tile(tile_width(K, 32), 8, 1))


def candidates(K: int, V: int, dtype) -> dict[str, list]:
  """The values worth timing for each field."""
  wide = dtype == jnp.float32
  tiles = lambda size, *values: list(dict.fromkeys(Tile(tile_width(size, w), *launch) for w, *launch in values))
  if wide:
    scan, keys = tiles(V, (16, 4, 1), (32, 4, 1), (32, 8, 1)), tiles(K, (16, 4, 1), (32, 4, 1))
  else:
    scan = tiles(V, (64, 4, 2), (64, 4, 1), (64, 8, 2), (32, 4, 2), (32, 4, 1))
    keys = tiles(K, (128, 8, 1), (128, 8, 2), (64, 4, 1), (64, 8, 1), (64, 8, 2), (32, 4, 1))
  return {"chunk": [16 if wide else 64], "width": [16] if wide else [32, 64],
          "depth": sorted({32 if wide else 64, tile_width(K)}), "scan": scan, "reverse_scan": scan, "gradients": keys}


def supports(q, k, v, beta, log_decay=None, *, chunk_size=None) -> str | None:
  """Why these inputs cannot run here, or None."""
  return triton_blocks.declines(q, chunk_size)


def delta_rule(q, k, v, beta, log_decay, initial_state, *, scale, normalize_qk, chunk_size=None):
  """See `kernels.delta_rule`. Heads are equal, the state is given, segments are already resets in `log_decay`."""
  K, V = q.shape[3], v.shape[3]
  config = None if chunk_size else tuned.lookup("delta_rule", Config, K=K, V=V, dtype=q.dtype)
  config = config or heuristic(K, V, q.dtype, chunk_size)
  return configured(q, k, v, beta, log_decay, initial_state, scale=scale, normalize_qk=normalize_qk, config=config)


def configured(q, k, v, beta, log_decay, initial_state, *, scale, normalize_qk=False, config):
  """The op under an explicit configuration."""
  (B, T, H, K), V = q.shape, v.shape[3]
  dK, dV = tile_width(K) - K, -V % max(config.scan.block, config.reverse_scan.block, min(config.width, tile_width(V)))
  if normalize_qk and K + dK > config.gradients.block:  # its gradient needs whole rows
    q, k, normalize_qk = *(chunks.normalize(chunks.wide(x)).astype(x.dtype) for x in (q, k)), False
  pieces = split.pieces(B * H * (V + dV) // config.scan.block, T, config.chunk)
  fold = functools.partial(split.fold, count=pieces, chunk=config.chunk)
  pad = lambda x, extra: fold(jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, extra))))
  state = jnp.pad(initial_state, ((0, 0), (0, 0), (0, dK), (0, dV)))
  output, final_state = _delta_rule(pad(q, dK), pad(k, dK), pad(v, dV), fold(beta), None if log_decay is None
                                    else fold(log_decay), state, scale, normalize_qk, config)
  return split.unfold(output, B)[:, :T, :, :V], final_state[:, :, :K, :V]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _delta_rule(q, k, v, beta, log_decay, initial_state, scale, normalize_qk, config):
  arrays = _arrays(q, k, beta, log_decay, normalize_qk, config)
  output, _, final_state = _scan(arrays, v, initial_state, scale, config, save=False)
  return output, final_state


def _forward(q, k, v, beta, log_decay, initial_state, scale, normalize_qk, config):
  arrays = _arrays(q, k, beta, log_decay, normalize_qk, config)
  output, states, final_state = _scan(arrays, v, initial_state, scale, config)
  return (output, final_state), (arrays, v, states)


def _backward(scale, normalize_qk, config, residuals, cotangents):
  arrays, v, states = residuals
  do, dfinal_state = cotangents
  dv, dstates, dinitial_state = _scan(arrays, do, dfinal_state, scale, config, reverse=True)
  dq, dk, dbeta, dlog_decay, dv = _gradients(arrays, v, do, dv, states, dstates, scale, config)
  return dq, dk, dv, dbeta, dlog_decay, dinitial_state


_delta_rule.defvjp(_forward, _backward, optimize_remat=True)


@dataclasses.dataclass
class _Arrays:
  """What every kernel reads. `q_norm` and `k_norm` are None, or 1 / norm of each row, `[B, T, H]`."""

  q: jax.Array
  k: jax.Array
  t: jax.Array
  beta: jax.Array
  log_decay: jax.Array | None
  q_norm: jax.Array | None
  k_norm: jax.Array | None

  def rows(self):
    """The vectors of a token, those that there are."""
    return [x for x in (self.beta, self.log_decay, self.q_norm, self.k_norm) if x is not None]


jax.tree_util.register_dataclass(_Arrays)


def _arrays(q, k, beta, log_decay, normalize_qk, config):
  t, q_norm, k_norm = inverse(q, k, beta, normalize_qk, config.chunk)
  return _Arrays(q, k, t, beta, log_decay, q_norm, k_norm)


# Kernel bodies. A ref holds one head: all T tokens or one chunk of them.


@dataclasses.dataclass
class _Rows:
  """The vectors of one chunk: beta, decays, and what multiplies the rows of q and k, None where nothing does."""

  beta: jax.Array
  decay: object
  q_norm: jax.Array | None
  k_norm: jax.Array | None


def _rows(refs, rows, C, gated, backward):
  beta, *others = (ref[rows] for ref in refs)
  if backward:
    beta = jnp.where(_is_zero(beta), LEAST_BETA, beta)
  gate = others.pop(0) if gated else None
  return _Rows(beta, decay_of(gate, C), *(others or (None, None)))


def _is_zero(beta):
  return jnp.abs(beta) < LEAST_BETA


def _weights(x, row_weight, column_weight):
  """`x [C, C]` with its rows and columns multiplied."""
  x = weigh(x, row_weight)
  return x if column_weight is None else x * column_weight[None]


def _values_map(t, rows, C):
  """M of a chunk, in float32."""
  return _weights(between(rows.decay, C, transposed=False) * t, None, rows.beta)


def _careful(dot, a, b, dtype, transposed=False):
  """`a @ b` of float32 operands, or a^T @ b, with 16 significant bits of each where products take bfloat16."""
  turn = lambda x: x.T if transposed else x
  if dtype == jnp.float32:
    return dot(turn(a), b)
  (a, da), (b, db) = _halves(a), _halves(b)
  return dot(turn(a), b) + (dot(turn(da), b) + dot(turn(a), db))


def _halves(x):
  """`x` as a sum of two bfloat16 arrays. The first is cut from the bit pattern: a cast there and back could be
  simplified away."""
  head = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536), jnp.float32)
  return head.astype(jnp.bfloat16), (x - head).astype(jnp.bfloat16)


def _next(state, total, *products):
  return sum(products, start=state if total is None else total * state)


def _scan_kernel(q_ref, k_ref, v_ref, t_ref, *refs, vectors, gated, values, save, reverse, scale, chunk, depth, dot):
  """Output and exit state; or, with `values`, only the exit states of pieces, whose last K columns stand for a map."""
  row_refs, refs = refs[:vectors], list(refs[vectors:])
  C, dtype, (T, K), block = chunk, operand(k_ref.dtype), k_ref.shape, v_ref.shape[1]
  tiles = [pl.ds(i * depth, depth) for i in range(K // depth)]
  held = lambda ref, rows, state: sum(dot(ref[rows, tile].astype(dtype), s) for tile, s in zip(tiles, state))
  if values is None:
    initial_ref, o_ref = refs.pop(0), refs.pop(0)
    initial = tuple(initial_ref[tile, :] for tile in tiles)
  else:
    first = pl.program_id(0) * block - values  # the first column of this program in the identity
    initial = tuple(_identity(i * depth, first, (depth, block)) for i in range(K // depth))
  *states_ref, final_ref = refs

  def step(i, state):
    n = T // C - 1 - i if reverse else i
    rows = pl.ds(n * C, C)
    vectors = _rows(row_refs, rows, C, gated, backward=reverse)
    decay, q_norm, k_norm = vectors.decay, vectors.q_norm, vectors.k_norm
    v, m = v_ref[rows, :].astype(jnp.float32), _values_map(t_ref[n], vectors, C)
    if values is not None:
      v = jnp.where(first < 0, v, 0.0)
    narrow = [s.astype(dtype) for s in state]
    if save:
      for tile, s in zip(tiles, narrow):
        states_ref[0][n, tile, :] = s
    if values is None or reverse:
      p = sum(dot(q_ref[rows, tile].astype(dtype), k_ref[rows, tile].astype(dtype).T) for tile in tiles)
      p = scale * _weights(between(decay, C, transposed=False) * p, q_norm, k_norm)
    if reverse:
      new = _careful(dot, p, v, dtype, transposed=True) + weigh(held(k_ref, rows, narrow), decay.after, k_norm)
      new = o = _careful(dot, m, new, dtype, transposed=True)
      keys = [(q_ref, weigh(v, decay.upto, scale, q_norm)), (k_ref, -weigh(new, decay.upto, k_norm))]
    else:
      new = v - weigh(held(k_ref, rows, narrow), decay.upto, k_norm)
      new = _careful(dot, m, new, dtype)
      keys = [(k_ref, weigh(new, decay.after, k_norm))]
    if values is None:
      if not reverse:
        o = dot(p.astype(dtype), new.astype(dtype)) + weigh(held(q_ref, rows, narrow), decay.upto, scale, q_norm)
      o_ref[rows, :] = o.astype(o_ref.dtype)
    keys = [(ref, x.astype(dtype)) for ref, x in keys]
    return tuple(_next(s, decay.total, *(dot(ref[rows, tile].astype(dtype).T, x) for ref, x in keys))
                 for tile, s in zip(tiles, state))

  state = jax.lax.fori_loop(0, T // C, step, initial)
  for tile, s in zip(tiles, state):
    final_ref[tile, :] = s


def _identity(row, column, shape):
  """A block of the identity matrix; zeros left of it."""
  rows, columns = (jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in range(2))
  return jnp.where(rows + row == columns + column, 1.0, 0.0)


def _gradients_kernel(q_ref, k_ref, v_ref, do_ref, dv_ref, t_ref, *refs, vectors, gated, scale, block, width, dot):
  row_refs, (states_ref, dstates_ref, dq_ref, dk_ref, dbeta_ref, *dg_ref, exact_dv_ref) = refs[:vectors], refs[vectors:]
  zero = _is_zero(row_refs[0][...])
  (C, K), dtype = k_ref.shape, operand(k_ref.dtype)
  f32 = lambda x: x.astype(jnp.float32)
  rows = _rows(row_refs, slice(None), C, gated, backward=True)
  decay, q_norm, k_norm = rows.decay, rows.q_norm, rows.k_norm
  row, column = rows_and_columns(C)
  keys = pl.ds(pl.program_id(0) * block, block)
  m = _values_map(t_ref[...], rows, C)
  square, wide, thin = jnp.zeros((C, C), jnp.float32), jnp.zeros((C, block), jnp.float32), jnp.zeros((C,), jnp.float32)

  def add_tile(i, carry):
    dp, dpt, e, et, dq, dk_exit, dk_entry, products, through = carry
    tile = pl.ds(i * width, width)
    do, dv = do_ref[:, tile].astype(dtype), dv_ref[:, tile].astype(dtype)
    held = sum(dot(k_ref[:, pl.ds(j, block)].astype(dtype), states_ref[pl.ds(j, block), tile])
               for j in range(0, K, block))
    new = _careful(dot, m, f32(v_ref[:, tile]) - weigh(held, decay.upto, k_norm), dtype)
    products += jnp.sum(f32(dv) * new, axis=1)
    new, dv = jnp.where(zero[:, None], 0.0, new).astype(dtype), jnp.where(zero[:, None], 0.0, dv).astype(dtype)
    state, dstate = states_ref[keys, tile], dstates_ref[keys, tile]
    if dg_ref:
      through += jnp.sum(f32(state) * f32(dstate))
    # Transposes get products of their own: a transposed accumulator is miscompiled by some Triton versions.
    return (dp + dot(do, new.T), dpt + dot(new, do.T), e + dot(dv, new.T), et + dot(new, dv.T), dq + dot(do, state.T),
            dk_exit + dot(new, dstate.T), dk_entry + dot(dv, state.T), products, through)

  dp, dpt, e, et, dq_state, dk_exit, dk_entry, products, through = jax.lax.fori_loop(
      0, v_ref.shape[1] // width, add_tile, (square,) * 4 + (wide,) * 3 + (thin, jnp.float32(0)))
  dbeta_ref[...] = products / (rows.beta * rows.beta)
  d, dt = between(decay, C, transposed=False), between(decay, C, transposed=True)
  dp, dpt = scale * _weights(d * dp, q_norm, k_norm), scale * _weights(dt * dpt, k_norm, q_norm)
  e = jnp.where(row > column, -_weights(d * e, k_norm, k_norm), 0.0).astype(dtype)
  et = jnp.where(row < column, -_weights(dt * et, k_norm, k_norm), 0.0).astype(dtype)
  dq_state, dk_exit = weigh(dq_state, decay.upto, scale, q_norm), weigh(dk_exit, decay.after, k_norm)
  dk_entry = -weigh(dk_entry, decay.upto, k_norm)
  q, k = q_ref[:, keys].astype(dtype), k_ref[:, keys].astype(dtype)
  # The pairs (i, i) come last: no gate lies between them, so the gates' gradient must not see them even as rounding.
  # Pairs on one side of a gate cancel to float32 rounding, because both their terms are products of the same operands.
  diagonal = jnp.sum(jnp.where(row == column, dp, 0.0), axis=1)[:, None]
  dq = dot(jnp.where(row > column, dp, 0.0).astype(dtype), k) + dq_state
  dk_rows = dot(e, k) + dk_entry
  dk_columns = dot(jnp.where(row < column, dpt, 0.0).astype(dtype), q) + dot(et, k)
  q, k = f32(q), f32(k)
  if dg_ref:
    inside = jnp.sum(q * dq + k * (dk_rows - dk_columns), axis=1)
    leaving = jnp.sum(k * dk_exit, axis=1)
    passing = jnp.where(column >= row, inside[None, :], leaving[None, :])
    dg_ref[0][...] = decay.total * through + jnp.sum(passing, axis=1)
  dq_ref[...] = _through_norm(q, q_norm, dq + diagonal * k).astype(dq_ref.dtype)
  dk_ref[...] = _through_norm(k, k_norm, dk_rows + dk_columns + dk_exit + diagonal * q).astype(dk_ref.dtype)

  # Other programs may still read what this one clears: it is 2^-40 of what counts there.
  @pl.when((pl.program_id(0) == 0) & (jnp.max(zero.astype(jnp.int32)) == 1))
  def _():
    def clear(i, _):
      tile = pl.ds(i * width, width)
      exact_dv_ref[:, tile] = jnp.where(zero[:, None], 0.0, f32(dv_ref[:, tile])).astype(exact_dv_ref.dtype)

    jax.lax.fori_loop(0, v_ref.shape[1] // width, clear, None)


def _through_norm(x, norm, dx):
  """The gradient of x from `dx`, in which 1 / norm counts as a constant."""
  return dx if norm is None else dx - (norm * norm * jnp.sum(x * dx, axis=1))[:, None] * x


# Launches. A scan has one program a (V tile, head, row of the batch), gradients one a (K tile, chunk, head, row).


def _scan(arrays, z, initial_state, scale, config, *, save=True, reverse=False):
  """Output (dv), entry state of each chunk if `save`, and final state, of pieces that follow each other."""
  run = functools.partial(_launch_scan, arrays, z, scale=scale, config=config, reverse=reverse)
  B, V = initial_state.shape[0], z.shape[3]
  if z.shape[0] > B:
    (final,) = run(None, save=False)
    initial_state = _entry_states(initial_state, final[..., V:], final[..., :V], reverse)
  output, *states, final = run(initial_state, save=save)
  return output, states[0] if save else None, split.exit_state(final, B, reverse)


def _entry_states(initial_state, kept, update, reverse):
  """State that enters each piece, when a piece turns S into `kept` S + `update`."""
  B = initial_state.shape[0]
  kept, update = (x.reshape(B, -1, *x.shape[1:]) for x in (kept, update))
  states, count = [initial_state], kept.shape[1]
  for p in reversed(range(1, count)) if reverse else range(count - 1):
    states.append(jnp.einsum("bhij,bhjv->bhiv", kept[:, p], states[-1], precision="highest") + update[:, p])
  return jnp.stack(states[::-1] if reverse else states, axis=1).reshape(-1, *initial_state.shape[1:])


def _launch_scan(arrays, z, initial_state, *, scale, config, reverse, save):
  (B, T, H, V), K = z.shape, arrays.k.shape[3]
  tile = config.reverse_scan if reverse else config.scan
  block, C, N, dtype = min(tile.block, V), config.chunk, T // config.chunk, operand(arrays.k.dtype)
  piece = initial_state is None
  columns, last = V + K * piece, V // block - 1
  keys = pl.BlockSpec((None, T, None, K), lambda t, h, b: (b, 0, h, 0))
  values = pl.BlockSpec((None, T, None, block), lambda t, h, b: (b, 0, h, jnp.minimum(t, last) if piece else t))
  whole = pl.BlockSpec((None, None, N, C, C), lambda t, h, b: (b, h, 0, 0, 0))
  state = pl.BlockSpec((None, None, K, block), lambda t, h, b: (b, h, 0, t))
  states = pl.BlockSpec((None, None, N, K, block), lambda t, h, b: (b, h, 0, 0, t))
  vectors = arrays.rows()
  name = "piece" if piece else "reverse" if reverse else "scan"
  return triton_blocks.launch(
      functools.partial(_scan_kernel, vectors=len(vectors), gated=arrays.log_decay is not None,
                        values=V if piece else None, save=save, reverse=reverse, scale=scale, chunk=C,
                        depth=min(config.depth, K)),
      name=f"delta_rule_{name}", grid=(-(-columns // block), H, B),
      in_specs=[keys, keys, values, whole, *[gate_block(x, T, chunked=False)[1][0] for x in vectors],
                *[state] * (not piece)],
      out_specs=[*[values] * (not piece), *[states] * save, state],
      out_shape=[*[jax.ShapeDtypeStruct(z.shape, z.dtype)] * (not piece),
                 *[jax.ShapeDtypeStruct((B, H, N, K, V), dtype)] * save,
                 jax.ShapeDtypeStruct((B, H, K, columns), jnp.float32)],
      num_warps=tile.num_warps, num_stages=tile.num_stages)(
          arrays.q, arrays.k, z, arrays.t, *vectors, *[] if piece else [initial_state])


def _gradients(arrays, v, do, dv, states, dstates, scale, config):
  """dq, dk, dbeta, d log_decay, of which each K tile has its part, and dv with exact zeros."""
  (B, T, H, K), V = arrays.k.shape, v.shape[3]
  C, tile = config.chunk, config.gradients
  block = min(tile.block, K)
  keys = pl.BlockSpec((None, C, None, K), lambda t, n, h, b: (b, n, h, 0))
  key_tile = pl.BlockSpec((None, C, None, block), lambda t, n, h, b: (b, n, h, t))
  values = pl.BlockSpec((None, C, None, V), lambda t, n, h, b: (b, n, h, 0))
  square = pl.BlockSpec((None, None, None, C, C), lambda t, n, h, b: (b, h, n, 0, 0))
  state = pl.BlockSpec((None, None, None, K, V), lambda t, n, h, b: (b, h, n, 0, 0))
  token = pl.BlockSpec((None, None, C, None), lambda t, n, h, b: (t, b, n, h))
  vectors, gated = arrays.rows(), arrays.log_decay is not None
  dq, dk, dbeta, *dg, dv = triton_blocks.launch(
      functools.partial(_gradients_kernel, vectors=len(vectors), gated=gated, scale=scale, block=block,
                        width=min(config.width, V)),
      name="delta_rule_gradients", grid=(K // block, T // C, H, B),
      in_specs=[keys, keys, values, values, values, square,
                *[gate_block(x, C, chunked=True)[1][0] for x in vectors], state, state],
      out_specs=[key_tile, key_tile, *[token] * (1 + gated), values], aliases={4: 3 + gated},
      out_shape=[*[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (arrays.q, arrays.k)],
                 *[jax.ShapeDtypeStruct((K // block, B, T, H), jnp.float32)] * (1 + gated),
                 jax.ShapeDtypeStruct(dv.shape, dv.dtype)],
      num_warps=tile.num_warps, num_stages=tile.num_stages)(
          arrays.q, arrays.k, v, do, dv, arrays.t, *vectors, states, dstates)
  return dq, dk, dbeta[0], jnp.sum(dg[0], axis=0) if gated else None, dv
