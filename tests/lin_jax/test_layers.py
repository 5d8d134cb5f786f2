"""Each layer against its formula written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax.layers import (
    SGLU,
    Linear,
    RMSNorm,
    ShortConvolution,
    SimpleRMSNorm,
    SwiGLU,
    joint_products,
    rotary,
    segment_runs,
    softplus,
)
from tests.close import assert_close


def normal(seed, *shape, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def test_rms_norm():
  norm = RMSNorm(6, eps=1e-6, rngs=nnx.Rngs(0))
  norm.scale[...] = normal(1, 6)
  x = 100 * normal(0, 3, 4, 6)
  expected = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6) * np.asarray(norm.scale[...])[None, None]
  assert_close("float32", norm(x), expected, 1e-6)


def test_simple_rms_norm():
  norm = SimpleRMSNorm(eps=1e-2)
  x = normal(0, 3, 4, 6)
  assert not jax.tree.leaves(norm)
  assert_close("float32", norm(x), x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-2), 1e-6)


@pytest.mark.parametrize("simple", [False, True])
def test_norm_statistics_are_float32(simple):
  # In float16 the squares of 300 overflow.
  x = jnp.full((2, 8), 300, jnp.float16)
  y = (SimpleRMSNorm(eps=1e-6) if simple else RMSNorm(8, eps=1e-6, rngs=nnx.Rngs(0)))(x)
  assert y.dtype == jnp.float16
  assert_close("float16", y, np.ones((2, 8)), 1e-3)


def test_swiglu():
  mlp = SwiGLU(6, 10, dtype=jnp.float32, rngs=nnx.Rngs(0))
  x = normal(0, 2, 3, 6)
  gate, up = (np.asarray(x @ linear.kernel[...]) for linear in (mlp.gate, mlp.up))
  assert_close("output", mlp(x), gate / (1 + np.exp(-gate)) * up @ np.asarray(mlp.down.kernel[...]), 1e-6)


def test_sglu():
  mlp = SGLU(6, 10, dtype=jnp.float32, rngs=nnx.Rngs(0))
  x = normal(0, 2, 3, 6)
  gate, up = (np.asarray(x @ linear.kernel[...]) for linear in (mlp.gate, mlp.up))
  assert_close("output", mlp(x), gate * up @ np.asarray(mlp.down.kernel[...]), 1e-6)
  assert mlp.flops_per_token() == 2 * 3 * 60


@pytest.mark.parametrize("output_dtype", [None, jnp.float32])
def test_linear_casts_at_use(output_dtype):
  linear = Linear(64, 5, (None, None), dtype=jnp.bfloat16, rngs=nnx.Rngs(0), bias=True, output_dtype=output_dtype)
  linear.bias[...] = normal(1, 5)
  x = normal(0, 3, 64, dtype=jnp.bfloat16)
  y = linear(x)
  assert linear.kernel.dtype == jnp.float32
  assert y.dtype == (output_dtype or jnp.bfloat16)
  rounded = np.asarray(linear.kernel[...].astype(jnp.bfloat16), np.float32)
  expected = np.asarray(x, np.float32) @ rounded + np.asarray(linear.bias[...])[None]
  assert_close("output", y.astype(jnp.float32), expected, 1e-6 if output_dtype else 5e-3)


@pytest.mark.parametrize("output_dtype", [None, jnp.float32])
def test_derivatives_of_linear_are_products_in_its_dtype(output_dtype):
  linear = Linear(64, 5, (None, None), dtype=jnp.bfloat16, rngs=nnx.Rngs(0), output_dtype=output_dtype)
  x, dy = normal(0, 3, 64, dtype=jnp.bfloat16), normal(1, 3, 5, dtype=output_dtype or jnp.bfloat16)
  apply = lambda linear, x: linear(x)
  gradients = lambda linear, x, dy: jax.vjp(apply, linear, x)[1](dy)
  products = [eqn for eqn in jax.make_jaxpr(gradients)(linear, x, dy).eqns if eqn.primitive.name == "dot_general"]
  assert len(products) == 3 and all(v.aval.dtype == jnp.bfloat16 for eqn in products for v in eqn.invars)
  dlinear, dx = gradients(linear, x, dy)
  (kernel, dkernel), (x, dx, dy) = ((np.asarray(a, np.float32) for a in arrays)
                                    for arrays in ((linear.kernel[...], dlinear.kernel[...]), (x, dx, dy)))
  assert_close("dkernel", dkernel, x.T @ dy, 5e-3)
  assert_close("dx", dx, dy @ kernel.T, 5e-3)
  tangent = jax.jvp(apply, (linear, jnp.asarray(x, jnp.bfloat16)), (linear, jnp.asarray(x, jnp.bfloat16)))[1]
  assert tangent.dtype == (output_dtype or jnp.bfloat16)
  assert_close("tangent", tangent.astype(jnp.float32), 2 * x @ kernel, 5e-3)


@pytest.fixture(scope="module")
def convolution():
  return ShortConvolution(5, 4, axis=None, dtype=jnp.float32, rngs=nnx.Rngs(0))


def test_short_convolution(convolution):
  x, kernel = np.asarray(normal(0, 2, 9, 5)), np.asarray(convolution.kernel[...])
  expected = np.stack([np.convolve(x[b, :, c], kernel[::-1, c])[:9] for b in range(2) for c in range(5)])
  assert_close("output", convolution(x)[0], expected.reshape(2, 5, 9).swapaxes(1, 2), 1e-6)


@pytest.mark.parametrize("pieces", [(9,), (4, 5), (1,) * 9])
def test_short_convolution_in_pieces(convolution, pieces):
  x, state, outputs = normal(0, 2, 9, 5), convolution.init_state(2), []
  for piece in np.split(x, np.cumsum(pieces)[:-1], axis=1):
    y, state = convolution(piece, state)
    outputs.append(y)
  whole, last = convolution(x)
  assert_close("output", np.concatenate(outputs, axis=1), whole, 1e-6)
  assert_close("state", state, last, 0)


def test_short_convolution_segments(convolution):
  x, past = normal(0, 1, 9, 5), normal(1, 1, 3, 5)
  # An id that comes back is another segment.
  segment_ids = jnp.array([[7, 7, 8, 7, 7, 7, 7, 7, 9]])
  y, state = convolution(x, past, segment_ids)
  alone = [convolution(x[:, :2], past), convolution(x[:, 2:3]), convolution(x[:, 3:8]), convolution(x[:, 8:])]
  assert_close("output", y, np.concatenate([output for output, _ in alone], axis=1), 1e-6)
  assert_close("state", state, alone[-1][1], 0)


def test_short_convolution_needs_two_taps():
  with pytest.raises(ValueError, match="taps=1"):
    ShortConvolution(5, 1, axis=None, dtype=jnp.float32, rngs=nnx.Rngs(0))


def test_segment_runs_count_changes():
  np.testing.assert_array_equal(segment_runs(jnp.array([[4, 4, 2, 4], [1, 1, 1, 1]])), [[0, 0, 1, 2], [0, 0, 0, 0]])


def test_rotary_scores_depend_on_distance():
  q, k = normal(0, 1, 1, 2, 8), normal(1, 1, 1, 2, 8)

  def score(i, j):
    rotated = (rotary(x, jnp.array([[position]]), 1e4) for x, position in ((q, i), (k, j)))
    return np.einsum("bthk,bthk->h", *rotated)

  assert_close("same distance", score(1007, 1002), score(5, 0), 1e-4)
  assert_close("length", np.linalg.norm(rotary(q, jnp.array([[9]]), 1e4)), np.linalg.norm(q), 1e-6)
  assert np.abs(score(5, 0) - score(6, 0)).max() > 1e-2


def test_rotary_angles():
  x = jnp.zeros((1, 1, 1, 4)).at[..., :2].set(1.0)
  angle = 3 * np.array([1.0, 1e4**-0.5])
  expected = np.concatenate([np.cos(angle), np.sin(angle)])
  assert_close("rotation", rotary(x, jnp.array([[3]]), 1e4)[0, 0, 0], expected, 1e-6)


def test_softplus_has_the_derivatives_of_its_formula():
  x = jnp.linspace(-30.0, 30.0, 101)
  for order in (lambda f: f, jax.grad, lambda f: jax.grad(jax.grad(f))):
    found, expected = (jax.vmap(order(f))(x) for f in (softplus, lambda x: jnp.log1p(jnp.exp(x))))
    assert_close("softplus", found, expected, 1e-5)


def test_softplus_has_an_upper_bound_and_no_overflow():
  x = jnp.array([79.0, 80.0, 100.0, 1e30, jnp.inf, -1e30, -jnp.inf, jnp.nan])
  np.testing.assert_allclose(softplus(x), [79, 80, 80, 80, 80, 0, 0, jnp.nan], rtol=1e-6)
  np.testing.assert_allclose(jax.vmap(jax.grad(softplus))(x), [1, 1, 1, 1, 1, 0, 0, jnp.nan], rtol=1e-6)


def test_joint_products_are_those_of_the_layers():
  linears = [Linear(8, size, ("embed", None), dtype=jnp.bfloat16, output_dtype=output, rngs=nnx.Rngs(size))
             for size, output in ((4, None), (3, None), (2, jnp.float32))]
  x = normal(0, 2, 5, 8, dtype=jnp.bfloat16)

  def results(products, linears, x):
    outputs, pull = jax.vjp(products, linears, x)
    return outputs, pull(jax.tree.map(jnp.cos, outputs))

  separate = lambda linears, x: [linear(x) for linear in linears]
  both = (jax.tree.leaves(results(products, linears, x)) for products in (joint_products, separate))
  for found, expected in zip(*both, strict=True):
    assert found.dtype == expected.dtype
    assert_close("joint products", found.astype(jnp.float32), expected.astype(jnp.float32), 5e-3)
