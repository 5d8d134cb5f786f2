"""The kernel of an addition and a norm against the definition: interpreted, lowered for CUDA, and on a GPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import use_abstract_mesh

from kernels import dispatch, residual_norm
from tests.close import assert_close
from tests.kernels.test_steps import A100

EPS = 1e-6
BOUNDS = {"float32": 1e-6, "bfloat16": 5e-3}  # the second allows a few values another rounding


def arguments(D, dtype, scaled, B=3):
  x, y, scale = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((B, D), (B, D), (D,))))
  return 100 * x.astype(dtype), y.astype(dtype), scale if scaled else None


def check(run, D, dtype, scaled):
  args = arguments(D, dtype, scaled)
  found, expected = jax.jit(lambda *args: run(*args, eps=EPS))(*args), residual_norm._definition(EPS, *args)
  for name, actual, one in zip(("sum", "norm"), found, expected, strict=True):
    assert actual.dtype == dtype
    assert_close(name, actual, one, BOUNDS[dtype])


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_interpreted_kernel_is_the_definition(dtype, scaled):
  check(residual_norm.launch, 256, dtype, scaled)


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("D", [128, 1024, 2048, 8192])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_compiled_kernel_is_the_definition(dtype, D, scaled):
  check(residual_norm.add_and_norm, D, dtype, scaled)


@pytest.mark.parametrize("D, kernels", [(1024, 1), (1000, 0), (64, 0)])
def test_a_gpu_gets_the_kernel_for_powers_of_two(D, kernels, monkeypatch):
  monkeypatch.setattr(dispatch, "platform", lambda: "cuda")
  with use_abstract_mesh(A100):
    text = jax.jit(lambda *args: residual_norm.add_and_norm(*args, EPS)).trace(*arguments(D, "bfloat16", True)).lower(
        lowering_platforms=("cuda",)).as_text()
  assert text.count('name = "add_and_norm"') == kernels


def test_gradients_are_those_of_the_definition(monkeypatch):
  args = arguments(256, "float32", True)
  loss = lambda run: jax.grad(lambda *args: sum(jnp.sum(jnp.sin(a)) for a in run(*args)), (0, 1, 2))(*args)
  expected = loss(lambda *args: residual_norm._definition(EPS, *args))
  monkeypatch.setattr(dispatch, "platform", lambda: "cuda")  # the kernel's wrapper, with the kernel interpreted
  for name, actual, one in zip(("dx", "dy", "dscale"), loss(lambda *args: residual_norm.add_and_norm(*args, EPS)),
                               expected, strict=True):
    assert_close(name, actual, one, 1e-6)
