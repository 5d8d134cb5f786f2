"""Inputs of the selective scan, its definition, and the comparison of an implementation with it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels import selective_scan
from tests.close import assert_close, tolerance
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
