"""Every implementation of the selective scan against a float32 scan: outputs, states, every gradient; bad input."""

import collections
import dataclasses
import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels import selective_scan
from kernels.selective_scan import step
from tests.close import assert_bounds, assert_close, relative_error, tolerance
from tests.kernels.cases import segment_ids

CHUNKED = functools.partial(selective_scan, implementation="xla_chunked")
PALLAS = functools.partial(selective_scan, implementation="pallas_triton")
REFERENCE = functools.partial(selective_scan, implementation="reference")


@dataclasses.dataclass(frozen=True)
class Case:
  """One input. `steps`: the range of a log-uniform step size. `segments` as in `tests.kernels.cases`."""

  B: int = 2
  T: int = 70
  D: int = 6
  N: int = 4
  dtype: str = "float32"
  steps: tuple[float, float] = (1e-3, 1.0)
  segments: tuple[int, ...] = ()
  initial_state: bool = True

  def __str__(self):
    return "-".join(f"{field.name}{getattr(self, field.name)}" for field in dataclasses.fields(self)
                    if getattr(self, field.name) != field.default).replace(" ", "") or "default"


def make_inputs(case, seed=0):
  """Arguments by name, segment ids and the cotangents of both results."""
  B, T, D, N = case.B, case.T, case.D, case.N
  rng = np.random.default_rng(seed)
  normal = lambda *shape, dtype="float32": jnp.asarray(rng.standard_normal(shape).astype(jnp.dtype(dtype)))
  arrays = {
      "x": normal(B, T, D, dtype=case.dtype),
      "step_size": jnp.asarray(np.exp(rng.uniform(*np.log(case.steps), (B, T, D))), jnp.float32),
      # As a layer starts, 1 to N for each channel, and moved from there.
      "a": jnp.asarray(-np.arange(1, N + 1) * np.exp(0.2 * rng.standard_normal((D, N))), jnp.float32),
      "b": normal(B, T, N, dtype=case.dtype),
      "c": normal(B, T, N, dtype=case.dtype),
  }
  if case.initial_state:
    arrays["initial_state"] = normal(B, D, N)
  cotangents = normal(B, T, D, dtype=case.dtype), normal(B, D, N)
  return arrays, segment_ids(case.segments, B) if case.segments else None, cotangents


# On a CPU, compilation is most of the time, optimised code none of it.
jit = functools.partial(
    jax.jit, compiler_options={} if jax.default_backend() == "gpu" else {"xla_backend_optimization_level": 0})


@functools.partial(jit, static_argnames="fn")
def results(fn, arrays, segment_ids, cotangents):
  """Outputs and gradients by name."""
  (output, final_state), vjp = jax.vjp(lambda x: fn(**x, segment_ids=segment_ids), arrays)
  return {"output": output, "final_state": final_state, **{f"d{name}": x for name, x in vjp(cotangents)[0].items()}}


def definition(x, step_size, a, b, c, *, initial_state=None, segment_ids=None):
  """The recurrence with autodiff, and a state set to zero where a segment starts."""
  B, T, _ = x.shape
  state = jnp.zeros((B, *a.shape)) if initial_state is None else initial_state
  ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
  same = jnp.concatenate([jnp.ones((B, 1), bool), ids[:, 1:] == ids[:, :-1]], axis=1)

  def step(state, now):
    same, x, s, b, c = now
    state = jnp.where(same[:, None, None], state, 0.0)
    state = jnp.exp(s[:, :, None] * a[None]) * state + s[:, :, None] * x[:, :, None] * b[:, None, :]
    return state, jnp.einsum("bdn,bn->bd", state, c, precision="highest")

  state, output = jax.lax.scan(step, state, [jnp.moveaxis(array, 1, 0) for array in (same, x, step_size, b, c)])
  return jnp.moveaxis(output, 0, 1), state


def check(case, fn, *, multi_pass=False):
  arrays, ids, cotangents = make_inputs(case)
  actual = results(fn, arrays, ids, cotangents)
  wide = jax.tree.map(lambda x: x.astype("float32"), (arrays, cotangents))
  for name, x in results(definition, wide[0], ids, wide[1]).items():
    assert_close(name, actual[name].astype("float32"), x, tolerance(name, case.dtype, multi_pass=multi_pass))
  for name, x in arrays.items():
    assert actual[f"d{name}"].dtype == x.dtype
  assert actual["output"].dtype == arrays["x"].dtype and actual["final_state"].dtype == jnp.float32


CASES = [
    *(Case(T=T) for T in (1, 15, 64, 65)),
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


def test_pallas_declines():
  arrays, _, _ = make_inputs(Case(T=4, N=33))
  with pytest.raises(NotImplementedError, match="'pallas_triton' declines these inputs: a state of 33 is more than 32"):
    PALLAS(**arrays)


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


BAD = {
    "rank of x": (dict(x=(2, 8)), r"x has shape \(2, 8\); it must be \[batch, time, channels\]"),
    "no tokens": (dict(x=(2, 0, 4)), r"x has shape \(2, 0, 4\).*none of them 0"),
    "step_size": (dict(step_size=(2, 8, 1)), r"step_size has shape \(2, 8, 1\); it must equal x's \(2, 8, 4\)"),
    "a": (dict(a=(5, 3)), r"a has shape \(5, 3\); it must be \[channels, state\], with x's 4 channels"),
    "b": (dict(b=(2, 8, 4)), r"b has shape \(2, 8, 4\); it must be \[batch, time, state\] \(2, 8, 3\)"),
    "c": (dict(c=(2, 7, 3)), r"c has shape \(2, 7, 3\); it must be \[batch, time, state\] \(2, 8, 3\)"),
    "state": (dict(initial_state=(2, 3, 4)),
              r"initial_state is float32\(2, 3, 4\); it must be float32\(2, 4, 3\)"),
    "segments": (dict(segment_ids=(2, 8)), r"segment_ids is float32\(2, 8\); it must be integers of shape \(2, 8\)"),
}
SHAPES = dict(x=(2, 8, 4), step_size=(2, 8, 4), a=(4, 3), b=(2, 8, 3), c=(2, 8, 3))


@pytest.mark.parametrize("name", BAD)
def test_bad_shapes_are_named(name, unchecked_arrays):
  changed, message = BAD[name]
  with pytest.raises(ValueError, match=f"selective_scan: .*{message}"):
    selective_scan(**{key: jnp.zeros(shape) for key, shape in (SHAPES | changed).items()})


@pytest.mark.parametrize("changed, message", [
    (dict(x="int32"), "x has dtype int32; it must be bfloat16, float16 or float32"),
    (dict(b="bfloat16"), "x, b, c have dtypes float32, bfloat16, float32; they must be equal"),
    (dict(step_size="bfloat16"), "step_size has dtype bfloat16; it must be float32"),
    (dict(a="bfloat16"), "a has dtype bfloat16; it must be float32"),
], ids=str)
def test_bad_dtypes_are_named(changed, message, unchecked_arrays):
  arrays = {name: jnp.zeros(shape, changed.get(name, "float32")) for name, shape in SHAPES.items()}
  with pytest.raises(ValueError, match=message):
    selective_scan(**arrays)
