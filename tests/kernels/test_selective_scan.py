"""Every implementation of the selective scan against a float32 scan: outputs, states and every gradient."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.selective_scan import step
from tests.close import assert_bounds, assert_close, relative_error, tolerance
from tests.kernels.selective_scan_cases import (
  CHUNKED,
  PALLAS,
  REFERENCE,
  Case,
  check,
  definition,
  jit,
  make_inputs,
  results,
)

CASES = [
    *(Case(T=T) for T in (1, 15, 64)),
    Case(B=1, T=1000),
    Case(D=1, N=1),
    Case(D=40, N=16, initial_state=False),
    *(Case(steps=steps) for steps in ((1e-3, 1.0), (1e-5, 1e-4), (5.0, 50.0))),
    Case(segments=(1,) * 70),
    Case(T=130, segments=(1, 62, 1, 1, 64, 1)),
    Case(D=32, N=16, dtype="bfloat16", segments=(40, 30)),
    Case(D=32, N=16, dtype="float16"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunked_equals_scan(case):
  check(case, CHUNKED)


@pytest.mark.parametrize("case", [Case(T=9), Case(T=9, segments=(2, 1, 6)), Case(T=9, dtype="bfloat16")], ids=str)
def test_reference_behind_the_contract_equals_scan(case):
  check(case, REFERENCE)


def test_steps_equal_one_call():
  """`step` token by token, as in decoding."""
  x, _, _ = make_inputs(Case(T=7))
  state, outputs = x["initial_state"], []
  for t in range(7):
    state, output = step(state, x["x"][:, t], x["step_size"][:, t], x["a"], x["b"][:, t], x["c"][:, t])
    outputs.append(output)
  output, final_state = CHUNKED(**x)
  assert_close("output", output, jnp.stack(outputs, axis=1), tolerance("output", "float32"))
  assert_close("final_state", final_state, state, tolerance("final_state", "float32"))


@pytest.mark.parametrize("fn", [CHUNKED, REFERENCE], ids=["xla_chunked", "reference"])
def test_closed_form(fn):
  """h_t = sum_{j<=t} exp(a sum of s over (j, t]) (s_j x_j b_j) + exp(a sum of s up to t) h_0, y_t = c_t h_t."""
  inputs, _, _ = make_inputs(Case(B=1, T=37, D=3, N=5))
  x, s, a, b, c, state = (np.asarray(array, np.float64) for array in inputs.values())
  s, x, b, c, state = s[0], x[0], b[0], c[0], state[0]
  sums = np.cumsum(s, axis=0)
  states = np.exp(sums[:, :, None] * a) * state
  for j in range(37):
    states[j:] += np.exp((sums[j:] - sums[j])[:, :, None] * a) * (s[j] * x[j])[:, None] * b[j]
  output, final_state = fn(**inputs)
  assert_close("output", output[0], np.einsum("tdn,tn->td", states, c), tolerance("output", "float32"))
  assert_close("final_state", final_state[0], states[-1], tolerance("final_state", "float32"))


def test_packed_documents_equal_documents_one_by_one():
  lengths = 15, 85, 30
  arrays, ids, cotangents = make_inputs(Case(B=1, T=sum(lengths), segments=lengths))
  packed, start, da = results(CHUNKED, arrays, ids, cotangents), 0, 0.0
  for n, length in enumerate(lengths):
    rows, last = slice(start, start := start + length), n == len(lengths) - 1
    alone = {name: x[:, rows] if x.ndim == 3 and x.shape[1] == sum(lengths) else x for name, x in arrays.items()}
    # Only the first document reads the initial state, and only the last one writes the final state.
    alone["initial_state"] *= float(n == 0)
    alone = results(CHUNKED, alone, None, (cotangents[0][:, rows], cotangents[1] * float(last)))
    compared = {name: packed[name][:, rows] for name in ("output", "dx", "dstep_size", "db", "dc")}
    compared |= {"dinitial_state": packed["dinitial_state"]} if n == 0 else {}
    compared |= {"final_state": packed["final_state"]} if last else {}
    for name, x in compared.items():
      assert_close(name, x, alone[name], tolerance(name, "float32"))
    da += alone["da"]
  assert_close("da", packed["da"], da, tolerance("da", "float32"))


@pytest.mark.parametrize("fn", [CHUNKED, REFERENCE], ids=["xla_chunked", "reference"])
def test_rates_of_minus_infinity_forget(fn):
  """With tokens that fill no chunk: -inf times the step size of the tokens that fill it up would be NaN."""
  arrays, _, cotangents = make_inputs(Case())
  infinite, fast = ({**arrays, "a": arrays["a"].at[:, 1].set(rate)} for rate in (-jnp.inf, -1e30))
  actual = results(fn, infinite, None, cotangents)
  for name, x in results(definition, fast, None, cotangents).items():
    assert_close(name, actual[name], x, tolerance(name, "float32"))
  assert not np.any(actual["da"][:, 1])
  infinite["step_size"] = jnp.zeros_like(arrays["step_size"])
  np.testing.assert_array_equal(fn(**infinite)[1], arrays["initial_state"])


INTERPRETED = [
    Case(T=1),
    Case(B=1, T=65, D=20, N=5, segments=(1, 30, 34)),
    Case(B=1, T=40, D=16, N=16, steps=(5.0, 50.0), initial_state=False),
    Case(T=40, D=32, N=16, dtype="bfloat16", segments=(10, 1, 29)),
    Case(T=20, D=16, N=20, dtype="float16"),
]


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_interpreted_kernels_equal_scan(case):
  check(case, PALLAS, multi_pass=True)


@pytest.mark.parametrize("case", [Case(T=100, D=16, N=16, segments=(15, 60, 25)), Case(B=1, T=130)], ids=str)
def test_pieces_equal_scan(case):
  """A sequence cut into four, which the op does where it is long."""
  module = importlib.import_module("kernels.selective_scan.pallas_triton")

  def cut(x, step_size, a, b, c, *, initial_state, segment_ids):
    starts = None if segment_ids is None else jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    resets = None if starts is None else jnp.where(starts, -1e4, 0.0)
    return module.configured(x, step_size, a, b, c, resets, initial_state, block=4, count=4)

  check(case, cut, multi_pass=True)


GPU_CASES = [
    *(Case(T=T, D=D, N=N, dtype=dtype, segments=segments)
      for dtype in ("bfloat16", "float16", "float32") for D, N in ((2048, 16), (100, 5), (64, 32))
      for T, segments in ((1, ()), (200, ()), (2000, (15, 85, 200, 900, 800)))),
    *(Case(B=1, T=5000, D=512, N=16, dtype=dtype, segments=segments)
      for dtype in ("bfloat16", "float32") for segments in ((), (1, 30, 2969, 2000))),
    *(Case(D=512, N=16, dtype=dtype, steps=steps)
      for dtype in ("bfloat16", "float32") for steps in ((1e-5, 1e-4), (5.0, 50.0))),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_compiled_kernels_equal_scan(case):
  check(case, PALLAS, multi_pass=True)


def side_by_side(case, record_property):
  """Asserts every error of three models under one vmap, each with inputs, and an `a`, of its own."""
  models = [make_inputs(case, seed) for seed in range(3)]
  stacked = [jax.tree.map(lambda *x: jnp.stack(x), *values)
             for values in zip(*((arrays, cotangents) for arrays, _, cotangents in models))]
  unjitted = results.__wrapped__  # compiler options belong to the outermost program
  actual = jit(jax.vmap(lambda arrays, cotangents: unjitted(PALLAS, arrays, None, cotangents)))(*stacked)
  errors = {}
  for i, (arrays, _, cotangents) in enumerate(models):
    wide = jax.tree.map(lambda x: x.astype("float32"), (arrays, cotangents))
    for name, x in results(definition, wide[0], None, wide[1]).items():
      errors[name] = max(errors.get(name, 0.0), relative_error(actual[name][i].astype("float32"), x))
  assert_bounds(str(case), case.dtype, errors, record_property)


@pytest.mark.parametrize("case", [Case(T=20, D=16, N=4, dtype="bfloat16", initial_state=False)], ids=str)
def test_interpreted_models_side_by_side_equal_scan(case, record_property):
  side_by_side(case, record_property)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [
    Case(B=B, T=T, D=D, N=N, dtype="bfloat16", initial_state=False)
    for D, N in ((128, 16), (256, 4), (256, 16), (512, 16)) for B, T in ((32, 127), (32, 512), (2, 960))], ids=str)
def test_models_side_by_side_equal_scan(case, record_property):
  assert jax.default_backend() == "gpu"
  side_by_side(case, record_property)
