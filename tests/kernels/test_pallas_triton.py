"""The Pallas kernels against the float32 scan: interpreted on small cases everywhere, the whole grid on a GPU.

`XLA_PYTHON_CLIENT_PREALLOCATE=false pytest tests/kernels/test_pallas_triton.py -m gpu -n 12 -k gla --record=FILE` runs
the grid of an op and writes every error, and the configuration that ran, to FILE.
"""

import dataclasses
import functools
import importlib

import jax
import pytest

import kernels
import tuning
from kernels import dispatch, tuned
from tests.close import relative_error, tolerance
from tests.kernels import cases
from tests.kernels.cases import Case

OPS = [op for op in dispatch.TABLE if "pallas_triton" in dispatch.TABLE[op]]
PALLAS = {op: functools.partial(getattr(kernels, op), implementation="pallas_triton") for op in OPS}
DECAYS = {"gla": ("channel",), "linear_attention": ("token", "head", "none")}


def check(op, case, record_property, monkeypatch):
  """Asserts every error of the case after recording all of them. Returns the configuration that ran."""
  inputs = cases.make_inputs(case)
  config = configuration(op, inputs, case.chunk_size, monkeypatch)
  record_property("config", tuning.describe(config))
  actual = cases.results(PALLAS[op], inputs.arrays, inputs.segment_ids, inputs.cotangents, case.chunk_size)
  errors = {name: relative_error(actual[name], x) for name, x in cases.expected(inputs).items()}
  record_property("errors", errors)
  bad = {name: f"{error:.1e} > {bound:.0e}" for name, error in errors.items()
         if not error <= (bound := tolerance(name, case.dtype, split=True))}
  assert not bad, f"{op} {case}: {bad}"
  return config


def configuration(op, inputs, chunk_size, monkeypatch):
  """What the op chooses for these inputs."""
  module, chosen = importlib.import_module(f"kernels.{op}.pallas_triton"), []

  def spy(*arrays, scale, config):
    chosen.append(config)
    return configured(*arrays, scale=scale, config=config)

  with monkeypatch.context() as patch:
    configured = module.configured
    patch.setattr(module, "configured", spy)
    call = functools.partial(PALLAS[op], segment_ids=inputs.segment_ids, chunk_size=chunk_size)
    jax.eval_shape(call, **inputs.arrays)
  config, = chosen
  return config


INTERPRETED = {
    "gla": [
        Case(T=1, H=1, K=16, V=16, dtype="float32"),
        Case(T=65, H=3, K=60, V=100, dtype="bfloat16"),
        Case(T=100, H=2, K=32, V=64, dtype="float32", gate="-30"),
        Case(T=64, H=1, K=128, V=32, dtype="float16", gate="near_zero", initial_state=False),
        Case(T=128, H=2, K=32, V=32, dtype="bfloat16", gate="logit_-20", segments=(1, 15, 70, 1, 41)),
        Case(T=50, H=4, K=32, V=32, dtype="float32", key_heads=2, chunk_size=16),
    ],
    "linear_attention": [
        Case(T=1, H=1, K=16, V=16, dtype="float32", decay="token"),
        Case(T=65, H=3, K=60, V=100, dtype="bfloat16", decay="token"),
        Case(T=65, H=3, K=32, V=64, dtype="float32", decay="head"),
        Case(T=100, H=2, K=32, V=64, dtype="bfloat16", decay="head", gate="-30"),
        Case(T=65, H=2, K=32, V=32, dtype="bfloat16", decay="none", initial_state=False),
        Case(T=70, H=1, K=32, V=16, dtype="float32", decay="none", segments=(1, 30, 39)),
        Case(T=128, H=2, K=32, V=32, dtype="float16", decay="token", gate="logit_-20", segments=(1, 15, 70, 1, 41)),
        Case(T=64, H=1, K=256, V=32, dtype="bfloat16", decay="token"),
        Case(T=50, H=4, K=32, V=32, dtype="float32", decay="token", key_heads=2, chunk_size=16),
    ],
}


@pytest.mark.parametrize("op, case", [(op, case) for op in OPS for case in INTERPRETED[op]], ids=str)
def test_interpreted_kernels_match_the_scan(op, case, record_property, monkeypatch):
  check(op, case, record_property, monkeypatch)


@pytest.mark.parametrize("op, case", [
    ("gla", Case(T=128, H=2, K=32, V=32, dtype="bfloat16", gate="logit_-20", segments=(1, 15, 70, 1, 41))),
    ("linear_attention", Case(T=100, H=2, K=32, V=32, dtype="bfloat16", decay="token", segments=(1, 59, 40))),
    ("linear_attention", Case(T=65, H=2, K=32, V=32, dtype="float32", decay="head")),
], ids=str)
def test_scores_from_a_kernel_of_their_own(op, case, record_property, monkeypatch):
  module = importlib.import_module(f"kernels.{op}.pallas_triton")
  heuristic = module.heuristic
  monkeypatch.setattr(module, "heuristic",
                      lambda *shape: dataclasses.replace(heuristic(*shape), scores=tuned.Tile(16, 4, 1)))
  assert check(op, case, record_property, monkeypatch).scores


def gpu_grid(op):
  """All cases for the first form of decay, and fewer widths for the others. A kernel of 128 tokens a chunk does not
  fit: the implementation says so, see test_declines."""
  first, *others = DECAYS[op]
  found = cases.grid(first) + [case for decay in others for case in cases.grid(decay, widths=(64, 256))]
  return [case for case in found if case.chunk_size != 128]


@pytest.mark.gpu
@pytest.mark.parametrize("op, case", [(op, case) for op in OPS for case in gpu_grid(op)], ids=str)
def test_compiled_kernels_match_the_scan(op, case, record_property, monkeypatch):
  assert jax.default_backend() == "gpu"
  check(op, case, record_property, monkeypatch)


def tuned_grid(device):
  """Cases at the width of every configuration that is listed for `device`, if there is one."""
  listed = [(op, *width) for op in OPS for width in (tuned.listed(op, device) if device else ())]
  return [(op, case) for op, K, V, dtype in listed for decay in DECAYS[op]
          for case in cases.around(K, V, ("bfloat16", "float16") if dtype == "bfloat16" else (dtype,), decay)]


@pytest.mark.gpu
@pytest.mark.parametrize("op, case", tuned_grid(tuned.device_kind()), ids=str)
def test_every_tuned_configuration_matches_the_scan(op, case, record_property, monkeypatch):
  config_class = importlib.import_module(f"kernels.{op}.pallas_triton").Config
  ran = check(op, case, record_property, monkeypatch)
  assert ran == tuned.lookup(op, config_class, K=case.K, V=case.V, dtype=case.dtype)


@pytest.mark.parametrize("op", OPS)
def test_declines(op):
  inputs = cases.make_inputs(Case(T=128, decay=DECAYS[op][0])).arrays
  with pytest.raises(NotImplementedError, match="chunk_size=128 is not one of 16, 32, 64"):
    PALLAS[op](**inputs, chunk_size=128)
