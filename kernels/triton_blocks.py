"""Idioms shared by the Pallas kernel bodies (Triton backend): launching, products, and exact sums of gates.

Kernel bodies take a `dot` as keyword: products of 16-bit operands accumulate in float32; float32 operands are
multiplied in three TF32 passes on a GPU (relative error about 1e-6) and in full float32 by the interpreter.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels import cpu_compiler
from kernels.derivatives import RESIDUALS

LOG2E = 1.4426950408889634  # kernels use exp2 of logarithms in base 2
CHUNKS = (16, 32, 64)
MOST_KEYS = 256  # more do not leave room for a tile of the state in registers


def declines(q, chunk_size: int | None) -> str | None:
  """Why the kernels cannot run queries like `q` in chunks of `chunk_size`, or None. The op has checked dtypes."""
  if q.shape[-1] > MOST_KEYS:
    return f"{q.shape[-1]} key channels are more than {MOST_KEYS}"
  if chunk_size is not None and chunk_size not in CHUNKS:
    return f"chunk_size={chunk_size} is not one of {', '.join(map(str, CHUNKS))}"
  return None


def launch(kernel, *, name, grid, in_specs, out_specs, out_shape, num_warps, num_stages, aliases=None, loop=False):
  """`pallas_call` of `kernel`: compiled by Triton when lowered for CUDA, interpreted on every other platform.

  `kernel` becomes the CUDA kernel's name in a profile; `name` marks the call in the lowered program.
  `aliases` maps inputs to the outputs that share their memory. Blocks have to divide their arrays, because compiled
  code does not mask accesses behind the end of an array, although the interpreter pads.

  `loop` says whether the kernel loops over chunks. It then gets the index of the first chunk in the keyword `start`.
  This is a 0 that is read from memory, so that no compiler knows how long the loop is: ptxas 13.0 to 13.5 unrolled
  loops of up to 17 iterations and lost a product. An upper bound from memory would occupy a register throughout, which
  kernels without a free register would spill.
  """
  if loop:
    kernel = functools.partial(_with_start, kernel)
    in_specs = [pl.BlockSpec((None,), lambda *_: (0,)), *in_specs]
    aliases = {i + 1: output for i, output in (aliases or {}).items()}

  def call(interpret):
    body = functools.partial(kernel, dot=Dot(interpret))
    body.__name__ = name
    return pl.pallas_call(
        body, name=name, grid=grid, in_specs=in_specs, out_specs=out_specs, out_shape=out_shape, interpret=interpret,
        input_output_aliases=aliases or {},
        compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=num_stages))

  @jax.custom_jvp
  def run(*args):
    args = (jnp.zeros((1,), jnp.int32), *args) if loop else args
    for spec, x in zip(jax.tree.leaves((in_specs, out_specs)), (*args, *jax.tree.leaves(out_shape)), strict=True):
      if any(block and size % block for block, size in zip(spec.block_shape, x.shape, strict=True)):
        raise AssertionError(f"{name}: blocks {spec.block_shape} do not divide an array {x.shape}")
    # Kernels are 32-bit code, whatever type JAX gives to Python's numbers around them.
    with jax.enable_x64(False):
      return jax.lax.platform_dependent(*args, cuda=call(False), default=call(True))

  @run.defjvp
  def refuse(primals, tangents):
    # The ops have a `custom_vjp` of their own, so only a derivative of its forward or backward pass comes here.
    raise NotImplementedError(f"{name}: the GPU kernels of implementation='pallas_triton' have first derivatives only, "
                              "in reverse mode; implementation='xla_chunked' has second ones")

  return run


def residuals(tree):
  """`tree` under the name by which a policy of `jax.checkpoint` saves it, so that no forward kernel runs twice."""
  return jax.tree.map(lambda x: checkpoint_name(x, RESIDUALS), tree)


def _with_start(kernel, start_ref, *refs, **options):
  kernel(*refs, start=start_ref[...], **options)


@dataclasses.dataclass(frozen=True)
class Dot:
  """`dot(a, b)`, and `dot.barrier(dtype)` between products whose operands must not be fetched early."""

  interpret: bool

  def __call__(self, a, b):
    if self.interpret:
      # XLA's CPU backend lacks some products of bfloat16. Their operands become float32, but stay rounded to bfloat16.
      a, b = (x if x.dtype == jnp.float32 else jax.lax.reduce_precision(x.astype(jnp.float32), 8, 7) for x in (a, b))
      return jax.lax.dot(*cpu_compiler.materialize(a, b), precision=jax.lax.Precision.HIGHEST)
    precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if a.dtype == jnp.float32 else None
    return jax.lax.dot(a, b, precision=precision, preferred_element_type=jnp.float32)

  def barrier(self, dtype):
    """Separates products of float32 operands, whose parts do not fit into the registers together."""
    if dtype == jnp.float32 and not self.interpret:
      plt.debug_barrier()


def operand(dtype):
  """The dtype of operands for inputs of `dtype`, never float16: states and cotangents may leave its range."""
  return jnp.float32 if dtype == jnp.float32 else jnp.bfloat16


def tile_width(size, widest=None):
  """The power of two that holds `size` columns, at least the 16 that a product takes, at most `widest`."""
  width = max(16, pl.next_power_of_2(size))
  return width if widest is None else min(width, widest)


def loop_width(block, size):
  """How many of `size` columns one iteration of a loop over tiles takes: `block`, which divides them, but half of 64.

  A loop of a single iteration is unrolled, and 64 columns at once want more registers than there are.
  """
  return min(block, size // 2 if size >= 64 else size)


def given(flag, *items):
  """The items if `flag`, otherwise none: operands, blocks and outputs that only some launches of a kernel have."""
  return items if flag else ()


def key_head(heads, key_heads):
  """Maps the index of a value head to that of the key head that it reads, for the index maps of blocks."""
  group = heads // key_heads
  return (lambda h: h) if group == 1 else (lambda h: jax.lax.div(h, group))


def rows_and_columns(size):
  """Row and column index of every entry of a `[size, size]` matrix."""
  shape = (size, size)
  return jax.lax.broadcasted_iota(jnp.int32, shape, 0), jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def computed_once(*arrays):
  """The arrays unchanged, each computed only once although its transpose is read too.

  XLA moves a transpose in front of the elementwise operations that made its operand, and so computes them twice. It
  moves none into a branch, so the arrays come from a branch that is always taken.
  """
  return jax.lax.cond(pl.program_id(0) >= 0, lambda: arrays, lambda: tuple(map(jnp.zeros_like, arrays)))


def leading_bits(x):
  """float32 `x` cut to the 8 significant bits that bfloat16 holds.

  It is cut from the bit pattern, because a cast to bfloat16 and back could be simplified away.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def halves(x):
  """float32 `x` as a sum of two bfloat16 arrays, of 16 significant bits together."""
  high = leading_bits(x)
  return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def masked_sum(mask, x, dot, parts):
  """`mask @ x` for a `[C, C]` matrix of -1, 0 and 1 and float32 `[C, D]`, through bfloat16 products.

  `x` is cut into `parts` of 8 significant bits, so that every product is exact: two parts carry 16 bits of each term,
  three all 24.
  """
  mask = mask.astype(jnp.bfloat16)
  total = None
  for part in range(parts):
    high = x
    if part < parts - 1:
      high = leading_bits(x)
      x = x - high
    product = dot(mask, high.astype(jnp.bfloat16))
    total = product if total is None else total + product
  return total
