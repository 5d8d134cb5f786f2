"""Several value heads per key head: the results are those of repeated key heads, which no kernel reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec, use_abstract_mesh

import kernels
from kernel_tuning import compiled
from kernel_tuning.gpus import GPUS
from kernels import chunks
from tests.close import assert_close, tolerance
from tests.kernels.cases import Case, check, make_inputs, results
from tests.kernels.forms import CHUNKED

PALLAS = {op: functools.partial(getattr(kernels, op), implementation="pallas_triton")
          for op in ("gla", "linear_attention", "delta_rule")}
# Every form of a decay, and each op both in one piece and in several.
WHOLE = [("gla", "channel"), ("linear_attention", "token"), ("linear_attention", "constant"), ("delta_rule", "token")]
IN_PIECES = [("gla", "channel"), ("linear_attention", "constant"), ("linear_attention", "none"),
             ("delta_rule", "none")]
PACKED = dict(dtype="bfloat16", segments=(1, 20, 19))


def grouped(op, decay, **fields):
  """A case with three value heads for each of two key heads."""
  beta = dict(beta="unit", normalize_qk=True) if op == "delta_rule" else {}
  return Case(**dict(B=1, T=40, H=6, K=32, V=16, key_heads=2, decay=decay, chunk_size=16) | beta | fields)


def key_arrays(case):
  """Names of the arrays that have key heads."""
  return ("q", "k", "log_decay") if case.decay == "channel" and case.beta is None else ("q", "k")


def repeated(case, arrays):
  return arrays | {name: chunks.repeat_heads(arrays[name], case.H) for name in key_arrays(case)}


def assert_equals_repeated(case, fn, x):
  """Results equal to those of `fn` on repeated key heads, whose gradients are summed over each group."""
  options = x.segment_ids, x.cotangents, case.chunk_size, case.normalize_qk
  actual, expected = (results(fn, arrays, *options) for arrays in (x.arrays, repeated(case, x.arrays)))
  for name, value in expected.items():
    if name.removeprefix("d") in key_arrays(case):
      value = np.asarray(value, np.float32).reshape(*value.shape[:2], case.key_heads, -1, value.shape[3]).sum(axis=3)
      assert actual[name].dtype == expected[name].dtype
      assert_close(name, actual[name], value, 5e-3 if actual[name].dtype == jnp.bfloat16 else 1e-6)
    else:
      np.testing.assert_array_equal(actual[name], value, err_msg=name)


@pytest.mark.parametrize("op, decay, fields", [
    *(pytest.param(*form, PACKED, id="-".join(form) + "-bfloat16 segments")
      for form in WHOLE),
    *(pytest.param(*form, dict(T=256, H=4, K=16, gate="near_zero"), id="-".join(form) + "-float32 pieces")
      for form in IN_PIECES)])
def test_kernels_equal_those_of_repeated_heads(op, decay, fields):
  case = grouped(op, decay, **fields)
  assert_equals_repeated(case, PALLAS[op], make_inputs(case))


@pytest.mark.parametrize("op, fields", [
    ("gla", dict(gate="-30")), ("linear_attention", dict(decay="none", K=128)),
    ("delta_rule", dict(decay="none", K=64)),
], ids=["exact chunks", "shared scores", "norms of two tiles"])
def test_kernels_of_few_configurations_match_the_scan(op, fields):
  case = grouped(op, fields.pop("decay", "channel"), T=20, H=4, **fields)
  check(case, PALLAS[op], multi_pass=True)


@pytest.mark.parametrize("op, decay, ops", [
    *(pytest.param(*form, ops, id="-".join((*form, name)))
      for name, ops in (("pallas_triton", PALLAS), ("xla_chunked", CHUNKED))
      for form in (("gla", "channel"), ("linear_attention", "token"), ("delta_rule", "token"))),
    pytest.param("delta_rule", "channel", CHUNKED, id="delta_rule-channel-xla_chunked")])
def test_a_value_that_is_not_finite_reaches_what_it_does_with_repeated_heads(op, decay, ops):
  # Of the shapes that the test above has, so that its programs of the kernels serve again.
  case = grouped(op, decay, gate="near_zero", **PACKED)
  x = make_inputs(case)
  for name, head in (("q", 1), ("k", 0), ("v", 2)):
    bad = {name: x.arrays[name].at[0, 5, head, 0].set(jnp.nan)}
    actual, expected = (results(ops[op], arrays, x.segment_ids, x.cotangents, case.chunk_size, case.normalize_qk)
                        for arrays in (x.arrays | bad, repeated(case, x.arrays | bad)))
    assert np.isnan(actual["output"]).any()
    for key, value in expected.items():
      if key.removeprefix("d") in key_arrays(case):
        value = chunks.sum_heads(value, case.key_heads)
      np.testing.assert_array_equal(np.isnan(actual[key]), np.isnan(value), err_msg=f"{name}: {key}")


@pytest.mark.parametrize("op, decay", [("linear_attention", "token"), ("delta_rule", "none")])
def test_vmap_over_models(op, decay):
  case = grouped(op, decay, H=4, K=16, T=20)
  models = [make_inputs(case, seed) for seed in range(2)]
  stacked = [jax.tree.map(lambda *x: jnp.stack(x), *(getattr(x, name) for x in models))
             for name in ("arrays", "cotangents")]
  run = lambda arrays, cotangents: results(PALLAS[op], arrays, None, cotangents, 16, case.normalize_qk)
  found = jax.vmap(run)(*stacked)
  for i, x in enumerate(models):
    for name, value in run(x.arrays, x.cotangents).items():
      assert_close(name, found[name][i], value, tolerance(name, "float32"))


@pytest.mark.parametrize("op, decay", [("gla", "channel"), ("linear_attention", "token"), ("delta_rule", "token")])
def test_shard_map_over_heads(op, decay):
  case = grouped(op, decay, H=4, K=16, T=20)
  x = make_inputs(case)
  mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:2])

  def sharded(segment_ids, chunk_size, normalize_qk=False, **arrays):
    options = dict(normalize_qk=True) if normalize_qk else {}
    spec = lambda name: PartitionSpec(*[None] * (1 if name == "initial_state" else 2), "tensor")
    specs = {name: None if a is None else spec(name) for name, a in arrays.items()}
    return jax.shard_map(lambda arrays: PALLAS[op](**arrays, chunk_size=16, **options), mesh=mesh, in_specs=(specs,),
                         out_specs=(spec("v"), spec("initial_state")), check_vma=False)(arrays)

  actual, expected = (results(fn, x.arrays, None, x.cotangents, 16, case.normalize_qk) for fn in (sharded, PALLAS[op]))
  for name, value in expected.items():
    assert_close(name, actual[name], value, tolerance(name, "float32"))


@pytest.mark.parametrize("op, decay, T", [*((*form, 256) for form in WHOLE), *((*form, 2048) for form in IN_PIECES)])
def test_compiled_kernels_read_key_heads_and_no_copies_of_them(op, decay, T):
  """In the program for a GPU, each array of a key head's shape has the key heads' number, but for gradients."""
  B, H, G, K, V = 1, 12, 3, 100, 32
  array = lambda *shape, dtype="float32": jax.ShapeDtypeStruct(shape, dtype)
  gates = {"channel": (B, T, G, K), "token": (B, T, H), "constant": (H,), "none": None}[decay]
  keys = array(B, T, G, K, dtype="bfloat16")
  arrays = {"q": keys, "k": keys, "v": array(B, T, H, V, dtype="bfloat16"), "log_decay": gates and array(*gates)}
  arrays |= {"beta": array(B, T, H)} if op == "delta_rule" else {}

  def loss(arrays):
    output, final_state = PALLAS[op](**arrays)
    return jnp.sum(output.astype(jnp.float32)) + jnp.sum(final_state)

  with use_abstract_mesh(GPUS["sm_90a"].abstract):
    traced = jax.jit(jax.grad(loss)).trace(arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert "stablehlo.while" not in text, "an interpreted kernel is part of the program"
  shapes = {}
  for eqn in compiled._launches(traced.jaxpr):
    aliased = {i for i, _ in eqn.params["input_output_aliases"]}
    for i, var in enumerate(eqn.invars):
      if var.aval.ndim == 4 and var.aval.shape[3] == 128 and i not in aliased:  # K is padded to 128
        shapes.setdefault(eqn.params["name"], set()).add(var.aval.shape[2])
  assert len(shapes) >= 2 and set.union(*shapes.values()) == {G}, shapes
