"""The Pallas kernels against the scan: interpreted on small cases everywhere, the whole grid on a GPU.

`XLA_PYTHON_CLIENT_PREALLOCATE=false pytest tests/kernels/test_pallas_triton.py -m gpu -n 12 -k gla --record=FILE` runs
the grid of an op and writes every error, and the configuration that ran, to FILE.
"""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernel_tuning import search
from kernels import chunks, tuned
from kernels.gla.pallas_triton_config import heuristic
from kernels.gla.pallas_triton_factors import factors
from tests.close import assert_bounds, relative_error
from tests.kernels import cases
from tests.kernels.cases import Case

# The ops over heads of queries, keys and values, which `cases` describes; selective_scan has tests of its own.
OPS = ["delta_rule", "gla", "linear_attention"]
PALLAS = {op: functools.partial(getattr(kernels, op), implementation="pallas_triton") for op in OPS}
DECAYS = {"gla": ("channel",), "linear_attention": ("token", "constant", "none"),
          "delta_rule": ("token", "none", "channel")}
BETA = {"delta_rule": "double"}


def check(op, case, record_property, monkeypatch):
  """Asserts every error of the case after recording all of them. Returns the configuration that ran."""
  inputs = cases.make_inputs(case)
  config = configuration(op, inputs, case.chunk_size, monkeypatch)
  record_property("config", search.describe(config))
  actual = cases.results(PALLAS[op], inputs.arrays, inputs.segment_ids, inputs.cotangents, case.chunk_size,
                         case.normalize_qk)
  errors = {name: relative_error(actual[name], x) for name, x in cases.expected(inputs).items()}
  assert_bounds(f"{op} {case}", case.dtype, errors, record_property)
  return config


class Chosen(Exception):
  """Carries the configuration out of the op, whose kernels then need no trace of their own."""


def configuration(op, inputs, chunk_size, monkeypatch):
  """The configuration that the op chooses for these inputs."""
  def configured(*arrays, config, **options):
    raise Chosen(config)

  call = functools.partial(PALLAS[op], segment_ids=inputs.segment_ids, chunk_size=chunk_size)
  with monkeypatch.context() as patch, pytest.raises(Chosen) as chosen:
    patch.setattr(importlib.import_module(f"kernels.{op}.pallas_triton"), "configured", configured)
    jax.eval_shape(call, **inputs.arrays)
  return chosen.value.args[0]


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
        Case(T=100, H=2, K=32, V=64, dtype="bfloat16", decay="constant", gate="-30"),
        Case(T=65, H=2, K=32, V=32, dtype="bfloat16", decay="none", initial_state=False),
        Case(T=70, H=1, K=32, V=16, dtype="float32", decay="none", segments=(1, 30, 39)),
        Case(T=128, H=2, K=32, V=32, dtype="float16", decay="token", gate="logit_-20", segments=(1, 15, 70, 1, 41)),
        Case(T=128, H=2, K=32, V=32, dtype="bfloat16", decay="constant", gate="near_zero", segments=(1, 15, 70, 1, 41)),
        Case(T=70, H=2, K=32, V=32, dtype="float32", decay="constant", segments=(1, 30, 39)),
        Case(T=64, H=1, K=256, V=32, dtype="bfloat16", decay="token"),
        Case(T=32, H=1, K=256, V=16, dtype="bfloat16", decay="constant"),
        Case(T=50, H=4, K=32, V=32, dtype="float32", decay="constant", key_heads=2, chunk_size=16),
    ],
    "delta_rule": [
        Case(T=1, H=1, K=16, V=16, decay="none", beta="unit"),
        Case(T=65, H=3, K=60, V=100, dtype="bfloat16", decay="token", beta="double", normalize_qk=True),
        Case(T=100, H=2, K=32, V=64, decay="token", beta="double", gate="-30"),
        Case(T=128, H=2, K=32, V=32, dtype="float16", decay="token", beta="unit", gate="logit_-20",
             segments=(1, 15, 70, 1, 41)),
        # Cases that differ in values alone compile once.
        *(Case(T=70, H=2, K=32, V=32, dtype="bfloat16", decay="none", beta=beta, keys=keys, normalize_qk=True)
          for beta, keys in (("double", "near_parallel"), ("1", "repeated"))),
        Case(T=70, H=2, K=32, V=32, dtype="bfloat16", decay="none", beta="double", segments=(1, 30, 39)),
        Case(T=128, H=2, K=32, V=32, decay="none", beta="unit", normalize_qk=True, segments=(1, 15, 70, 1, 41)),
        Case(T=64, H=1, K=256, V=32, dtype="bfloat16", decay="token", beta="unit", normalize_qk=True),
        Case(T=50, H=4, K=32, V=32, decay="none", beta="2", key_heads=2, chunk_size=16, initial_state=False),
        *(Case(T=256, B=1, H=1, K=32, V=32, decay="token", beta=beta, gate="near_zero", chunk_size=16)
          for beta in ("0", "double")),
        *(Case(T=70, H=1, K=100, V=40, dtype="bfloat16", beta="double", gate=gate, keys=keys, normalize_qk=True)
          for gate, keys in (("near_zero", "near_parallel"), ("-30", "normal"), ("mixed", "correlated"))),
        Case(T=256, B=1, H=2, K=32, V=32, beta="double", gate="near_zero", key_heads=1, chunk_size=16,
             segments=(1, 99, 5, 151)),
    ],
}


@pytest.mark.parametrize("op, case", [(op, case) for op in OPS for case in INTERPRETED[op]], ids=str)
def test_interpreted_kernels_match_the_scan(op, case, record_property, monkeypatch):
  check(op, case, record_property, monkeypatch)


@pytest.mark.parametrize("op, case", [
    ("gla", Case(T=128, H=2, K=32, V=32, dtype="bfloat16", gate="logit_-20", segments=(1, 15, 70, 1, 41))),
    ("linear_attention", Case(T=100, H=2, K=32, V=32, dtype="bfloat16", decay="token", segments=(1, 59, 40))),
    ("linear_attention", Case(T=65, H=2, K=32, V=32, dtype="float32", decay="constant")),
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
  (first, *others), beta = DECAYS[op], BETA.get(op)
  found = cases.grid(first, beta=beta)
  found += [case for decay in others for case in cases.grid(decay, widths=(64, 256), beta=beta)]
  return [case for case in found if case.chunk_size != 128]


@pytest.mark.gpu
@pytest.mark.parametrize("op, case", [(op, case) for op in OPS for case in gpu_grid(op)], ids=str)
def test_compiled_kernels_match_the_scan(op, case, record_property, monkeypatch):
  assert jax.default_backend() == "gpu"
  check(op, case, record_property, monkeypatch)


def side_by_side(op, case, record_property):
  """Asserts every error of three models under one vmap, each with inputs of its own."""
  models = [cases.make_inputs(case, seed) for seed in range(3)]
  stacked = [jax.tree.map(lambda *x: jnp.stack(x), *values)
             for values in zip(*((inputs.arrays, inputs.cotangents) for inputs in models))]
  actual = jax.vmap(lambda arrays, cotangents: cases.results(PALLAS[op], arrays, None, cotangents, case.chunk_size))(
      *stacked)
  errors = {}
  for i, inputs in enumerate(models):
    for name, x in cases.expected(inputs).items():
      errors[name] = max(errors.get(name, 0.0), relative_error(actual[name][i], x))
  assert_bounds(f"{op} {case}", case.dtype, errors, record_property)


NARROW = (8, 8), (8, 16), (16, 16), (16, 32), (32, 32)


def synthetic_grid(widths, lengths):
  """Heads of models for synthetic tasks."""
  return [(op, Case(B=4, T=T, H=8, K=K, V=V, dtype="bfloat16", initial_state=False, decay=decay, beta=BETA.get(op)))
          for op in OPS for decay in DECAYS[op] for K, V in widths for T in lengths]


@pytest.mark.parametrize("op, case", [
    ("gla", Case(T=40, K=8, V=16, dtype="bfloat16", initial_state=False, chunk_size=16)),
    ("delta_rule", Case(T=40, K=16, V=16, dtype="bfloat16", decay="none", beta="unit", chunk_size=16)),
], ids=str)
def test_interpreted_models_side_by_side_match_the_scan(op, case, record_property):
  side_by_side(op, case, record_property)


@pytest.mark.gpu
@pytest.mark.parametrize("op, case", [
    *synthetic_grid(NARROW, (32, 127, 512)),
    *synthetic_grid(((32, 64), (64, 64), (64, 128), (128, 128), (128, 256)), (127, 512)),
], ids=str)
def test_models_side_by_side_match_the_scan(op, case, record_property):
  assert jax.default_backend() == "gpu"
  side_by_side(op, case, record_property)


@pytest.mark.gpu
@pytest.mark.parametrize("op, case", synthetic_grid(NARROW, (32, 127, 512)), ids=str)
def test_narrow_heads_match_the_scan(op, case, record_property, monkeypatch):
  assert jax.default_backend() == "gpu"
  check(op, case, record_property, monkeypatch)


def cut_grid():
  """Few long sequences, which are cut into pieces, at widths of which K or V is the wider, in both formats."""
  widths = (16, 32), (16, 128), (32, 256), (60, 100), (64, 128), (128, 64), (256, 256), (256, 512)
  return [(op, Case(B=1, T=1024, H=2, K=K, V=V, dtype=dtype, gate="near_zero", decay=decay, beta=BETA.get(op)))
          for op in OPS for decay in DECAYS[op] for K, V in widths for dtype in ("bfloat16", "float32")]


@pytest.mark.gpu
@pytest.mark.parametrize("op, case", cut_grid(), ids=str)
def test_pieces_match_the_scan(op, case, record_property, monkeypatch):
  assert jax.default_backend() == "gpu"
  check(op, case, record_property, monkeypatch)


def _served(op, dtype):
  """Input dtypes that an entry for `dtype` serves; the delta rule runs float16 as float32."""
  return ("bfloat16", "float16") if dtype == "bfloat16" and op != "delta_rule" else (dtype,)


def tuned_grid(device):
  """Cases at the width of every configuration that is listed for `device`, if there is one."""
  listed = [(op, *width) for op in OPS for width in (tuned.listed(op, device) if device else ())]
  return [(op, case) for op, decay, K, V, dtype in listed
          for case in cases.around(K, V, _served(op, dtype), decay,
                                   BETA.get(op))]


@pytest.mark.gpu
@pytest.mark.parametrize("op, case", tuned_grid(tuned.device_kind()), ids=str)
def test_every_tuned_configuration_matches_the_scan(op, case, record_property, monkeypatch):
  ran = check(op, case, record_property, monkeypatch)
  gate = "token" if case.segments and case.decay != "channel" else case.decay  # resets are gates
  configs = search.configurations(op, gate)
  listed = tuned.lookup(op, configs.Config, gate=gate, K=case.K, V=case.V, dtype=case.dtype)
  # A width may be listed for its own gate alone.
  assert ran == (listed or configs.heuristic(case.K, case.V, jnp.dtype(case.dtype)))


def test_a_document_that_starts_in_a_chunk_leaves_it_to_the_factors():
  """Its reset counts as e^-40, and factors hold e^-60 in half a chunk. Two starts in a half are too much."""
  config, gates = heuristic(16, 16, jnp.dtype("bfloat16"), 64), np.full((1, 256, 1, 16), np.log(0.5) / 16)
  gates[:, [5, 40, 64, 127, 140, 150]] = chunks.RESET
  x = jnp.ones((1, 256, 1, 16), jnp.bfloat16)
  _, _, _, bounded, _ = jax.jit(lambda g: factors(x, x, g, 1.0, config))(jnp.asarray(gates, jnp.float32))
  assert bounded[0, 0].tolist() == [1, 1, 0, 1]


@pytest.mark.parametrize("op", OPS)
def test_declines(op):
  inputs = cases.make_inputs(Case(T=128, decay=DECAYS[op][0], beta=BETA.get(op))).arrays
  with pytest.raises(NotImplementedError, match="chunk_size=128 is not one of 16, 32, 64"):
    PALLAS[op](**inputs, chunk_size=128)
