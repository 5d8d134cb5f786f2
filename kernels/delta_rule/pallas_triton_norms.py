"""The gradient through the norms of q and k, in a kernel body and as a Pallas kernel of its own."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import triton_blocks

ROWS = 8  # of keys per program


def through_norm(x, norm, dx):
  """The gradient of rows x from `dx`, in which 1 / norm counts as a constant."""
  return dx if norm is None else dx - (norm * norm * jnp.sum(x * dx, axis=-1))[..., None] * x


def launch_through_norm(x, norm, dx):
  """`through_norm` of float32 `dx [..., K]` in the dtype of x: one pass, where the compiler makes two."""
  K = x.shape[-1]
  rows, row = pl.BlockSpec((ROWS, K), lambda i: (i, 0)), pl.BlockSpec((ROWS,), lambda i: (i,))
  return triton_blocks.launch(
      _kernel, name="delta_rule_norms", grid=(norm.size // ROWS,), num_warps=4, num_stages=1,
      in_specs=[rows, row, rows], out_specs=rows, out_shape=jax.ShapeDtypeStruct((norm.size, K), x.dtype))(
          x.reshape(-1, K), norm.reshape(-1), dx.reshape(-1, K)).reshape(x.shape)


def _kernel(x_ref, norm_ref, dx_ref, out_ref, dot):
  out_ref[...] = through_norm(x_ref[...].astype(jnp.float32), norm_ref[...], dx_ref[...]).astype(out_ref.dtype)
