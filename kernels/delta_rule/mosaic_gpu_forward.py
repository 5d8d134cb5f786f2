"""The delta rule's forward scan for Hopper. Letters as in `README.md`; `mosaic_gpu_ring.py` has the jobs."""

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

REGISTERS = {"state": 168, "scores": 152, "copy": 24}  # of each thread, with two state warpgroups


def forward_scan(operands, v, state, p):
  """O, the transposed exit state, and with `p.save` E and the transposed states before each chunk.

  `state` is the transposed entry state `[B, H, V, K]`.
  """
  W = p.states
  shared = scratch(p, state=tiled(W, TILE, p.K), u=tiled(W, C, TILE)) | {
      "state_ready": plgpu.Barrier(num_arrivals=W), "state_used": plgpu.Barrier(),
      "u_ready": plgpu.Barrier(num_arrivals=W), "u_used": plgpu.Barrier()}

  def body(*refs, cores, **ring):
    ring, me = types.SimpleNamespace(**ring), jax.lax.axis_index("group")
    *inputs, initial_ref = refs[:6 + p.gated]
    o_ref, final_ref, *saved = refs[6 + p.gated:]
    mosaic_blocks.run_jobs(p.states, me, REGISTERS, {
        "state": lambda: _carry(p, ring, cores, me, inputs[4], initial_ref, final_ref, saved),
        "scores": lambda: _output(p, ring, cores, inputs[4], o_ref),
        "copy": lambda: copy(p, [*inputs, None][:6], ring, lambda i: i)})
    finish(ring)

  tokens = jax.ShapeDtypeStruct(v.shape, jnp.bfloat16)
  return mosaic_blocks.launch(
      body, name="delta_rule_forward_scan", grid=p.grid, groups=p.groups, scratch=shared,
      outputs=[tokens, jax.ShapeDtypeStruct((p.B, p.H, p.V, p.K), jnp.float32),
               *given(p.save, tokens, jax.ShapeDtypeStruct((p.B, p.H, p.chunks, p.V, p.K), jnp.bfloat16))])(
      operands.q, operands.k, v, operands.y, operands.vectors, *given(p.gated, operands.sums), state)


def _carry(p, ring, cores, me, all_vectors, initial_ref, final_ref, saved):
  """The job of a state warpgroup: E and U of each chunk, and the next state."""
  _, h, b = place()
  mine = value_channels(p, me)

  def step(n, state):
    slot = jax.lax.rem(n, STAGES)
    k, v, y, published = ring.k.at[slot], ring.v.at[slot, me], ring.y.at[slot], ring.state.at[me]
    weights, low = Weights.of(p, ring, slot, all_vectors, n), state.astype(jnp.bfloat16)

    def publish():
      pl.when(n > 0)(lambda: plgpu.barrier_wait(ring.state_used))
      if p.save:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      published[...] = low
      plgpu.commit_smem()
      plgpu.barrier_arrive(ring.state_ready)
      if p.save:
        plgpu.copy_smem_to_gmem(published, saved[1].at[b, h, n, mine])

    def chunk(held, errors, following):
      if p.held:
        held.add(low, k.T)
      publish()
      if not p.held:
        held.add(published, k.T)
      values = plgpu.load(v.T, layout=WGMMA)
      e = values.astype(jnp.float32) - weigh(held.read(), weights.upto(COLUMNS, K_NORM), over_columns)
      high, rest = halves(weigh(-e, weights.beta(), over_columns))
      errors.start(e)
      for a, part in (high, 0), (rest, 0), (high, 1):
        errors.add(a, y.at[part].T)
      following.start(weights.carried(state))  # while the products run
      e = errors.read()
      u = weigh(e, weights.beta(), over_columns)
      for part in halves(weigh(u, weights.after(), over_columns)):
        following.add(part, k)
      if p.save:
        v.T[...] = e.astype(jnp.bfloat16)  # E takes the place of V
      pl.when(n > 0)(lambda: plgpu.barrier_wait(ring.u_used))
      ring.u.at[me].T[...] = u.astype(jnp.bfloat16)
      plgpu.commit_smem()
      plgpu.barrier_arrive(ring.u_ready)
      if p.save:
        plgpu.copy_smem_to_gmem(v, saved[0].at[b, pl.ds(n * C, C), h, mine])
      return following.read()

    plgpu.barrier_wait(ring.loaded.at[slot])
    state = cores(chunk, (TILE, C), (TILE, C), (TILE, p.K))
    if p.save:
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(ring.used.at[slot])
    return state

  first = plgpu.load(initial_ref.at[b, h, mine], layout=WGMMA, optimized=False)
  final_ref.at[b, h, mine][...] = jax.lax.fori_loop(0, p.chunks, step, first)
  plgpu.barrier_wait(ring.state_used)
  plgpu.barrier_wait(ring.u_used)
  plgpu.wait_smem_to_gmem(0)


def _output(p, ring, cores, all_vectors, o_ref):
  """The job of the scores' warpgroup: P, and O as soon as the state and U are there."""
  _, h, b = place()
  tiles = range(p.states)

  def step(n, carry):
    slot = jax.lax.rem(n, STAGES)
    q, k, weights = ring.q.at[slot], ring.k.at[slot], Weights.of(p, ring, slot, all_vectors, n)
    plgpu.barrier_wait(ring.loaded.at[slot])
    scores = weights.scores(cores, q, k).astype(jnp.bfloat16)

    def outputs(*totals):
      plgpu.barrier_wait(ring.state_ready)
      for i, total in enumerate(totals):
        total.add(q, ring.state.at[i].T)
      held = [total.read() for total in totals]
      plgpu.barrier_arrive(ring.state_used)
      upto = weights.upto(ROWS, Q_NORM)
      for total, x in zip(totals, held):
        total.start(weigh(x * p.scale, upto, over_rows))
      plgpu.barrier_wait(ring.u_ready)
      for i, total in enumerate(totals):
        total.add(scores, ring.u.at[i])
      return [total.read() for total in totals]

    found = cores(outputs, *[(C, TILE) for _ in tiles])
    plgpu.barrier_arrive(ring.used.at[slot])
    for i in tiles:
      ring.u.at[i][...] = found[i].astype(jnp.bfloat16)  # O takes the place of U
    plgpu.commit_smem()
    for i in tiles:
      plgpu.copy_smem_to_gmem(ring.u.at[i], o_ref.at[b, pl.ds(n * C, C), h, value_channels(p, i)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(ring.u_used)
    return carry

  jax.lax.fori_loop(0, p.chunks, step, None)
  plgpu.wait_smem_to_gmem(0)
