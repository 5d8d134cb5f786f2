"""A fault of jaxlib's compiler for CPUs: how the ops avoid it, how a process switches it off, and how it is detected.

jaxlib hands fusions of matrix products to the library YNNPACK. In 0.11.2 and 0.12.0.1, a fusion of a sum or maximum
over an axis with a product whose right operand repeats one number, such as a state of zeros, reads memory that nothing
wrote. The program then returns garbage, which differs from run to run. The fault appears in plain JAX, so the code
around an op in a jitted program may be wrong although the op is right.
"""

import functools
import mmap
import os
import pathlib
import warnings

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

FLAG = "xla_cpu_experimental_ynn_fusion_type"


def materialize(*operands):
  """The operands of a product as arrays in memory, outside of the fusion that could repeat one number for them.

  This happens on every platform, because a program does not know for which one it is traced. It keeps the compiler from
  fusing a product with the operations that compute its operands.
  """
  return jax.lax.optimization_barrier(operands)


def switch_off() -> None:
  """Adds `--xla_cpu_experimental_ynn_fusion_type=` to XLA_FLAGS, unless the flag is there or this jaxlib lacks it.

  It has an effect until JAX starts a device, because XLA_FLAGS is read once, at that time.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  if FLAG not in flags and _known():
    os.environ["XLA_FLAGS"] = f"{flags} --{FLAG}=".strip()


def _known():
  """Whether jaxlib contains the flag's name. A flag that jaxlib does not know would end the process."""
  library = pathlib.Path(jaxlib.__file__).parent / "libjax_common.so"
  if not library.exists():
    return False
  with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
    return content.find(FLAG.encode()) >= 0


@functools.cache
def probe() -> None:
  """Compiles a fusion of the faulty kind, once per process, and warns when its result is not NumPy's.

  This takes about 15 ms. The ops call it when the first of them is chosen for a CPU.
  """
  x = np.arange(1, 4097, dtype=np.float32).reshape(2, 2, 16, 64) / 4096
  repeated, sums = np.full((2, 2, 64, 64), 3.0, np.float32), np.sum(x, axis=-1, keepdims=True)
  expected = x @ repeated + sums

  def fused(x):
    product = jax.lax.dot_general(x, jnp.full(repeated.shape, 3.0, x.dtype), (((3,), (2,)), ((0, 1), (0, 1))))
    return product + jnp.sum(x, axis=-1, keepdims=True)

  # The caller may be tracing, and a call of a compiled program does not enter the trace.
  found = np.asarray(jax.jit(fused).lower(jax.ShapeDtypeStruct(x.shape, x.dtype)).compile()(x))
  if not np.allclose(found, expected, rtol=1e-3):
    warnings.warn(
        f"jaxlib {jaxlib.__version__} compiles some fusions wrongly on this CPU: a test product is off by "
        f"{np.max(np.abs(found - expected)):.1e}. The ops of this library avoid such fusions, other jitted code may "
        f"return garbage. Set XLA_FLAGS=--{FLAG}= before JAX starts a device.", RuntimeWarning, stacklevel=2)
