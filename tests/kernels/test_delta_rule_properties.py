"""Properties of delta_rule with and without decay, and its behaviour under JAX's transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kernels import delta_rule
from tests.close import assert_close, tolerance
from tests.kernels.cases import Case, make_inputs, results

CHUNKED = functools.partial(delta_rule, implementation="xla_chunked")
every_decay = pytest.mark.parametrize("decay", ["token", "none"])


@functools.cache
def inputs(decay):
  return make_inputs(Case(B=4, T=50, H=2, K=8, V=12, decay=decay, beta="double"))


@functools.cache
def plain(decay):
  return transformed(CHUNKED, decay)


def transformed(fn, decay):
  """Results of an op that went through a transformation."""
  return results(fn, inputs(decay).arrays, None, inputs(decay).cotangents)


def assert_equal_results(actual, expected):
  assert actual.keys() == expected.keys()
  for name, x in expected.items():
    assert_close(name, actual[name], x, tolerance(name, "float32"))


@every_decay
def test_remat(decay):
  def remat(segment_ids, chunk_size, **arrays):
    return jax.checkpoint(CHUNKED)(**arrays)

  assert_equal_results(transformed(remat, decay), plain(decay))


@every_decay
def test_vmap_over_the_batch(decay):
  def mapped(segment_ids, chunk_size, **arrays):
    def one(arrays):
      return jax.tree.map(lambda x: x[0], CHUNKED(**jax.tree.map(lambda x: x[None], arrays)))

    return jax.vmap(one)(arrays)

  assert_equal_results(transformed(mapped, decay), plain(decay))


@every_decay
def test_scan_over_layers(decay):
  """A scan over two heads as if they were layers with stacked inputs."""
  def scanned(initial_state, segment_ids, chunk_size, **arrays):
    stacked = jax.tree.map(lambda x: jnp.expand_dims(jnp.moveaxis(x, 2, 0), 3), arrays)
    stacked["initial_state"] = jnp.moveaxis(initial_state[:, :, None], 1, 0)
    _, (output, state) = jax.lax.scan(lambda c, x: (c, CHUNKED(**x)), None, stacked)
    return jnp.moveaxis(output[..., 0, :], 0, 2), jnp.moveaxis(state[:, :, 0], 0, 1)

  assert_equal_results(transformed(scanned, decay), plain(decay))


@every_decay
def test_shard_map_over_batch_and_heads(decay):
  mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu"))
  spec, state = PartitionSpec("data", None, "tensor", None), PartitionSpec("data", "tensor", None, None)
  gate = PartitionSpec("data", None, "tensor")

  def sharded(segment_ids, chunk_size, **arrays):
    specs = {"q": spec, "k": spec, "v": spec, "beta": gate, "initial_state": state,
             "log_decay": None if decay == "none" else gate}
    return jax.shard_map(lambda arrays: CHUNKED(**arrays), mesh=mesh, in_specs=(specs,), out_specs=(spec, state),
                         check_vma=False)(arrays)

  actual = transformed(sharded, decay)
  assert not actual["dq"].sharding.is_fully_replicated
  assert_equal_results(actual, plain(decay))


@every_decay
def test_pieces_with_the_state_passed_on_equal_one_call(decay):
  def pieces(initial_state, segment_ids, chunk_size, **arrays):
    outputs, state = [], initial_state
    for start, end in ((0, 1), (1, 34), (34, 50)):
      piece = jax.tree.map(functools.partial(jax.lax.slice_in_dim, start_index=start, limit_index=end, axis=1), arrays)
      output, state = CHUNKED(**piece, initial_state=state)
      outputs.append(output)
    return jnp.concatenate(outputs, axis=1), state

  assert_equal_results(transformed(pieces, decay), plain(decay))


def test_causality_by_gradient():
  """Output t depends on every token up to t (its own gate included) and on none after it."""
  t = 34
  loss = lambda arrays: jnp.sum(jnp.sin(CHUNKED(**arrays)[0][:, t]))
  # Near gates and small beta: behind strong ones, or many overwrites, a token's share vanishes in float32.
  arrays = make_inputs(Case(B=4, T=50, H=2, K=8, V=12, decay="token", gate="near_zero", beta="unit")).arrays
  gradients = jax.jit(jax.grad(loss))(arrays | {"beta": 0.1 * arrays["beta"]})
  for name in ("q", "k", "v", "beta", "log_decay"):
    size = np.abs(gradients[name]).max(axis=tuple(i for i in range(gradients[name].ndim) if i != 1))
    assert not size[t + 1:].any(), name
    assert (size[t] > 0) if name == "q" else (size[:t + 1] > 0).all(), name
  assert not np.abs(gradients["q"])[:, :t].any()


@every_decay
def test_heads_are_independent(decay):
  """Heads in another order give the results in that order, bit for bit."""
  axis = lambda name: 1 if name.endswith("state") else 2
  flip = lambda name, x: x if x is None else jnp.flip(x, axis(name))
  x = inputs(decay)
  arrays = {name: flip(name, x) for name, x in x.arrays.items()}
  permuted = results(CHUNKED, arrays, None, (jnp.flip(x.cotangents[0], 2), jnp.flip(x.cotangents[1], 1)))
  for name, x in plain(decay).items():
    np.testing.assert_array_equal(permuted[name], flip(name, x), err_msg=name)


@every_decay
def test_nan_stays_in_its_sequence_and_head(decay):
  """Unused rows of a padded batch may hold anything."""
  x = inputs(decay)
  arrays = x.arrays | {"v": x.arrays["v"].at[1, 7, 0].set(jnp.nan)}
  actual = results(CHUNKED, arrays, None, x.cotangents)
  for name, x in plain(decay).items():
    heads = 1 if name.endswith("state") else 2
    same = np.asarray(actual[name] == x).all(axis=tuple(i for i in range(x.ndim) if i not in (0, heads)))
    assert same[[0, 2, 3]].all() and same[1, 1], name
  assert np.isnan(actual["output"][1, 7, 0]).all() and np.isfinite(actual["output"][1, :, 1]).all()


@every_decay
def test_grouped_heads_equal_repeated_ones(decay):
  grouped = make_inputs(Case(T=20, H=4, K=8, V=8, key_heads=2, decay=decay, beta="double"))
  arrays = grouped.arrays | {name: jnp.repeat(grouped.arrays[name], 2, axis=2) for name in "qk"}
  actual = results(CHUNKED, grouped.arrays, None, grouped.cotangents)
  expected = results(CHUNKED, arrays, None, grouped.cotangents)
  for name in ("dq", "dk"):
    expected[name] = expected[name].reshape(2, 20, 2, 2, 8).sum(axis=3)
  assert_equal_results(actual, expected)


@every_decay
def test_no_initial_state_equals_zeros(decay):
  x = inputs(decay)
  zeros = x.arrays | {"initial_state": jnp.zeros_like(x.arrays["initial_state"])}
  actual, expected = (results(CHUNKED, arrays, None, x.cotangents)
                      for arrays in (x.arrays | {"initial_state": None}, zeros))
  expected.pop("dinitial_state")
  assert_equal_results(actual, expected)


@pytest.mark.parametrize("gate_dtype", ["bfloat16", "float16"])
def test_16_bit_gates_are_widened_first(gate_dtype):
  """beta and log_decay of any dtype act in float32; their gradients have their dtype."""
  x = inputs("token")
  names = "beta", "log_decay"
  narrow = {name: x.arrays[name].astype(gate_dtype) for name in names}
  actual = results(CHUNKED, x.arrays | narrow, None, x.cotangents)
  expected = results(CHUNKED, x.arrays | {name: g.astype("float32") for name, g in narrow.items()}, None, x.cotangents)
  assert all(actual[f"d{name}"].dtype == gate_dtype for name in names)
  for name, value in expected.items():
    same = value.astype(gate_dtype) if name.removeprefix("d") in names else value
    np.testing.assert_array_equal(actual[name], same, err_msg=name)


def compiled(T, decay):
  shapes = {name: (1, T, 4, 64) for name in "qkv"} | {"beta": (1, T, 4)}
  shapes |= {"log_decay": (1, T, 4)} if decay == "token" else {}
  arrays = {name: jax.ShapeDtypeStruct(shape, "float32" if len(shape) == 3 else "bfloat16")
            for name, shape in shapes.items()}
  loss = lambda x: jnp.sum(CHUNKED(**x)[0].astype(jnp.float32)**2)
  return jax.jit(jax.value_and_grad(loss)).lower(arrays).compile().memory_analysis()


@every_decay
def test_memory_is_linear_in_time_and_small(decay):
  """Forward and backward need scratch of a few times their inputs, where saving every state would need 42 times."""
  short, long = compiled(1024, decay), compiled(4096, decay)
  print(f"scratch / inputs: {long.temp_size_in_bytes / long.argument_size_in_bytes:.2f}")
  assert long.temp_size_in_bytes <= 4.1 * short.temp_size_in_bytes
  assert long.temp_size_in_bytes <= 6 * long.argument_size_in_bytes
