"""The delta rule's gradients per chunk for Hopper, from what the scans have saved. Letters as in `README.md`.

A program takes one item after another: a chunk of a head and a tile of its key channels. One warpgroup copies, so
that the operands of later items arrive while two others form the gradients of one (`mosaic_gpu_gradients_item.py`).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import chunks, mosaic_blocks
from kernels.delta_rule.mosaic_gpu_gradients_item import HALVES, STAGES, form_all
from kernels.delta_rule.mosaic_gpu_ring import C, Problem
from kernels.delta_rule.pallas_triton_norms import launch_through_norm
from kernels.mosaic_blocks import TILE, tiled
from kernels.triton_blocks import given

PROGRAMS = 132  # multiprocessors of an H100 or H200, each of which has room for one program


@dataclasses.dataclass(frozen=True)
class Gradients(Problem):
  """A launch. `flows` says whether gates have a gradient."""

  flows: bool

  @property
  def block(self):
    """Key channels per item."""
    return math.gcd(self.K, 128)

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


def gradients(operands, e, do, minus_f, states, dstates, scale, flows):
  """dq, dk, dv, dbeta and, if the `flows` through gates are wanted, d log_decay.

  Args:
    operands: as `prepare` gives them by head, for chunks of 64 tokens.
    e, do, minus_f: `[B, T, H, V]` in bfloat16, as are the following.
    states, dstates: transposed, `[B, H, N, V, K]`: before each chunk, and the cotangents behind each chunk.
  Products take bfloat16 operands and are summed in float32; dP and dX are rounded once, after their weights.
  """
  (B, T, H, V), (G, K) = do.shape, operands.k.shape[2:]
  normalized = operands.q_norm is not None
  p = Gradients(B, T, H, G, K, V, operands.sums is not None, normalized, scale, False, flows)
  dkey = jax.ShapeDtypeStruct((B, T, H, K), p.dtype)
  out = [dkey, dkey, jax.ShapeDtypeStruct(do.shape, do.dtype), jax.ShapeDtypeStruct((B, H, T), jnp.float32),
         *given(flows, jax.ShapeDtypeStruct((HALVES * K // p.block, B, H, T), jnp.float32))]

  def body(*refs, cores, **ring):
    inputs, outputs = refs[:8 + p.gated], refs[8 + p.gated:]
    me = jax.lax.axis_index("group")
    pl.when(me == HALVES)(lambda: _copy(p, inputs, ring))
    pl.when(me < HALVES)(lambda: form_all(p, outputs, ring, cores, me))
    plgpu.barrier_arrive(ring["done"])
    plgpu.barrier_wait(ring["done"])

  dq, dk, dv, dbeta, *dg = mosaic_blocks.launch(
      body, name="delta_rule_gradients", grid=(min(PROGRAMS, p.items), 1, 1), outputs=out, scratch=_memory(p),
      groups=HALVES + 1)(operands.q, operands.k, e, do, minus_f, states, dstates, operands.vectors,
                          *given(p.gated, operands.sums))
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
    # This place is free: the last iteration has waited until the item before the last was finished.
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
