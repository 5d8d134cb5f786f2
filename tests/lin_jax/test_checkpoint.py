"""What is kept, what is restored, and the messages for a checkpoint of another model and for a damaged one."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lin_jax.checkpoint import Checkpoints, load_model
from lin_jax.config import CheckpointConfig
from lin_jax.config import save as save_config
from lin_jax.damage import DamagedCheckpoint
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


def test_a_save_that_was_not_scheduled_takes_no_place_among_those_kept(data, tmp_path):
  config, iterator = tiny.config(data), train_iterator(tiny.config(data).data, seed=0)
  checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=2, keep_best=2))
  for step, loss, kept in [(1, 1.0, [1]), (2, None, [1, 2]), (3, 3.0, [1, 3]), (4, 0.5, [1, 3, 4]), (5, 2.0, [1, 4, 5]),
                           (6, 0.1, [1, 4, 5, 6]), (7, 9.0, [1, 4, 5, 7])]:
    checkpoints.save(step, tree(0.0), {"count": jnp.int32(step)}, iterator, config, loss, scheduled=step not in (2, 6))
    assert checkpoints.steps() == kept
  checkpoints.close()
  assert Checkpoints(tmp_path).best() == 4  # step 6 would be, but an unbroken run has none of it


def test_a_loss_that_is_not_finite_is_no_best(data, tmp_path):
  saved(tmp_path, data, [float("nan"), 2.0, float("inf"), -float("inf")], keep_last=1)
  assert Checkpoints(tmp_path).steps() == [2, 4] and Checkpoints(tmp_path).best() == 2


def test_restoring_waits_for_a_save_under_way(data, tmp_path):
  config, iterator = tiny.config(data), train_iterator(tiny.config(data).data, seed=0)
  # So large that no disk has it by the time that it is asked for.
  params = {"w": jnp.asarray(np.random.default_rng(0).random(2**22, np.float32))}
  for first in ("processes", "restore_params"):
    checkpoints = Checkpoints(tmp_path / first, CheckpointConfig())
    checkpoints.save(1, params, {"count": jnp.int32(1)}, iterator, config)
    if first == "processes":
      assert checkpoints.processes(1) == 1
    assert np.array_equal(checkpoints.restore_params(1, params)["w"], params["w"])
    checkpoints.close()


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
  save_config(config, tmp_path / "config.json")
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
  save_config(dataclasses.replace(config, model=dataclasses.replace(config.model, width=48)), tmp_path / "config.json")
  with pytest.raises(ValueError, match=r"another model: params embedding has shape \(64, 32\) there, \(64, 48\)"):
    load_model(tmp_path)


ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree(0.0))
COUNT = {"count": jax.ShapeDtypeStruct((), jnp.int32)}


def restore(workdir, data, step=2):
  """What `Checkpoints.load` returns for all items of `step`."""
  checkpoints = Checkpoints(workdir)
  iterator = train_iterator(tiny.config(data).data, seed=0)
  return checkpoints.load(step, lambda step: checkpoints.restore(step, ABSTRACT, COUNT, iterator))


def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(data, tmp_path):
  random = np.random.default_rng(0)
  checkpoints = Checkpoints(tmp_path, CheckpointConfig())
  trees = {item: {name: jnp.asarray(random.standard_normal(1000), jnp.float32) for name in names}
           for item, names in (("params", "wb"), ("optimizer", "mv"))}
  iterator = train_iterator(tiny.config(data).data, seed=0)
  checkpoints.save(1, trees["params"], trees["optimizer"], iterator, tiny.config(data))
  checkpoints.close()
  abstract = {item: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), t) for item, t in trees.items()}
  # Arrays of random numbers do not compress, so nearly every byte of these files is one of an array.
  files = [path for path in tmp_path.glob("checkpoints/1/*/ocdbt.process_0/d/*") if path.stat().st_size > 3000]
  assert {path.parts[-4] for path in files} == {"params", "optimizer"}
  found = 0
  for i in range(24):
    path = files[i % len(files)]
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[random.integers(len(whole))] ^= 1 << random.integers(8)
    path.write_bytes(damaged)
    try:
      restored = Checkpoints(tmp_path).restore(1, abstract["params"], abstract["optimizer"], iterator)
      assert all(map(np.array_equal, jax.tree.leaves(restored), jax.tree.leaves((trees["params"], trees["optimizer"]))))
    except DamagedCheckpoint as e:
      assert f"{tmp_path}/checkpoints/1 is damaged" in str(e)
      found += 1
    path.write_bytes(whole)
  assert found >= 20


def cut(item, size):
  for path in item.glob("**/d/*"):
    os.truncate(path, size)


@pytest.mark.parametrize("damage", [
    lambda step: shutil.rmtree(step / "params"),
    lambda step: shutil.rmtree(step / "optimizer"),
    lambda step: shutil.rmtree(step / "data"),
    lambda step: shutil.rmtree(step / "checksums"),
    lambda step: [shutil.rmtree(step), step.mkdir()],
    lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
    lambda step: (step / "params" / "_METADATA").write_text(""),
    lambda step: cut(step / "params", 20),
    lambda step: cut(step / "optimizer", 0),
    lambda step: (step / "data" / "process_0-of-1.json").write_text('{"next_index": 3}'),
    lambda step: (step / "checksums" / "crc32.json").write_text("[]"),
    lambda step: [shutil.rmtree(step), shutil.copytree(step.parent / "1", step)],
])
def test_a_damaged_checkpoint_is_named_with_the_newest_that_loads(data, tmp_path, damage, capfd):
  saved(tmp_path, data, [2.0, 1.0])
  damage(tmp_path / "checkpoints" / "2")
  with pytest.raises(DamagedCheckpoint) as error:
    restore(tmp_path, data, None)
  message = str(error.value)
  assert message.startswith(f"checkpoint {tmp_path}/checkpoints/2 ") and "\n" not in message
  assert message.endswith(f"newest checkpoint that loads is {tmp_path}/checkpoints/1: --checkpoint=1 goes on from it")
  assert not capfd.readouterr().err  # nor does Orbax say more
  step, (params, optimizer) = restore(tmp_path, data, "previous")
  assert step == 1 and (params["w"] == 1).all() and optimizer == {"count": 1}


def test_previous_passes_over_what_does_not_load_either(data, tmp_path):
  saved(tmp_path, data, [3.0, 2.0, 1.0], keep_last=3)
  for step in (2, 3):
    shutil.rmtree(tmp_path / "checkpoints" / str(step) / "data")
  assert restore(tmp_path, data, "previous")[0] == 1
  shutil.rmtree(tmp_path / "checkpoints" / "1" / "data")
  with pytest.raises(DamagedCheckpoint, match=r"checkpoints/2 is damaged: .*No other checkpoint of this run loads"):
    restore(tmp_path, data, "previous")
  with pytest.raises(ValueError, match=r"no checkpoint of step 4; saved: \[1, 2, 3\]"):
    restore(tmp_path, data, 4)


@pytest.mark.parametrize("text", ['{"eval_lo', "", "[]", '{"eval_loss": null}', '{"eval_loss": 0.5}'])
def test_damaged_metrics_cost_a_step_its_rank_and_nothing_else(data, tmp_path, text):
  saved(tmp_path, data, [1.0, 2.0], keep_last=1)
  (tmp_path / "checkpoints" / "1" / "metrics" / "metrics").write_text(text)
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.steps() == [1, 2] and checkpoints.best() == 2
  assert restore(tmp_path, data, 1)[0] == 1


def test_a_checkpoint_from_before_there_were_checksums_loads(data, tmp_path):
  saved(tmp_path, data, [1.0])
  step = tmp_path / "checkpoints" / "1"
  shutil.rmtree(step / "checksums")
  metadata = json.loads((step / "_CHECKPOINT_METADATA").read_text())
  del metadata["item_handlers"]["checksums"]
  (step / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
  assert restore(tmp_path, data, None)[0] == 1 and Checkpoints(tmp_path).best() == 1


def test_checkpoints_that_a_run_goes_back_behind_are_set_aside(data, tmp_path):
  saved(tmp_path, data, [3.0, 2.0, 1.0], keep_last=3)
  (tmp_path / "set_aside" / "3").mkdir(parents=True)
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.resume_from(1) == [tmp_path / "set_aside" / "2", tmp_path / "set_aside" / "3.1"]
  assert checkpoints.steps() == [1] and (tmp_path / "set_aside" / "3.1" / "params").is_dir()
  assert checkpoints.resume_from(1) == []


def test_deletions_that_a_kill_has_prevented_are_made_up_for(data, tmp_path):
  saved(tmp_path, data, [1.0, 5.0, 4.0, 3.0, 2.0], keep_last=5)
  shutil.rmtree(tmp_path / "checkpoints" / "4" / "metrics")  # killed while it was being deleted
  checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=2, keep_best=1))
  assert checkpoints.resume_from(5) == [tmp_path / "set_aside" / "4"]
  assert checkpoints.steps() == [1, 3, 5]
  checkpoints.close()
  assert Checkpoints(tmp_path).steps() == [1, 3, 5]
