"""The Pallas kernels against the float32 scan: interpreted on small cases everywhere, the whole grid on a GPU.

`XLA_PYTHON_CLIENT_PREALLOCATE=false pytest -m gpu -n 12 --record=FILE` runs the grid and writes every error to FILE.
"""

import functools

import jax
import pytest

import kernels
from tests.close import relative_error, tolerance
from tests.kernels import cases
from tests.kernels.cases import Case

pallas = functools.partial(kernels.gla, implementation="pallas_triton")


def check(case, record_property):
  """Asserts every error of the case after recording all of them."""
  inputs = cases.make_inputs(case)
  actual = cases.results(pallas, inputs.arrays, inputs.segment_ids, inputs.cotangents, case.chunk_size)
  errors = {name: relative_error(actual[name], x) for name, x in cases.expected(inputs).items()}
  record_property("errors", errors)
  bad = {name: f"{error:.1e} > {bound:.0e}" for name, error in errors.items()
         if not error <= (bound := tolerance(name, case.dtype, split=True))}
  assert not bad, f"{case}: {bad}"


INTERPRETED = [
    Case(T=1, H=1, K=16, V=16, dtype="float32"),
    Case(T=65, H=3, K=60, V=100, dtype="bfloat16"),
    Case(T=100, H=2, K=32, V=64, dtype="float32", gate="-30"),
    Case(T=64, H=1, K=128, V=32, dtype="float16", gate="near_zero", initial_state=False),
    Case(T=128, H=2, K=32, V=32, dtype="bfloat16", gate="logit_-20", segments=(1, 15, 70, 1, 41)),
    Case(T=50, H=4, K=32, V=32, dtype="float32", key_heads=2, chunk_size=16),
]


@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_interpreted_kernels_match_the_scan(case, record_property):
  check(case, record_property)


# A Triton kernel of 128 tokens a chunk does not fit: the implementation says so, see test_declines.
GPU_GRID = [case for case in cases.grid() if case.chunk_size != 128]


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_GRID, ids=str)
def test_compiled_kernels_match_the_scan(case, record_property):
  assert jax.default_backend() == "gpu"
  check(case, record_property)


def test_declines():
  inputs = cases.make_inputs(Case(T=128)).arrays
  with pytest.raises(NotImplementedError, match="chunk_size=128 is not one of 16, 32, 64"):
    pallas(**inputs, chunk_size=128)
