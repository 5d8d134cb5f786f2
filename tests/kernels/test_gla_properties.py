"""Properties of gla that hold for every implementation, and its behaviour under JAX's transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from kernels import gla
from tests.close import assert_close, tolerance
from tests.kernels.cases import Case, make_inputs, results

CHUNKED = functools.partial(gla, implementation="xla_chunked")
CASE = Case(B=4, T=50, H=2, K=8, V=12)
INPUTS = make_inputs(CASE)
NAMES = "q", "k", "v", "log_decay"


@functools.cache
def plain():
  return results(CHUNKED, INPUTS.arrays, None, INPUTS.cotangents)


def assert_equal_results(actual, expected):
  assert actual.keys() == expected.keys()
  for name, x in expected.items():
    assert_close(name, actual[name], x, tolerance(name, "float32"))


def transformed(fn):
  """Results of an op that went through a transformation."""
  return results(fn, INPUTS.arrays, None, INPUTS.cotangents)


def test_remat():
  def remat(initial_state, segment_ids, chunk_size, **arrays):
    return jax.checkpoint(CHUNKED)(**arrays, initial_state=initial_state)

  assert_equal_results(transformed(remat), plain())


def test_vmap_over_the_batch():
  def mapped(initial_state, segment_ids, chunk_size, **arrays):
    one = lambda arrays, state: jax.tree.map(
        lambda x: x[0], CHUNKED(**jax.tree.map(lambda x: x[None], arrays), initial_state=state[None]))
    return jax.vmap(one)(arrays, initial_state)

  assert_equal_results(transformed(mapped), plain())


def test_scan_over_layers():
  """A scan over two heads as if they were layers with stacked inputs."""
  def scanned(initial_state, segment_ids, chunk_size, **arrays):
    by_head = lambda x, axis: jnp.moveaxis(x, axis, 0)[..., None, :] if axis == 2 else jnp.moveaxis(x, 1, 0)[:, :, None]
    stacked = {name: by_head(x, 2) for name, x in arrays.items()}, by_head(initial_state, 1)
    _, (output, state) = jax.lax.scan(lambda c, x: (c, CHUNKED(**x[0], initial_state=x[1])), None, stacked)
    return jnp.moveaxis(output[..., 0, :], 0, 2), jnp.moveaxis(state[:, :, 0], 0, 1)

  assert_equal_results(transformed(scanned), plain())


def test_shard_map_over_batch_and_heads():
  mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu"))
  spec, state_spec = PartitionSpec("data", None, "tensor", None), PartitionSpec("data", "tensor", None, None)

  def sharded(initial_state, segment_ids, chunk_size, **arrays):
    call = lambda q, k, v, g, state: CHUNKED(q, k, v, g, initial_state=state)
    return jax.shard_map(call, mesh=mesh, in_specs=(spec,) * 4 + (state_spec,), out_specs=(spec, state_spec),
                         check_vma=False)(*(arrays[name] for name in NAMES), initial_state)

  actual = transformed(sharded)
  assert not actual["dq"].sharding.is_fully_replicated
  assert_equal_results(actual, plain())


def test_pieces_with_the_state_passed_on_equal_one_call():
  def pieces(initial_state, segment_ids, chunk_size, **arrays):
    outputs, state = [], initial_state
    for rows in (slice(0, 1), slice(1, 34), slice(34, 50)):
      output, state = CHUNKED(**{name: x[:, rows] for name, x in arrays.items()}, initial_state=state)
      outputs.append(output)
    return jnp.concatenate(outputs, axis=1), state

  assert_equal_results(transformed(pieces), plain())


def test_causality_by_gradient():
  """Output t depends on every token up to t (its own gate included) and on none after it."""
  t = 34
  loss = lambda arrays: jnp.sum(jnp.sin(CHUNKED(**arrays)[0][:, t]))
  gradients = jax.jit(jax.grad(loss))(INPUTS.arrays)
  for name in NAMES:
    size = np.abs(gradients[name]).max(axis=(0, 2, 3))
    assert not size[t + 1:].any(), name
    assert (size[t] > 0) if name == "q" else (size[:t + 1] > 0).all(), name
  assert not np.abs(gradients["q"])[:, :t].any()


def test_heads_are_independent():
  """Heads in another order give the results in that order, bit for bit."""
  order = np.array([1, 0])
  arrays = {name: x[:, order] if name == "initial_state" else x[:, :, order] for name, x in INPUTS.arrays.items()}
  cotangents = INPUTS.cotangents[0][:, :, order], INPUTS.cotangents[1][:, order]
  permuted = results(CHUNKED, arrays, None, cotangents)
  for name, x in plain().items():
    axis = 1 if name.endswith("state") else 2
    np.testing.assert_array_equal(permuted[name], np.take(np.asarray(x), order, axis=axis), err_msg=name)


def test_nan_stays_in_its_sequence_and_head():
  """Unused rows of a padded batch may hold anything."""
  arrays = INPUTS.arrays | {"v": INPUTS.arrays["v"].at[1, 7, 0].set(jnp.nan)}
  actual = results(CHUNKED, arrays, None, INPUTS.cotangents)
  for name, x in plain().items():
    heads = 1 if name.endswith("state") else 2
    same = np.asarray(actual[name] == x).all(axis=tuple(i for i in range(4) if i not in (0, heads)))
    assert same[[0, 2, 3]].all() and same[1, 1], name
  assert np.isnan(actual["output"][1, 7, 0]).all() and np.isfinite(actual["output"][1, :, 1]).all()


def test_grouped_heads_equal_repeated_ones():
  grouped = make_inputs(Case(T=20, H=4, K=8, V=8, key_heads=2))
  repeat = lambda x: jnp.repeat(x, 2, axis=2)
  arrays = grouped.arrays | {name: repeat(grouped.arrays[name]) for name in ("q", "k", "log_decay")}
  actual = results(CHUNKED, grouped.arrays, None, grouped.cotangents)
  expected = results(CHUNKED, arrays, None, grouped.cotangents)
  for name in ("dq", "dk", "dlog_decay"):
    expected[name] = expected[name].reshape(2, 20, 2, 2, 8).sum(axis=3)
  assert_equal_results(actual, expected)


def test_no_initial_state_equals_zeros():
  without = INPUTS.arrays | {"initial_state": None}
  zeros = INPUTS.arrays | {"initial_state": jnp.zeros_like(INPUTS.arrays["initial_state"])}
  actual, expected = (results(CHUNKED, x, None, INPUTS.cotangents) for x in (without, zeros))
  expected.pop("dinitial_state")
  assert_equal_results(actual, expected)


def compiled(T, dtype="bfloat16"):
  array = lambda width, dtype: jax.ShapeDtypeStruct((1, T, 4, width), dtype)
  arrays = array(64, dtype), array(64, dtype), array(64, dtype), array(64, "float32")
  loss = lambda *x: jnp.sum(CHUNKED(*x)[0].astype(jnp.float32)**2)
  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))).lower(*arrays).compile().memory_analysis()


def test_memory_is_linear_in_time_and_small():
  """Forward and backward need scratch of a few times their inputs, where saving every state would need 64 times."""
  short, long = compiled(1024), compiled(4096)
  print(f"scratch / inputs: {long.temp_size_in_bytes / long.argument_size_in_bytes:.2f}")
  assert long.temp_size_in_bytes <= 4.1 * short.temp_size_in_bytes
  assert long.temp_size_in_bytes <= 4 * long.argument_size_in_bytes
