"""`residual_norm.py` as one Pallas kernel for the Triton backend."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import triton_blocks
from kernels.triton_blocks import given

LEAST, MOST = 128, 8192  # channels: a program holds one row
PER_WARP = 512


def declines(D: int) -> str | None:
  """Why the kernel cannot run on rows of D channels, or None."""
  if not LEAST <= D <= MOST or D & (D - 1):
    return f"{D} channels are not a power of two from {LEAST} to {MOST}"
  return None


def add_and_norm(x, y, scale, *, eps):
  """See `kernels.residual_norm`."""
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
