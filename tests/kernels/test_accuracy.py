"""The bounds of 16-bit inputs, for one token and for many, over random draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels.accuracy import ENTRY
from tests.close import relative_error, tolerance
from tests.environment import LONG_LOOPS
from tests.kernels.cases import Case, make_inputs

FORMS = {"gla": {}, "linear_attention": {"decay": "token"}, "delta_rule": {"decay": "token", "beta": "unit"}}


@functools.cache
def outputs(op, implementation):
  """The op's outputs `[rows, V]` of one token and head; one object each, so that compiled programs serve again."""
  fn = functools.partial(getattr(kernels, op), implementation=implementation)
  options = {} if jax.default_backend() == "gpu" else LONG_LOOPS
  return jax.jit(lambda arrays: fn(**arrays)[0][:, 0, 0], compiler_options=options)


@pytest.mark.parametrize("op, implementation", [
    ("gla", "xla_chunked"), ("gla", "pallas_triton"), ("linear_attention", "xla_chunked"),
    ("linear_attention", "pallas_triton"), ("delta_rule", "pallas_triton")])
def test_one_token_keeps_the_bound_of_an_entry_and_many_that_of_an_rms(op, implementation):
  """Each of 300 draws is a row of the batch, of one token and one head."""
  arrays = make_inputs(Case(B=300, T=1, H=1, dtype="bfloat16", initial_state=False, **FORMS[op]), seed=1).arrays
  wide = jax.tree.map(lambda x: x.astype("float32"), arrays)
  run = lambda implementation, arrays: np.asarray(outputs(op, implementation)(arrays), np.float64)
  output, expected = run(implementation, arrays), run("reference", wide)
  terms = run("reference", wide | {name: jnp.abs(wide[name]) for name in "qkv"})
  share = np.max(np.abs(output - expected) / terms)
  rows = [relative_error(*row) for row in zip(output, expected)]
  bound = tolerance("output", "bfloat16")
  print(f"of the terms {share:.1e}; rows above the bound {np.mean(np.array(rows) > bound):.2f}, worst {max(rows):.1e}")
  assert share <= ENTRY
  assert max(relative_error(*pair) for pair in zip(np.split(output, 4), np.split(expected, 4))) <= bound
  # Only the kernels of gla round terms that a sum over channels can cancel.
  assert max(rows) <= bound or (op, implementation) == ("gla", "pallas_triton")
