"""The addition of a branch to the residual stream and the norm of the sum, for one token: one kernel on a GPU.

A kernel of a few rows takes about 2 us, however little it does. The compiler needs three: the sum, the mean of its
squares, and the normalised row.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels import steps, triton_blocks
from kernels.rms_norm import reference
from kernels.triton_blocks import given

LEAST, MOST = 128, 8192  # channels, a power of two: a program holds one row
PER_WARP = 512


def add_and_norm(x: Float[Array, "B D"], y: Float[Array, "B D"], scale: Float[Array, "D"] | None, eps: float,
                 ) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
  """x + y, rounded to the dtype of x, and n / sqrt(mean(n²) + eps) * scale for each row n of it, in the same dtype.

  Statistics are float32. The derivatives are those of the definition in jnp.
  """
  D = x.shape[1]
  if not steps.has_kernels() or not LEAST <= D <= MOST or D & (D - 1):
    return _definition(eps, x, y, scale)
  definition = functools.partial(_definition, eps)
  run = jax.custom_vjp(functools.partial(launch, eps=eps))
  run.defvjp(lambda *args: (run(*args), args), lambda args, cotangents: jax.vjp(definition, *args)[1](cotangents))
  return run(x, y, scale)


def launch(x, y, scale, *, eps):
  """The kernel, whatever the platform."""
  B, D = x.shape
  row, whole = pl.BlockSpec((None, D), lambda b: (b, 0)), pl.BlockSpec((D,), lambda b: (0,))
  scaled = given(scale is not None, scale)
  return triton_blocks.launch(
      functools.partial(_kernel, eps=eps), name="add_and_norm", grid=(B,),
      num_warps=max(1, D // PER_WARP), num_stages=1,
      in_specs=[row, row, *given(scale is not None, whole)], out_specs=[row, row],
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * 2)(x, y, *scaled)


def _kernel(x_ref, y_ref, *refs, eps, dot):
  *scale_ref, sum_ref, norm_ref = refs
  total = (x_ref[...] + y_ref[...].astype(x_ref.dtype)).astype(x_ref.dtype)
  sum_ref[...] = total
  n = total.astype(jnp.float32)
  n = n * jax.lax.rsqrt(jnp.sum(n * n) * (1 / n.shape[0]) + eps)
  norm_ref[...] = (n * scale_ref[0][...] if scale_ref else n).astype(norm_ref.dtype)


def _definition(eps, x, y, scale):
  total = x + y.astype(x.dtype)
  return total, reference.rms_norm(total, scale, None, eps, "swish")
