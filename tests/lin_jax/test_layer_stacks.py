"""Layers that are apart in a training state compute what stacked ones do, and leave no trace in a checkpoint."""

import re

import jax
import numpy as np
import pytest
from flax import nnx

from lin_jax import sharding
from lin_jax.checkpoint import load_model
from lin_jax.config import MeshConfig
from lin_jax.data import train_iterator
from lin_jax.layer_stacks import Layers, apart, together
from lin_jax.training import make_state, make_train_step, train
from tests.close import assert_close
from tests.lin_jax import tiny
from tests.lin_jax.runs import on_step, shared_steps, terminate


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return tiny.write_dataset(tmp_path_factory.mktemp("stacks") / "data")


def is_layers(leaf):
  return isinstance(leaf, Layers)


def test_every_stacked_parameter_and_moment_comes_apart_and_together(data):
  config = tiny.config(data)
  state = make_state(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))[3]()
  separate = apart(state)
  for tree in (separate.params, separate.opt_state):
    layers = [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_layers) if is_layers(leaf)]
    assert layers and all(len(leaf) == config.model.depth for leaf in layers)
  assert {type(leaf) for leaf in jax.tree.leaves(separate.params["runs"], is_leaf=is_layers)} == {Layers}
  names = lambda state: [variable.get_metadata().get("out_sharding") for variable in jax.tree.leaves(
      state.params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))]
  again = together(separate)
  assert names(again) == names(state)
  jax.tree.map(np.testing.assert_array_equal, again, state)


@pytest.fixture(scope="module")
def programs(data):
  """Maps a value of `unroll` to (mesh, create, compiled step) on eight devices with two microbatches."""
  found = {}
  for unroll in (0, 1):
    config = tiny.config(data, accumulation=2)
    config.unroll, config.mesh = unroll, MeshConfig(2, 2, 2)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
      graph, optimizer, abstract, create = make_state(config, mesh)
      batch = jax.device_put(next(train_iterator(config.data, seed=0)), sharding.batch_sharding(mesh))
      found[unroll] = mesh, create, make_train_step(config, graph, optimizer, abstract).lower(abstract, batch).compile()
  return found


def test_a_step_with_layers_apart_equals_a_step_under_the_scan(data, programs):
  states = {}
  for unroll, (mesh, create, step) in programs.items():
    iterator, state = train_iterator(tiny.config(data).data, seed=0), create()
    for _ in range(2):
      state, _ = step(state, jax.device_put(next(iterator), sharding.batch_sharding(mesh)))
    states[unroll] = jax.device_get(together(state))
  for (path, actual), expected in zip(jax.tree_util.tree_leaves_with_path(states[0]), jax.tree.leaves(states[1]),
                                      strict=True):
    assert_close(jax.tree_util.keystr(path), actual, expected, 2e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_compiled_step_with_layers_apart_stacks_no_weight(data, accumulation):
  config = tiny.config(data, accumulation=accumulation)
  config.unroll = 0
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  graph, optimizer, abstract, _ = make_state(config, mesh)
  text = make_train_step(config, graph, optimizer, abstract).lower(
      abstract, next(train_iterator(config.data, seed=0))).compile().as_text()
  # Two layers of width 32, whose MLPs have width 64.
  assert not re.findall(r"f32\[2,(?:32,64|64,32|32,32|32,16)\]", text)
  assert re.findall(r"f32\[(?:32,64|64,32)\]", text)


def test_a_run_goes_on_under_another_unroll(data, tmp_path, monkeypatch):
  def run(workdir, parts):
    for last, unroll in parts:
      config = tiny.config(data, steps=6)
      config.unroll, config.eval.every, config.checkpoint.every = unroll, 0, 2
      with monkeypatch.context() as patch:
        on_step(patch, last - 1, terminate)  # the step after it is under way by then
        assert train(config, workdir)["step"] == last
    return load_model(workdir)

  with shared_steps():
    _, changing = run(tmp_path / "changing", [(2, 0), (4, 1), (6, 0)])
    _, same = run(tmp_path / "same", [(6, 1)])
  for (path, actual), expected in zip(jax.tree_util.tree_leaves_with_path(nnx.state(changing)),
                                      jax.tree.leaves(nnx.state(same)), strict=True):
    assert_close(jax.tree_util.keystr(path), actual, expected, 1e-4)
