"""The step against a plain one, sharded against unsharded, and what a run does with bad numbers and bad workdirs."""

import functools
import json
import math

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from lin_jax import metrics as reporting
from lin_jax import sharding, training
from lin_jax.checkpoint import load_model
from lin_jax.config import MeshConfig
from lin_jax.config import load as load_config
from lin_jax.data import eval_batches, train_iterator
from lin_jax.mixers.gla import GLAConfig
from lin_jax.training import make_state, make_train_step, train
from tests.close import assert_close
from tests.lin_jax import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return tiny.write_dataset(tmp_path_factory.mktemp("training") / "data")


@pytest.fixture(scope="module")
def batches(data):
  iterator = train_iterator(tiny.config(data).data, seed=0)
  return [next(iterator) for _ in range(3)]


@functools.cache
def compiled(path, accumulation=1, mesh_config=(1, 1, 1)):
  """(mesh, graph, optimizer, create, train_step) of the tiny config, compiled once for all tests."""
  config = tiny.config(path, accumulation=accumulation, nonfinite="skip")
  mesh = sharding.make_mesh(MeshConfig(*mesh_config), jax.devices()[:math.prod(mesh_config)])
  with jax.set_mesh(mesh):
    graph, optimizer, abstract, create = make_state(config, mesh)
    return mesh, graph, optimizer, create, make_train_step(config, graph, optimizer, abstract)


def run_steps(batches, *args):
  """(state, list of metrics) after one step per batch."""
  mesh, _, _, create, step = compiled(*args)
  with jax.set_mesh(mesh):
    state, metrics = create(), []
    for batch in batches:
      state, reported = step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
      metrics.append(jax.device_get(reported))
  return state, metrics


@pytest.fixture(scope="module")
def one_device(data, batches):
  state, metrics = run_steps(batches, data)
  return jax.device_get(state), metrics


def assert_states_close(actual, expected, ratio):
  pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
  for (path, a), e in pairs:
    assert_close(jax.tree_util.keystr(path), a, e, ratio)


def test_step_equals_plain_optimization(data, batches, one_device):
  _, graph, optimizer, create, _ = compiled(data)
  state = create()
  params, opt_state, optimizer = state.params, state.opt_state, optimizer(state.schedule)

  @jax.jit
  def plain_step(params, opt_state, batch):
    def loss(params):
      logits, _ = nnx.merge(graph, params)(batch["tokens"], None, batch["segment_ids"])
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
      return (losses * batch["mask"]).sum() / batch["mask"].sum()

    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return value, optax.apply_updates(params, updates), opt_state

  for batch, metrics in zip(batches, one_device[1], strict=True):
    value, params, opt_state = plain_step(params, opt_state, batch)
    assert_close("loss", metrics["loss"], value, 1e-5)
  assert_states_close(one_device[0].params, params, 2e-5)


def test_accumulation_on_split_sequences_equals_one_big_batch(data, batches, one_device):
  # Microbatches with different numbers of targets: a mean of their means would be another loss.
  assert len({float(batches[0]["mask"][i::4].sum()) for i in range(4)}) > 1
  state, metrics = run_steps(batches, data, 4, (1, 1, 1, 2))
  for name in ("loss", "grad_norm", "accuracy", "learning_rate"):
    assert_close(name, [m[name] for m in metrics], [m[name] for m in one_device[1]], 1e-5)
  assert_states_close(state, one_device[0], 5e-5)


def test_only_marked_targets_count_however_they_are_spread(data, batches):
  """As for answers, whose targets are marked: rows without any, and microbatches and devices with unequal numbers."""
  mask = np.zeros((8, 64), np.float32)
  mask[1, 40:], mask[2, 3], mask[6, ::2] = 1, 1, 1
  marked = [batches[0] | {"mask": mask * batches[0]["mask"]}, batches[1] | {"mask": np.zeros_like(mask)}]
  expected = run_steps(marked, data)
  metrics = expected[1]
  assert [float(m["targets"]) for m in metrics] == [marked[0]["mask"].sum(), 0.0]
  assert float(metrics[0]["loss"]) > 1 and float(metrics[1]["loss"]) == 0 and bool(metrics[1]["finite"])
  for layout in ((4,), (1, (2, 2, 2))):
    state, metrics = run_steps(marked, data, *layout)
    for name in ("loss", "grad_norm", "accuracy", "targets"):
      assert_close(name, [m[name] for m in metrics], [m[name] for m in expected[1]], 1e-5)
    assert_states_close(state.params, expected[0].params, 5e-5)


def test_held_out_batches_without_a_target_are_refused_before_anything_is_written(data, tmp_path, monkeypatch):
  held_out = eval_batches(tiny.config(data).data, "val", 2)
  unmarked = [batch | {"mask": np.zeros_like(batch["mask"])} for batch in held_out]
  monkeypatch.setattr(training, "eval_batches", lambda *_, **__: unmarked)
  with pytest.raises(ValueError, match="config.eval.batches=2: no target of these held-out batches counts"):
    train(tiny.config(data), tmp_path / "run")
  assert not list(tmp_path.iterdir())


def test_eight_devices_equal_one_with_every_leaf_sharded(data, batches, one_device):
  state, metrics = run_steps(batches, data, 1, (2, 2, 2))
  for name in ("loss", "grad_norm", "accuracy"):
    assert_close(name, [m[name] for m in metrics], [m[name] for m in one_device[1]], 1e-5)
  assert_states_close(state, one_device[0], 5e-5)
  mesh, _, _, create, _ = compiled(data, 1, (2, 2, 2))
  with jax.set_mesh(mesh):
    created = create()
  for before_or_after in (created, state):
    assert_every_leaf_sharded(before_or_after)


def assert_every_leaf_sharded(state):
  """Over every axis of size 2 that its logical axes name, in the parameters and both moments."""
  adam = state.opt_state[1][0]
  for tree in (state.params, adam.mu, adam.nu):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
    for path, variable in leaves:
      names = variable.get_metadata()["out_sharding"]
      axes = [None] * (variable.ndim - len(names)) + [sharding.LOGICAL_AXES[name] for name in names]
      sizes = zip(variable.shape, axes, strict=True)
      expected = [size // 2 if axis and size % 2 == 0 else size for size, axis in sizes]
      shards = {shard.data.shape for shard in variable[...].addressable_shards}
      assert shards == {tuple(expected)}, jax.tree_util.keystr(path)
    assert any(len([axis for axis in v[...].sharding.spec if axis]) == 2 for _, v in leaves)
  assert adam.mu["embedding"][...].sharding.spec == P("tensor", "fsdp")
  assert state.step.sharding.spec == P()


def test_skipped_step_changes_nothing_but_the_count(data, batches, one_device):
  bad = batches[1] | {"mask": np.where(np.arange(64)[None] == 7, np.float32("nan"), batches[1]["mask"])}
  state, metrics = run_steps([batches[0], bad, *batches[1:]], data)
  assert [bool(m["finite"]) for m in metrics] == [True, False, True, True]
  assert int(state.step) == 4 and int(state.skipped) == 1 and np.isnan(metrics[1]["loss"])
  for (path, actual), expected in zip(jax.tree_util.tree_leaves_with_path((state.params, state.opt_state)),
                                      jax.tree.leaves((one_device[0].params, one_device[0].opt_state)), strict=True):
    assert np.array_equal(actual, expected), jax.tree_util.keystr(path)
  assert [float(m["learning_rate"]) for m in metrics[2:]] == [float(m["learning_rate"]) for m in one_device[1][1:]]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
  config, workdir = tiny.config(data), tmp_path_factory.mktemp("finished") / "runs" / "tiny"
  config.log.profile_steps = "3,4"
  return config, workdir, train(config, workdir)


def test_run_learns_and_leaves_everything_in_its_workdir(finished):
  config, workdir, result = finished
  names = {path.name for path in workdir.iterdir()}
  assert names == {"config.json", "data.json", "environment.json", "metrics.jsonl", "checkpoints", "profile",
                   "loss.png"}
  assert list((workdir / "profile").rglob("*.xplane.pb"))
  environment = json.loads((workdir / "environment.json").read_text())
  assert environment["jax"] == jax.__version__ and environment["device_count"] == 8
  assert load_config(workdir / "config.json") == config
  records = reporting.read(workdir / "metrics.jsonl")
  assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))
  held_out = {r["step"]: r["bits_per_byte"] for r in records if "bits_per_byte" in r}
  assert list(held_out) == [0, 4, 8, 12] and held_out[12] < held_out[0] - 0.3
  assert result["step"] == 12 and result["bits_per_byte"] == held_out[12] and not result["preempted"]
  # Two ids a byte pair in this dataset: nats per token to bits per byte.
  assert np.isclose(result["bits_per_byte"], result["eval_loss"] / np.log(2) / 2)


def test_saved_model_is_the_evaluated_one(finished):
  config, workdir, result = finished
  saved, model = load_model(workdir)
  assert saved == config

  @jax.jit
  def losses(batch):
    logits, _ = model(batch["tokens"], None, batch["segment_ids"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return (loss * batch["mask"]).sum(), batch["mask"].sum()

  total, targets = np.sum([losses(batch) for batch in eval_batches(config.data, "val", config.eval.batches)], axis=0)
  assert_close("held-out loss", total / targets, result["eval_loss"], 1e-5)


def test_finished_run_is_left_as_it_is(finished):
  config, workdir, result = finished
  before = (workdir / "metrics.jsonl").read_text()
  again = train(config, workdir)
  assert again == result and (workdir / "metrics.jsonl").read_text() == before


def test_workdir_of_another_config_is_refused(finished, data):
  config, workdir, _ = finished
  other = tiny.config(data, learning_rate=0.5)
  other.model.width = 64
  with pytest.raises(ValueError, match=r"model.width was 32, now 64, optim.learning_rate was 0.01, now 0.5"):
    train(other, workdir)
  assert load_config(workdir / "config.json") == config


def test_workdir_with_checkpoints_of_an_unknown_run_is_refused(data, tmp_path):
  (tmp_path / "checkpoints" / "4").mkdir(parents=True)
  with pytest.raises(ValueError, match="holds checkpoints but no config.json"):
    train(tiny.config(data), tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_unwritable_workdir_is_found_before_anything_runs(data, tmp_path, monkeypatch):
  monkeypatch.setattr("lin_jax.training.make_train_step", lambda *a: pytest.fail("reached the first step"))
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="file/run' cannot be written: Not a directory"):
    train(tiny.config(data), tmp_path / "file" / "run")
  with pytest.raises(ValueError, match="cannot be written: File name too long"):
    train(tiny.config(data), tmp_path / ("a" * 300))


@pytest.mark.parametrize("section, field, value, message", [
    ("data", "path", "/nowhere", "'/nowhere': no such directory"),
    ("data", "batch_size", 12, "config.data.batch_size=12"),
    ("mesh", "tensor", 4, "config.model.mixer.heads=2"),
    ("model", "vocab_size", 50, "vocab_size=50"),
    ("model", "hybrid_layers", (1,), r"config.model.hybrid_layers=\(1,\): must name layers if and only if"),
    ("optim", "steps", 0, "config.optim.steps=0"),
    ("optim", "decay_steps", 13, "config.optim.decay_steps=13: must lie above"),
    ("optim", "beta2", 1.0, "config.optim.beta2=1.0"),
    ("log", "profile_steps", "0,4", "config.log.profile_steps='0,4'"),
    ("model", "mixer", GLAConfig(heads=2, chunk_size=5), "chunk_size=5"),
    ("model", "mixer", GLAConfig(heads=2, implementation="fast"), "implementation='fast' is unknown"),
])
def test_bad_input_is_refused_before_anything_is_written(data, tmp_path, section, field, value, message):
  config = tiny.config(data)
  setattr(getattr(config, section), field, value)
  with pytest.raises(ValueError, match=message):
    train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_the_loss_keeps_nothing_in_its_document(data, batches):
  """It would cost a look at each layer's states, and a sum over the documents is not finite either way."""
  _, graph, _, create, _ = compiled(data)
  loss = functools.partial(training.loss_sum, graph)
  assert len(np.unique(batches[0]["segment_ids"][0])) > 1
  assert "is_finite" not in str(jax.make_jaxpr(jax.grad(loss, has_aux=True))(create().params, batches[0]))


def test_nonfinite_loss_stops_the_run_and_names_the_last_checkpoint(data, tmp_path):
  # Weights of 1e30 after the first step overflow in the second.
  config = tiny.config(data, learning_rate=1e30, final_learning_rate=1e30)
  config.checkpoint.every, config.eval.every = 1, 0
  with pytest.raises(FloatingPointError, match=r"step 2: loss .*nan.* Last checkpoint: 1\. .*nonfinite=skip"):
    train(config, tmp_path / "run")
  records = reporting.read(tmp_path / "run" / "metrics.jsonl")
  assert [r["step"] for r in records if "loss" in r] == [1]
  assert load_model(tmp_path / "run")[0] == config
