"""The delta rule, gated or not, as Pallas kernels for the Triton backend, with their `custom_vjp`.

Per head, for a chunk of C tokens with entry state S and exit state S', `upto`, `after`, `total` and D as in
`kernels.scalar_decay`, b = diag(beta), and Y of `kernels.delta_rule.inverse` (arXiv:2406.06484, section 3.2):

  P = scale D * (Q K^T)        R = V - upto * (K S)         e = R - (D * Y) (b R)         V' = b e
  O = P V' + scale upto * (Q S)                             S' = total S + K^T (after * V')

Row i of e is the error that token i corrects: its value less what the state holds under its key by then. Backward,

  dV' = P^T dO + after * (K dS')        f = dV' - (D * Y)^T (b dV')        dV = b f
  dS = total dS' + Q^T (scale upto * dO) - K^T (upto * dV)                 dbeta_i = f_i . e_i
  dP = dO V'^T        E = -dV V'^T        (scale D * dP on and below the diagonal, D * E below it)
  dQ = dP K + scale upto * (dO S^T)     dK = dP^T Q + E K + E^T K + after * (V' dS'^T) - upto * (dV S^T)

No gradient passes through the inverse by itself: -T^T dT T^T is an outer product of vectors that are there anyway.
e takes the place of v for the backward pass, so that the gradients need no inverse, and chunks of any size: the scans
run in chunks of C tokens and keep the state every `span` tokens, the length of a chunk of gradients.

The scans hold the transposed state S^T of a tile of V's columns in registers. Every product on the way from one state
to the next has what was just computed on its left, where it stays in registers, and keys, queries and Y on its right.
`normalize_qk` multiplies the rows of the products by 1 / norm; q and k are never written again.

| pass | kernel | reads | writes | bytes a token-head at K = V = 128, bfloat16, C = 32, span 64 |
| forward | `delta_rule_inverse` | k, beta, g | D * Y | 352 |
| forward | `delta_rule_scan` | q, k, v, D * Y, beta, g | o, final state; for gradients e, S of each span | 1120 + 768 |
| backward | `delta_rule_reverse` | q, k, do, D * Y, beta, g | -f, dS' of each span, d initial_state | 1120 + 512 |
| backward | `delta_rule_gradients` | q, k, e, do, f, beta, g, S, dS' | dq, dk, dv, dbeta, dg | 3072 |

Where few heads leave the GPU idle, the sequence is cut into pieces. A piece maps its entry state to Phi S + Psi; the
kernel `delta_rule_piece` finds both as the exit state from the columns [0, I] without outputs, and the pieces' entry
states follow exactly. Backward a piece's map is Phi^T, so that only the columns of the update are scanned.

Residuals: q, k, e, beta, the gates, D * Y (4 C bytes a token-head) and the states (2 K V / span): 128 + 512 bytes at K
= V = 128; of each piece Phi. bfloat16 inputs use bfloat16 operands and states; float32 inputs keep float32. Where keys
are alike, what Y and its transpose multiply all but cancels, so the products with Y, and P^T dO, take 16 bits of their
operands (of P in P V' too, where K is at most 16); so does what is added to a state, because a beta near 2 lets no
error fade. float16 inputs run as float32: operands of bfloat16 would change which keys are alike. A gate's gradient is
the flow through it, as in `kernels.linear_attention`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels import chunks, split, triton_blocks, tuned
from kernels.delta_rule.inverse import SIZE, inverse
from kernels.scalar_decay import between, decay_of, decay_of_sums, gate_block, weigh
from kernels.triton_blocks import halves, operand, rows_and_columns, tile_width
from kernels.tuned import Tile


@dataclasses.dataclass(frozen=True)
class Config:
  """Tokens a chunk of the scans, tokens of a chunk of gradients (a multiple), K columns of one product in the scans, V
  columns of one product of gradients, and the tile of each kernel: V columns of the scans, K columns of a program of
  gradients."""

  chunk: int
  span: int
  depth: int
  width: int
  scan: Tile
  reverse_scan: Tile
  gradients: Tile


def heuristic(K: int, V: int, dtype, chunk_size: int | None = None) -> Config:
  """The answer for what is not listed: tiles for the smallest supported GPU, slow on larger ones."""
  # Neighbours differ where a compiler spilled.
  wide = dtype == jnp.float32
  chunk = chunk_size or (16 if wide else 32)
  block, warps = tile_width(V, 16 if wide or K > 128 else 32), 8 if wide and K > 64 else 4
  stages = 3 if K <= 32 and (wide or V < 128) or wide and K == 64 and chunk < 64 else 2
  scan = Tile(64 if K <= 16 and V >= 128 and not wide else block, warps, stages)
  reverse_scan = Tile(block, warps, 3 if K * block <= (512 if wide else 2048) else 1 if wide and K == 128 else 2)
  gradients = Tile(tile_width(K, 16 if wide and V <= 16 else 32), 4, 1 if wide else 2)
  depth, width = 32 if wide and K > 64 else 64, 16 if wide or K <= 32 or V == 256 else 32
  return Config(chunk, chunk, depth, width, scan, reverse_scan, gradients)


def candidates(K: int, V: int, dtype) -> dict[str, list]:
  """The values worth timing for each field, around those that were fastest on an H100.

  Chunks of 16 tokens round the state so often that bfloat16 misses the bounds where keys are alike.
  """
  wide = dtype == jnp.float32
  tiles = lambda size, *values: list(dict.fromkeys(Tile(tile_width(size, w), *launch) for w, *launch in values))
  if wide:
    scan, keys = tiles(V, (16, 4, 2), (32, 4, 2), (32, 8, 2)), tiles(K, (16, 4, 1), (32, 4, 1), (32, 8, 1))
  else:
    scan = tiles(V, (64, 4, 3), (64, 4, 2), (128, 8, 3), (32, 4, 2), (32, 4, 3))
    keys = tiles(K, (64, 4, 1), (64, 4, 2), (64, 4, 3), (128, 8, 1), (128, 8, 2), (128, 8, 3), (64, 8, 2), (32, 4, 2))
  return {"scan": scan, "reverse_scan": scan, "width": [16] if wide else [32, 64, 128], "gradients": keys,
          "depth": sorted({32 if wide else 64, tile_width(K)}), "span": [16, 32] if wide else [32, 64],
          "chunk": [16] if wide else [32]}


def supports(q, k, v, beta, log_decay=None, *, chunk_size=None) -> str | None:
  """Why these inputs cannot run here, or None."""
  return triton_blocks.declines(q, chunk_size)


def delta_rule(q, k, v, beta, log_decay, initial_state, *, scale, normalize_qk, chunk_size=None):
  """See `kernels.delta_rule`. Heads are equal, the state is given, segments are already resets in `log_decay`."""
  if q.dtype == jnp.float16:
    wide = delta_rule(*(chunks.wide(x) for x in (q, k, v)), beta, log_decay, initial_state, scale=scale,
                      normalize_qk=normalize_qk, chunk_size=chunk_size)
    return wide[0].astype(v.dtype), wide[1]
  K, V = q.shape[3], v.shape[3]
  gate = tuned.gate_key(log_decay)
  config = None if chunk_size else tuned.lookup("delta_rule", Config, gate=gate, K=K, V=V, dtype=q.dtype)
  config = config or heuristic(K, V, q.dtype, chunk_size)
  return configured(q, k, v, beta, log_decay, initial_state, scale=scale, normalize_qk=normalize_qk, config=config)


def configured(q, k, v, beta, log_decay, initial_state, *, scale, normalize_qk=False, config):
  """The op under an explicit configuration."""
  (B, T, H, K), V = q.shape, v.shape[3]
  dK, dV = tile_width(K) - K, -V % max(config.scan.block, config.reverse_scan.block, min(config.width, tile_width(V)))
  # A piece's map takes K more columns: with a program a multiprocessor, cutting loses.
  pieces = split.pieces(B * H * (V + dV) // config.scan.block, T, config.span, enough=128)
  fold = functools.partial(split.fold, count=pieces, chunk=config.span)
  pad = lambda x, extra: fold(jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, extra))))
  state = jnp.pad(initial_state, ((0, 0), (0, 0), (0, dK), (0, dV)))
  output, final_state = _delta_rule(pad(q, dK), pad(k, dK), pad(v, dV), fold(beta), None if log_decay is None
                                    else fold(log_decay), state, scale, normalize_qk, config)
  return split.unfold(output, B)[:, :T, :, :V], final_state[:, :, :K, :V]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _delta_rule(q, k, v, beta, log_decay, initial_state, scale, normalize_qk, config):
  arrays = _arrays(q, k, beta, log_decay, normalize_qk, config)
  output, final_state, _ = _scan(arrays, v, initial_state, scale, config, save=False)
  return output, final_state


def _forward(q, k, v, beta, log_decay, initial_state, scale, normalize_qk, config):
  arrays = _arrays(q, k, beta, log_decay, normalize_qk, config)
  output, errors, states, final_state, kept = _scan(arrays, v, initial_state, scale, config)
  return (output, final_state), (arrays, errors, states, kept)


def _backward(scale, normalize_qk, config, residuals, cotangents):
  arrays, errors, states, kept = residuals
  do, dfinal_state = cotangents
  f, dstates, dinitial_state, _ = _scan(arrays, do, dfinal_state, scale, config, reverse=True, kept=kept)
  dq, dk, dv, dbeta, dlog_decay = _gradients(arrays, errors, do, f, states, dstates, scale, config)
  return dq, dk, dv, dbeta, dlog_decay, dinitial_state


_delta_rule.defvjp(_forward, _backward, optimize_remat=True)


@dataclasses.dataclass
class _Arrays:
  """What every kernel reads; `y` to `k_norm` as `inverse` gives them."""

  q: jax.Array
  k: jax.Array
  y: jax.Array
  beta: jax.Array
  log_decay: jax.Array | None
  sums: jax.Array | None
  q_norm: jax.Array | None
  k_norm: jax.Array | None

  def rows(self, gates):
    """The vectors of a token, those that there are."""
    return [x for x in (self.beta, gates, self.q_norm, self.k_norm) if x is not None]


jax.tree_util.register_dataclass(_Arrays)


def _arrays(q, k, beta, log_decay, normalize_qk, config):
  y, sums, q_norm, k_norm = inverse(q, k, beta, log_decay, normalize_qk, config.chunk)
  return _Arrays(q, k, y, beta, log_decay, sums, q_norm, k_norm)


# Kernel bodies. A ref holds one head: all T tokens or one chunk of them.


def _take_rows(refs, vectors, gated):
  """Splits off the refs of `vectors` a token: that of the gates or None, the others, and what is left."""
  beta, *others = refs[:vectors]
  gate = others.pop(0) if gated else None
  return gate, (beta, *others), list(refs[vectors:])


def _rows(refs, rows):
  """beta, and what multiplies the rows of q and k, None where nothing does."""
  beta, *norms = (ref[rows] for ref in refs)
  return beta, *(norms or (None, None))


def _columns(x, *weights):
  """Columns of x times each weight that there is."""
  for weight in weights:
    if weight is not None:
      x = x * (weight if jnp.ndim(weight) == 0 else weight[None])
  return x


def _weights(x, row_weight, column_weight):
  """`x [C, C]` with its rows and columns multiplied."""
  return _columns(weigh(x, row_weight), column_weight)


def _parts(x, dtype):
  """float32 `x` as operands of 16 significant bits together where products take bfloat16."""
  return [x] if dtype == jnp.float32 else halves(x)


def _add_product(total, a, b, dot, dtype):
  """`total + a @ b` of float32 `a` and `b` in parts; the product of the last parts is left out."""
  a = _parts(a, dtype)
  for i, x in enumerate(a):
    for y in b[:len(a) - i]:
      total += dot(x, y)
  return total


def _scan_kernel(q_ref, k_ref, v_ref, y_ref, *refs, vectors, gated, values, save, reverse, scale, chunk, span, depth,
                 start, dot):
  """Output and exit state; or, with `values`, only exit states of pieces, whose columns after them stand for a map."""
  sums_ref, row_refs, refs = _take_rows(refs, vectors, gated)
  C, dtype, (T, K), block, every = chunk, operand(k_ref.dtype), k_ref.shape, v_ref.shape[1], span // chunk
  tiles = [pl.ds(i * depth, depth) for i in range(K // depth)]
  # A map's columns are scanned forward alone: the first column of this program in the identity.
  first = None if values is None or reverse else pl.program_id(0) * block - values
  if values is None:
    initial_ref, o_ref = refs.pop(0), refs.pop(0)
    initial = tuple(initial_ref[tile, :].T for tile in tiles)
  else:
    initial = tuple(jnp.zeros((block, depth), jnp.float32) if reverse else _identity(first, i * depth, (block, depth))
                    for i in range(K // depth))
  *saved_refs, final_ref = refs
  outputs = values is None and not reverse
  # The queries' part waits until e needs no registers: always in float32, and beside gates if it is one product.
  early = outputs and dtype != jnp.float32 and (len(tiles) > 1 or not gated)

  def step(i, state):
    n = T // C - 1 - i if reverse else i
    rows = pl.ds(n * C, C)
    decays = lambda: decay_of_sums(sums_ref[rows], sums_ref[n * C + C - 1]) if gated else decay_of(None, C)
    decay = decays()
    beta, q_norm, k_norm = _rows(row_refs, rows)
    y = [_load_lower(y_ref.at[n, jnp.int32(i)]) for i in range(y_ref.shape[1])]
    v, y = v_ref[rows, :].T, y if reverse else [part.T for part in y]
    if first is not None:
      v = jnp.where(first < 0, v, jnp.zeros_like(v))
    save_now = save and ((every == 1) | (jax.lax.rem(n, every) == (every - 1 if reverse else 0)))
    load = lambda name, j: (q_ref if name == "q" else k_ref)[rows, pl.ds(j * depth, depth)].astype(dtype)
    # Read once a step. Wider keys, and beside gates those of narrower products, spill when they are held.
    if dtype != jnp.float32 and K <= 128 and (not gated or depth == 128):
      load = functools.cache(load)

    def scores(a, b):
      product = lambda j: dot(load(a, j), load(b, j).T)
      if dtype == jnp.float32:  # unrolled, its addresses take the registers that the operands' pieces need
        return jax.lax.fori_loop(0, len(tiles), lambda j, found: found + product(j), jnp.zeros((C, C), jnp.float32))
      return sum(map(product, range(len(tiles))))

    # P comes before the products with the state, beside which there are no registers for it.
    if reverse:
      p = scale * _weights(between(decay, C, transposed=False) * scores("q", "k"), q_norm, k_norm)
      p = _parts(p, dtype)
    elif outputs:
      p = scale * _weights(between(decay, C, transposed=True) * scores("k", "q"), k_norm, q_norm)
      p = _parts(p, dtype) if K <= 16 else [p.astype(dtype)]  # over few channels the output's two terms cancel more
    k_held, q_held = 0.0, 0.0
    for j, s in enumerate(state):
      dot.barrier(dtype)
      s = s.astype(dtype)
      k_held += dot(s, load("k", j).T)
      if early:
        q_held += dot(s, load("q", j).T)
    if reverse:
      new = _columns(k_held, decay.after, k_norm)
      new = sum((dot(v.astype(dtype), part) for part in p), start=new)
      new = _add_product(-new, _columns(new, beta), y, dot, dtype)
      if values is None:
        o_ref[rows, :] = new.astype(o_ref.dtype).T
      keys = [("q", _columns(v.astype(jnp.float32), decay.upto, scale, q_norm)),
              ("k", _columns(new, beta, decay.upto, k_norm))]
    else:
      new = v.astype(jnp.float32) - _columns(k_held, decay.upto, k_norm)
      new = _add_product(new, _columns(-new, beta), y, dot, dtype)
      if save:
        saved_refs[0][rows, :] = new.astype(saved_refs[0].dtype).T
      new = _columns(new, beta)
      if outputs:
        for j, s in enumerate(() if early else state):
          dot.barrier(dtype)
          q_held += dot(s.astype(dtype), load("q", j).T)
        o = sum((dot(new.astype(dtype), part) for part in p), start=_columns(q_held, decay.upto, scale, q_norm))
        if gated:
          o_ref[rows, :] = o.astype(o_ref.dtype).T
      decay = decays()  # read again: kept since the beginning of the step, it spills
      keys = [("k", _columns(new, decay.after, k_norm))]
    # The state is what every later token reads: what is added to it takes 16 bits too.
    keys = [(name, part) for name, x in keys for part in _parts(x, dtype)]
    left = []
    for j, s in enumerate(state):
      dot.barrier(dtype)
      if save:
        pl.when(save_now)(functools.partial(_store, saved_refs[-1], (jax.lax.div(n, every), slice(None), tiles[j]), s))
      left.append(sum((dot(x, load(name, j)) for name, x in keys), start=_columns(s, decay.total)))
    if outputs and not gated:  # the next state need not wait for the output's way through shared memory
      o_ref[rows, :] = o.astype(o_ref.dtype).T
    return tuple(left)

  state = jax.lax.fori_loop(start, T // C, step, initial)
  for tile, s in zip(tiles, state):
    final_ref[tile, :] = s.T


def _load_lower(ref):
  """One part of D * Y, whose blocks above the diagonal are neither written nor read."""
  row, column = rows_and_columns(ref.shape[0])
  return plt.load(ref, mask=jax.lax.div(row, SIZE) >= jax.lax.div(column, SIZE), other=0.0)


def _store(ref, index, x):
  ref[index] = x.astype(ref.dtype)


def _identity(row, column, shape):
  """A block of the identity matrix; zeros above it."""
  rows, columns = (jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in range(2))
  return jnp.where(rows + row == columns + column, 1.0, 0.0)


def _gradients_kernel(q_ref, k_ref, e_ref, do_ref, f_ref, *refs, vectors, gated, scale, width, whole, dot):
  """`f_ref` holds -f. The way through a norm needs `whole` rows of keys."""
  gate_ref, row_refs, refs = _take_rows(refs, vectors, gated)
  states_ref, dstates_ref, dq_ref, dk_ref, dbeta_ref, *dg_ref, dv_ref = refs
  (C, block), dtype = k_ref.shape, operand(k_ref.dtype)
  through_norm = _through_norm if whole else lambda x, norm, dx: dx
  f32 = lambda x: x.astype(jnp.float32)
  row, column = rows_and_columns(C)
  first = pl.program_id(0) == 0
  decay = decay_of(gate_ref[...] if gated else None, C)
  beta, q_norm, k_norm = _rows(row_refs, slice(None))
  square, wide = jnp.zeros((C, C), jnp.float32), jnp.zeros((C, block), jnp.float32)

  def add_tile(i, carry):
    dp, x, dq, dk_entry, dk_exit, through = carry
    tile = pl.ds(i * width, width)
    e, do, f = e_ref[:, tile], do_ref[:, tile].astype(dtype), f_ref[:, tile]
    state, dstate = states_ref[tile, :], dstates_ref[tile, :]

    @pl.when(first)
    def _():
      dv_ref[:, tile] = weigh(f32(f), -beta).astype(dv_ref.dtype)

    if gated:
      through += jnp.sum(f32(state) * f32(dstate))
    return (dp + dot(do, e.T), x + dot(f, e.T), dq + dot(do, state), dk_entry + dot(f, state),
            dk_exit + dot(e, dstate), through)

  dp, x, dq, dk_entry, dk_exit, through = jax.lax.fori_loop(
      0, e_ref.shape[1] // width, add_tile, (square, square, wide, wide, wide, jnp.float32(0)))
  # Before the loop these loads would wait beside its own, but the registers are worth more.
  q, k = q_ref[...].astype(dtype), k_ref[...].astype(dtype)
  dbeta_ref[...] = -jnp.sum(jnp.where(row == column, x, 0.0), axis=1)
  d = between(decay, C, transposed=False)
  weight = beta if k_norm is None else beta * k_norm
  dp = scale * _weights(d * dp, q_norm, weight)
  x = jnp.where(row > column, _weights(d * x, weight, weight), 0.0).astype(dtype)
  dq, dk_entry = weigh(dq, decay.upto, scale, q_norm), weigh(dk_entry, decay.upto, weight)
  dk_exit = weigh(dk_exit, decay.after, weight)
  if not gated:
    dp, x = _computed_once(dp.astype(dtype), x)
    dq += dot(dp, k)
    dk = dk_entry + dk_exit + dot(dp.T, q) + dot(x, k) + dot(x.T, k)
    dq_ref[...] = through_norm(f32(q), q_norm, dq).astype(dq_ref.dtype)
    dk_ref[...] = through_norm(f32(k), k_norm, dk).astype(dk_ref.dtype)
    return
  # The pairs (i, i) come last: no gate lies between them, so the gates' gradient must not see them even as rounding.
  # Pairs on one side of a gate cancel to float32 rounding, because both their terms are products of the same operands.
  diagonal = jnp.sum(jnp.where(row == column, dp, 0.0), axis=1)[:, None]
  dp, x = _computed_once(jnp.where(row > column, dp, 0.0).astype(dtype), x)
  # In this order nothing spills.
  dk_rows = dot(x, k) + dk_entry
  inside = jnp.sum(f32(k) * dk_rows, axis=1)
  dq += dot(dp, k)
  inside += jnp.sum(f32(q) * dq, axis=1)
  dq_ref[...] = through_norm(f32(q), q_norm, dq + diagonal * f32(k)).astype(dq_ref.dtype)
  dk_columns = dot(dp.T, q) + dot(x.T, k)
  inside -= jnp.sum(f32(k) * dk_columns, axis=1)
  leaving = jnp.sum(f32(k) * dk_exit, axis=1)
  dk = dk_rows + dk_columns + dk_exit + diagonal * f32(q)
  dk_ref[...] = through_norm(f32(k), k_norm, dk).astype(dk_ref.dtype)
  passing = jnp.where(row >= column, inside[:, None], leaving[:, None])
  dg_ref[0][...] = decay.total * through + jnp.sum(passing, axis=0)


def _computed_once(*arrays):
  """The arrays as they are, of which the transposes are read too.

  XLA moves a transpose in front of the elementwise operations that made its operand, and so computes those twice. It
  moves none into a branch: this one, which is always taken.
  """
  return jax.lax.cond(pl.program_id(0) >= 0, lambda: arrays, lambda: tuple(map(jnp.zeros_like, arrays)))


def _through_norm(x, norm, dx):
  """The gradient of rows x from `dx`, in which 1 / norm counts as a constant."""
  return dx if norm is None else dx - (norm * norm * jnp.sum(x * dx, axis=-1))[..., None] * x


# Launches. A scan has one program a (V tile, head, row of the batch), gradients one a (K tile, chunk, head, row).


def _scan(arrays, z, initial_state, scale, config, *, save=True, reverse=False, kept=None):
  """Output (-f), if `save` the errors (not in reverse) and the states at the spans' ends, the final state, and `kept`,
  the map Phi of each piece if there are several: found forward, given in reverse."""
  run = functools.partial(_launch_scan, arrays, z, scale=scale, config=config, reverse=reverse)
  B, V = initial_state.shape[0], z.shape[3]
  if z.shape[0] > B:
    (final,) = run(None, save=False)
    update, kept = final[..., :V], jnp.swapaxes(kept, -1, -2) if reverse else final[..., V:V + initial_state.shape[2]]
    initial_state = _entry_states(initial_state, kept, update, reverse)
  *found, final = run(initial_state, save=save)
  return *found, split.exit_state(final, B, reverse), kept


def _entry_states(initial_state, kept, update, reverse):
  """State that enters each piece, when a piece turns S into `kept` S + `update`."""
  B = initial_state.shape[0]
  kept, update = (x.reshape(B, -1, *x.shape[1:]) for x in (kept, update))
  states, count = [initial_state], kept.shape[1]
  for p in reversed(range(1, count)) if reverse else range(count - 1):
    states.append(chunks.einsum("bhij,bhjv->bhiv", kept[:, p], states[-1]) + update[:, p])
  return jnp.stack(states[::-1] if reverse else states, axis=1).reshape(-1, *initial_state.shape[1:])


def _launch_scan(arrays, z, initial_state, *, scale, config, reverse, save):
  (B, T, H, V), K = z.shape, arrays.k.shape[3]
  tile = config.reverse_scan if reverse else config.scan
  block, C, N, dtype = min(tile.block, V), config.chunk, T // config.span, operand(arrays.k.dtype)
  piece = initial_state is None
  columns, last = pl.cdiv(V + K * (piece and not reverse), block) * block, V // block - 1  # tiles are not masked
  keys = pl.BlockSpec((None, T, None, K), lambda t, h, b: (b, 0, h, 0))
  values = pl.BlockSpec((None, T, None, block), lambda t, h, b: (b, 0, h, jnp.minimum(t, last) if piece else t))
  whole = pl.BlockSpec((None, None, *arrays.y.shape[2:]), lambda t, h, b: (b, h, 0, 0, 0, 0))
  state = pl.BlockSpec((None, None, K, block), lambda t, h, b: (b, h, 0, t))
  states = pl.BlockSpec((None, None, N, block, K), lambda t, h, b: (b, h, 0, t, 0))
  vectors, errors = arrays.rows(arrays.sums), save and not reverse
  name = "piece" if piece else "reverse" if reverse else "scan"
  return triton_blocks.launch(
      functools.partial(_scan_kernel, vectors=len(vectors), gated=arrays.log_decay is not None,
                        values=V if piece else None, save=save, reverse=reverse, scale=scale, chunk=C,
                        span=config.span, depth=min(config.depth, K)),
      name=f"delta_rule_{name}", grid=(columns // block, H, B), loop=True,
      in_specs=[keys, keys, values, whole, *[gate_block(x, T, chunked=False)[1][0] for x in vectors],
                *[state] * (not piece)],
      out_specs=[*[values] * (not piece), *[values] * errors, *[states] * save, state],
      out_shape=[*[jax.ShapeDtypeStruct(z.shape, dtype if reverse else z.dtype)] * (not piece),
                 *[jax.ShapeDtypeStruct(z.shape, dtype)] * errors,
                 *[jax.ShapeDtypeStruct((B, H, N, V, K), dtype)] * save,
                 jax.ShapeDtypeStruct((B, H, K, columns), jnp.float32)],
      num_warps=tile.num_warps, num_stages=tile.num_stages)(
          arrays.q, arrays.k, z, arrays.y, *vectors, *[] if piece else [initial_state])


def _gradients(arrays, errors, do, f, states, dstates, scale, config):
  """dq, dk, dv, dbeta and d log_decay, of which each K tile has its part."""
  (B, T, H, K), V = arrays.k.shape, do.shape[3]
  C, tile = config.span, config.gradients
  block = min(tile.block, K)
  keys = pl.BlockSpec((None, C, None, block), lambda t, n, h, b: (b, n, h, t))
  values = pl.BlockSpec((None, C, None, V), lambda t, n, h, b: (b, n, h, 0))
  state = pl.BlockSpec((None, None, None, V, block), lambda t, n, h, b: (b, h, n, 0, t))
  token = pl.BlockSpec((None, None, C, None), lambda t, n, h, b: (t, b, n, h))
  vectors, gated = arrays.rows(arrays.log_decay), arrays.log_decay is not None
  normalized, whole = arrays.q_norm is not None, block == K
  dtype = jnp.float32 if normalized and not whole else arrays.k.dtype
  dq, dk, dbeta, *dg, dv = triton_blocks.launch(
      functools.partial(_gradients_kernel, vectors=len(vectors), gated=gated, scale=scale, width=min(config.width, V),
                        whole=whole),
      name="delta_rule_gradients", grid=(K // block, T // C, H, B),
      in_specs=[keys, keys, values, values, values, *[gate_block(x, C, chunked=True)[1][0] for x in vectors],
                state, state],
      out_specs=[keys, keys, *[token] * (1 + gated), values],
      out_shape=[*[jax.ShapeDtypeStruct(arrays.k.shape, dtype)] * 2,
                 *[jax.ShapeDtypeStruct((K // block, B, T, H), jnp.float32)] * (1 + gated),
                 jax.ShapeDtypeStruct(do.shape, do.dtype)],
      num_warps=tile.num_warps, num_stages=tile.num_stages)(
          arrays.q, arrays.k, errors, do, f, *vectors, states, dstates)
  if normalized and not whole:
    dq, dk = (_through_norm(x.astype(jnp.float32), norm, dx).astype(x.dtype)
              for x, norm, dx in ((arrays.q, arrays.q_norm, dq), (arrays.k, arrays.k_norm, dk)))
  return dq, dk, dv, dbeta[0], jnp.sum(dg[0], axis=0) if gated else None
