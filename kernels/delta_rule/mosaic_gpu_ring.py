"""What the delta rule's two scans for Hopper share: the ring of chunks in shared memory, and the weights per token.

A program owns all chunks of a head and 64 or 128 value channels. Its warpgroups have different jobs. One or two *state*
warpgroups each carry the transposed state of 64 value channels in registers, and do nothing but the work on the way
from one state to the next. One warpgroup forms the scores P and what else does not wait for a state. The last one
copies: it fills the stages of a ring, one chunk in each, and waits until the others have used a stage. So keys,
queries, P and Y are loaded or formed once for all value channels of a program, and no product waits for memory.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.mosaic_blocks import COLUMNS, ROWS, TILE, WGMMA, over_columns, over_rows, tiled
from kernels.scalar_decay import UNIT

C = 64  # tokens per chunk, the rows of a product
STAGES = 2
MOST_HELD = 128  # key channels up to which a state warpgroup has registers for the state in bfloat16 beside float32
BETA, K_NORM, Q_NORM = range(3)  # the vectors of a chunk, as `inverse` writes them


@dataclasses.dataclass(frozen=True)
class Problem:
  """Sizes and settings of a scan. `save` says whether the backward pass needs more than the output."""

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
    """State warpgroups of a program: two where the registers of a multiprocessor suffice for both."""
    return 2 if self.K <= MOST_HELD and self.V % (2 * TILE) == 0 else 1

  @property
  def columns(self):
    """Value channels of a program."""
    return self.states * TILE

  @property
  def groups(self):
    return self.states + 2

  @property
  def grid(self):
    return self.V // self.columns, self.H, self.B

  @property
  def held(self):
    return self.K <= MOST_HELD

  @property
  def vectors(self):
    """Vectors of a chunk in a stage. Wide keys leave no room for the factors of queries, which are read from afar."""
    return (3 if self.held else 2) if self.normalized else 1


def scratch(p, **others):
  """The stages of the ring, the `others`, and the barriers at which a stage was loaded and used."""
  K, W = p.K, p.states
  # Small buffers come last, because large ones begin at multiples of 1 KB.
  return {
      "q": tiled(STAGES, C, K), "k": tiled(STAGES, C, K), "v": tiled(STAGES, W, C, TILE), "y": tiled(STAGES, 2, C, C),
      **others,
      "vectors": plgpu.SMEM((STAGES, p.vectors, C), jnp.float32),
      "sums": plgpu.SMEM((STAGES, C), jnp.int32),
      "loaded": plgpu.Barrier(num_arrivals=4 + W + p.gated, num_barriers=STAGES),
      "used": plgpu.Barrier(num_arrivals=W + 1, num_barriers=STAGES), "done": plgpu.Barrier(num_arrivals=W + 2)}


def place():
  """Tile of value channels, head and row of the program."""
  return tuple(jax.lax.axis_index(name) for name in ("tile", "head", "row"))


def value_channels(p, i):
  """The value channels of the state warpgroup `i`."""
  return pl.ds(place()[0] * p.columns + i * TILE, TILE)


def copy(p, refs, ring, order):
  """The job of the copying warpgroup. `order(i)` is the chunk that comes as the `i`-th."""
  q_ref, k_ref, v_ref, y_ref, vectors_ref, sums_ref = refs
  _, h, b = place()
  key, N = jax.lax.div(h, p.H // p.G), p.chunks

  def load(i, slot):
    n, full = order(i), ring.loaded.at[slot]
    rows = pl.ds(n * C, C)
    plgpu.copy_gmem_to_smem(k_ref.at[b, rows, key], ring.k.at[slot], full)
    for j in range(p.states):
      plgpu.copy_gmem_to_smem(v_ref.at[b, rows, h, value_channels(p, j)], ring.v.at[slot, j], full)
    plgpu.copy_gmem_to_smem(vectors_ref.at[b, h, n, pl.ds(0, p.vectors)], ring.vectors.at[slot], full)
    if p.gated:
      plgpu.copy_gmem_to_smem(sums_ref.at[b, h, rows], ring.sums.at[slot], full)
    plgpu.copy_gmem_to_smem(q_ref.at[b, rows, key], ring.q.at[slot], full)
    plgpu.copy_gmem_to_smem(y_ref.at[b, h, n], ring.y.at[slot], full)

  for i in range(min(STAGES, N)):
    load(i, i)

  @pl.loop(STAGES, N)
  def _(i):
    slot = jax.lax.rem(i, STAGES)
    plgpu.barrier_wait(ring.used.at[slot])
    load(i, slot)

  for i in range(max(N - STAGES, 0), N):
    plgpu.barrier_wait(ring.used.at[i % STAGES])


def finish(ring):
  """Waits for all warpgroups: one that ends while another has products under way may stop the GPU."""
  plgpu.barrier_arrive(ring.done)
  plgpu.barrier_wait(ring.done)


@dataclasses.dataclass(frozen=True)
class Weights:
  """The factors per token of the chunk in a stage. They are formed where they are used, and not kept in registers."""

  vectors: Any
  sums: Any
  q_norm: Any
  normalized: bool
  scale: float

  @classmethod
  def of(cls, p, ring, slot, all_vectors, n):
    """The weights of chunk `n` in a stage; `all_vectors` are those of all chunks."""
    _, h, b = place()
    q_norm = ring.vectors.at[slot, Q_NORM] if p.held else all_vectors.at[b, h, n, Q_NORM]
    return cls(ring.vectors.at[slot], ring.sums.at[slot] if p.gated else None, q_norm if p.normalized else None,
               p.normalized, p.scale)

  def beta(self):
    return self._vector(BETA, COLUMNS)

  def upto(self, layout, norm):
    """Lambda times the factor `norm`; None if both are 1."""
    return self._with_norm(None if self.sums is None else _decay(plgpu.load(self.sums, layout=layout)), norm, layout)

  def after(self):
    """Gamma times the factor of keys; None if both are 1."""
    decay = None
    if self.sums is not None:
      decay = _decay(self.sums[C - 1] - plgpu.load(self.sums, layout=COLUMNS))
    return self._with_norm(decay, K_NORM, COLUMNS)

  def carried(self, state):
    """The state times lambda."""
    return state if self.sums is None else state * _decay(self.sums[C - 1])

  def scores(self, cores, q, k):
    """P, in float32."""
    shape = (C, C)
    p = cores.product(q, k.T, shape) * self.scale
    if self.sums is not None:
      between = over_rows(plgpu.load(self.sums, layout=ROWS), shape) - over_columns(
          plgpu.load(self.sums, layout=COLUMNS), shape)
      p = p * _decay(between)
    if self.normalized:
      p = p * over_rows(self._vector(Q_NORM, ROWS), shape) * over_columns(self._vector(K_NORM, COLUMNS), shape)
    row, column = (plgpu.broadcasted_iota(jnp.int32, shape, i, layout=WGMMA) for i in range(2))
    return jnp.where(row >= column, p, 0.0)

  def _vector(self, i, layout):
    if i == Q_NORM:
      return plgpu.load(self.q_norm, layout=layout, optimized=False)
    return plgpu.load(self.vectors.at[i], layout=layout)

  def _with_norm(self, factor, norm, layout):
    if not self.normalized:
      return factor
    norm = self._vector(norm, layout)
    return norm if factor is None else factor * norm


def _decay(sums):
  return jnp.exp2(sums.astype(jnp.float32) * UNIT)
