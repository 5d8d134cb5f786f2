"""Short convolution in jnp: the definition, and what runs where no kernel does."""

import jax
import jax.numpy as jnp


def short_convolution(x, kernel, bias, initial_inputs, runs, silu):
  """See `kernels.short_convolution`. `runs` [B, T], if any, is the number of the segment of each token in its row.

  The initial inputs, zeros if None, belong to the segment 0.
  """
  (B, T, C), past = x.shape, kernel.shape[0] - 1
  before = jnp.zeros((B, past, C), x.dtype) if initial_inputs is None else initial_inputs
  inputs = jnp.concatenate([before, x], axis=1)
  numbers = None if runs is None else jnp.pad(runs, ((0, 0), (past, 0)))
  y = 0.0 if bias is None else bias[None, None]
  for i in range(past + 1):
    window = inputs[:, i:i + T]
    if runs is not None:
      window = jnp.where((numbers[:, i:i + T] == runs)[..., None], window, 0)
    y = y + kernel[i][None, None] * window.astype(jnp.float32)
  return (jax.nn.silu(y) if silu else y).astype(x.dtype)


def supports(*arrays, chunk_size=None) -> str | None:
  """None: the definition runs everything."""
  return None
