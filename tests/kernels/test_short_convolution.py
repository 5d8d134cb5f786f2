"""Short convolution: the definition against NumPy, and the kernels against the definition."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels import short_convolution
from tests.close import assert_close

H100 = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"))
# Relative RMS error of outputs and gradients: one rounding of a 16-bit result, and sums in another order.
BOUNDS = {"float32": 2e-6, "bfloat16": 3e-3, "float16": 4e-4}
KERNELS = functools.partial(short_convolution, implementation="pallas_triton")
DEFINITION = functools.partial(short_convolution, implementation="reference")


@dataclasses.dataclass(frozen=True)
class Case:
  T: int
  C: int = 16
  B: int = 2
  taps: int = 4
  dtype: str = "float32"
  silu: bool = True
  bias: bool = False
  initial: bool = False
  segments: tuple = ()  # lengths, in all rows but the first, which is one segment

  def __str__(self):
    flags = "".join(f"-{name}" for name in ("silu", "bias", "initial") if getattr(self, name))
    return f"T{self.T}-C{self.C}-taps{self.taps}-{self.dtype}{flags}-{'.'.join(map(str, self.segments))}"

  def inputs(self):
    """The arrays by name, the segment ids, and the cotangents of both results."""
    rng = np.random.default_rng(0)  # of NumPy, which compiles nothing
    draw = lambda *shape, dtype=self.dtype: jnp.asarray(rng.standard_normal(shape), dtype)
    arrays = {"x": draw(self.B, self.T, self.C), "kernel": draw(self.taps, self.C, dtype="float32")}
    if self.bias:
      arrays["bias"] = draw(self.C, dtype="float32")
    if self.initial:
      arrays["initial_inputs"] = draw(self.B, self.taps - 1, self.C)
    ids = None
    if self.segments:
      row = np.repeat(np.arange(len(self.segments)) % 3, self.segments)
      ids = jnp.asarray(np.stack([np.zeros_like(row), *[row] * (self.B - 1)]))
    return arrays, ids, (draw(self.B, self.T, self.C), draw(self.B, self.taps - 1, self.C))

  def results(self, fn, arrays, ids, cotangents):
    """The output, the kept inputs and every gradient, by name."""
    y, pull = jax.vjp(lambda arrays: fn(**arrays, silu=self.silu, segment_ids=ids), arrays)
    return {"output": y[0], "inputs": y[1], **{f"d{name}": a for name, a in pull(cotangents)[0].items()}}


def check(case):
  arrays, ids, cotangents = case.inputs()
  wide = jax.tree.map(lambda a: np.asarray(a, "float32"), (arrays, cotangents))
  found, wanted = (jax.jit(functools.partial(case.results, fn))(*x)
                   for fn, x in ((KERNELS, (arrays, ids, cotangents)), (DEFINITION, (wide[0], ids, wide[1]))))
  for name, x in wanted.items():
    assert found[name].dtype == (jnp.float32 if name in ("dkernel", "dbias") else case.dtype)
    assert_close(name, found[name], x, BOUNDS[case.dtype])


CASES = [
    Case(1), Case(2, initial=True), Case(40, taps=8, silu=False), Case(128, taps=2, initial=True),
    Case(130, C=48, bias=True),
    Case(130, initial=True, segments=(1, 62, 1, 1, 2, 63)), Case(64, segments=(1,) * 64, taps=3, initial=True),
    Case(70, silu=False, bias=True, segments=(3, 67)), Case(192, segments=(64, 128), B=3),
    *(Case(200, C=64, dtype=dtype, bias=True, initial=True, segments=(15, 85, 100))
      for dtype in ("bfloat16", "float16")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernels_equal_the_definition(case):
  check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [
    *(Case(1000, C, dtype=dtype, silu=silu, bias=silu, initial=bool(segments), segments=segments)
      for dtype in ("bfloat16", "float16", "float32") for C in (64, 1536, 2048)
      for silu, segments in ((True, ()), (True, (15, 85, 1, 899)), (False, (1000,)))), *CASES], ids=str)
def test_compiled_kernels_equal_the_definition(case):
  check(case)


def test_the_definition_equals_the_formula():
  case = Case(9, C=5, bias=True, initial=True)
  arrays, _, _ = case.inputs()
  x, kernel, bias, before = (np.asarray(a, np.float64) for a in arrays.values())
  inputs = np.concatenate([before, x], axis=1)
  z = bias + sum(kernel[i] * inputs[:, i:i + 9] for i in range(4))
  y, kept = DEFINITION(**arrays, silu=True)
  assert_close("output", y, z / (1 + np.exp(-z)), BOUNDS["float32"])
  assert_close("inputs", kept, inputs[:, -3:], 1e-7)


@pytest.mark.parametrize("fn", [KERNELS, DEFINITION], ids=["pallas_triton", "reference"])
def test_other_segments_count_as_zero_even_if_not_finite(fn):
  """Forward and backward: nothing of the middle segment reaches the others."""
  case = Case(70, segments=(30, 10, 30), initial=True)
  arrays, ids, (dy, dinputs) = case.inputs()
  ids = ids[1:].repeat(2, axis=0)

  @jax.jit
  def results(value):
    bad = arrays | {"x": arrays["x"].at[:, 30:40].set(value)}
    y, pull = jax.vjp(lambda x: fn(**bad | {"x": x}, silu=True, segment_ids=ids), bad["x"])
    return y[0], y[1], pull((dy.at[:, 30:40].set(value), dinputs))[0]

  for found, wanted in zip(results(jnp.nan), results(1.0)):
    keep = lambda a: a if a.shape[1] < 40 else np.delete(a, np.arange(30, 40), axis=1)
    np.testing.assert_array_equal(keep(found), keep(wanted))


def test_second_derivatives_and_forward_mode_over_reverse_mode():
  case = Case(20, bias=True, initial=True, segments=(6, 14))
  arrays, ids, _ = case.inputs()

  @functools.partial(jax.jit, static_argnums=0)
  def curvature(fn, arrays):
    gradient = jax.grad(lambda arrays: jnp.sum(jnp.sin(fn(**arrays, silu=True, segment_ids=ids)[0])))
    reverse = jax.grad(lambda arrays: sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient(arrays))))(arrays)
    return reverse, jax.jvp(gradient, (arrays,), (arrays,))[1]

  for found, wanted in zip(*(jax.tree.leaves(curvature(fn, arrays)) for fn in (KERNELS, DEFINITION))):
    assert_close("second derivative", found, wanted, 1e-5)


def test_vmap():
  case = Case(24, B=3, initial=True, segments=(5, 19))
  arrays, ids, cotangents = case.inputs()
  one = lambda fn: jax.jit(jax.vmap(lambda x, ids, initial, cotangents: case.results(
      fn, {"x": x[None], "kernel": arrays["kernel"], "initial_inputs": initial[None]}, ids[None],
      jax.tree.map(lambda a: a[None], cotangents))))(arrays["x"], ids, arrays["initial_inputs"], cotangents)
  for found, wanted in zip(*map(jax.tree.leaves, map(one, (KERNELS, DEFINITION)))):
    assert_close("vmap", found, wanted, BOUNDS["float32"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", [Case(2048, 1536), Case(100, 48, initial=True, bias=True, segments=(3, 97))], ids=str)
def test_one_kernel_per_pass_lowers(case, dtype):
  case = dataclasses.replace(case, dtype=dtype)
  arrays, ids, _ = jax.eval_shape(case.inputs)

  def loss(arrays, ids):
    return jnp.sum(jnp.sin(KERNELS(**arrays, silu=True, segment_ids=ids)[0].astype(jnp.float32)))

  def launches(fn):
    with use_abstract_mesh(H100):
      text = jax.jit(fn).trace(arrays, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.while" not in text, "an interpreted kernel is part of the program"
    return collections.Counter(re.findall(r'name = "(short_convolution_\w+)"', text))

  assert launches(loss) == {"short_convolution_forward": 1}
  assert launches(jax.grad(loss)) == {"short_convolution_forward": 1, "short_convolution_backward": 1}


@pytest.mark.parametrize("C, taps, reason", [(40, 4, "40 channels are not a multiple of 16"),
                                             (32, 9, "9 taps are more than 8")])
def test_what_the_kernels_decline(C, taps, reason):
  with pytest.raises(NotImplementedError, match=f"declines these inputs: {reason}"):
    KERNELS(jnp.zeros((1, 4, C)), jnp.zeros((taps, C)))


@pytest.mark.parametrize("bad, message", [
    (dict(x=jnp.ones((2, 4))), r"x has shape \(2, 4\)"),
    (dict(x=jnp.ones((2, 4, 5), jnp.int32)), "x has dtype int32"),
    (dict(kernel=jnp.ones((1, 5))), r"kernel is float32\(1, 5\); it must be float32 \[taps, 5\] with at least 2 taps"),
    (dict(bias=jnp.ones(4)), r"bias is float32\(4,\); it must be float32\(5,\)"),
    (dict(initial_inputs=jnp.ones((2, 3, 4))), r"initial_inputs is float32\(2, 3, 4\)"),
    (dict(segment_ids=jnp.ones((2, 4))), r"segment_ids is float32\(2, 4\)")])
def test_bad_arguments_are_named(bad, message, unchecked_arrays):
  with pytest.raises(ValueError, match=f"short_convolution: {message}"):
    short_convolution(**dict(x=jnp.ones((2, 4, 5)), kernel=jnp.ones((4, 5))) | bad)
