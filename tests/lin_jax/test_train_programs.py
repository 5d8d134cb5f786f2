"""What the program of a training step holds, and what it leaves to its arguments."""

import collections
import re

import jax
import pytest

from lin_jax import sharding
from lin_jax.data import train_iterator
from lin_jax.training import make_state, make_train_step
from tests.compilations import compilations
from tests.lin_jax import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return tiny.write_dataset(tmp_path_factory.mktemp("programs") / "data")


def test_runs_that_differ_in_seed_rate_and_steps_share_their_programs(data):
  """A constant of one of them in a program would keep the others from finding it in the compilation cache."""
  batch = next(train_iterator(tiny.config(data).data, seed=0))

  def programs(seed, schedule, **optim):
    config = tiny.config(data, schedule=schedule, **optim)
    config.seed = seed
    graph, optimizer, abstract, create = make_state(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    step = make_train_step(config, graph, optimizer, abstract)
    return create.func.lower(*create.args).as_text(), step.lower(abstract, batch).as_text()

  cosine = programs(0, "cosine", steps=6, warmup_steps=2, learning_rate=0.01, final_learning_rate=0.001)
  assert programs(7, "cosine", steps=9, warmup_steps=3, learning_rate=0.02, final_learning_rate=0.02) == cosine
  stable = programs(0, "wsd", steps=6, warmup_steps=2, learning_rate=0.01)
  assert programs(1, "wsd", steps=9, decay_steps=2, warmup_steps=2, learning_rate=0.03) == stable != cosine


def test_a_state_is_described_without_running_anything(data):
  """Programs are compiled for devices that do not exist, and nothing can run on those."""
  config = tiny.config(data)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  with jax.set_mesh(mesh), compilations() as compiled:
    make_state(config, mesh)
  assert not compiled


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("unroll, remat", [(1, "dots"), (0, "full")])
def test_weights_are_cast_once_per_step(data, accumulation, unroll, remat):
  config = tiny.config(data, accumulation=accumulation)
  config.model.dtype, config.unroll, config.remat = "bfloat16", unroll, remat
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  graph, optimizer, abstract, _ = make_state(config, mesh)
  batch = {name: jax.ShapeDtypeStruct((8, 64), dtype) for name, dtype in (
      ("tokens", "int32"), ("targets", "int32"), ("segment_ids", "int32"), ("mask", "float32"))}
  text = make_train_step(config, graph, optimizer, abstract).lower(abstract, batch).as_text()
  casts = collections.Counter(re.findall(r"stablehlo.convert .*\(tensor<(\S+)xf32>\) -> tensor<\S+xbf16>", text))
  # The model has width 32, queries and keys 16, values 32, the MLP 64, the vocabulary 64.
  kernels = {"32x16": 2, "32x4": 1, "32x32": 3, "32x64": 2, "64x32": 1}
  unembedding = {"32x64": 1}
  if unroll == 0:  # each of the two layers by itself
    assert {shape: casts[shape] for shape in kernels} == {
        shape: 2 * count + unembedding.get(shape, 0) for shape, count in kernels.items()}
  else:
    assert {shape: casts[f"2x{shape}"] for shape in kernels} == kernels
    assert {shape: casts[shape] for shape in ("32x16", "32x32", "64x32", "32x64")} == {
        "32x16": 0, "32x32": 0, "64x32": 0, **unembedding}, casts
