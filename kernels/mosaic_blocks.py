"""Idioms of the Pallas kernel bodies for Hopper (Mosaic GPU backend): memory, products, layouts and the launch.

A program has several warpgroups with different jobs. One of them only copies: it fills the stages of a ring in shared
memory, and waits at a barrier until the others have used a stage. The version-specific calls of the backend are here.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = 64  # rows of one product of a warpgroup
WGMMA = plgpu.Layout.WGMMA
ROWS, COLUMNS = WGMMA.reduce(1), WGMMA.reduce(0)  # of a vector with one entry per row, or per column


def tiled(*shape, dtype=jnp.bfloat16):
  """Shared memory in the arrangement that both the copy engine and the tensor cores take."""
  swizzle = plgpu.find_swizzle(shape[-1] * jnp.dtype(dtype).itemsize * 8)
  return plgpu.SMEM(shape, dtype, transforms=(
      plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle)))


class _Sum:
  """A float32 sum of products in registers. Products run while the program goes on, in the order of their calls."""

  def __init__(self, ref):
    self._ref = ref

  def start(self, x):
    """Begins at `x` and not at zero."""
    self._ref[...] = x

  def add(self, a, b):
    """Adds `a @ b`. `a` is a reference or a bfloat16 value in the layout WGMMA, `b` is a reference."""
    plgpu.wgmma(self._ref, a, b)

  def read(self, later=0):
    """The sum, when all products but the `later` last ones of the warpgroup have ended."""
    # Nothing but this barrier keeps later work behind the wait.
    return jax.lax.optimization_barrier(plgpu.wgmma_accumulator_load(self._ref, wait_n=later))


class _PlainSum(_Sum):
  """The same for the interpreter of this backend, which knows no tensor cores."""

  def start(self, x):
    self._ref = x

  def add(self, a, b):
    wide = lambda x: x[...].astype(jnp.float32)
    self._ref += jax.lax.dot(wide(a), wide(b), precision=jax.lax.Precision.HIGHEST)

  def read(self, later=0):
    return self._ref


@dataclasses.dataclass(frozen=True)
class TensorCores:
  """`cores(f, *shapes)` calls `f` with a sum of products of each shape, and returns its result."""

  interpret: bool

  def __call__(self, f, *shapes):
    if self.interpret:
      return f(*(_PlainSum(jnp.zeros(shape, jnp.float32)) for shape in shapes))
    return pl.run_scoped(lambda *refs: f(*map(_Sum, refs)), *(plgpu.ACC(shape, jnp.float32) for shape in shapes))

  def product(self, a, b, shape):
    """`a @ b`, awaited."""
    def f(total):
      total.add(a, b)
      return total.read()
    return self(f, shape)


def halves(x):
  """float32 `x` as a sum of two bfloat16 arrays, of 16 significant bits together."""
  high = x.astype(jnp.bfloat16)
  return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def over_rows(vector, shape):
  """One entry per row, the same in all columns."""
  return jax.lax.broadcast_in_dim(vector, shape, [0])


def over_columns(vector, shape):
  """One entry per column, the same in all rows."""
  return jax.lax.broadcast_in_dim(vector, shape, [1])


def weigh(x, vector, over):
  """x times a vector with one entry per row or column, or x itself if that is None."""
  return x if vector is None else x * over(vector, x.shape)


def run_jobs(states, me, registers, jobs):
  """Runs the job of warpgroup `me`: the first `states` of them "state", the next one "scores" and the last "copy".

  `registers` has the number per thread of each job where there are two state warpgroups. The launch gives all threads
  the same number, and an instruction raises or lowers it. One that does not do what its name says ends the program.
  """
  launched = 65536 // (states + 2) // 128 // 8 * 8
  if states == 1:
    registers = {"state": 232, "scores": 232, "copy": 24}
  for job, chosen in (("copy", me == states + 1), ("state", me < states), ("scores", me == states)):
    @pl.when(chosen)
    def _(job=job):
      number = registers[job]
      plgpu.set_max_registers(number, action="increase" if number > launched else "decrease")
      jobs[job]()


def compiles() -> bool:
  """Whether programs are made for a GPU: the one that is there, or an abstract one that a mesh names."""
  abstract = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() == "gpu" if abstract is None else abstract.platform == "gpu"


def launch(body, *, name, grid, outputs, scratch, groups):
  """A kernel of `groups` warpgroups per program of the grid `(tiles, heads, rows)`.

  It is interpreted where there is no GPU.
  """
  def call(interpret):
    return plgpu.kernel(
        functools.partial(body, cores=TensorCores(interpret)), out_type=outputs, scratch_types=scratch, grid=grid,
        grid_names=("tile", "head", "row"), num_threads=groups, thread_name="group", kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams() if interpret else None)

  @jax.custom_jvp
  def run(*args):
    with jax.enable_x64(False):
      return call(interpret=not compiles())(*args)

  @run.defjvp
  def refuse(primals, tangents):
    raise NotImplementedError(f"{name}: the GPU kernels of implementation='mosaic_gpu' have first derivatives only, in "
                              "reverse mode; implementation='xla_chunked' has second ones")

  return run
