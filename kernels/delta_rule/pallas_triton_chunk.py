"""One chunk of the delta rule's scans, forward and reversed, as parts of a Pallas kernel body.

Letters as in `README.md` of this folder. The state is S^T, one array per tile of key channels. On the way from one
state to the next, the left operand of each product is the value just computed, still in registers; its right operand is
keys, queries or Y. The order of statements decides what spills.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels.delta_rule.inverse import SIZE
from kernels.delta_rule.pallas_triton_operands import row_weights, weigh_both, weigh_columns
from kernels.scalar_decay import Decay, between, decay_of, decay_of_sums
from kernels.triton_blocks import halves, operand, rows_and_columns

MOST_SHARED_KEYS = 128  # K up to which the keys and queries of a chunk are read once: wider ones spill when held
FEW_KEYS = 16  # K up to which the two terms of O cancel so far that P needs 16 significant bits


@dataclasses.dataclass(frozen=True)
class Scan:
  """Refs of one head and settings of a scan. `o` is None for pieces, `sums` without gates; `saved` may be empty."""

  q: Any
  k: Any
  v: Any
  y: Any
  sums: Any
  per_token: tuple
  o: Any
  saved: list
  reverse: bool
  scale: float
  chunk: int
  span: int
  depth: int
  dot: Callable

  @property
  def dtype(self):
    return operand(self.k.dtype)

  @property
  def gated(self):
    return self.sums is not None

  @property
  def tiles(self):
    return [pl.ds(i * self.depth, self.depth) for i in range(self.k.shape[1] // self.depth)]

  @property
  def reads_once(self):
    """Whether keys and queries are read once per chunk. Beside gates, operands of narrower products spill if held."""
    return (self.dtype != jnp.float32 and self.k.shape[1] <= MOST_SHARED_KEYS
            and (not self.gated or self.depth == MOST_SHARED_KEYS))

  @property
  def queries_early(self):
    """Whether Q S is formed beside K S. Otherwise it waits until E needs no registers: always in float32, and beside
    gates if it is one product."""
    return self.o is not None and self.dtype != jnp.float32 and (len(self.tiles) > 1 or not self.gated)


@dataclasses.dataclass(frozen=True)
class Chunk:
  """One chunk as a program reads it. `v` and `y` are V^T and Y^T, in a reversed scan dO^T and Y. `load(name, j)` gives
  a tile of q or k."""

  n: jax.Array
  rows: pl.Slice
  decay: Decay
  beta: jax.Array
  q_norm: jax.Array | None
  k_norm: jax.Array | None
  v: jax.Array
  y: list
  save_now: jax.Array | bool
  load: Callable


def forward_chunk(scan, chunk, state):
  """Writes O and E, and gives the exit state."""
  dtype, dot, beta, load = scan.dtype, scan.dot, chunk.beta, chunk.load
  if scan.o is not None:
    # P comes before the products with the state, beside which there are no registers for it.
    p = scan.scale * weigh_both(between(chunk.decay, scan.chunk, transposed=True) * _scores(scan, load, "k", "q"),
                                chunk.k_norm, chunk.q_norm)
    p = _parts(p, dtype) if scan.k.shape[1] <= FEW_KEYS else [p.astype(dtype)]
  held = _held(scan, load, state, "kq" if scan.queries_early else "k")
  e = chunk.v.astype(jnp.float32) - weigh_columns(held[0], chunk.decay.upto, chunk.k_norm)
  e = _add_product(e, weigh_columns(-e, beta), chunk.y, dot, dtype)
  if scan.saved:
    scan.saved[0][chunk.rows, :] = e.astype(scan.saved[0].dtype).T
  u = weigh_columns(e, beta)
  if scan.o is not None:
    q_held = held[1] if scan.queries_early else _held(scan, load, state, "q")[0]
    o = sum((dot(u.astype(dtype), part) for part in p),
            start=weigh_columns(q_held, chunk.decay.upto, scan.scale, chunk.q_norm))
    if scan.gated:
      scan.o[chunk.rows, :] = o.astype(scan.o.dtype).T
  decay = _decay(scan, chunk.n, chunk.rows)  # read again: kept from the beginning of the chunk, it spills
  left = _next_state(scan, chunk, state, decay, [("k", weigh_columns(u, decay.after, chunk.k_norm))])
  if scan.o is not None and not scan.gated:
    # The next state need not wait for the output's way through shared memory.
    scan.o[chunk.rows, :] = o.astype(scan.o.dtype).T
  return left


def reverse_chunk(scan, chunk, dstate):
  """Writes -F, and gives the cotangent of the entry state from that of the exit state."""
  dtype, dot, beta, decay, load = scan.dtype, scan.dot, chunk.beta, chunk.decay, chunk.load
  p = scan.scale * weigh_both(between(decay, scan.chunk, transposed=False) * _scores(scan, load, "q", "k"),
                              chunk.q_norm, chunk.k_norm)
  p = _parts(p, dtype)
  du = weigh_columns(_held(scan, load, dstate, "k")[0], decay.after, chunk.k_norm)
  du = sum((dot(chunk.v.astype(dtype), part) for part in p), start=du)
  minus_f = _add_product(-du, weigh_columns(du, beta), chunk.y, dot, dtype)
  if scan.o is not None:
    scan.o[chunk.rows, :] = minus_f.astype(scan.o.dtype).T
  added = [("q", weigh_columns(chunk.v.astype(jnp.float32), decay.upto, scan.scale, chunk.q_norm)),
           ("k", weigh_columns(minus_f, beta, decay.upto, chunk.k_norm))]
  return _next_state(scan, chunk, dstate, decay, added)


def read_chunk(scan, n, first):
  """Chunk `n`; in a map's columns, which begin in the program where `first` is 0, no values are added."""
  C, dtype = scan.chunk, scan.dtype
  rows = pl.ds(n * C, C)
  decay = _decay(scan, n, rows)
  beta, q_norm, k_norm = row_weights(scan.per_token, rows)
  y = [load_lower(scan.y.at[n, jnp.int32(i)]) for i in range(scan.y.shape[1])]
  v, y = scan.v[rows, :].T, y if scan.reverse else [part.T for part in y]
  if first is not None:
    v = jnp.where(first < 0, v, jnp.zeros_like(v))
  every = scan.span // C
  save_now = bool(scan.saved) and (
      (every == 1) | (jax.lax.rem(n, every) == (every - 1 if scan.reverse else 0)))
  load = lambda name, j: (scan.q if name == "q" else scan.k)[rows, pl.ds(j * scan.depth, scan.depth)].astype(dtype)
  load = functools.cache(load) if scan.reads_once else load
  return Chunk(n, rows, decay, beta, q_norm, k_norm, v, y, save_now, load)


def _decay(scan, n, rows):
  C = scan.chunk
  return decay_of_sums(scan.sums[rows], scan.sums[n * C + C - 1]) if scan.gated else decay_of(None, C)


def _scores(scan, load, a, b):
  """Products `[C, C]` of the rows of `a` and `b`, each the name of the queries or of the keys."""
  count, shape = len(scan.tiles), (scan.chunk, scan.chunk)
  product = lambda j: scan.dot(load(a, j), load(b, j).T)
  if scan.dtype == jnp.float32:  # unrolled, its addresses take the registers that the operands' parts need
    return jax.lax.fori_loop(0, count, lambda j, found: found + product(j), jnp.zeros(shape, jnp.float32))
  return sum(map(product, range(count)))


def _held(scan, load, state, names):
  """The values that the state holds under the rows of each name, transposed: products of S^T with K^T or Q^T."""
  held = [0.0 for _ in names]
  for j, s in enumerate(state):
    scan.dot.barrier(scan.dtype)
    s = s.astype(scan.dtype)
    for i, name in enumerate(names):
      held[i] += scan.dot(s, load(name, j).T)
  return held


def _next_state(scan, chunk, state, decay, added):
  """The state behind a chunk, in which products are `added`, given by name and left operand; saves the state before it.

  Every later token reads the state, so the operands of these products have 16 significant bits too.
  """
  added = [(name, part) for name, x in added for part in _parts(x, scan.dtype)]
  left = []
  for j, (s, tile) in enumerate(zip(state, scan.tiles)):
    scan.dot.barrier(scan.dtype)
    if scan.saved:
      index = jax.lax.div(chunk.n, scan.span // scan.chunk), slice(None), tile
      pl.when(chunk.save_now)(functools.partial(_store, scan.saved[-1], index, s))
    left.append(sum((scan.dot(x, chunk.load(name, j)) for name, x in added), start=weigh_columns(s, decay.total)))
  return tuple(left)


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


def load_lower(ref):
  """One part of Y, whose blocks above the diagonal are neither written nor read."""
  row, column = rows_and_columns(ref.shape[0])
  return plt.load(ref, mask=jax.lax.div(row, SIZE) >= jax.lax.div(column, SIZE), other=0.0)


def _store(ref, index, x):
  ref[index] = x.astype(ref.dtype)
