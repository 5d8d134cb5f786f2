"""The delta rule's gradients per chunk for Hopper, from what the scans have saved. Letters as in `README.md`.

A program takes an item after the other: one chunk of a head and a tile of its key channels. One warpgroup copies, so
that the operands of later items arrive while two warpgroups form the gradients of one. Each of the two has half of the
key channels and shares nothing with the other but dP, which the first one forms, and dX, which the second one forms.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import chunks, mosaic_blocks
from kernels.delta_rule.mosaic_gpu_scan import BETA, K_NORM, Q_NORM, C, Problem
from kernels.delta_rule.pallas_triton_norms import launch_through_norm
from kernels.mosaic_blocks import COLUMNS, ROWS, TILE, WGMMA, over_columns, over_rows, tiled
from kernels.scalar_decay import UNIT, decay_of, decay_of_sums
from kernels.triton_blocks import given

PROGRAMS = 132  # multiprocessors of an H100 or H200, each of which has room for one program
STAGES = 3  # tiles of value channels in shared memory
HALVES = 2  # of the key channels
INSIDE, LEAVING, THROUGH = range(3)  # what flows through the gates inside a chunk, out of it, and past it


@dataclasses.dataclass(frozen=True)
class Gradients(Problem):
  """A launch. `flows` says whether gates have a gradient."""

  flows: bool

  @property
  def block(self):
    """Key channels per item."""
    return min(self.K, 128)

  @property
  def half(self):
    return self.block // HALVES

  @property
  def whole(self):
    """Whether an item has whole rows of keys, so that gradients can go through the norms."""
    return self.block == self.K

  @property
  def items(self):
    return self.B * self.chunks * self.H * (self.K // self.block)

  @property
  def value_tiles(self):
    return self.V // TILE

  @property
  def dtype(self):
    """Of dq and dk: they still have to go through the norms if those cannot be applied here."""
    return jnp.float32 if self.normalized and not self.whole else jnp.bfloat16

  def place(self, j):
    """Row, chunk, head and tile of keys of the program's item j. Neighbours in memory are worked on at one time."""
    rest = jax.lax.axis_index("tile") + j * min(PROGRAMS, self.items)
    found = []
    for size in (self.K // self.block, self.H, self.chunks):
      found.append(jax.lax.rem(rest, size))
      rest = jax.lax.div(rest, size)
    tile, head, chunk = found
    return rest, chunk, head, tile

  def own_items(self):
    """How many items the program has."""
    programs = min(PROGRAMS, self.items)
    return jax.lax.div(self.items - jax.lax.axis_index("tile") + (programs - 1), programs)


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


def gradients(operands, vectors, sums, e, do, minus_f, states, dstates, scale, flows):
  """dq, dk, dv, dbeta and, if the `flows` through gates are wanted, d log_decay."""
  (B, T, H, V), (G, K) = do.shape, operands.k.shape[2:]
  normalized = operands.q_norm is not None
  p = Gradients(B, T, H, G, K, V, sums is not None, normalized, scale, False, flows)
  dkey = jax.ShapeDtypeStruct((B, T, H, K), p.dtype)
  out = [dkey, dkey, jax.ShapeDtypeStruct(do.shape, do.dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32),
         *given(flows, jax.ShapeDtypeStruct((HALVES * K // p.block, B, H, T), jnp.float32))]

  def body(*refs, sums, **ring):
    inputs, outputs = refs[:8 + p.gated], refs[8 + p.gated:]
    me = jax.lax.axis_index("group")
    pl.when(me == HALVES)(lambda: _copy(p, inputs, ring))
    pl.when(me < HALVES)(lambda: _form_all(p, outputs, ring, sums, me))
    plgpu.barrier_arrive(ring["done"])
    plgpu.barrier_wait(ring["done"])

  dq, dk, dv, dbeta, *dg = mosaic_blocks.launch(
      body, name="delta_rule_gradients", grid=(min(PROGRAMS, p.items), 1, 1), outputs=out, scratch=_memory(p),
      groups=HALVES + 1)(operands.q, operands.k, e, do, minus_f, states, dstates, vectors, *given(p.gated, sums))
  dq, dk = (chunks.sum_heads(x, G) for x in (dq, dk))
  if normalized and not p.whole:  # all value heads of a key head have its norms
    dq, dk = (launch_through_norm(x, norm[:, :, ::H // G], dx)
              for x, norm, dx in ((operands.q, operands.q_norm, dq), (operands.k, operands.k_norm, dk)))
  tokens = lambda x: jnp.swapaxes(x, 1, 2)
  return dq, dk, dv, tokens(dbeta), tokens(jnp.sum(dg[0], axis=0)) if flows else None


def _memory(p):
  rows, matrix = 3 if p.normalized else 1, functools.partial(tiled, columns=p.half)  # of all operands of a product
  return dict(
      left_s=matrix(STAGES, 2, C, TILE), e_s=matrix(STAGES, C, TILE),  # dO and -F, and E
      states_s=matrix(STAGES, HALVES, TILE, p.half), dstates_s=matrix(STAGES, HALVES, TILE, p.half),
      keys_s=matrix(2, HALVES, C, p.half),  # Q and K, then dQ and dK
      pairs_s=matrix(2, C, C),  # dP and dX
      w_s=plgpu.SMEM((2, rows, C), jnp.float32), g_s=plgpu.SMEM((2, C), jnp.int32),
      diagonal_s=plgpu.SMEM((C,), jnp.float32), rows_s=plgpu.SMEM((HALVES, 3, C), jnp.float32),
      loaded=plgpu.Barrier(num_arrivals=3 + 2 * HALVES, num_barriers=STAGES),
      used=plgpu.Barrier(num_arrivals=HALVES, num_barriers=STAGES),
      vectors_loaded=plgpu.Barrier(num_arrivals=1 + p.gated, num_barriers=2),
      keys_loaded=plgpu.Barrier(num_arrivals=2 * HALVES), keys_used=plgpu.Barrier(num_arrivals=HALVES),
      met=plgpu.Barrier(num_arrivals=HALVES), done=plgpu.Barrier(num_arrivals=HALVES + 1))


def _copy(p, refs, ring):
  """The copying warpgroup."""
  q_ref, k_ref, e_ref, do_ref, minus_f_ref, states_ref, dstates_ref, w_ref, *g_ref = refs
  plgpu.set_max_registers(40, action="decrease")
  copy = plgpu.copy_gmem_to_smem

  def step(j, carry):
    b, n, h, t = p.place(j)
    rows, key, now = pl.ds(n * C, C), jax.lax.div(h, p.H // p.G), jax.lax.rem(j, 2)
    halves = [pl.ds(t * p.block + i * p.half, p.half) for i in range(HALVES)]
    # This place is free: the loop has waited for the keys of the item before the last.
    copy(w_ref.at[b, h, n], ring["w_s"].at[now], ring["vectors_loaded"].at[now])
    if p.gated:
      copy(g_ref[0].at[b, h, rows], ring["g_s"].at[now], ring["vectors_loaded"].at[now])

    @pl.loop(0, p.value_tiles)
    def _(i):
      index, values = j * p.value_tiles + i, pl.ds(i * TILE, TILE)
      slot = jax.lax.rem(index, STAGES)
      pl.when(index >= STAGES)(lambda: plgpu.barrier_wait(ring["used"].at[slot]))
      arrive = ring["loaded"].at[slot]
      for ref, place in ((do_ref, ring["left_s"].at[slot, 0]), (minus_f_ref, ring["left_s"].at[slot, 1]),
                         (e_ref, ring["e_s"].at[slot])):
        copy(ref.at[b, rows, h, values], place, arrive)
      for half, keys in enumerate(halves):
        copy(states_ref.at[b, h, n, values, keys], ring["states_s"].at[slot, half], arrive)
        copy(dstates_ref.at[b, h, n, values, keys], ring["dstates_s"].at[slot, half], arrive)

    pl.when(j > 0)(lambda: plgpu.barrier_wait(ring["keys_used"]))
    for half, keys in enumerate(halves):
      for i, ref in enumerate((q_ref, k_ref)):
        copy(ref.at[b, rows, key, keys], ring["keys_s"].at[i, half], ring["keys_loaded"])
    return carry

  items = p.own_items()
  jax.lax.fori_loop(0, items, step, None)
  for slot in range(STAGES):
    pl.when(items * p.value_tiles > slot)(lambda slot=slot: plgpu.barrier_wait(ring["used"].at[slot]))
  plgpu.barrier_wait(ring["keys_used"])


def _form_all(p, refs, ring, sums, me):
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
    sums(lambda *found: _form(p, refs, ring, sums, me, j, factors, found, meet), *shapes)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(ring["keys_used"])
    return carry

  jax.lax.fori_loop(0, p.own_items(), step, None)
  plgpu.wait_smem_to_gmem(0)


def _form(p, refs, ring, sums, me, j, factors, found, meet):
  """The gradients of item j, in sums of products that are still zero."""
  dq_ref, dk_ref, dv_ref, dbeta_ref, *dg_ref = refs
  pairs, dq, entry, *leaving = found
  b, n, h, t = p.place(j)
  rows = pl.ds(n * C, C)
  keys = pl.ds(t * p.block + me * p.half, p.half)
  through = _sum_over_values(p, ring, sums, me, j, factors, found, dv_ref.at[b, rows, h], t == 0)
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
    columns = sums(of_columns, (C, p.half))
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


def _sum_over_values(p, ring, sums, me, j, factors, found, dv_ref, first):
  """Adds dP or dX, and the parts of dQ and dK from the states; writes dV if the item is the `first` of its chunk.

  It returns the rows of S * dS', summed over keys, if gates have a gradient.
  """
  pairs, dq, entry, *leaving = found
  leaving = leaving[0] if leaving else entry
  through = None
  for i in range(p.value_tiles):
    slot = jax.lax.rem(j * p.value_tiles + i, STAGES)
    left, e = ring["left_s"].at[slot], ring["e_s"].at[slot]
    state, dstate = ring["states_s"].at[slot, me], ring["dstates_s"].at[slot, me]
    plgpu.barrier_wait(ring["loaded"].at[slot])
    pairs.add(left.at[me], e.T)
    dq.add(left.at[0], state)
    entry.add(left.at[1], state)
    leaving.add(e, dstate)
    if p.flows:
      flow = jnp.sum(_wide(state) * _wide(dstate), axis=1)
      through = flow if through is None else through + flow

    write_dv = functools.partial(_write_dv, ring["pairs_s"].at[me], left.at[1], factors,
                                 dv_ref.at[:, pl.ds(i * TILE, TILE)])
    pl.when((me == i % HALVES) & first)(write_dv)
    sums.wait()
    plgpu.barrier_arrive(ring["used"].at[slot])
  return through


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
