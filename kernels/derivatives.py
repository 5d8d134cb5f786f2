"""Derivatives of kernels by way of the same function in jnp."""

from collections.abc import Callable

import jax

RESIDUALS = "op_residuals"  # the name of an op's results that its backward pass reads, for policies of jax.checkpoint


def of_definition(kernel: Callable, definition: Callable) -> Callable:
  """`kernel` with the derivatives of `definition`, the same function in jnp, and with the same tree of results.

  A fused op has a `custom_vjp` of two kernels. A derivative of either kernel is one of second order, or forward mode
  over reverse mode. It is rare, so it need not be fast.
  """
  run = jax.custom_jvp(kernel)
  run.defjvp(lambda primals, tangents: jax.jvp(definition, primals, tangents))
  return run
