"""Properties that every op keeps, in every form of its decay and under JAX's transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from tests.close import assert_close
from tests.kernels.cases import results
from tests.kernels.forms import (
    CHUNKED,
    assert_equal_results,
    changed,
    every_form,
    every_gate,
    few_forms,
    implementations,
    inputs,
    plain,
    transformed,
)


def heads_axis(name, x):
  """A constant decay has heads only, a state no time."""
  return 0 if x.ndim == 1 else 1 if name.endswith("state") else 2


def without_constants(arrays):
  """The arrays that have a row for each sequence, and the others, of which a constant decay may be one."""
  constant = {name: x for name, x in arrays.items() if x is None or x.ndim == 1}
  return {name: x for name, x in arrays.items() if name not in constant}, constant


@few_forms
def test_remat(op, decay):
  def remat(segment_ids, chunk_size, **arrays):
    return jax.checkpoint(CHUNKED[op])(**arrays)

  assert_equal_results(transformed(remat, op, decay), plain(op, decay))


def hessian_vector_products(fn, arrays):
  """Products with one vector: forward over reverse, and reverse over reverse, not run yet."""
  arrays = {name: x for name, x in arrays.items() if x is not None}
  vector = {name: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for name, x in arrays.items()}
  gradient = jax.grad(lambda x: sum(jnp.sum(jnp.sin(y)) for y in fn(**x)))
  along = lambda x: sum(jnp.vdot(dx, v) for dx, v in zip(*map(jax.tree.leaves, (gradient(x), vector))))
  forward = jax.jit(lambda x: jax.jvp(gradient, (x,), (vector,))[1])
  return (lambda: forward(arrays)), (lambda: jax.jit(jax.grad(along))(arrays))


@pytest.mark.parametrize("op, decay", [("gla", "channel"), ("linear_attention", "token"), ("delta_rule", "none"),
                                       ("delta_rule", "channel")])
def test_second_derivatives_equal_those_of_the_scan(op, decay):
  arrays = inputs(op, decay, B=1, T=20, H=1, K=4, V=6).arrays
  fns = [functools.partial(fn, chunk_size=16) for fn in implementations(op).values()]
  (forward, reverse), (wanted, _) = (hessian_vector_products(fn, arrays) for fn in fns[:2])
  wanted = wanted()
  for name, x in forward().items():
    assert_close(name, x, wanted[name], 1e-5)
  # Programs that take seconds to compile are only traced.
  found = reverse() if op == "linear_attention" else jax.eval_shape(reverse)
  assert found.keys() == wanted.keys()
  for name, x in found.items() if op == "linear_attention" else ():
    assert_close(name, x, wanted[name], 1e-5)


@pytest.mark.parametrize("op, decay", [("gla", "channel"), ("linear_attention", "token"), ("delta_rule", "none")])
def test_kernels_refuse_second_derivatives(op, decay):
  arrays = inputs(op, decay, B=1, T=20, H=1, K=4, V=6).arrays
  for product in hessian_vector_products(implementations(op)["pallas_triton"], arrays):
    with pytest.raises(NotImplementedError, match="first derivatives only.*implementation='xla_chunked' has second"):
      jax.eval_shape(product)


@few_forms
def test_vmap_over_the_batch(op, decay):
  def mapped(segment_ids, chunk_size, **arrays):
    rows, constant = without_constants(arrays)
    one = lambda row: CHUNKED[op](**{name: x[None] for name, x in row.items()}, **constant)
    return jax.tree.map(lambda x: x[:, 0], jax.vmap(one)(rows))

  assert_equal_results(transformed(mapped, op, decay), plain(op, decay))


@few_forms
def test_scan_over_layers(op, decay):
  """A scan over two heads as if they were layers with stacked inputs."""
  def stack(name, x):
    axis = heads_axis(name, x)
    return jnp.expand_dims(jnp.moveaxis(x, axis, 0), axis + 1)

  def scanned(segment_ids, chunk_size, **arrays):
    stacked = {name: x if x is None else stack(name, x) for name, x in arrays.items()}
    _, (output, state) = jax.lax.scan(lambda c, x: (c, CHUNKED[op](**x)), None, stacked)
    return jnp.moveaxis(output[..., 0, :], 0, 2), jnp.moveaxis(state[:, :, 0], 0, 1)

  assert_equal_results(transformed(scanned, op, decay), plain(op, decay))


@few_forms
def test_shard_map_over_batch_and_heads(op, decay):
  mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu"))

  def spec(name, x):
    axes = ["data"] + [None] * (x.ndim - 1)
    axes[heads_axis(name, x)] = "tensor"
    return PartitionSpec(*axes)

  def sharded(segment_ids, chunk_size, **arrays):
    specs = {name: None if x is None else spec(name, x) for name, x in arrays.items()}
    return jax.shard_map(lambda arrays: CHUNKED[op](**arrays), mesh=mesh, in_specs=(specs,),
                         out_specs=(specs["v"], specs["initial_state"]), check_vma=False)(arrays)

  actual = transformed(sharded, op, decay)
  assert not actual["dq"].sharding.is_fully_replicated
  assert_equal_results(actual, plain(op, decay))


@every_form
def test_pieces_with_the_state_passed_on_equal_one_call(op, decay):
  def pieces(initial_state, segment_ids, chunk_size, **arrays):
    (arrays, constant), outputs, state = without_constants(arrays), [], initial_state
    for rows in (slice(0, 1), slice(1, 34), slice(34, 50)):
      piece = {name: x[:, rows] for name, x in arrays.items()}
      output, state = CHUNKED[op](**piece, **constant, initial_state=state)
      outputs.append(output)
    return jnp.concatenate(outputs, axis=1), state

  assert_equal_results(transformed(pieces, op, decay), plain(op, decay))


@every_gate
def test_causality_by_gradient(op, decay):
  """Output t depends on every token up to t (its own gate included) and on none after it."""
  t = 34
  loss = lambda arrays: jnp.sum(jnp.sin(CHUNKED[op](**arrays)[0][:, t]))
  # Near gates and small beta: behind strong ones, or many overwrites, a token's share vanishes in float32.
  arrays = inputs(op, decay, gate="near_zero").arrays
  gradients = jax.jit(jax.grad(loss))(arrays | {name: 0.05 * x for name, x in arrays.items() if name == "beta"})
  for name in arrays.keys() - {"initial_state"}:
    size = np.abs(gradients[name]).max(axis=tuple(i for i in range(gradients[name].ndim) if i != 1))
    assert not size[t + 1:].any(), name
    assert (size[t] > 0) if name == "q" else (size[:t + 1] > 0).all(), name
  assert not np.abs(gradients["q"])[:, :t].any()


@every_form
def test_heads_are_independent(op, decay):
  """Heads in another order give the results in that order, bit for bit."""
  flip = lambda name, x: x if x is None else jnp.flip(x, heads_axis(name, x))
  x = inputs(op, decay)
  arrays = {name: flip(name, x) for name, x in x.arrays.items()}
  permuted = results(CHUNKED[op], arrays, None, (jnp.flip(x.cotangents[0], 2), jnp.flip(x.cotangents[1], 1)))
  for name, x in plain(op, decay).items():
    np.testing.assert_array_equal(permuted[name], flip(name, x), err_msg=name)


@every_form
def test_nan_stays_in_its_sequence_and_head(op, decay):
  """Unused rows of a padded batch may hold anything."""
  actual = changed(op, decay, v=inputs(op, decay).arrays["v"].at[1, 7, 0].set(jnp.nan))
  for name, x in plain(op, decay).items():
    if x.ndim == 1:  # the gradient of a constant decay is a sum over sequences
      assert np.isnan(actual[name][0]) and actual[name][1] == x[1]
      continue
    same = np.asarray(actual[name] == x).all(axis=tuple(i for i in range(x.ndim) if i not in (0, heads_axis(name, x))))
    assert same[[0, 2, 3]].all() and same[1, 1], name
  assert np.isnan(actual["output"][1, 7, 0]).all() and np.isfinite(actual["output"][1, :, 1]).all()


@few_forms
def test_grouped_heads_equal_repeated_ones(op, decay):
  grouped = inputs(op, decay, B=2, T=20, H=4, V=8, key_heads=2)
  shared = ("q", "k", "log_decay") if op == "gla" else ("q", "k")
  arrays = grouped.arrays | {name: jnp.repeat(grouped.arrays[name], 2, axis=2) for name in shared}
  actual, repeated = (results(CHUNKED[op], x, None, grouped.cotangents) for x in (grouped.arrays, arrays))
  for name in shared:
    repeated[f"d{name}"] = repeated[f"d{name}"].reshape(2, 20, 2, 2, 8).sum(axis=3)
  assert_equal_results(actual, repeated)


@few_forms
def test_no_initial_state_equals_zeros(op, decay):
  zeros = jnp.zeros_like(inputs(op, decay).arrays["initial_state"])
  actual, expected = (changed(op, decay, initial_state=state) for state in (None, zeros))
  expected.pop("dinitial_state")
  assert_equal_results(actual, expected)


@pytest.mark.parametrize("op, decay, gate_dtype", [
    ("gla", "channel", "bfloat16"), ("linear_attention", "token", "float16"), ("delta_rule", "token", "bfloat16"),
    ("delta_rule", "channel", "bfloat16")])
def test_16_bit_gates_are_widened_first(op, decay, gate_dtype):
  """beta and log_decay of any dtype act in float32; their gradients have their dtype."""
  gates = {name: x.astype(gate_dtype) for name, x in inputs(op, decay).arrays.items() if name in ("beta", "log_decay")}
  actual = changed(op, decay, **gates)
  expected = changed(op, decay, **{name: g.astype("float32") for name, g in gates.items()})
  assert all(actual[f"d{name}"].dtype == gate_dtype for name in gates)
  for name, x in expected.items():
    np.testing.assert_array_equal(actual[name], x.astype(actual[name].dtype), err_msg=name)


def scratch(op, decay, T):
  """Bytes of temporary arrays of a gradient, and of its arguments."""
  shapes = {name: (1, T, 4, 64) for name in "qkv"} | ({"beta": (1, T, 4)} if op == "delta_rule" else {})
  shapes["log_decay"] = {"channel": (1, T, 4, 64), "token": (1, T, 4), "constant": (4,), "none": None}[decay]
  arrays = {name: shape and jax.ShapeDtypeStruct(shape, "bfloat16" if name in "qkv" else "float32")
            for name, shape in shapes.items()}
  loss = lambda x: jnp.sum(CHUNKED[op](**x)[0].astype(jnp.float32)**2)
  memory = jax.jit(jax.value_and_grad(loss)).lower(arrays).compile().memory_analysis()
  return memory.temp_size_in_bytes, memory.argument_size_in_bytes


@few_forms
def test_memory_is_linear_in_time_and_small(op, decay):
  """Forward and backward need scratch of a few times their inputs, where saving every state would need 42 to 64."""
  (short, _), (long, arguments) = scratch(op, decay, 1024), scratch(op, decay, 4096)
  print(f"scratch / inputs: {long / arguments:.2f}")
  assert long <= 4.1 * short
  assert long <= (4 if op == "gla" else 6) * arguments
