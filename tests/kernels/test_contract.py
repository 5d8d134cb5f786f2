"""The ops' rules for their numbers and arrays, and that a scale may be traced."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import kernels
from tests.close import assert_close, tolerance
from tests.kernels.cases import Case, make_inputs

OPS = {"delta_rule": {"beta": "unit", "decay": "token"}, "gla": {}, "linear_attention": {"decay": "token"}}
X = jnp.ones((1, 3, 2, 4))
ARGUMENTS = {"delta_rule": (X, X, X, X[..., 0]), "gla": (X, X, X, -X), "linear_attention": (X, X, X, -X[..., 0])}
every_op = pytest.mark.parametrize("op", OPS)


@pytest.mark.parametrize("implementation", ["reference", "xla_chunked"])
@every_op
def test_a_traced_scale_is_that_number_and_has_a_gradient(op, implementation):
  inputs = make_inputs(Case(T=9, K=4, V=6, **OPS[op]))
  options = {"normalize_qk": True} if op == "delta_rule" else {}
  fn = functools.partial(getattr(kernels, op), **inputs.arrays, **options, implementation=implementation)
  output, final_state = fn(scale=0.3)
  (traced, traced_state), vjp = jax.vjp(jax.jit(lambda scale: fn(scale=scale)), jnp.float32(0.3))
  assert_close("output", traced, output, tolerance("output", "float32"))
  assert_close("final_state", traced_state, final_state, tolerance("final_state", "float32"))
  # The output is linear in it.
  np.testing.assert_allclose(vjp(inputs.cotangents)[0], jnp.sum(inputs.cotangents[0] * output) / 0.3, rtol=1e-5)
  several = jax.vmap(lambda scale: fn(scale=scale)[0])(jnp.asarray([0.0, 0.3]))
  assert not np.any(several[0])
  assert_close("output", several[1], output, tolerance("output", "float32"))


@every_op
def test_kernels_take_a_traced_scale(op):
  loss = lambda scale: jnp.sum(getattr(kernels, op)(*ARGUMENTS[op], scale=scale, implementation="pallas_triton")[0])
  assert jax.eval_shape(jax.grad(loss), jnp.float32(0.3)).shape == ()


@every_op
def test_numbers_of_any_kind_are_one_number(op):
  fn = functools.partial(getattr(kernels, op), *ARGUMENTS[op], implementation="reference")
  expected = fn(scale=-0.5)[0]
  for scale in (np.float32(-0.5), np.float64(-0.5), np.asarray(-0.5), ml_dtypes.bfloat16(-0.5)):
    np.testing.assert_array_equal(fn(scale=scale)[0], expected)
  for scale in (2, np.int64(2), jnp.int32(2), jnp.bfloat16(2)):
    np.testing.assert_allclose(fn(scale=scale)[0], -4 * expected, rtol=1e-6)
  for size in (np.int64(16), np.asarray(16)):
    np.testing.assert_array_equal(fn(scale=-0.5, chunk_size=size)[0], expected)


RULE = "it must be a finite number, an array of no dimensions, or None"
SIZES = "it must be one of 16, 32, 64, 128, or None"
NUMBERS = {
    "not a number": (dict(scale=float("nan")), f"scale=nan; {RULE}"),
    "infinite": (dict(scale=-np.inf), f"scale=-inf; {RULE}"),
    "infinite in float32": (dict(scale=1e300), f"scale=1e\\+300; {RULE}"),
    "truth": (dict(scale=True), f"scale=True; {RULE}"),
    "truth of numpy": (dict(scale=np.bool_(True)), f"scale=np.True_; {RULE}"),
    "truth as an array": (dict(scale=jnp.asarray(True)), rf"scale is bool\(\); {RULE}"),
    "one per head": (dict(scale=jnp.ones(2)), rf"scale is float32\(2,\); {RULE}"),
    "one per head, of numpy": (dict(scale=np.ones(2)), rf"scale=array.*; {RULE}"),
    "text": (dict(scale="0.5"), f"scale='0.5'; {RULE}"),
    "complex": (dict(scale=1j), f"scale=1j; {RULE}"),
    "chunk of a float": (dict(chunk_size=16.0), f"chunk_size=16.0; {SIZES}"),
    "chunk of a truth": (dict(chunk_size=True), f"chunk_size=True; {SIZES}"),
    "chunk of text": (dict(chunk_size="16"), f"chunk_size='16'; {SIZES}"),
    "segments in a list": (dict(segment_ids=[[1, 1, 2]]), "segment_ids is a list; it must be an array or None"),
    "a number for a state": (dict(initial_state=0.0), "initial_state is a float; it must be an array or None"),
}


@pytest.mark.parametrize("name", NUMBERS)
@every_op
def test_bad_numbers_are_named(op, name, unchecked_arrays):
  changed, message = NUMBERS[name]
  with pytest.raises(ValueError, match=f"{op}: {message}"):
    getattr(kernels, op)(*ARGUMENTS[op], **changed)


@every_op
def test_what_must_be_static_is_named(op, unchecked_arrays):
  fn = functools.partial(getattr(kernels, op), *ARGUMENTS[op])
  with pytest.raises(ValueError, match=rf"{op}: chunk_size=.*Tracer.*; {SIZES}"):
    jax.jit(lambda size: fn(chunk_size=size))(16)
  if op == "delta_rule":
    with pytest.raises(ValueError, match="delta_rule: normalize_qk=.*Tracer.*; it must be True or False"):
      jax.jit(lambda flag: fn(normalize_qk=flag))(True)
    with pytest.raises(ValueError, match="delta_rule: normalize_qk=1; it must be True or False"):
      fn(normalize_qk=1)
    with pytest.raises(ValueError, match="delta_rule: beta is a float; it must be an array$"):
      kernels.delta_rule(X, X, X, 0.5)


def test_numbers_in_the_place_of_arrays_are_named(unchecked_arrays):
  with pytest.raises(ValueError, match="selective_scan: step_size is a float; it must be an array$"):
    kernels.selective_scan(X[0], 0.1, X[0, 0], X[0], X[0])
  with pytest.raises(ValueError, match="linear_attention: log_decay is a float; it must be an array or None"):
    kernels.linear_attention(X, X, X, -0.1)


@pytest.mark.parametrize("implementation", ["reference", "xla_chunked"])
@pytest.mark.parametrize("op", [*OPS, "delta_rule of channels", "selective_scan"])
def test_x64_changes_no_type(op, implementation):
  ids = jnp.asarray([[1, 1, 2]])
  rows = X[:, :, 0]
  others = {"delta_rule of channels": (*ARGUMENTS["delta_rule"], -X),
            "selective_scan": (rows, rows, -jnp.ones((4, 4)), rows, rows)}
  arguments = (ARGUMENTS | others)[op]
  call = lambda *x: getattr(kernels, op.split()[0])(*x, segment_ids=ids, implementation=implementation)
  pullback = lambda *x: jax.vjp(call, *x)[1](call(*x))
  with jax.enable_x64(True):
    found = jax.eval_shape(lambda *x: (call(*x), pullback(*x)), *arguments)
  assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}


@every_op
def test_float64_is_named(op, unchecked_arrays):
  with jax.enable_x64(True):
    wide = [x.astype("float64") for x in ARGUMENTS[op]]
    with pytest.raises(ValueError, match="q has dtype float64; it must be bfloat16, float16 or float32"):
      getattr(kernels, op)(*wide)
    with pytest.raises(ValueError, match=f"{'beta' if op == 'delta_rule' else 'log_decay'} has dtype float64; it must"):
      getattr(kernels, op)(*ARGUMENTS[op][:3], wide[3])
    with pytest.raises(ValueError, match=r"initial_state is float64\(1, 2, 4, 4\); it must be float32"):
      getattr(kernels, op)(*ARGUMENTS[op], initial_state=jnp.zeros((1, 2, 4, 4), "float64"))
