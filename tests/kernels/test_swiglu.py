"""SwiGLU's product: the definition against NumPy, and the kernel of its gradients against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import swiglu
from tests.close import assert_close
from tests.kernels.test_rms_norm import BOUNDS, launches

KERNELS = functools.partial(swiglu, implementation="pallas_triton")
DEFINITION = functools.partial(swiglu, implementation="reference")
SHAPES = [(2, 5, 64), (4, 1024), (3, 7, 1024)]


def inputs(shape, dtype="float32"):
  """gate, up, and the cotangent of the output."""
  return [jnp.asarray(2 * x, dtype) for x in np.random.default_rng(0).standard_normal((3, *shape))]


@functools.partial(jax.jit, static_argnums=0)
def results(fn, arrays):
  return jax.vjp(fn, *arrays[:2])[1](arrays[2])


def check(shape, dtype):
  arrays = inputs(shape, dtype)
  found, wanted = results(KERNELS, arrays), results(DEFINITION, [np.asarray(a, "float32") for a in arrays])
  for name, x, expected in zip(("dgate", "dup"), found, wanted):
    assert x.dtype == dtype
    assert_close(name, x, expected, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_interpreted_kernel_equals_the_definition(shape, dtype):
  check(shape, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(8, 512, 5632), *SHAPES], ids=str)
def test_the_compiled_kernel_equals_the_definition(shape, dtype):
  check(shape, dtype)


@pytest.mark.parametrize("fn", [KERNELS, DEFINITION], ids=["pallas_triton", "reference"])
def test_the_formula(fn):
  gate, up, _ = (np.asarray(a, np.float64) for a in inputs((4, 256)))
  assert_close("output", fn(*inputs((4, 256))[:2]), gate / (1 + np.exp(-gate)) * up, BOUNDS["float32"])


def test_second_derivatives_forward_mode_over_reverse_mode_and_vmap():
  @functools.partial(jax.jit, static_argnums=0)
  def found(fn, gate, up, dy):
    gradient = jax.grad(lambda arrays: jnp.sum(jnp.sin(fn(*arrays))))
    squares = jax.grad(lambda arrays: sum(jnp.sum(g**2) for g in gradient(arrays)))((gate, up))
    rows = jax.vmap(lambda gate, up, dy: jax.vjp(fn, gate, up)[1](dy))(gate, up, dy)
    return squares, jax.jvp(gradient, ((gate, up),), ((gate, up),))[1], rows

  for x, expected in zip(*(jax.tree.leaves(found(fn, *inputs((4, 1024)))) for fn in (KERNELS, DEFINITION))):
    assert_close("derivative", x, expected, 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_kernel_in_the_backward_pass_lowers(dtype):
  arrays = [jax.ShapeDtypeStruct((8, 128, 5632), dtype)] * 2
  loss = lambda *arrays: jnp.sum(jnp.sin(KERNELS(*arrays).astype(jnp.float32)))
  assert launches(loss, *arrays, op="swiglu") == {}
  assert launches(jax.grad(loss, (0, 1)), *arrays, op="swiglu") == {"swiglu_backward": 1}


def test_what_the_kernel_declines_and_what_is_wrong(unchecked_arrays):
  with pytest.raises(NotImplementedError, match="declines these inputs: 1000 entries are not a multiple of 128"):
    KERNELS(jnp.zeros(1000), jnp.zeros(1000))
  with pytest.raises(ValueError, match=r"swiglu: up is float32\(5,\); it must be as gate, float32\(4,\)"):
    swiglu(jnp.zeros(4), jnp.zeros(5))
  with pytest.raises(ValueError, match="swiglu: gate has dtype int32"):
    swiglu(jnp.zeros(4, jnp.int32), jnp.zeros(4, jnp.int32))
