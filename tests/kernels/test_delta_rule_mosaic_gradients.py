"""The delta rule's gradients by the kernel for Hopper, interpreted, beside the kernel of the Triton backend."""

import jax
import jax.numpy as jnp
import pytest

from kernels.delta_rule import mosaic_gpu_gradients, pallas_triton_gradients
from kernels.delta_rule.pallas_triton_config import Config
from kernels.delta_rule.pallas_triton_operands import prepare
from kernels.tuned import Tile
from tests.close import relative_error

B, H, C = 1, 2, 64
ROUNDING = 3e-3  # of two results in bfloat16


# With two programs for 6 items, a program has more items than the 3 tiles of values that fit into shared memory.
@pytest.mark.parametrize("gated, flows, normalized, T, G, K, V, programs", [
    (True, True, False, 192, 1, 128, 128, 2),
    (True, True, True, 64, 1, 256, 512, 1),  # the gradient goes through the norms behind the kernel
    (False, False, True, 128, 1, 64, 128, 3)])  # and here in it
def test_gradients_equal_those_of_the_triton_kernel(gated, flows, normalized, T, G, K, V, programs, monkeypatch):
  monkeypatch.setattr(mosaic_gpu_gradients, "PROGRAMS", programs)
  keys = iter(jax.random.split(jax.random.key(0), 9))
  draw = lambda *shape: jax.random.normal(next(keys), shape)
  half = lambda x: x.astype(jnp.bfloat16)
  q, k = draw(B, T, G, K), draw(B, T, G, K)
  if not normalized:
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
  beta, g = 2 * jax.nn.sigmoid(draw(B, T, H)), -jax.nn.softplus(draw(B, T, H)) if gated else None
  operands = prepare(half(q), half(k), beta, g, normalized, C, by_head=True)
  e, do, minus_f = (half(draw(B, T, H, V)) for _ in range(3))
  states = half(draw(B, H, T // C, V, K))
  saved = e, do, minus_f, states, half(jnp.flip(states, axis=-1))
  actual = mosaic_gpu_gradients.gradients(operands, *saved, 0.1, flows)
  config = Config(C, C, 0, 64, None, None, Tile(min(K, 128), 4, 1))
  expected = pallas_triton_gradients.gradients(operands, *saved, 0.1, config, flows)
  for name, a, b in zip(("dq", "dk", "dv", "dbeta", "d log_decay"), actual, expected, strict=True):
    if name == "d log_decay" and not flows:
      assert a is None and b is None
    else:
      assert (a.shape, a.dtype) == (b.shape, b.dtype)
      assert relative_error(a, b) < ROUNDING, name
