"""One item of the delta rule's gradients for Hopper: a chunk of a head and a tile of its key channels.

Two warpgroups form them. Each has half of the key channels and shares nothing with the other but dP, which the first
one forms, and dX, which the second one forms. `ring` is the shared memory of `mosaic_gpu_gradients.py`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.delta_rule.mosaic_gpu_ring import BETA, K_NORM, Q_NORM, C
from kernels.mosaic_blocks import COLUMNS, ROWS, TILE, WGMMA, over_columns, over_rows
from kernels.scalar_decay import UNIT, decay_of, decay_of_sums

STAGES = 3  # tiles of value channels in shared memory
HALVES = 2  # of the key channels
INSIDE, LEAVING, THROUGH = range(3)  # what flows through the gates inside a chunk, out of it, and past it


@dataclasses.dataclass(frozen=True)
class Factors:
  """The factors per token of one chunk, from its vectors in shared memory."""

  vectors: Any
  sums: Any
  normalized: bool

  def vector(self, i, layout):
    """None for a norm without normalization."""
    return plgpu.load(self.vectors.at[i], layout=layout) if i == BETA or self.normalized else None

  def weight(self, layout):
    return product(self.vector(BETA, layout), self.vector(K_NORM, layout))

  def decay(self):
    if self.sums is None:
      return decay_of(None, C)
    return decay_of_sums(plgpu.load(self.sums, layout=ROWS), self.sums[C - 1])

  def between(self):
    """D without its mask, or None."""
    if self.sums is None:
      return None
    difference = (over_rows(plgpu.load(self.sums, layout=ROWS), (C, C))
                  - over_columns(plgpu.load(self.sums, layout=COLUMNS), (C, C)))
    return jnp.exp2(difference.astype(jnp.float32) * UNIT)


def product(*factors):
  """The product of the factors that are not None, or None."""
  found = None
  for x in factors:
    if x is not None:
      found = x if found is None else found * x
  return found


def weigh(x, *factors):
  """Rows of x times each factor that is not None."""
  factor = product(*factors)
  return x if factor is None else x * over_rows(factor, x.shape)


def form_all(p, refs, ring, cores, me):
  """A warpgroup of half of the key channels."""
  plgpu.set_max_registers(232, action="increase")

  def meet():
    plgpu.barrier_arrive(ring["met"])
    plgpu.barrier_wait(ring["met"])

  def step(j, carry):
    now = jax.lax.rem(j, 2)
    factors = Factors(ring["w_s"].at[now], ring["g_s"].at[now] if p.gated else None, p.normalized)
    plgpu.barrier_wait(ring["vectors_loaded"].at[now])
    shapes = [(C, C), *[(C, p.half)] * (2 + p.gated)]
    cores(lambda *found: _form(p, refs, ring, cores, me, j, factors, found, meet), *shapes)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(ring["keys_used"])
    return carry

  jax.lax.fori_loop(0, p.own_items(), step, None)
  plgpu.wait_smem_to_gmem(0)


def _form(p, refs, ring, cores, me, j, factors, found, meet):
  """The gradients of item j, in sums of products that are still zero."""
  dq_ref, dk_ref, dv_ref, dbeta_ref, *dg_ref = refs
  pairs, dq, entry, *leaving = found
  b, n, h, t = p.place(j)
  rows = pl.ds(n * C, C)
  keys = pl.ds(t * p.block + me * p.half, p.half)
  through = _sum_over_values(p, ring, cores, me, j, factors, found, dv_ref.at[b, rows, h], t == 0)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # dV has left the memory of dP and dX
  x = pairs.read()
  pl.when(me == 0)(lambda: _share_scores(p, ring, factors, x))
  pl.when(me == 1)(lambda: _share_overlaps(p, ring, factors, x, dbeta_ref.at[b, h, rows], t == 0))
  decay, q_norm, weight = factors.decay(), factors.vector(Q_NORM, ROWS), factors.weight(ROWS)
  dq.start(weigh(dq.read() * p.scale, decay.upto, q_norm))
  entry.start(weigh(entry.read(), decay.upto, weight))
  dk_exit = weigh(leaving[0].read(), decay.after, weight) if p.gated else None
  plgpu.barrier_wait(ring["keys_loaded"])
  meet()
  q_s, k_s = (ring["keys_s"].at[i, me] for i in range(2))
  dp, dx = (ring["pairs_s"].at[i] for i in range(2))
  dq.add(dp, k_s)
  entry.add(dx, k_s)
  if p.flows:
    def of_columns(total):
      total.add(dp.T, q_s)
      total.add(dx.T, k_s)
      return total.read()
    columns = cores(of_columns, (C, p.half))
    dq, dk = _with_flows(p, ring, me, dq.read(), entry.read(), columns, dk_exit, through, decay.total, q_s, k_s,
                         dg_ref[0].at[HALVES * t + me, b, h, rows])
  else:
    entry.add(dp.T, q_s)
    entry.add(dx.T, k_s)
    dq, dk = dq.read(), entry.read()
    if p.gated:
      dk = dk + dk_exit
  meet()  # neither dP nor dX is read any more
  _write(p, ring, me, factors, meet, (q_s, k_s), (dq, dk), [ref.at[b, rows, h, keys] for ref in (dq_ref, dk_ref)])


def _sum_over_values(p, ring, cores, me, j, factors, found, dv_ref, first):
  """Adds dP or dX, and the parts of dQ and dK from the states; writes dV if the item is the `first` of its chunk.

  It returns the rows of S * dS', summed over keys, if gates have a gradient.
  """
  pairs, dq, entry, *leaving = found
  leaving = leaving[0] if leaving else entry

  def add_tile(i, through):
    slot = jax.lax.rem(j * p.value_tiles + i, STAGES)
    left, e = ring["left_s"].at[slot], ring["e_s"].at[slot]
    state, dstate = ring["states_s"].at[slot, me], ring["dstates_s"].at[slot, me]
    plgpu.barrier_wait(ring["loaded"].at[slot])
    pairs.add(left.at[me], e.T)
    dq.add(left.at[0], state)
    entry.add(left.at[1], state)
    leaving.add(e, dstate)
    if p.flows:
      through = through + jnp.sum(_wide(state) * _wide(dstate), axis=1)
    write_dv = functools.partial(_write_dv, ring["pairs_s"].at[me], left.at[1], factors,
                                 dv_ref.at[:, pl.ds(i * TILE, TILE)])
    pl.when((me == jax.lax.rem(i, HALVES)) & first)(write_dv)
    cores.wait()
    plgpu.barrier_arrive(ring["used"].at[slot])
    return through

  nothing = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), ROWS)
  return cores.loop(p.value_tiles, add_tile, nothing if p.flows else None)


def _write_dv(place, minus_f, factors, dv_ref):
  """It leaves from the memory that dP or dX takes afterwards."""
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  place[...] = weigh(_wide(minus_f), -factors.vector(BETA, ROWS)).astype(jnp.bfloat16)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(place, dv_ref)


def _rows_and_columns():
  return (plgpu.broadcasted_iota(jnp.int32, (C, C), i, layout=WGMMA) for i in range(2))


def _share_scores(p, ring, factors, dp):
  row, column = _rows_and_columns()
  dp = weigh(product(dp * p.scale, factors.between()), factors.vector(Q_NORM, ROWS))
  dp = dp * over_columns(factors.weight(COLUMNS), dp.shape)
  kept = row >= column
  if p.flows:
    # No gate lies between the pairs (i, i), so the gates' gradient must not see them even as rounding.
    ring["diagonal_s"][...] = jnp.sum(jnp.where(row == column, dp, 0.0), axis=1)
    kept = row > column
  ring["pairs_s"].at[0][...] = jnp.where(kept, dp, 0.0).astype(jnp.bfloat16)
  plgpu.commit_smem()


def _share_overlaps(p, ring, factors, dx, dbeta_ref, first):
  row, column = _rows_and_columns()
  pl.when(first)(lambda: dbeta_ref.__setitem__(..., -jnp.sum(jnp.where(row == column, dx, 0.0), axis=1)))
  dx = weigh(product(dx, factors.between()), factors.weight(ROWS))
  dx = dx * over_columns(factors.weight(COLUMNS), dx.shape)
  ring["pairs_s"].at[1][...] = jnp.where(row > column, dx, 0.0).astype(jnp.bfloat16)
  plgpu.commit_smem()


def _with_flows(p, ring, me, dq, dk_rows, dk_columns, dk_exit, through, total, q_s, k_s, dg_ref):
  """dQ and dK with the pairs (i, i), which the flows leave out; writes d log_decay of the warpgroup's keys.

  Pairs on one side of a gate cancel to float32 rounding, because both their terms are products of the same operands.
  """
  row, column = _rows_and_columns()
  q, k = _wide(q_s), _wide(k_s)
  flows = ring["rows_s"].at[me]
  flows.at[INSIDE][...] = jnp.sum(k * dk_rows + q * dq - k * dk_columns, axis=1)
  flows.at[LEAVING][...] = jnp.sum(k * dk_exit, axis=1)
  flows.at[THROUGH][...] = through * total
  plgpu.commit_smem()
  inside, leaving, through = (over_columns(plgpu.load(flows.at[i], layout=COLUMNS), (C, C)) for i in range(3))
  dg_ref[...] = jnp.sum(jnp.where(column >= row, inside, leaving) + through, axis=1)
  diagonal = plgpu.load(ring["diagonal_s"], layout=ROWS)
  return dq + weigh(k, diagonal), dk_rows + dk_columns + dk_exit + weigh(q, diagonal)


def _write(p, ring, me, factors, meet, places, found, refs):
  """dQ and dK, through the norms if the item has whole rows. They leave from the memory of Q and K."""
  if p.normalized and p.whole:
    for i in range(2):
      ring["rows_s"].at[me, i][...] = jnp.sum(_wide(places[i]) * found[i], axis=1)
    meet()
    parts = [sum(plgpu.load(ring["rows_s"].at[half, i], layout=ROWS) for half in range(HALVES)) for i in range(2)]
    norms = [factors.vector(i, ROWS) for i in (Q_NORM, K_NORM)]
    found = [x - weigh(_wide(place), norm * norm * part) for x, place, norm, part in zip(found, places, norms, parts)]
  if p.dtype == jnp.float32:
    for ref, x in zip(refs, found):
      ref[...] = x
    return
  for place, x in zip(places, found):
    place[...] = x.astype(jnp.bfloat16)
  plgpu.commit_smem()
  for place, ref in zip(places, refs):
    plgpu.copy_smem_to_gmem(place, ref)


def _wide(ref):
  return plgpu.load(ref, layout=WGMMA).astype(jnp.float32)
