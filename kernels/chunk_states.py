"""One chunk's state and its decays in plain jnp, for the forms that run on every device.

They stand apart from `kernels.chunks`, from which kernels are compiled, so that a change here leaves those as they are.
"""

import jax.numpy as jnp
import numpy as np


def scalar_decays(exponents, size):
  """exp of `between`, `upto`, `after` and `total` as `kernels.chunks.exponents` returns them, zero above the diagonal.

  Without decay, `exponents` being None, every factor is one.
  """
  causal = np.tril(np.ones((1, 1, size, size), bool))
  if exponents is None:
    return causal.astype(np.float32), 1.0, 1.0, 1.0
  between, *others = exponents
  return jnp.exp(jnp.where(causal, between, -jnp.inf)), *(jnp.exp(x) for x in others)


def next_state(state, total, x, y, dot):
  """The state `[B, H, K, V]` after a chunk: `total`, which broadcasts to it, times the state, and the sum of x^T y."""
  return total * state + dot("bhik,bhiv->bhkv", x, y)
