"""Frozen parameters and adapters: what trains, what is kept of the rest, and equal steps in every layout."""

import dataclasses
import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lin_jax import hf, sharding, training
from lin_jax.checkpoint import load_model, save_model
from lin_jax.config import LoraConfig, MeshConfig, from_dict, to_dict
from lin_jax.data import eval_batches, train_iterator
from lin_jax.evaluate import evaluate
from lin_jax.initial import Initial
from lin_jax.layers import Linear
from lin_jax.lora import Adapter, merge_adapters
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.optim import parameter_name
from lin_jax.train_state import make_state
from lin_jax.trainable import combined, parameter_names, partition
from tests.close import assert_close
from tests.lin_jax import tiny

QUERIES_AND_MLP = LoraConfig(rank=2, alpha=8.0, targets=r"\.query$,mlp.down")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return tiny.write_dataset(tmp_path_factory.mktemp("trainable") / "data")


def tuned(path, trainable="", lora=QUERIES_AND_MLP, **model):
  config = tiny.config(path, trainable=trainable)
  config.lora = lora
  config.model = dataclasses.replace(config.model, **{"mixer": AttentionConfig(heads=2), **model})
  return config


def state_of(config, **mesh):
  return make_state(config, sharding.make_mesh(MeshConfig(**mesh), jax.devices()[:math.prod(mesh.values())]))


def shapes(config):
  return state_of(config, data=1)[2]


def names(tree):
  return {jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
          for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def test_old_configs_load_and_a_round_trip_keeps_the_new_fields(data):
  config = tuned(data, "norm")
  assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
  old = to_dict(tiny.config(data))
  del old["lora"], old["init_from"], old["optim"]["name"], old["optim"]["schedule"], old["optim"]["trainable"]
  assert from_dict(old) == tiny.config(data)


def test_all_parameters_train_without_a_choice(data):
  abstract = shapes(tuned(data, lora=LoraConfig()))
  assert not jax.tree.leaves(abstract.frozen) and names(abstract.params) == names(abstract.parameters())


def test_only_chosen_parameters_have_an_optimizer_state(data):
  abstract = shapes(tuned(data, r"mlp\.up,^norm", lora=LoraConfig(), dtype="bfloat16"))
  trained = names(abstract.params)
  assert trained == {name for name in names(abstract.parameters()) if "mlp.up" in name or name == "norm.scale"}
  assert {name.split("mu.")[1] for name in names(abstract.opt_state) if "mu." in name} == trained
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((abstract.params, abstract.opt_state[1][0].mu)))
  kept = {name: leaf.dtype for name, leaf in zip(sorted(names(abstract.frozen)), sorted_leaves(abstract.frozen),
                                                 strict=True)}
  assert kept["embedding"] == jnp.bfloat16 and kept["runs.0.0.mixer.query.kernel"] == jnp.bfloat16
  assert kept["runs.0.0.mlp_norm.scale"] == jnp.float32
  again = partition(abstract.parameters(), parameter_names(abstract.params))
  assert jax.tree.structure(again) == jax.tree.structure((abstract.params, abstract.frozen))
  assert combined(*again) == abstract.parameters()


def sorted_leaves(tree):
  named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
  return [named[name] for name in sorted(named)]


@pytest.mark.parametrize("change, message", [
    (dict(trainable="mlp,hed"),
     r"config.optim.trainable='mlp,hed': 'hed' is found in no name of embedding, norm.scale, .*adapter.b"),
    (dict(lora=LoraConfig(rank=2, targets="kernel")),
     r"config.lora.targets='kernel': 'kernel' is found in no name of runs.0.0.mixer.key, .*runs.0.0.mlp.up"),
])
def test_a_pattern_that_chooses_nothing_is_refused_with_the_names(data, change, message):
  with pytest.raises(ValueError, match=message):
    shapes(tuned(data, **change))


def test_an_adapter_is_a_product_beside_the_frozen_one():
  linear = Linear(6, 5, ("embed", "heads"), dtype="float32", bias=True, rngs=nnx.Rngs(0))
  x, cotangent, b = (jax.random.normal(jax.random.key(seed), shape)
                     for seed, shape in enumerate([(2, 3, 6), (2, 3, 5), (2, 5)]))
  plain = linear(x)
  linear.adapter = Adapter(linear, LoraConfig(rank=2, alpha=6.0), rngs=nnx.Rngs(3))
  assert np.array_equal(linear(x), plain) and np.std(linear.adapter.a[...]) > 0.1
  linear.adapter.b[...] = b
  graph, params = nnx.split(linear)

  @jax.jit
  def adapted(params, x):
    return jnp.vdot(nnx.merge(graph, params)(x), cotangent)

  @jax.jit
  def merged(params, x):
    a, b = (params["adapter"][name][...] for name in "ab")
    return jnp.vdot(x @ (params["kernel"][...] + 3.0 * a @ b)[None] + params["bias"][...][None, None], cotangent)

  gradients = [jax.grad(loss, (0, 1))(params, x) for loss in (adapted, merged)]
  for actual, expected in zip(*map(jax.tree.leaves, gradients), strict=True):
    assert_close("gradient", actual, expected, 1e-5)
  assert linear.flops_per_token() == 2 * 30 + 2 * 2 * 11
  expected = linear(x)
  assert_close("merged", merge_adapters(linear)(x), expected, 1e-5)
  assert linear.adapter is None


def test_no_product_makes_the_gradient_of_a_frozen_matrix(data):
  config = tuned(data)
  graph, _, abstract, _ = state_of(config, data=1)
  batch = next(train_iterator(config.data, seed=0))

  def results(params, frozen):
    loss = lambda params, frozen: training.loss_sum(graph, combined(params, frozen), batch)[0]
    return {eqn.outvars[0].aval.shape for eqn in equations(jax.make_jaxpr(jax.grad(loss))(params, frozen).jaxpr)
            if eqn.primitive.name == "dot_general"}

  matrices = {leaf.shape[-2:] for leaf in jax.tree.leaves(abstract.frozen)} - {(32,), (2, 32)}  # without norms
  assert matrices == {(64, 32), (32, 64), (32, 32)}  # of the MLP and the unembedding, and of the mixer
  assert results(*partition(abstract.parameters(), parameter_names(abstract.parameters()))) >= matrices
  assert not matrices & results(abstract.params, abstract.frozen)


def equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
      if inner := getattr(inner, "jaxpr", inner if hasattr(inner, "eqns") else None):
        yield from equations(inner)


@pytest.fixture(scope="module")
def source(data, tmp_path_factory):
  """A run with parameters of another seed than the tests' runs."""
  workdir = tmp_path_factory.mktemp("source") / "run"
  config = tuned(data, lora=LoraConfig())
  config.seed = 7
  graph, _, _, create = state_of(config, data=1)
  save_model(workdir, config, nnx.merge(graph, create().params))
  return workdir


def test_a_run_with_adapters_starts_from_another_and_goes_on_in_another_layout_without_it(data, source, tmp_path,
                                                                                         capsys):
  shutil.copytree(source, tmp_path / "source")
  config, workdir = tuned(data, trainable="mixer_norm"), tmp_path / "run"
  config.init_from, config.unroll, config.mesh = str(tmp_path / "source"), 0, MeshConfig(2, 2, 2)
  config.optim.steps, config.checkpoint.every, config.eval.every = 4, 2, 0
  result = training.train(config, workdir)
  out = capsys.readouterr().out
  assert "of which 704 train" in out and f"parameters from {tmp_path}/source" in out
  held_out = eval_batches(config.data, "val", config.eval.batches)
  loaded, model = load_model(workdir)
  assert loaded.lora == LoraConfig()
  assert np.isclose(evaluate(model, held_out)["loss"], result["eval_loss"], rtol=1e-5)

  shutil.rmtree(tmp_path / "source")
  config.unroll, config.mesh = 1, MeshConfig()
  assert np.isclose(training.train(config, workdir, 2)["eval_loss"], result["eval_loss"], rtol=1e-5)
  again, start = load_model(workdir)[1], load_model(source)[1]
  named = lambda model: {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(
      nnx.state(model, nnx.Param))}
  for (name, now), first, was in zip(named(again).items(), *(named(m).values() for m in (model, start)), strict=True):
    assert_close(name, now, first, 1e-4)
    trains = re.search("query|mlp.down|mixer_norm", name)
    assert np.array_equal(now, was) != bool(trains), name

  config.init_from = str(source)
  with pytest.raises(ValueError, match="holds a run of another config .init_from was"):
    training.train(config, workdir)


def initial(config, path):
  config.init_from = str(path)
  found = Initial(config, shapes(config), sharding.make_mesh(config.mesh))
  found.require_fit()
  return found


def test_a_source_of_other_shapes_is_refused_by_name(data, source):
  with pytest.raises(ValueError, match=r"run': runs.0.0.mlp.down.kernel has shape \(2, 64, 32\) there, \(2, 48, 32\) "
                                       r"in this config; .*up.kernel"):
    initial(tuned(data, mlp_width=48), source)
  with pytest.raises(ValueError, match=r"head has shape none \(missing\) there, \(32, 64\) in this config"):
    initial(tuned(data, tie_embeddings=False), source)
  with pytest.raises(ValueError, match="config.init_from='nowhere': "):
    initial(tuned(data), "nowhere")


def test_a_source_that_computes_something_else_is_said(data, source):
  assert initial(tuned(data, norm_eps=1e-3), source).note == (
      f"parameters from {source}; config.model differs: norm_eps was 1e-06 there and is 0.001")


def test_a_hugging_face_folder_is_a_source(data):
  config = tiny.config(data)
  config.model = hf.load_config("tests/fixtures/hf/gla")
  assert initial(config, "tests/fixtures/hf/gla").note == "parameters from tests/fixtures/hf/gla"
