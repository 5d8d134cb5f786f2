"""Skip connection, gate and norm: the definition against NumPy, and the kernels against the definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import skip_gate_norm
from kernels.skip_gate_norm import pallas_triton
from tests.close import assert_close
from tests.kernels.test_rms_norm import BOUNDS, launches

KERNELS = functools.partial(skip_gate_norm, implementation="pallas_triton")
DEFINITION = functools.partial(skip_gate_norm, implementation="reference")
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
  shape: tuple
  dtype: str = "float32"

  def __str__(self):
    return f"{'x'.join(map(str, self.shape))}-{self.dtype}"

  def inputs(self):
    """x, v, gate, skip, scale, and the cotangent of the output."""
    keys = jax.random.split(jax.random.key(0), 6)
    draw = lambda key: jax.random.normal(key, self.shape).astype(self.dtype)
    vector = lambda key: 1 + 0.1 * jax.random.normal(key, self.shape[-2:])
    return 3 * draw(keys[0]), draw(keys[1]), 2 * draw(keys[2]), vector(keys[3]), vector(keys[4]), draw(keys[5])


def results(fn, *arrays):
  """The output and every gradient, by name."""
  *arrays, dy = arrays
  y, pull = jax.vjp(lambda arrays: fn(*arrays, eps=EPS), arrays)
  return {"output": y, **dict(zip(("dx", "dv", "dgate", "dskip", "dscale"), pull(dy)[0], strict=True))}


def check(case):
  arrays = case.inputs()
  wide = [a.astype("float32") for a in arrays]
  found, wanted = (jax.jit(functools.partial(results, fn))(*x) for fn, x in ((KERNELS, arrays), (DEFINITION, wide)))
  for name, x in wanted.items():
    assert found[name].dtype == (jnp.float32 if name in ("dskip", "dscale") else case.dtype)
    assert_close(name, found[name].astype("float32"), x, BOUNDS[case.dtype])


CASES = [
    Case((2, 8, 2, 64)), Case((64, 1, 32)), Case((3, 16)), Case((7, 5, 96)), Case((16, 1, 1536)), Case((2, 1, 8192)),
    *(Case((4, 50, 2, 128), dtype) for dtype in ("bfloat16", "float16")), Case((2, 33, 1, 192), "bfloat16"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernels_equal_the_definition(case):
  check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [
    *(Case((8, 512, G, C), dtype) for dtype in ("bfloat16", "float16", "float32")
      for G, C in ((1, 4096), (1, 2048), (2, 1024), (8, 64))), *CASES], ids=str)
def test_compiled_kernels_equal_the_definition(case):
  check(case)


def test_the_definition_equals_the_formula():
  case = Case((3, 2, 6))
  x, v, gate, skip, scale, _ = (np.asarray(a, np.float64) for a in case.inputs())
  h = (x + skip * v) * gate / (1 + np.exp(-gate))
  expected = h / np.sqrt(np.mean(h**2, -1, keepdims=True) + EPS) * scale
  assert_close("output", DEFINITION(*case.inputs()[:-1], eps=EPS), expected, BOUNDS["float32"])


def test_second_derivatives_and_forward_mode_over_reverse_mode():
  *arrays, _ = Case((4, 1, 32)).inputs()

  def curvature(fn):
    gradient = jax.grad(lambda arrays: jnp.sum(jnp.sin(fn(*arrays, eps=EPS))))
    reverse = jax.grad(lambda arrays: sum(jnp.sum(g**2) for g in gradient(arrays)))(arrays)
    return reverse, jax.jvp(gradient, (arrays,), (arrays,))[1]

  for found, wanted in zip(*map(jax.tree.leaves, map(curvature, (KERNELS, DEFINITION)))):
    assert_close("second derivative", found, wanted, 1e-5)


def test_vmap():
  x, v, gate, skip, scale, dy = Case((3, 8, 1, 32)).inputs()
  mapped = lambda fn: jax.vmap(lambda x, v, gate, dy: results(fn, x, v, gate, skip, scale, dy))(x, v, gate, dy)
  for found, wanted in zip(*(jax.tree.leaves(mapped(fn)) for fn in (KERNELS, DEFINITION)), strict=True):
    assert_close("vmap", found, wanted, BOUNDS["float32"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(8, 64, 1, 4096), (3, 5, 96), (7, 2, 1536)])
def test_one_kernel_per_pass_lowers(shape, dtype):
  arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in Case(shape, dtype).inputs()[:-1]]
  loss = lambda *arrays: jnp.sum(jnp.sin(KERNELS(*arrays, eps=EPS).astype(jnp.float32)))
  counts = functools.partial(launches, op="skip_gate_norm")
  assert counts(loss, *arrays) == {"skip_gate_norm_forward": 1}
  assert counts(jax.grad(loss, range(5)), *arrays) == {"skip_gate_norm_forward": 1, "skip_gate_norm_backward": 1}


def test_widths_are_those_of_the_norm():
  assert pallas_triton.supports(jax.ShapeDtypeStruct((4, 1, 5120), jnp.bfloat16)) is None
  x = jnp.zeros((4, 1, 100))
  with pytest.raises(NotImplementedError, match="skip_gate_norm.*declines these inputs: 100 channels are not"):
    KERNELS(x, x, x, x[0], x[0], eps=EPS)


@pytest.mark.parametrize("bad, message", [
    (dict(v=jnp.ones((2, 1, 5))), r"v is float32\(2, 1, 5\); it must be as x, float32\(2, 1, 4\)"),
    (dict(gate=jnp.ones((2, 1, 4), jnp.bfloat16)), r"gate is bfloat16\(2, 1, 4\); it must be as x"),
    (dict(skip=jnp.ones(4)), r"skip is float32\(4,\); it must be float32\(1, 4\)"),
    (dict(scale=jnp.ones((2, 4))), r"scale is float32\(2, 4\); it must be float32\(1, 4\)"),
    (dict(x=jnp.ones((2, 0, 4))), r"x has shape \(2, 0, 4\)"),
    (dict(x=jnp.ones((2, 1, 4), jnp.int32)), "x has dtype int32")])
def test_bad_arguments_are_named(bad, message, unchecked_arrays):
  arrays = {name: jnp.ones((2, 1, 4)) for name in ("x", "v", "gate")}
  vectors = {name: jnp.ones((1, 4)) for name in ("skip", "scale")}
  with pytest.raises(ValueError, match=f"skip_gate_norm: {message}"):
    skip_gate_norm(**arrays | vectors | bad, eps=EPS)
