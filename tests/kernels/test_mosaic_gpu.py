"""The delta rule's kernels for Hopper against the scan: interpreted on small cases, the whole grid on a GPU.

`XLA_PYTHON_CLIENT_PREALLOCATE=false pytest tests/kernels/test_mosaic_gpu.py -m gpu -n 8 --record=FILE` runs the grid.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

import kernels
from kernel_tuning import gpus
from kernels import dispatch
from kernels.delta_rule import mosaic_gpu
from tests.close import assert_bounds, relative_error
from tests.kernels import cases
from tests.kernels.cases import Case

MOSAIC = functools.partial(kernels.delta_rule, implementation="mosaic_gpu")
BF16 = functools.partial(Case, dtype="bfloat16", beta="double")
BLOCK = 64  # tokens per chunk


def check(case, record_property):
  inputs = cases.make_inputs(case)
  actual = cases.results(MOSAIC, inputs.arrays, inputs.segment_ids, inputs.cotangents, None, case.normalize_qk)
  errors = {name: relative_error(actual[name], x) for name, x in cases.expected(inputs).items()}
  assert_bounds(f"delta_rule {case}", case.dtype, errors, record_property)


@pytest.mark.parametrize("case", [
    BF16(B=1, T=70, H=2, K=64, V=128, decay="token", key_heads=1, normalize_qk=True),
    BF16(B=1, T=65, H=1, K=192, V=40, decay="none"),  # padded to 256 and 64
    BF16(B=1, T=150, H=1, K=64, V=64, decay="none", segments=(1, 62, 2, 85)),
], ids=str)
def test_interpreted_kernels_match_the_scan(case, record_property):
  check(case, record_property)


def grid():
  """Widths of one and of two state warpgroups, of keys that are held and that are not, and of odd sizes."""
  for K, V in (64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (96, 192), (192, 192), (256, 256), (256, 512):
    for decay in "token", "none":
      yield BF16(T=200, K=K, V=V, decay=decay, normalize_qk=True)
      yield BF16(T=64 * 9, K=K, V=V, decay=decay, gate="near_zero", initial_state=False)
  for decay in "token", "none":
    for K, V in (128, 128), (256, 256):
      yield BF16(T=500, K=K, V=V, decay=decay, segments=(1, 62, 100, 1, 336), normalize_qk=True)
    for gate in ("-30", "logit_-20", "mixed") if decay == "token" else ("mixed",):
      yield BF16(T=1000, H=4, K=128, V=128, decay=decay, gate=gate, key_heads=2, normalize_qk=True)
    for keys, beta in ("near_parallel", "double"), ("repeated", "1"):  # as in `cases.delta_rules`
      for K, T in (128, 500), (256, 300):
        yield BF16(T=T, K=K, V=128, decay=decay, gate="near_zero", keys=keys, beta=beta, normalize_qk=True)


@pytest.mark.gpu
@pytest.mark.parametrize("case", list(grid()), ids=str)
def test_compiled_kernels_match_the_scan(case, record_property):
  assert dispatch.capability() == "9.0"
  check(case, record_property)


PARTS = 6  # of the numbers of chunks, for several processes


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("K, V", [(128, 128), (256, 512)])
@pytest.mark.parametrize("decay", ["token", "none"])
def test_every_number_of_chunks(decay, K, V, part, record_property):
  """From 1 to 24 chunks, each three times with equal results: a race between warpgroups would show."""
  worst = {}
  for count in range(1 + part, 25, PARTS):
    inputs = cases.make_inputs(BF16(B=1, T=count * BLOCK, K=K, V=V, decay=decay, gate="near_zero"))
    run = functools.partial(cases.results, MOSAIC, inputs.arrays, None, inputs.cotangents, None, False)
    found, *again = (run() for _ in range(3))
    assert all((found[name] == x[name]).all() for x in again for name in found)
    for name, x in cases.expected(inputs).items():
      worst[name] = max(worst.get(name, 0.0), relative_error(found[name], x))
  assert_bounds(f"delta_rule {decay} {K}x{V} 1 to 24 chunks", "bfloat16", worst, record_property)


@pytest.mark.gpu
def test_models_side_by_side_equal_one_alone():
  models = [cases.make_inputs(BF16(T=200, K=128, V=128, decay="token"), seed) for seed in range(3)]
  run = lambda arrays, cotangents: cases.results.__wrapped__(MOSAIC, arrays, None, cotangents, None)
  stacked = [jax.tree.map(lambda *x: jnp.stack(x), *values)
             for values in zip(*((inputs.arrays, inputs.cotangents) for inputs in models))]
  together = jax.jit(jax.vmap(run))(*stacked)
  for i, inputs in enumerate(models):
    for name, x in jax.jit(run)(inputs.arrays, inputs.cotangents).items():
      assert (together[name][i] == x).all(), name


def shapes(B=8, T=2048, H=16, K=128, V=128, dtype=jnp.bfloat16):
  array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
  return array(B, T, H, K), array(B, T, H, K), array(B, T, H, V), array(B, T, H, dtype=jnp.float32)


@pytest.fixture
def hopper(monkeypatch):
  monkeypatch.setattr(dispatch, "platform", lambda: "cuda")
  monkeypatch.setattr(dispatch, "capability", lambda: "9.0")


ids = jax.ShapeDtypeStruct((8, 2048), jnp.int32)


def test_hopper_runs_them_first(hopper):
  for arrays in shapes(), shapes(V=96), (*shapes(), None, ids):
    text = kernels.explain("delta_rule", *arrays)
    assert text.startswith("delta_rule runs as mosaic_gpu on cuda")
    assert "  pallas_triton: can run, mosaic_gpu comes first" in text
    assert dispatch.choose("delta_rule", None, *arrays) is mosaic_gpu.delta_rule


@pytest.mark.parametrize("arrays, reason", [
    (shapes(K=64), "pallas_triton is as fast with gradients for 64 key channels"),
    (shapes(V=40), "it would pad 40 value channels to 64"),
    (shapes(B=1), "pallas_triton cuts long sequences into pieces, and 16 programs leave most of a GPU idle")])
def test_runs_only_if_named(hopper, arrays, reason):
  text = kernels.explain("delta_rule", *arrays)
  assert text.startswith("delta_rule runs as pallas_triton on cuda") and f"  mosaic_gpu: {reason}" in text
  assert dispatch.choose("delta_rule", "mosaic_gpu", *arrays) is mosaic_gpu.delta_rule


channels = jax.ShapeDtypeStruct((8, 2048, 16, 128), jnp.float32)


@pytest.mark.parametrize("arrays, reason", [
    (shapes(dtype=jnp.float32), "its kernels take bfloat16, not float32"),
    (shapes(K=257), "257 key channels are more than 256"),
    ((*shapes(), channels), "it takes no decay per key channel")])
def test_declines(hopper, arrays, reason):
  assert f"  mosaic_gpu: {reason}" in kernels.explain("delta_rule", *arrays)
  with pytest.raises(NotImplementedError, match=reason):
    dispatch.choose("delta_rule", "mosaic_gpu", *arrays)


def test_other_gpus_do_not_have_them(hopper, monkeypatch):
  monkeypatch.setattr(dispatch, "capability", lambda: "8.0")
  text = kernels.explain("delta_rule", *shapes())
  assert "  mosaic_gpu: the GPU has compute capability 8.0, it needs 9.0" in text


def test_a_jax_without_the_backend_runs_the_others(hopper, monkeypatch):
  def fail(op, name):
    if name == "mosaic_gpu":
      raise ImportError("no such backend")
    return module(op, name)

  module = dispatch._module
  monkeypatch.setattr(dispatch, "_module", fail)
  text = kernels.explain("delta_rule", *shapes())
  assert "runs as pallas_triton" in text and "mosaic_gpu: it does not load: no such backend" in text


@pytest.mark.parametrize("K, V, gated", [(128, 128, True), (256, 512, False)])
def test_lowers_for_hopper_without_a_gpu(K, V, gated):
  arrays = shapes(B=1, T=128, H=2, K=K, V=V)
  gates = jax.ShapeDtypeStruct((1, 128, 2), jnp.float32) if gated else None
  both = lambda arrays, do: jax.vjp(lambda *x: MOSAIC(*x, normalize_qk=True)[0], *arrays)[1](do)
  with jax.sharding.use_abstract_mesh(gpus.GPUS["sm_90a"].abstract):
    lowered = jax.jit(both).trace((*arrays, gates), arrays[2]).lower(lowering_platforms=("cuda",))
  text = lowered.as_text()
  assert text.count("mosaic_gpu") >= 2


def test_has_first_derivatives_only(monkeypatch):
  x = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
  beta = jnp.ones((1, 64, 1))
  with pytest.raises(NotImplementedError, match="have first derivatives only"):
    jax.eval_shape(lambda x: jax.jvp(jax.grad(lambda x: MOSAIC(x, x, x, beta)[0].sum().astype(float)), (x,), (x,)), x)
