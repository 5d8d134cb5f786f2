"""A non-finite value changes nothing in other segments, forward and backward, and is not hidden in its own."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels import chunks, containment
from tests.kernels import cases, selective_scan_cases
from tests.kernels.cases import Case, make_inputs

LENGTHS = 15, 14, 11
FIRST, SECOND, THIRD = slice(0, 15), slice(15, 29), slice(29, 40)
OTHERS = {"first": (SECOND, THIRD), "second": (FIRST, THIRD)}
FORMS = {"gla": {}, "linear_attention": {"decay": "none"}, "delta_rule": {"decay": "token", "beta": "unit"},
         "delta_rule of channels": {"beta": "unit"}, "selective_scan": {}}
IMPLEMENTATIONS = [(op, name) for op in FORMS for name in ("reference", "xla_chunked", "pallas_triton")
                   if name != "pallas_triton" or op in ("linear_attention", "selective_scan")]


@functools.cache
def prepared(op, implementation):
  """Arrays, cotangents, and a function of both that gives results by name; time is axis 1 but in states and rates."""
  fn = functools.partial(getattr(kernels, op.split()[0]), implementation=implementation)
  if op == "selective_scan":
    arrays, ids, cotangents = selective_scan_cases.make_inputs(selective_scan_cases.Case(B=1, T=40, segments=LENGTHS))
    run = lambda arrays, cotangents: selective_scan_cases.results(fn, arrays, ids, cotangents)
  else:
    inputs = make_inputs(Case(B=1, T=40, H=1, K=8, V=8, segments=LENGTHS, gate="near_zero", **FORMS[op]))
    arrays, cotangents = inputs.arrays, inputs.cotangents
    run = lambda arrays, cotangents: cases.results(fn, arrays, inputs.segment_ids, cotangents)
  return {name: x for name, x in arrays.items() if x is not None}, cotangents, run, run(arrays, cotangents)


def tokens(results):
  return {name: x for name, x in results.items() if x.ndim > 2 and x.shape[1] == 40}


def assert_equal_in(segments, actual, expected, rtol=0.0):
  for name, x in tokens(expected).items():
    for rows in segments:
      np.testing.assert_allclose(actual[name][:, rows], x[:, rows], rtol=rtol, atol=rtol, err_msg=name)


def selects(op, implementation):
  """Whether the implementation goes from token to token, and treats non-finite values as the definition does."""
  return implementation == "reference" or (op, implementation) == ("selective_scan", "xla_chunked")


every_implementation = pytest.mark.parametrize("op, implementation", IMPLEMENTATIONS)


@every_implementation
def test_inputs_that_are_not_finite_stay_in_their_segment(op, implementation):
  arrays, cotangents, run, expected = prepared(op, implementation)
  for name, (where, t, end, bad) in itertools.product(tokens(arrays), (
      ("first", 10, 15, jnp.inf), ("second", 15, 29, jnp.nan), ("second", 28, 29, jnp.nan))):
    if name == "log_decay" and t == 15 or implementation == "pallas_triton" and t == 28:
      continue  # the gate of a segment's first token acts on nothing, and interpreted kernels are slow
    actual = run(arrays | {name: arrays[name].at[0, t].set(bad)}, cotangents)
    # The value that stands in for a gate has another rounding in the sums of its chunk.
    assert_equal_in(OTHERS[where], actual, expected, rtol=1e-4 * (name == "log_decay"))
    np.testing.assert_array_equal(actual["output"][:, :t], expected["output"][:, :t])
    np.testing.assert_array_equal(actual["final_state"], expected["final_state"])
    lost, reads = ~np.isfinite(actual["output"][:, t:end]), name in ("q", "c")
    gradients = [np.isfinite(x[:, t]).all() for key, x in tokens(actual).items() if key != "output"]
    if selects(op, implementation):
      assert lost[:, 0].any() and not all(gradients), name
    else:
      assert lost[:, :1 if reads else None].all() and not np.isfinite(actual[f"d{name}"][:, t]).any(), name


@pytest.mark.parametrize("op, implementation", [pair for pair in IMPLEMENTATIONS if "pallas_triton" not in pair])
def test_states_and_cotangents_that_are_not_finite_stay_in_their_segment(op, implementation):
  arrays, cotangents, run, expected = prepared(op, implementation)
  actual = run(arrays | {"initial_state": arrays["initial_state"] * jnp.nan}, cotangents)
  assert_equal_in((SECOND, THIRD), actual, expected)
  assert np.isnan(actual["output"][:, FIRST]).all()
  for t, others in ((20, (FIRST, THIRD)), (15, (FIRST, THIRD)), (0, (SECOND, THIRD))):
    actual = run(arrays, (cotangents[0].at[:, t].set(jnp.nan), cotangents[1]))
    assert_equal_in(others, actual, expected)
    assert np.isnan(actual["dx" if op == "selective_scan" else "dv"][:, t]).all()
    np.testing.assert_array_equal(actual["output"], expected["output"])
  actual = run(arrays, (cotangents[0], cotangents[1] * jnp.inf))
  assert_equal_in((FIRST, SECOND), actual, expected)
  assert not np.isfinite(actual["dx" if op == "selective_scan" else "dv"][:, THIRD]).any()


def test_finite_numbers_give_the_same_bits():
  """As the same resets given as gates, around which nothing is looked for."""
  arrays, cotangents, run, expected = prepared("gla", "xla_chunked")
  starts = np.isin(np.arange(40), np.cumsum(LENGTHS)).reshape(1, 40, 1, 1)
  gates = jnp.where(starts, chunks.RESET, arrays["log_decay"])
  fn = functools.partial(kernels.gla, implementation="xla_chunked")
  actual = cases.results(fn, arrays | {"log_decay": gates}, None, cotangents)
  for name, x in expected.items():
    np.testing.assert_array_equal(actual[name], x, err_msg=name)


@every_implementation
def test_left_out_it_changes_no_finite_number(op, implementation):
  arrays, cotangents, run, expected = prepared(op, implementation)
  with containment.left_out():
    actual = run(arrays, cotangents)
  for name, x in expected.items():
    np.testing.assert_array_equal(actual[name], x, err_msg=name)


def test_left_out_nothing_is_looked_at_and_a_number_that_is_not_finite_spreads():
  arrays, _, _, _ = prepared("gla", "xla_chunked")
  ids = cases.segment_ids(LENGTHS, 1)
  run = jax.jit(lambda x: kernels.gla(**x, segment_ids=ids, implementation="xla_chunked")[0])
  bad = arrays | {"v": arrays["v"].at[0, 10].set(jnp.nan)}
  assert "is_finite" in str(jax.make_jaxpr(run)(bad)) and np.isfinite(run(bad)[:, SECOND]).all()
  with containment.left_out():
    assert "is_finite" not in str(jax.make_jaxpr(run)(bad)) and np.isnan(run(bad)[:, SECOND]).any()


def test_a_lost_output_that_nobody_uses_loses_no_gradient_before_it():
  arrays, cotangents, run, expected = prepared("gla", "xla_chunked")
  used = cotangents[0].at[:, 10:15].set(0.0), cotangents[1]
  clean = run(arrays, used)
  actual = run(arrays | {"v": arrays["v"].at[0, 10].set(jnp.nan)}, used)
  assert np.isnan(actual["output"][:, 10:15]).all() and np.isnan(actual["dv"][:, 10:15]).all()
  np.testing.assert_allclose(actual["dv"][:, :10], clean["dv"][:, :10], rtol=1e-5)
  np.testing.assert_array_equal(actual["dinitial_state"], clean["dinitial_state"])


def test_a_state_that_overflows_stays_in_its_segment_in_the_scan():
  arrays, cotangents, run, expected = prepared("gla", "reference")
  actual = run(arrays | {name: arrays[name].at[0, 3].set(1e30) for name in "kv"}, cotangents)
  assert not np.isfinite(actual["output"][:, 3:15]).any()
  assert_equal_in((SECOND, THIRD), actual, expected)


def test_segments_under_transformations():
  """vmap, remat and a second derivative of a contained op."""
  arrays, _, _, _ = prepared("gla", "xla_chunked")
  ids = cases.segment_ids(LENGTHS, 1)
  loss = lambda x: jnp.sum(jnp.sin(kernels.gla(**x, segment_ids=ids, implementation="xla_chunked")[0]))
  gradient = jax.grad(loss)
  jax.eval_shape(jax.vmap(gradient), jax.tree.map(lambda x: jnp.stack([x, x]), arrays))
  for fn in (jax.grad(jax.checkpoint(loss)), lambda x: jax.jvp(gradient, (x,), (x,)),
             jax.grad(lambda x: sum(map(jnp.sum, gradient(x).values())))):
    jax.eval_shape(fn, arrays)
