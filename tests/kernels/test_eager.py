"""Ops that are called outside of `jit`: the second call compiles nothing, and each call has its own options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from tests.close import assert_close
from tests.compilations import compilations

SEGMENTS = jnp.array([[0] * 9 + [1] * 11])


def arrays(op, seed):
  x = jax.random.normal(jax.random.key(seed), (4, 1, 20, 2, 16))
  q, k, v = x[:3]
  gate = -jnp.abs(x[3])
  if op == "selective_scan":
    return q[:, :, 0], jnp.abs(k[:, :, 0]), gate[0, :16, 0, :8], v[:, :, 0, :8], v[:, :, 1, :8]
  if op == "delta_rule":
    return q, k / jnp.linalg.norm(k, axis=-1, keepdims=True), v, jax.nn.sigmoid(gate[..., 0])
  return q, k, v, gate if op == "gla" else gate[..., 0]


@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["", "segments"])
@pytest.mark.parametrize("op", ["delta_rule", "gla", "linear_attention", "selective_scan"])
def test_the_second_call_compiles_nothing(op, segment_ids):
  call = lambda *args: getattr(kernels, op)(*args, segment_ids=segment_ids)[0].sum()
  inputs = [arrays(op, seed) for seed in range(2)]
  for differentiated in (call, jax.grad(call)):
    with compilations() as compiled:
      first = differentiated(*inputs[0])
    assert compiled
    with compilations() as compiled:
      second = differentiated(*inputs[1])
    assert not compiled and not np.array_equal(first, second)


def test_other_options_are_another_program():
  q, k, v, gate = arrays("gla", 0)
  expected = {scale: jax.jit(lambda scale=scale: kernels.gla(q, k, v, gate, scale=scale)[0])() for scale in (0.5, 1.0)}
  for scale, output in expected.items():
    assert_close("output", kernels.gla(q, k, v, gate, scale=scale)[0], output, 1e-6)
  named = kernels.gla(q, k, v, gate, scale=0.5, implementation="reference")[0]
  assert_close("output", named, expected[0.5], 1e-5)
