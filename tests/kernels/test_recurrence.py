"""The recurrence in NumPy, with a derivative written by hand, against a scan of JAX with autodiff."""

import pytest

from tests.close import assert_close, tolerance
from tests.kernels.cases import Case, compiled_scan, expected, make_inputs

SHAPE = dict(T=20, H=4, K=5, V=6)


@pytest.mark.parametrize("case", [
    Case(**SHAPE, key_heads=2, segments=(7, 1, 12)),
    *(Case(**SHAPE, key_heads=2, decay=decay) for decay in ("token", "constant", "none")),
    *(Case(**SHAPE, key_heads=2, decay=decay, beta="double", segments=(7, 1, 12), normalize_qk=decay != "token")
      for decay in ("channel", "token", "none")),
    Case(**SHAPE, beta="unit", initial_state=False),
], ids=str)
def test_the_derivative_is_that_of_autodiff(case):
  inputs = make_inputs(case)
  found, scan = expected(inputs), compiled_scan(inputs)
  assert found.keys() == scan.keys()
  for name, x in scan.items():
    assert found[name].dtype == "float64"
    assert_close(name, found[name], x, tolerance(name, "float32"))
