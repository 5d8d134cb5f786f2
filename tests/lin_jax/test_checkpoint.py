"""What is kept, what is restored, and the message for a checkpoint of another model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lin_jax import config as configs
from lin_jax.checkpoint import Checkpoints, load_model
from lin_jax.config import CheckpointConfig
from lin_jax.data import train_iterator
from lin_jax.model import LanguageModel
from tests.lin_jax import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return tiny.write_dataset(tmp_path_factory.mktemp("checkpoint") / "data")


def tree(value):
  return {"w": jnp.full((4, 2), value), "layers": [{"b": jnp.full(3, value)}]}


def saved(workdir, data, losses, **policy):
  """Saves steps 1, 2, ... with the given held-out losses; parameters equal the step."""
  config = tiny.config(data)
  iterator = train_iterator(config.data, seed=0)
  checkpoints = Checkpoints(workdir, CheckpointConfig(**policy))
  for step, loss in enumerate(losses, start=1):
    next(iterator)
    checkpoints.save(step, tree(float(step)), {"count": jnp.int32(step)}, iterator, config, loss)
  checkpoints.close()
  return iterator


@pytest.mark.parametrize("policy, kept, best", [
    (dict(keep_last=2, keep_best=1), [2, 5, 6], 2),
    (dict(keep_last=1, keep_best=2), [2, 4, 6], 2),
    (dict(keep_last=3, keep_best=0), [4, 5, 6], 4),
])
def test_last_and_best_are_kept(data, tmp_path, policy, kept, best):
  # Step 6 was not evaluated: it is never the best.
  saved(tmp_path, data, [5.0, 1.0, 4.0, 2.0, 3.0, None], **policy)
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.steps() == kept and checkpoints.latest() == 6 and checkpoints.best() == best


def test_restore_gives_back_arrays_placement_and_the_place_in_the_data(data, tmp_path):
  iterator = saved(tmp_path, data, [1.0, 2.0])
  mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
  place = {4: P("fsdp"), 3: P()}
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, place[len(x)])),
                          tree(0.0))
  other = train_iterator(tiny.config(data).data, seed=0)
  params, optimizer = Checkpoints(tmp_path).restore(2, abstract, {"count": jax.ShapeDtypeStruct((), jnp.int32)}, other)
  for actual, expected, like in zip(*map(jax.tree.leaves, (params, tree(2.0), abstract)), strict=True):
    assert np.array_equal(actual, expected) and actual.sharding == like.sharding
  assert optimizer == {"count": 2}
  for actual, expected in zip(*map(jax.tree.leaves, (next(other), next(iterator))), strict=True):
    assert np.array_equal(actual, expected)


def test_another_number_of_processes_goes_on_at_the_same_batch(data, tmp_path):
  expected = next(saved(tmp_path, data, [None, None]))
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (tree(0.0), {"count": jnp.int32(0)}))
  folder = tmp_path / "checkpoints" / "2" / "data"
  position = (folder / "process_0-of-1.json").rename(folder / "process_0-of-2.json")
  (folder / "process_1-of-2.json").write_bytes(position.read_bytes())
  assert Checkpoints(tmp_path).processes(2) == 2
  whole = train_iterator(tiny.config(data).data, seed=0)
  parts = [train_iterator(tiny.config(data).data, seed=0, process_index=i, process_count=4) for i in range(4)]
  for iterator in (whole, *parts):
    Checkpoints(tmp_path).restore(2, *abstract, iterator)
  assert np.array_equal(next(whole)["tokens"], expected["tokens"])
  rows = np.concatenate([next(part)["tokens"] for part in parts])
  assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected["tokens"].tolist()))


@pytest.mark.parametrize("change, message", [
    (lambda t: t | {"w": jnp.zeros((4, 3))}, r"params w has shape \(4, 2\) there, \(4, 3\) in this config"),
    (lambda t: t | {"extra": jnp.zeros(1)}, r"params extra has shape none \(missing\) there, \(1,\) in this config"),
    (lambda t: {"w": t["w"]}, r"params layers.0.b has shape \(3,\) there, none \(missing\) in this config"),
])
def test_checkpoint_of_another_model_is_refused_by_name(data, tmp_path, change, message):
  saved(tmp_path, data, [None])
  with pytest.raises(ValueError, match=message):
    Checkpoints(tmp_path).restore_params(1, change(tree(0.0)))


def test_save_survives_the_reuse_of_its_buffers(data, tmp_path):
  checkpoints = Checkpoints(tmp_path, CheckpointConfig())
  overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  params = {"w": jnp.ones((1024, 1024))}
  iterator = train_iterator(tiny.config(data).data, seed=0)
  checkpoints.save(1, params, {"count": jnp.int32(1)}, iterator, tiny.config(data))
  overwrite(params["w"]).block_until_ready()
  checkpoints.close()
  restored = Checkpoints(tmp_path).restore_params(1, {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)})
  assert (np.asarray(restored["w"]) == 1).all()


def test_load_model_names_what_is_missing(data, tmp_path):
  with pytest.raises(ValueError, match="config.json: not a saved lin_jax config"):
    load_model(tmp_path)
  config = tiny.config(data)
  configs.save(config, tmp_path / "config.json")
  with pytest.raises(ValueError, match="no checkpoints"):
    load_model(tmp_path)
  checkpoints = Checkpoints(tmp_path, config.checkpoint)
  params = nnx.state(jax.jit(lambda: LanguageModel(config.model, rngs=nnx.Rngs(0)))())
  checkpoints.save(3, params, {"count": jnp.int32(1)}, train_iterator(config.data, seed=0), config)
  checkpoints.close()
  assert load_model(tmp_path, 3)[0] == config
  for step in (2, "best"):
    with pytest.raises(ValueError, match=rf"no checkpoint of step {step}; saved: \[3\]"):
      load_model(tmp_path, step)
  configs.save(dataclasses.replace(config, model=dataclasses.replace(config.model, width=48)), tmp_path / "config.json")
  with pytest.raises(ValueError, match=r"another model: params embedding has shape \(64, 32\) there, \(64, 48\)"):
    load_model(tmp_path)
