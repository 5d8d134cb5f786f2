"""Gates of minus infinity, which forget everything."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.close import assert_close, tolerance
from tests.kernels.cases import expected, results
from tests.kernels.forms import CHUNKED, FORMS, assert_equal_results, implementations, inputs

# Where gates of -inf stand in T = 50 tokens: the first, neighbours, the last, and in one head (of gla: in half of the
# channels).
CLOSED = {"at some tokens": (slice(None), [0, 5, 6, 49]), "in half": (slice(None), slice(20, 40), 0),
          "everywhere": (slice(None),)}


def closed(op, decay, where):
  """Inputs with gates of -inf."""
  x = inputs(op, decay)
  gates = x.arrays["log_decay"]
  if decay == "constant":
    gates = gates.at[slice(1, None) if where == "in half" else slice(None)].set(-jnp.inf)
  elif where == "in half" and decay == "channel":
    gates = gates.at[:, 20:40, :, ::2].set(-jnp.inf)
  else:
    gates = gates.at[CLOSED[where]].set(-jnp.inf)
  return dataclasses.replace(x, arrays=x.arrays | {"log_decay": gates})


@pytest.mark.parametrize("op, decay", [form for form in FORMS if form[1] != "none"])
def test_gates_of_minus_infinity_forget(op, decay):
  """A decay of exactly 0 is as good as any other, and its own gradient is 0, as in the scan."""
  for where in CLOSED:
    x = closed(op, decay, where)
    actual = results(CHUNKED[op], x.arrays, None, x.cotangents)
    assert_equal_results(actual, expected(x))
    assert not np.any(actual["dlog_decay"][np.isneginf(x.arrays["log_decay"])]), where


@pytest.mark.parametrize("op, decay", [("gla", "channel"), ("linear_attention", "constant"), ("delta_rule", "channel")])
def test_gates_of_minus_infinity_forget_in_kernels(op, decay):
  x = inputs(op, decay, B=1, T=20, H=1, V=8)
  for row in ([0, 5, 6, 19], range(20)):
    at = 0 if decay == "constant" else (slice(None), np.asarray(row))
    gates = x.arrays["log_decay"].at[at].set(-jnp.inf)
    x = dataclasses.replace(x, arrays=x.arrays | {"log_decay": gates})
    actual, wanted = results(implementations(op)["pallas_triton"], x.arrays, None, x.cotangents), expected(x)
    # The kernels of gla take such a gate as -40: 4e-18 of a state is left, and the flows through the gate cancel to
    # rounding.
    np.testing.assert_allclose(actual["dlog_decay"][np.isneginf(gates)], 0.0, atol=1e-5 if op == "gla" else 0)
    for name, value in wanted.items():
      if np.any(value):
        assert_close(name, actual[name], value, tolerance(name, "float32", multi_pass=True))
      elif name != "dlog_decay":
        np.testing.assert_allclose(actual[name], 0.0, atol=1e-15 if op == "gla" else 0)
