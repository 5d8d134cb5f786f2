"""Programs of the selective scan: under vmap and remat, in memory, differentiated twice, and lowered for a GPU."""

import collections
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from tests.close import assert_close, tolerance
from tests.kernels.selective_scan_cases import CHUNKED, PALLAS, REFERENCE, Case, jit, make_inputs, results


@pytest.mark.parametrize("fn", [CHUNKED, PALLAS], ids=["xla_chunked", "pallas_triton"])
def test_vmap_and_remat_change_nothing(fn):
  arrays, _, _ = make_inputs(Case(B=4, T=10, D=16))
  two = {name: x if name == "a" else x.reshape(2, 2, *x.shape[1:]) for name, x in arrays.items()}

  def loss(arrays):
    return jnp.sum(jnp.sin(fn(**arrays)[0]))

  def mapped(arrays):
    axes = {name: None if name == "a" else 0 for name in arrays}
    return jnp.sum(jax.vmap(jax.checkpoint(loss), in_axes=(axes,))(arrays))

  expected, actual = (jit(jax.grad(f))(x) for f, x in ((loss, arrays), (mapped, two)))
  for name, x in expected.items():
    assert_close(name, actual[name].reshape(x.shape), x, tolerance(f"d{name}", "float32"))


def test_memory_is_linear_in_time():
  """No array of forward and backward holds a state for each token of the sequence."""
  arrays, ids, cotangents = make_inputs(Case(B=1, T=1024, D=8, N=16))
  program = results.lower(CHUNKED, arrays, ids, cotangents).as_text()
  assert "tensor<16x1x8x16xf32>" in program, "the states of 16 chunks"
  assert not any(f"tensor<{shape}xf32>" in program for shape in ("1024x1x8x16", "16x64x1x8x16", "1x1024x8x16"))


def test_second_derivatives_equal_those_of_the_scan():
  arrays, _, _ = make_inputs(Case(D=3))
  vector = {name: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for name, x in arrays.items()}

  def product(fn):
    gradient = jax.grad(lambda x: sum(jnp.sum(jnp.sin(y)) for y in fn(**x)))
    return lambda arrays: jax.jvp(gradient, (arrays,), (vector,))[1]

  expected, actual = (jit(product(fn))(arrays) for fn in (REFERENCE, CHUNKED))
  for name, x in expected.items():
    assert_close(name, actual[name], x, tolerance(f"d{name}", "float32"))
  gradient = jax.grad(lambda x: jnp.sum(CHUNKED(**x)[0]**2))
  jax.eval_shape(jax.grad(lambda x: sum(map(jnp.sum, gradient(x).values()))), arrays)
  with pytest.raises(NotImplementedError, match="first derivatives only.*implementation='xla_chunked' has second"):
    jax.eval_shape(product(PALLAS), arrays)


def kernel_counts(B, T, dtype="bfloat16", N=16, gradient=True):
  """How often each kernel appears in a loss, or its gradient, lowered for CUDA without a GPU."""

  def loss(x, step_size, a, b, c):
    output, final_state = PALLAS(x, step_size, a, b, c)
    return jnp.sum(output.astype(jnp.float32)) + jnp.sum(final_state)

  array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
  arrays = (array(B, T, 2048), array(B, T, 2048, dtype="float32"), array(2048, N, dtype="float32"),
            array(B, T, N), array(B, T, N))
  with use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100", 132, "gpu"))):
    fn = jax.grad(loss, argnums=range(5)) if gradient else loss
    text = jax.jit(fn).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
  assert "stablehlo.while" not in text, "an interpreted kernel is part of the program"
  return collections.Counter(re.findall(r'name = "selective_scan_(\w+)"', text))


@pytest.mark.parametrize("dtype, N", [("bfloat16", 16), ("float32", 4), ("float16", 32)])
def test_kernels_lower(dtype, N):
  assert kernel_counts(16, 100, dtype, N) == {"forward": 1, "backward": 1}


def test_forward_alone_lowers_without_states():
  assert kernel_counts(16, 100, gradient=False) == {"forward": 1}


def test_few_long_sequences_are_cut():
  assert kernel_counts(1, 4096) == {"forward": 1, "backward": 1, "piece": 2}
