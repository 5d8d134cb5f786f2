"""Ops whose tokens are split over devices: outputs, states and every gradient equal to one device's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lin_jax import context, sharding
from lin_jax.config import MeshConfig
from tests.close import assert_close

T, H, G, K, V = 256, 4, 2, 8, 4
DOCUMENTS = [1, 2, 15, 64, 65, 109], [32, 160, 64]  # of two rows; the second row's begin where parts of 32 tokens do
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

LAYOUTS = {
    "gla": "btgk,btgk,bthv,btgk", "none": "btgk,btgk,bthv", "constant": "btgk,btgk,bthv,h",
    "token": "btgk,btgk,bthv,bth", "delta none": "btgk,btgk,bthv,bth", "delta token": "btgk,btgk,bthv,bth,bth",
    "delta channel": "btgk,btgk,bthv,bth,bthk", "scan": "bth,bth,hn,btn,btn"}
STATES = {"scan": "bhn"}
OUTPUTS = {"scan": "bth"}


def op_of(form):
  if form.startswith("delta"):
    return functools.partial(context.delta_rule, normalize_qk=True)
  return {"gla": context.gla, "scan": context.selective_scan}.get(form, context.linear_attention)


def segment_ids():
  return np.stack([np.repeat(np.arange(len(row)), row) for row in DOCUMENTS]).astype(np.int32)


def arrays(form):
  """The op's arrays, an initial state, and cotangents of the output and the final state."""
  sizes = dict(b=2, t=T, h=H, g=G, k=K, v=V, n=3)
  names = [*LAYOUTS[form].split(","), STATES.get(form, "bhkv"), OUTPUTS.get(form, "bthv"), STATES.get(form, "bhkv")]
  keys = jax.random.split(jax.random.key(0), len(names))
  *x, state, doutput, dstate = (jax.random.normal(key, [sizes[name] for name in axes])
                                for key, axes in zip(keys, names, strict=True))
  if form == "scan":
    x[1], x[2] = jax.nn.softplus(x[1] - 3), -jnp.exp(x[2])
  if form.startswith("delta"):
    x[3] = 2 * jax.nn.sigmoid(x[3])
  if form in ("gla", "constant", "token", "delta token", "delta channel"):
    x[-1] = jax.nn.log_sigmoid(x[-1]) / 8
  return x, state, (doutput, dstate)


def results(form, implementation, ids, x, state, cotangents):
  """The output and the final state, and the gradients of all arrays and of the initial state."""
  layouts = f"{STATES.get(form, 'bhkv')},bt,{LAYOUTS[form]}->{OUTPUTS.get(form, 'bthv')},{STATES.get(form, 'bhkv')}"

  def run(state, ids, *x):
    return op_of(form)(*x, initial_state=state, segment_ids=ids, implementation=implementation)

  op = sharding.map_over_heads(run, layouts)
  found, pullback = jax.vjp(lambda state, *x: op(state, ids, *x), state, *x)
  return found, pullback(cotangents)


@functools.cache
def on_one_device(form):
  """The function from segment ids to the results by the op's definition."""
  run = jit(functools.partial(results, form, "reference"))
  return lambda ids: run(ids, *arrays(form))


def assert_equal(form, parts, implementation, ids):
  mesh = sharding.make_mesh(MeshConfig(data=1, context=parts), jax.devices()[:parts])
  with jax.set_mesh(mesh):
    actual = jit(functools.partial(results, form, implementation))(ids, *arrays(form))
  expected = on_one_device(form)(np.zeros((2, T), np.int32) if ids is None else ids)
  for i, (x, y) in enumerate(zip(*map(jax.tree.leaves, (actual, expected)), strict=True)):
    assert_close(f"result {i}", x, y, 1e-5)


@pytest.mark.parametrize("form, parts", [
    ("gla", 8), ("none", 2), ("constant", 4), ("token", 8), ("delta none", 2), ("delta token", 8), ("delta channel", 4),
    ("scan", 8)])
def test_parts_of_packed_rows_equal_one_device(form, parts):
  assert_equal(form, parts, "reference", segment_ids())


@pytest.mark.parametrize("form, parts", [("gla", 4), ("token", 2), ("delta token", 4), ("scan", 2)])
def test_the_implementation_that_dispatch_chooses_runs_on_parts(form, parts):
  assert_equal(form, parts, None, None)
