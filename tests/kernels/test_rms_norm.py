"""RMSNorm with scale and gate: the definition against NumPy, and the kernels against the definition."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels import rms_norm
from kernels.rms_norm import pallas_triton
from tests.close import assert_close

H100 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"))
# Relative RMS error of outputs and gradients: one rounding of a 16-bit result, and sums in another order.
BOUNDS = {"float32": 2e-6, "bfloat16": 3e-3, "float16": 4e-4}
KERNELS = functools.partial(rms_norm, implementation="pallas_triton")
DEFINITION = functools.partial(rms_norm, implementation="reference")


@dataclasses.dataclass(frozen=True)
class Case:
  shape: tuple
  dtype: str = "float32"
  scaled: bool = True
  gate: str = "swish"  # its activation; "" without a gate
  eps: float = 1e-5

  def __str__(self):
    return f"{'x'.join(map(str, self.shape))}-{self.dtype}-{'scaled' if self.scaled else 'plain'}-{self.gate}"

  def inputs(self):
    """x, scale, gate, and the cotangent of the output."""
    rng = np.random.default_rng(0)  # of NumPy, which compiles nothing
    draw = lambda size: jnp.asarray(size * rng.standard_normal(self.shape), self.dtype)
    scale = jnp.asarray(1 + 0.1 * rng.standard_normal(self.shape[-1:]), "float32") if self.scaled else None
    return draw(3), scale, draw(2) if self.gate else None, draw(1)

  def results(self, fn, x, scale, gate, dy):
    """The output and every gradient, by name."""
    given = {name: a for name, a in dict(x=x, scale=scale, gate=gate).items() if a is not None}
    options = dict(eps=self.eps, activation=self.gate or "swish")
    y, pull = jax.vjp(lambda arrays: fn(**arrays, **options), given)
    return {"output": y, **{f"d{name}": a for name, a in pull(dy)[0].items()}}


def check(case):
  arrays = case.inputs()
  wide = [None if a is None else np.asarray(a, "float32") for a in arrays]
  found, wanted = (jax.jit(functools.partial(case.results, fn))(*x)
                   for fn, x in ((KERNELS, arrays), (DEFINITION, wide)))
  for name, x in wanted.items():
    assert found[name].dtype == (jnp.float32 if name == "dscale" else case.dtype)
    assert_close(name, found[name], x, BOUNDS[case.dtype])


CASES = [
    Case((2, 8, 4, 64)), Case((2, 8, 4, 64), scaled=False), Case((2, 8, 4, 64), gate=""),
    Case((2, 8, 4, 64), gate="identity"), Case((64, 32), scaled=False, gate=""), Case((3, 16)), Case((48,)),
    Case((7, 5, 96)), Case((96, 1536)), Case((5, 2048), gate=""), Case((2, 8192)),
    *(Case((4, 50, 128), dtype) for dtype in ("bfloat16", "float16")),
    Case((2, 33, 6, 192), "bfloat16", scaled=False, gate="identity"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernels_equal_the_definition(case):
  check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [
    *(Case((8, 512, H, C), dtype, scaled, gate) for dtype in ("bfloat16", "float16", "float32")
      for H, C in ((4, 256), (4, 512), (16, 128), (1, 2048), (3, 192)) for scaled, gate in (
          (True, "swish"), (True, ""), (False, "identity"))), *CASES], ids=str)
def test_compiled_kernels_equal_the_definition(case):
  check(case)


def test_the_definition_equals_the_formula():
  case = Case((3, 4, 6))
  x, scale, gate, _ = (np.asarray(a, np.float64) for a in case.inputs())
  expected = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + case.eps) * scale * gate / (1 + np.exp(-gate))
  assert_close("output", DEFINITION(*case.inputs()[:3], eps=case.eps), expected, BOUNDS["float32"])


def test_statistics_do_not_overflow_in_float16():
  x = jnp.full((4, 16), 300, jnp.float16)
  assert_close("output", KERNELS(x, eps=1e-6), np.ones(x.shape), 1e-3)


def test_second_derivatives_and_forward_mode_over_reverse_mode():
  case = Case((4, 32))
  *arrays, _ = case.inputs()

  def loss(fn, arrays):
    return jnp.sum(jnp.sin(fn(*arrays, eps=case.eps)))

  @functools.partial(jax.jit, static_argnums=0)
  def curvature(fn, arrays):
    gradient = jax.grad(functools.partial(loss, fn))
    reverse = jax.grad(lambda arrays: sum(jnp.sum(g**2) for g in gradient(arrays)))(arrays)
    return reverse, jax.jvp(gradient, (arrays,), (arrays,))[1]

  for found, wanted in zip(*(jax.tree.leaves(curvature(fn, arrays)) for fn in (KERNELS, DEFINITION))):
    assert_close("second derivative", found, wanted, 1e-5)


def test_vmap():
  case = Case((3, 8, 32))
  arrays = case.inputs()
  for found, wanted in zip(*(jax.tree.leaves(jax.jit(jax.vmap(lambda x, gate, dy, fn=fn: case.results(
      fn, x, arrays[1], gate, dy)))(arrays[0], *arrays[2:])) for fn in (KERNELS, DEFINITION))):
    assert_close("vmap", found, wanted, BOUNDS["float32"])


def launches(fn, *arrays, op="rms_norm"):
  with use_abstract_mesh(H100):
    text = jax.jit(fn).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
  assert "stablehlo.while" not in text, "an interpreted kernel is part of the program"
  return collections.Counter(re.findall(rf'name = "({op}_\w+)"', text))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(8, 64, 4, 512), (3, 5, 96), (7, 1536)])
def test_one_kernel_per_pass_lowers(shape, dtype):
  arrays = [None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype) for a in Case(shape, dtype).inputs()]
  loss = lambda x, scale, gate: jnp.sum(jnp.sin(KERNELS(x, scale, gate, eps=1e-5).astype(jnp.float32)))
  assert launches(loss, *arrays[:3]) == {"rms_norm_forward": 1}
  assert launches(jax.grad(loss, (0, 1, 2)), *arrays[:3]) == {"rms_norm_forward": 1, "rms_norm_backward": 1}


@pytest.mark.parametrize("C, fits", [(16, True), (2560, True), (8192, True), (5120, True), (16384, False), (100, False),
                                     (2064, False)])
def test_widths(C, fits):
  x = jax.ShapeDtypeStruct((4, C), jnp.bfloat16)
  assert (pallas_triton.supports(x) is None) == fits
  if not fits:
    with pytest.raises(NotImplementedError, match=f"declines these inputs: {C} channels are not"):
      KERNELS(jnp.zeros(x.shape), eps=1e-5)


@pytest.mark.parametrize("bad, message", [
    (dict(scale=jnp.ones(5)), r"scale is float32\(5,\); it must be float32\(4,\)"),
    (dict(gate=jnp.ones((2, 5))), r"gate is float32\(2, 5\); it must be as x, float32\(2, 4\)"),
    (dict(activation="relu"), "activation='relu'; it must be one of swish, identity"),
    (dict(x=jnp.ones((0, 4))), r"x has shape \(0, 4\)"),
    (dict(x=jnp.ones((2, 4), jnp.int32)), "x has dtype int32")])
def test_bad_arguments_are_named(bad, message, unchecked_arrays):
  with pytest.raises(ValueError, match=f"rms_norm: {message}"):
    rms_norm(**dict(x=jnp.ones((2, 4)), eps=1e-5) | bad)
