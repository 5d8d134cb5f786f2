"""The delta rule's reversed scan for Hopper. Letters as in `README.md`; `mosaic_gpu_ring.py` has the jobs."""

import types

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import mosaic_blocks
from kernels.delta_rule.mosaic_gpu_ring import (
  K_NORM,
  Q_NORM,
  STAGES,
  C,
  Weights,
  copy,
  finish,
  place,
  scratch,
  value_channels,
)
from kernels.mosaic_blocks import COLUMNS, ROWS, TILE, WGMMA, halves, over_columns, over_rows, tiled, weigh
from kernels.triton_blocks import given

REGISTERS = {"state": 184, "scores": 120, "copy": 24}  # of each thread, with two state warpgroups


def reverse_scan(operands, do, dstate, p):
  """-F, the transposed cotangent of the entry state, and the transposed cotangents of the states behind each chunk.

  `dstate` is the transposed cotangent of the exit state `[B, H, V, K]`.
  """
  W, last = p.states, p.chunks - 1
  queries = {"queries": tiled(2, C, p.K)} if p.held else {}
  shared = scratch(p, state=tiled(W, TILE, p.K), scores=tiled(2, C, C), **queries) | {
      "ready": plgpu.Barrier(), "scores_used": plgpu.Barrier(num_arrivals=W)}

  def body(*refs, cores, **ring):
    ring, me = types.SimpleNamespace(**ring), jax.lax.axis_index("group")
    *inputs, initial_ref = refs[:6 + p.gated]
    f_ref, final_ref, dstates_ref = refs[6 + p.gated:]
    mosaic_blocks.run_jobs(p.states, me, REGISTERS, {
        "state": lambda: _carry(p, ring, cores, me, inputs[4], initial_ref, f_ref, final_ref, dstates_ref),
        "scores": lambda: _scores(p, ring, cores, inputs[4]),
        "copy": lambda: copy(p, [*inputs, None][:6], ring, lambda i: last - i)})
    finish(ring)

  return mosaic_blocks.launch(
      body, name="delta_rule_reverse_scan", grid=p.grid, groups=p.groups, scratch=shared,
      outputs=[jax.ShapeDtypeStruct(do.shape, jnp.bfloat16),
               jax.ShapeDtypeStruct((p.B, p.H, p.V, p.K), jnp.float32),
               jax.ShapeDtypeStruct((p.B, p.H, p.chunks, p.V, p.K), jnp.bfloat16)])(
      operands.q, operands.k, do, operands.y, operands.vectors, *given(p.gated, operands.sums), dstate)


def _scores(p, ring, cores, all_vectors):
  """The job of the scores' warpgroup: P, and the queries times s Lambda, both in 16 significant bits."""
  def step(i, carry):
    slot = jax.lax.rem(i, STAGES)
    q, weights = ring.q.at[slot], Weights.of(p, ring, slot, all_vectors, p.chunks - 1 - i)
    plgpu.barrier_wait(ring.loaded.at[slot])
    parts = halves(weights.scores(cores, q, ring.k.at[slot]))
    pl.when(i > 0)(lambda: plgpu.barrier_wait(ring.scores_used))
    for j, part in enumerate(parts):
      ring.scores.at[j][...] = part
    for column in range(0, p.K if p.held else 0, TILE):
      tile = pl.ds(column, TILE)
      queries = plgpu.load(q.at[:, tile], layout=WGMMA).astype(jnp.float32) * p.scale
      for j, part in enumerate(halves(weigh(queries, weights.upto(ROWS, Q_NORM), over_rows))):
        ring.queries.at[j, :, tile][...] = part
    plgpu.commit_smem()
    plgpu.barrier_arrive(ring.ready)
    plgpu.barrier_arrive(ring.used.at[slot])
    return carry

  jax.lax.fori_loop(0, p.chunks, step, None)
  plgpu.barrier_wait(ring.scores_used)


def _carry(p, ring, cores, me, all_vectors, initial_ref, f_ref, final_ref, dstates_ref):
  """The job of a state warpgroup: -F of each chunk, and the cotangent of the state before it."""
  _, h, b = place()
  mine = value_channels(p, me)

  def step(i, dstate):
    slot, n = jax.lax.rem(i, STAGES), p.chunks - 1 - i
    k, do, y, published = ring.k.at[slot], ring.v.at[slot, me], ring.y.at[slot], ring.state.at[me]
    weights, low = Weights.of(p, ring, slot, all_vectors, n), dstate.astype(jnp.bfloat16)

    def publish():
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      published[...] = low
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(published, dstates_ref.at[b, h, n, mine])

    def chunk(total, errors, following):
      if p.held:
        total.add(low, k.T)
      publish()
      if not p.held:  # wide keys leave no memory for weighed queries, and later no registers for these products
        total.add(published, k.T)
        wide = plgpu.load(do.T, layout=WGMMA).astype(jnp.float32) * p.scale
        following.start(weights.carried(dstate))
        for part in halves(weigh(wide, weights.upto(COLUMNS, Q_NORM), over_columns)):
          following.add(part, ring.q.at[slot])
      total.start(weigh(total.read(later=0 if p.held else 2), weights.after(), over_columns))
      plgpu.barrier_wait(ring.ready)
      for j in range(2):
        total.add(do.T, ring.scores.at[j])
      if p.held:
        following.start(weights.carried(dstate))  # while the products run
      du = total.read()
      high, rest = halves(weigh(du, weights.beta(), over_columns))
      errors.start(-du)
      for a, part in (high, 0), (rest, 0), (high, 1):
        errors.add(a, y.at[part])
      if p.held:  # these products run while -F is worked on
        for part in range(2):
          following.add(do.T, ring.queries.at[part])
      minus_f = errors.read(later=2 if p.held else 0)
      dv = weigh(minus_f, weights.beta(), over_columns)
      for part in halves(weigh(dv, weights.upto(COLUMNS, K_NORM), over_columns)):
        following.add(part, k)
      found = following.read()
      plgpu.barrier_arrive(ring.scores_used)
      do.T[...] = minus_f.astype(jnp.bfloat16)  # -F takes the place of dO
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(do, f_ref.at[b, pl.ds(n * C, C), h, mine])
      return found

    plgpu.barrier_wait(ring.loaded.at[slot])
    dstate = cores(chunk, (TILE, C), (TILE, C), (TILE, p.K))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(ring.used.at[slot])
    return dstate

  first = plgpu.load(initial_ref.at[b, h, mine], layout=WGMMA, optimized=False)
  final_ref.at[b, h, mine][...] = jax.lax.fori_loop(0, p.chunks, step, first)
  plgpu.wait_smem_to_gmem(0)
