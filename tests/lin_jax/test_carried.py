"""Training on neighbouring windows with the state carried between them: data, loss, gradient, resumption, refusals."""

import dataclasses
import functools
import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lin_jax import sharding, train_state
from lin_jax.checkpoint import Checkpoints
from lin_jax.config import MeshConfig
from lin_jax.data import train_iterator
from lin_jax.mixers.attention import AttentionConfig
from lin_jax.mixers.gla import GLAConfig
from lin_jax.training import loss_sum, make_state, make_train_step, rows_that_go_on, train
from tests.close import assert_close
from tests.lin_jax import tiny

ROWS, LENGTH = 8, 16


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return tiny.write_dataset(tmp_path_factory.mktemp("carried") / "data")


def config(data, windows=3, mixer=None, hybrid=None, **optim):
  result = tiny.config(data, **optim)
  result.data.carried_windows, result.data.sequence_length = windows, LENGTH
  result.model.mixer, result.model.mlp_width = mixer or result.model.mixer, 0
  result.model.hybrid_mixer, result.model.hybrid_layers = hybrid, (1,) if hybrid else ()
  return result


@pytest.fixture(scope="module")
def compiled(data):
  """(state, step, loss): three windows per run, microbatches, and rows and windows over two devices each; the library's
  loss, differentiated, as a function of parameters, batch and state that gives ((sum, _), gradients)."""
  settings = config(data, 3, GLA, learning_rate=1e-30, final_learning_rate=1e-30, accumulation=2)
  mesh = sharding.make_mesh(MeshConfig(data=2, context=2), jax.devices()[:4])
  with jax.set_mesh(mesh):
    graph, optimizer, abstract, create = make_state(settings, mesh)
    step, state = make_train_step(settings, graph, optimizer, abstract), create()
  # Further from zero than a new model's, so that the loss depends on what came before.
  host = jax.device_get(dataclasses.replace(state, params=jax.tree.map(lambda x: 4 * x, state.params)))
  shardings = jax.tree.map(lambda x: x.sharding, abstract)

  def call(state, batch):
    with jax.set_mesh(mesh):
      state, metrics = step(jax.device_put(state, shardings), jax.device_put(batch, sharding.batch_sharding(mesh)))
    return jax.device_get((state, metrics))

  return host, call, jax.jit(jax.value_and_grad(functools.partial(loss_sum, graph), has_aux=True))


def two_windows():
  """A batch of windows of twice the length and its halves; a document ends inside, at the middle, or not at all."""
  random = np.random.default_rng(0)
  ids = random.integers(tiny.VOCAB, size=(ROWS, 2 * LENGTH + 1), dtype=np.int32)
  starts = np.zeros(ids.shape, np.int32)
  for row, place in enumerate((LENGTH, LENGTH - 1, LENGTH + 1, 5, 2 * LENGTH)):
    starts[row, place] = 1
  segments = 1 + np.cumsum(starts, axis=1, dtype=np.int32)
  whole = dict(tokens=ids[:, :-1], targets=ids[:, 1:], segment_ids=segments[:, :-1],
               mask=(segments[:, 1:] == segments[:, :-1]).astype(np.float32))
  halves = [{k: v[:, half] for k, v in whole.items()} for half in (np.s_[:LENGTH], np.s_[LENGTH:])]
  # Segments are numbered anew in each window.
  halves[1]["segment_ids"] = halves[1]["segment_ids"] - halves[1]["segment_ids"][:, :1] + 1
  return whole, halves


GLA = GLAConfig(heads=2, gate_rank=4, conv_width=3, implementation="reference")


def test_two_windows_equal_one_of_twice_the_length(compiled):
  state, step, loss = compiled
  whole, halves = two_windows()
  (both, _), _ = loss(state.params, whole, None)
  (alone, _), _ = loss(state.params, halves[1], state.carried)
  losses = []
  for batch in (*halves, halves[1], halves[1]):
    state, metrics = step(state, batch)
    losses.append(metrics["loss"] * batch["mask"].sum())
  assert_close("loss of both windows", losses[0] + losses[1], both, 1e-5)
  # The second window has less to go on without the first: the comparison above would notice.
  assert abs(losses[1] - alone) > 1e-3 * alone and abs(losses[2] - losses[1]) > 1e-3 * alone
  assert_close("loss of a window that begins a run", losses[3], alone, 1e-5)


def test_no_gradient_flows_into_an_earlier_window(compiled):
  state, step, loss = compiled
  whole, halves = two_windows()
  state, _ = step(state, halves[0])
  _, metrics = step(state, halves[1])
  second_only = whole | {"mask": whole["mask"] * (np.arange(2 * LENGTH) >= LENGTH).astype(np.float32)}

  truncated, full = (optax.tree.norm(loss(state.params, *inputs)[1]) / halves[1]["mask"].sum()
                     for inputs in ((halves[1], state.carried), (second_only, None)))
  assert_close("gradient norm", metrics["grad_norm"], truncated, 1e-5)
  assert abs(full - truncated) > 1e-3 * truncated


def test_documents_and_bad_steps_leave_nothing_to_go_on_from(compiled):
  empty, step, _ = compiled
  _, halves = two_windows()
  state, _ = step(empty, halves[0])
  rows = np.abs(state.carried[0][0]["memory"]).sum((0, 2, 3, 4))
  assert rows[0] == 0 and (rows[1:] > 0).all()  # the document of row 0 ends with the window
  bad = halves[1] | {"mask": halves[1]["mask"] * np.float32("nan")}
  state, metrics = step(state, bad)
  assert not metrics["finite"]
  for leaf, expected in zip(jax.tree.leaves(state.carried), jax.tree.leaves(empty.carried), strict=True):
    assert np.array_equal(leaf, expected)


@pytest.mark.parametrize("count", [1, 2])
def test_rows_read_neighbouring_windows(data, count):
  settings = config(data).data
  parts = [train_iterator(settings, 1, process_index=i, process_count=count) for i in range(count)]
  stream = np.fromfile(data / "train-00000.bin", "<u2").astype(np.int32)
  places = {stream[i:i + LENGTH].tobytes(): i for i in range(0, len(stream) - LENGTH, LENGTH)}
  runs = []
  # 2999 targets are 187 windows, or 62 runs of three; an epoch ends inside the eighth group of eight.
  for _ in range(8):
    starts = [[places[row.tobytes()] for part in parts for row in next(part)["tokens"]] for _ in range(3)]
    assert (np.diff(starts, axis=0) == LENGTH).all() and len(starts[0]) == ROWS
    runs += starts[0]
  assert sorted(runs[:62]) == [3 * LENGTH * i for i in range(62)] and runs[:62] != sorted(runs[:62])


def test_staggered_rows_change_text_one_after_the_other(data):
  settings = dataclasses.replace(config(data, 4).data, staggered=True)
  stream = np.fromfile(data / "train-00000.bin", "<u2").astype(np.int32)
  places = {stream[i:i + LENGTH].tobytes(): i for i in range(0, len(stream) - LENGTH, LENGTH)}
  iterator, changed = train_iterator(settings, 1), []
  batch = next(iterator)
  for step in range(9):
    following = next(iterator)
    before, after = (np.array([places[row.tobytes()] for row in part["tokens"]]) for part in (batch, following))
    neighbours = (after - before == LENGTH) & (before // (4 * LENGTH) == after // (4 * LENGTH))  # in one run
    ended = batch["mask"][:, -1] == 0  # their document has
    np.testing.assert_array_equal(rows_that_go_on(settings, batch, step), neighbours & ~ended)
    changed.append(~neighbours)
    batch = following
  assert np.sum(changed, axis=1).tolist() == [2] * 9  # of eight rows in runs of four windows


def test_a_restored_iterator_goes_on_inside_a_run(data):
  iterator = train_iterator(config(data).data, 1)
  for _ in range(4):
    next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = [next(iterator)["tokens"] for _ in range(5)]
  resumed = train_iterator(config(data).data, 1)
  resumed.set_state(state)
  np.testing.assert_array_equal([next(resumed)["tokens"] for _ in range(5)], expected)


def test_a_checkpoint_between_two_windows_resumes_exactly(compiled, tmp_path):
  state, step, _ = compiled
  _, halves = two_windows()
  state, _ = step(state, halves[0])
  settings = tiny.config("", learning_rate=1e-30, final_learning_rate=1e-30)  # of `compiled`
  batches = iter(grain.MapDataset.range(3).to_iter_dataset())
  checkpoints = Checkpoints(tmp_path, settings.checkpoint)
  checkpoints.save(1, *train_state.saved_form(state)(state), batches, settings)
  restored = train_state.restore(checkpoints, 1, jax.tree.map(jnp.asarray, state), batches, settings)
  checkpoints.close()
  assert any(leaf.any() for leaf in jax.tree.leaves(state.carried))
  for resumed, unbroken in zip(*(jax.tree.leaves(step(s, halves[1])) for s in (restored, state)), strict=True):
    assert np.array_equal(resumed, unbroken)


def test_rows_with_a_state_need_as_many_processes_as_before(data):
  train_state.require_rows(1, config(data).data)
  train_state.require_rows(2, dataclasses.replace(config(data).data, carried_windows=1))
  with pytest.raises(ValueError, match="carried_windows=3: the run was saved by 2 processes and cannot go on with 1"):
    train_state.require_rows(2, config(data).data)


@pytest.mark.parametrize("changes, windows, message", [
    (dict(mixer=AttentionConfig(heads=2)), 2, "carried_windows=2: the state of this model grows beyond .*length=16"),
    (dict(hybrid=AttentionConfig(heads=2, window=LENGTH + 1)), 3, "carried_windows=3: the state of this model grows"),
    ({}, 188, "carried_windows=188: split 'train' of .* has 187 windows of 16 tokens"),
    ({}, 0, "carried_windows=0: must be at least 1"),
])
def test_what_cannot_be_carried_is_refused(data, tmp_path, changes, windows, message):
  with pytest.raises(ValueError, match=message):
    train(config(data, windows, **changes), tmp_path / "run")
  assert not (tmp_path / "run").exists()
