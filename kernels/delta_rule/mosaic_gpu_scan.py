"""The delta rule's scans over chunks for Hopper. Letters as in `README.md`.

A program owns all chunks of a head and `64 W` value channels. Each of its W state warpgroups carries the transposed
state of 64 value channels in registers, and does nothing but the products on the way from one state to the next. One
warpgroup forms the scores P, and forward the output. The last one copies. Keys, queries, P and Y are loaded or formed
once for all value channels of the program.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import mosaic_blocks
from kernels.mosaic_blocks import COLUMNS, ROWS, TILE, WGMMA, halves, over_columns, over_rows, tiled
from kernels.scalar_decay import UNIT

C = 64  # tokens per chunk
STAGES = 2
BETA, Q_NORM, K_NORM = range(3)


@dataclasses.dataclass(frozen=True)
class Weights:
  """The factors per token of one chunk, from its vectors in shared memory."""

  vectors: Any
  sums: Any
  normalized: bool
  scale: float

  def _vector(self, i, layout):
    return plgpu.load(self.vectors.at[i], layout=layout)

  def beta(self):
    return self._vector(BETA, COLUMNS)

  def _decay(self, x):
    return jnp.exp2(x.astype(jnp.float32) * UNIT)

  def upto(self, layout, norm=None):
    """Lambda, times the factors of a norm; None if it is 1."""
    factor = None if self.sums is None else self._decay(plgpu.load(self.sums, layout=layout))
    return self._with_norm(factor, norm, layout)

  def after(self, norm):
    factor = None
    if self.sums is not None:
      factor = self._decay(self.sums[C - 1] - plgpu.load(self.sums, layout=COLUMNS))
    return self._with_norm(factor, norm, COLUMNS)

  def total(self):
    return None if self.sums is None else self._decay(self.sums[C - 1])

  def _with_norm(self, factor, norm, layout):
    if norm is None or not self.normalized:
      return factor
    norm = self._vector(norm, layout)
    return norm if factor is None else factor * norm

  def scores(self, sums, q, k):
    """P, in float32."""
    shape = (C, C)
    p = sums.product(q, k.T, shape) * self.scale
    if self.sums is not None:
      between = over_rows(plgpu.load(self.sums, layout=ROWS), shape) - over_columns(
          plgpu.load(self.sums, layout=COLUMNS), shape)
      p = p * self._decay(between)
    if self.normalized:
      p = p * over_rows(self._vector(Q_NORM, ROWS), shape) * over_columns(self._vector(K_NORM, COLUMNS), shape)
    row, column = (plgpu.broadcasted_iota(jnp.int32, shape, i, layout=WGMMA) for i in range(2))
    return jnp.where(row >= column, p, 0.0)


def weigh(x, vector, over=over_columns):
  return x if vector is None else x * over(vector, x.shape)


@dataclasses.dataclass(frozen=True)
class Problem:
  B: int
  T: int
  H: int
  G: int
  K: int
  V: int
  gated: bool
  normalized: bool
  scale: float
  save: bool

  @property
  def chunks(self):
    return self.T // C

  @property
  def states(self):
    """State warpgroups of a program: two share a multiprocessor's registers where the state has 128 key channels."""
    return min(2 if self.K <= 128 else 1, self.V // TILE)

  @property
  def held(self):
    """Whether the state warpgroups have registers for the state in bfloat16 beside float32."""
    return self.K <= 128

  @property
  def columns(self):
    return self.states * TILE


def _ring(p):
  """The stages of the ring, and the barriers at which a stage was loaded and used."""
  K, W = p.K, p.states
  rows = 3 if p.normalized else 1
  return dict(
      q_s=tiled(STAGES, C, K), k_s=tiled(STAGES, C, K), v_s=tiled(STAGES, W, C, TILE), y_s=tiled(STAGES, 2, C, C),
      w_s=plgpu.SMEM((STAGES, rows, C), jnp.float32), g_s=plgpu.SMEM((STAGES, C), jnp.int32),
      loaded=plgpu.Barrier(num_arrivals=4 + W + p.gated, num_barriers=STAGES),
      used=plgpu.Barrier(num_arrivals=W + 1, num_barriers=STAGES), done=plgpu.Barrier(num_arrivals=W + 2))


def _copy(p, refs, ring, order):
  """The copying warpgroup."""
  q_ref, k_ref, v_ref, y_ref, w_ref, g_ref = refs
  t, h, b = (jax.lax.axis_index(name) for name in ("tile", "head", "row"))
  key, N = jax.lax.div(h, p.H // p.G), p.chunks

  def issue(i, slot):
    n = order(i)
    at, arrive = pl.ds(n * C, C), ring["loaded"].at[slot]
    plgpu.copy_gmem_to_smem(k_ref.at[b, at, key], ring["k_s"].at[slot], arrive)
    for j in range(p.states):
      plgpu.copy_gmem_to_smem(v_ref.at[b, at, h, pl.ds(t * p.columns + j * TILE, TILE)], ring["v_s"].at[slot, j],
                              arrive)
    plgpu.copy_gmem_to_smem(w_ref.at[b, h, n], ring["w_s"].at[slot], arrive)
    if p.gated:
      plgpu.copy_gmem_to_smem(g_ref.at[b, h, at], ring["g_s"].at[slot], arrive)
    plgpu.copy_gmem_to_smem(q_ref.at[b, at, key], ring["q_s"].at[slot], arrive)
    plgpu.copy_gmem_to_smem(y_ref.at[b, h, n], ring["y_s"].at[slot], arrive)

  for i in range(min(STAGES, N)):
    issue(i, i)

  @pl.loop(STAGES, N)
  def _(i):
    slot = jax.lax.rem(i, STAGES)
    plgpu.barrier_wait(ring["used"].at[slot])
    issue(i, slot)

  for i in range(max(N - STAGES, 0), N):
    plgpu.barrier_wait(ring["used"].at[i % STAGES])


def _weights(p, ring, slot):
  return Weights(ring["w_s"].at[slot], ring["g_s"].at[slot] if p.gated else None, p.normalized, p.scale)


def forward_scan(q, k, v, y, vectors, gates, initial_state, p):
  """O and the transposed final state, and with `save` E and the states before each chunk."""
  W = p.states
  out = [jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct((p.B, p.H, p.V, p.K), jnp.float32)]
  if p.save:
    out += [jax.ShapeDtypeStruct(v.shape, jnp.bfloat16),
            jax.ShapeDtypeStruct((p.B, p.H, p.chunks, p.V, p.K), jnp.bfloat16)]
  scratch = _ring(p) | dict(
      state_s=tiled(W, TILE, p.K), u_s=tiled(W, C, TILE),
      state_ready=plgpu.Barrier(num_arrivals=W), state_used=plgpu.Barrier(), u_ready=plgpu.Barrier(num_arrivals=W),
      u_used=plgpu.Barrier())

  def body(*refs, sums, **ring):
    inputs = [*refs[:5], refs[5] if p.gated else None]
    initial_ref, o_ref, final_ref, *saved = refs[5 + p.gated:]
    me = jax.lax.axis_index("group")
    pl.when(me == W + 1)(lambda: (plgpu.set_max_registers(24, action="decrease"), _copy(p, inputs, ring, lambda i: i))[0])
    pl.when(me < W)(lambda: _forward_state(p, ring, sums, me, initial_ref, final_ref, saved))
    pl.when(me == W)(lambda: _forward_output(p, ring, sums, o_ref))
    plgpu.barrier_arrive(ring["done"])
    plgpu.barrier_wait(ring["done"])

  return mosaic_blocks.launch(body, name="delta_rule_forward_scan", grid=(p.V // p.columns, p.H, p.B), outputs=out,
                              scratch=scratch, groups=W + 2)(
      q, k, v, y, vectors, *([gates] if p.gated else []), initial_state)


def _forward_state(p, ring, sums, me, initial_ref, final_ref, saved):
  plgpu.set_max_registers(168 if p.states == 2 else 232, action="increase")
  t, h, b = (jax.lax.axis_index(name) for name in ("tile", "head", "row"))
  mine = pl.ds(t * p.columns + me * TILE, TILE)

  def step(n, state):
    slot = jax.lax.rem(n, STAGES)
    k, v, y = ring["k_s"].at[slot], ring["v_s"].at[slot, me], ring["y_s"].at[slot]
    published = ring["state_s"].at[me]
    weights = _weights(p, ring, slot)
    low = state.astype(jnp.bfloat16)

    def publish():
      pl.when(n > 0)(lambda: plgpu.barrier_wait(ring["state_used"]))
      if p.save:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      published[...] = low
      plgpu.commit_smem()
      plgpu.barrier_arrive(ring["state_ready"])
      if p.save:
        plgpu.copy_smem_to_gmem(published, saved[1].at[b, h, n, mine])

    def chunk(held, errors, left):
      if p.held:
        held.add(low, k.T)
        publish()
      else:
        publish()
        held.add(published, k.T)
      values, total = plgpu.load(v.T, layout=WGMMA), weights.total()
      e = values.astype(jnp.float32) - weigh(held.read(), weights.upto(COLUMNS, K_NORM))
      high, rest = halves(weigh(-e, weights.beta()))
      errors.start(e)
      errors.add(high, y.at[0].T)
      errors.add(rest, y.at[0].T)
      errors.add(high, y.at[1].T)
      left.start(state if total is None else state * total)
      e = errors.read()
      u = weigh(e, weights.beta())
      for x in halves(weigh(u, weights.after(K_NORM))):
        left.add(x, k)
      if p.save:
        v.T[...] = e.astype(jnp.bfloat16)
      pl.when(n > 0)(lambda: plgpu.barrier_wait(ring["u_used"]))
      ring["u_s"].at[me].T[...] = u.astype(jnp.bfloat16)
      plgpu.commit_smem()
      plgpu.barrier_arrive(ring["u_ready"])
      if p.save:
        plgpu.copy_smem_to_gmem(v, saved[0].at[b, pl.ds(n * C, C), h, mine])
      return left.read()

    plgpu.barrier_wait(ring["loaded"].at[slot])
    state = sums(chunk, (TILE, C), (TILE, C), (TILE, p.K))
    if p.save:
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(ring["used"].at[slot])
    return state

  first = plgpu.load(initial_ref.at[b, h, mine], layout=WGMMA, optimized=False)
  state = jax.lax.fori_loop(0, p.chunks, step, first)
  plgpu.barrier_wait(ring["state_used"])
  plgpu.barrier_wait(ring["u_used"])
  final_ref.at[b, h, mine][...] = state
  plgpu.wait_smem_to_gmem(0)


def _forward_output(p, ring, sums, o_ref):
  plgpu.set_max_registers(152 if p.states == 2 else 232, action="increase")
  t, h, b = (jax.lax.axis_index(name) for name in ("tile", "head", "row"))
  tiles = range(p.states)

  def step(n, carry):
    slot = jax.lax.rem(n, STAGES)
    q, k = ring["q_s"].at[slot], ring["k_s"].at[slot]
    plgpu.barrier_wait(ring["loaded"].at[slot])
    weights = _weights(p, ring, slot)
    scores = weights.scores(sums, q, k).astype(jnp.bfloat16)

    def outputs(*found):
      plgpu.barrier_wait(ring["state_ready"])
      for i, total in enumerate(found):
        total.add(q, ring["state_s"].at[i].T)
      upto = weights.upto(ROWS, Q_NORM)
      held = [total.read() for total in found]
      plgpu.barrier_arrive(ring["state_used"])
      for total, x in zip(found, held):
        total.start(weigh(x * p.scale, upto, over_rows))
      plgpu.barrier_wait(ring["u_ready"])
      for i, total in enumerate(found):
        total.add(scores, ring["u_s"].at[i])
      return [total.read() for total in found]

    held = sums(outputs, *[(C, TILE) for _ in tiles])
    plgpu.barrier_arrive(ring["used"].at[slot])
    for i, x in enumerate(held):  # O takes the place of U
      ring["u_s"].at[i][...] = x.astype(jnp.bfloat16)
    plgpu.commit_smem()
    for i in tiles:
      plgpu.copy_smem_to_gmem(ring["u_s"].at[i],
                              o_ref.at[b, pl.ds(n * C, C), h, pl.ds(t * p.columns + i * TILE, TILE)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(ring["u_used"])
    return carry

  jax.lax.fori_loop(0, p.chunks, step, None)
  plgpu.wait_smem_to_gmem(0)


def reverse_scan(q, k, do, y, vectors, gates, dfinal_state, p):
  """-F and the transposed cotangent of the initial state, and with `save` the cotangents of the states behind chunks."""
  W = p.states
  out = [jax.ShapeDtypeStruct(do.shape, jnp.bfloat16), jax.ShapeDtypeStruct((p.B, p.H, p.V, p.K), jnp.float32),
         jax.ShapeDtypeStruct((p.B, p.H, p.chunks, p.V, p.K), jnp.bfloat16)]
  scratch = _ring(p) | dict(
      state_s=tiled(W, TILE, p.K), p_s=tiled(2, C, C), ready=plgpu.Barrier(),
      **({"weighted_s": tiled(2, C, p.K)} if p.held else {}),
      p_used=plgpu.Barrier(num_arrivals=W))

  def body(*refs, sums, **ring):
    inputs = [*refs[:5], refs[5] if p.gated else None]
    initial_ref, f_ref, final_ref, dstates_ref = refs[5 + p.gated:]
    me, last = jax.lax.axis_index("group"), p.chunks - 1
    pl.when(me == W + 1)(lambda: (plgpu.set_max_registers(24, action="decrease"),
                                  _copy(p, inputs, ring, lambda i: last - i))[0])
    pl.when(me < W)(lambda: _reverse_state(p, ring, sums, me, initial_ref, f_ref, final_ref, dstates_ref))
    pl.when(me == W)(lambda: _reverse_scores(p, ring, sums))
    plgpu.barrier_arrive(ring["done"])
    plgpu.barrier_wait(ring["done"])

  return mosaic_blocks.launch(body, name="delta_rule_reverse_scan", grid=(p.V // p.columns, p.H, p.B), outputs=out,
                              scratch=scratch, groups=W + 2)(
      q, k, do, y, vectors, *([gates] if p.gated else []), dfinal_state)


def _reverse_scores(p, ring, sums):
  def step(i, carry):
    slot = jax.lax.rem(i, STAGES)
    q, k = ring["q_s"].at[slot], ring["k_s"].at[slot]
    plgpu.barrier_wait(ring["loaded"].at[slot])
    weights = _weights(p, ring, slot)
    parts = halves(weights.scores(sums, q, k))
    pl.when(i > 0)(lambda: plgpu.barrier_wait(ring["p_used"]))
    for j in range(2):
      ring["p_s"].at[j][...] = parts[j]
    for column in range(0, p.K if p.held else 0, TILE):
      tile = pl.ds(column, TILE)
      queries = plgpu.load(q.at[:, tile], layout=WGMMA).astype(jnp.float32) * p.scale
      for j, part in enumerate(halves(weigh(queries, weights.upto(ROWS, Q_NORM), over_rows))):
        ring["weighted_s"].at[j, :, tile][...] = part
    plgpu.commit_smem()
    plgpu.barrier_arrive(ring["ready"])
    plgpu.barrier_arrive(ring["used"].at[slot])
    return carry

  plgpu.set_max_registers(*((120, ) if p.states == 2 else (232, )), action="decrease" if p.states == 2 else "increase")
  jax.lax.fori_loop(0, p.chunks, step, None)
  plgpu.barrier_wait(ring["p_used"])


def _reverse_state(p, ring, sums, me, initial_ref, f_ref, final_ref, dstates_ref):
  plgpu.set_max_registers(184 if p.states == 2 else 232, action="increase")
  t, h, b = (jax.lax.axis_index(name) for name in ("tile", "head", "row"))
  mine = pl.ds(t * p.columns + me * TILE, TILE)

  def step(i, dstate):
    slot, n = jax.lax.rem(i, STAGES), p.chunks - 1 - i
    k, do, y = ring["k_s"].at[slot], ring["v_s"].at[slot, me], ring["y_s"].at[slot]
    published = ring["state_s"].at[me]
    weights = _weights(p, ring, slot)
    low = dstate.astype(jnp.bfloat16)

    def publish():
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      published[...] = low
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(published, dstates_ref.at[b, h, n, mine])

    def chunk(held, errors, left):
      if p.held:
        held.add(low, k.T)
        publish()
      else:
        publish()
        held.add(published, k.T)
      total = weights.total()
      held.start(weigh(held.read(), weights.after(K_NORM)))
      plgpu.barrier_wait(ring["ready"])
      for j in range(2):
        held.add(do.T, ring["p_s"].at[j])
      left.start(dstate if total is None else dstate * total)
      du = held.read()
      high, rest = halves(weigh(du, weights.beta()))
      errors.start(-du)
      errors.add(high, y.at[0])
      errors.add(rest, y.at[0])
      errors.add(high, y.at[1])
      if p.held:
        for j in range(2):
          left.add(do.T, ring["weighted_s"].at[j])
      else:
        read = plgpu.load(do.T, layout=WGMMA).astype(jnp.float32) * p.scale
        for x in halves(weigh(read, weights.upto(COLUMNS, Q_NORM))):
          left.add(x, ring["q_s"].at[slot])
      minus_f = errors.read(later=2)
      for x in halves(weigh(weigh(minus_f, weights.beta()), weights.upto(COLUMNS, K_NORM))):
        left.add(x, k)
      found = left.read()
      plgpu.barrier_arrive(ring["p_used"])
      do.T[...] = minus_f.astype(jnp.bfloat16)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(do, f_ref.at[b, pl.ds(n * C, C), h, mine])
      return found

    plgpu.barrier_wait(ring["loaded"].at[slot])
    dstate = sums(chunk, (TILE, C), (TILE, C), (TILE, p.K))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(ring["used"].at[slot])
    return dstate

  first = plgpu.load(initial_ref.at[b, h, mine], layout=WGMMA, optimized=False)
  dstate = jax.lax.fori_loop(0, p.chunks, step, first)
  final_ref.at[b, h, mine][...] = dstate
  plgpu.wait_smem_to_gmem(0)
