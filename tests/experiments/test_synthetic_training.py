"""Training on synthetic tasks: a tiny recall that is learnt, every task at a small size, measures and batches."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from synthetic import TASKS, examples
from synthetic.answerer import Answerer
from synthetic.batch import Batch
from synthetic.mqar import MQAR
from synthetic.reduced import MIXERS
from synthetic.runs import HEADS, Run, parse_fields, whole
from synthetic.scores import class_accuracy, score, total_variation
from synthetic.training import train

RECALL = {"sequence_length": 32, "pairs": 4, "vocab_size": 32}
SMALL = {"in_context_recall": {"sequence_length": 16}, "noisy_recall": {"sequence_length": 16},
         "fuzzy_recall": {"sequence_length": 24}, "selective_copying": {"sequence_length": 16, "copies": 4},
         "compression": {"sequence_length": 8}, "memorization": {"vocab_size": 16, "sequence_length": 16},
         "regbench": {"sequence_length": 32, "train_examples": 500, "max_letters": 6}}


def test_delta_net_recalls():
  run = Run("mqar", "delta_net", RECALL, width=32, depth=1, batch_size=64, steps=500, evaluate_every=50,
            learning_rate=1e-2, stop_accuracy=0.95, test_examples=256)
  lines = []
  result, slow = train([run, dataclasses.replace(run, learning_rate=1e-6)], lines.append, until_solved=True)
  assert slow is None  # left out, because the other has solved it
  assert result["solved"] and result["accuracy"] >= 0.95 and not result["diverged"]
  assert result["steps"] < 500  # the run ends when the task is solved
  assert result["curve"][0][2] < 0.7 and result["curve"][-1] == [result["steps"], pytest.approx(
      result["curve"][-1][1]), pytest.approx(result["accuracy"], abs=1e-5)]
  assert f"step {result['steps']}/500" in lines[-1] and "accuracy 0.9" in lines[-1]


@pytest.fixture(scope="module")
def side_by_side():
  run = Run("mqar", "delta_net", RECALL, width=16, depth=1, batch_size=16, steps=6, evaluate_every=2, test_examples=32,
            examples=40)
  runs = [dataclasses.replace(run, learning_rate=rate, final_fraction=end, weight_decay=decay)
          for rate, end, decay in ((1e-2, 0.0, 0.0), (1e-3, 0.1, 0.1))]
  return runs, train(runs)


def test_runs_side_by_side_are_those_alone(side_by_side):
  for run, together in zip(*side_by_side, strict=True):
    [alone] = train([run])
    assert alone["side_by_side"] == 1 and together["side_by_side"] == 2
    assert alone["parameters"] == together["parameters"] and alone["steps"] == together["steps"] == 6
    for (step, loss, _), (same, other, _) in zip(alone["curve"], together["curve"], strict=True):
      assert step == same and loss == pytest.approx(other, rel=1e-4)
  first, second = (result["curve"] for result in side_by_side[1])
  assert first[-1][1] < second[-1][1]  # a higher rate goes faster


def test_a_run_that_ends_keeps_its_result(side_by_side):
  runs, _ = side_by_side
  wild = dataclasses.replace(runs[0], learning_rate=1e30)
  diverged, other = train([wild, runs[1]])
  assert diverged["diverged"] and diverged["steps"] < 6 and diverged["curve"][-1][1] is None
  assert not other["diverged"] and other["steps"] == 6
  easy = [dataclasses.replace(run, stop_accuracy=0.0) for run in runs]
  assert [result["steps"] for result in train(easy)] == [2, 2]
  assert not any(result is None for result in train(easy, until_solved=True))  # both solved it at the same test


def test_only_rates_may_differ(side_by_side):
  [run, _], _ = side_by_side
  with pytest.raises(ValueError, match="may differ in learning_rate, final_fraction, weight_decay alone"):
    train([run, dataclasses.replace(run, seed=1)])


@pytest.mark.parametrize(("examples", "dropout"), [(0, 0.0), (40, 0.1)])
def test_a_stopped_run_goes_on_to_the_same_end(tmp_path, examples, dropout):
  run = Run("mqar", "attention", RECALL, width=16, depth=1, batch_size=16, steps=7, evaluate_every=2, test_examples=32,
            examples=examples, embedding_dropout=dropout)
  runs = [run, dataclasses.replace(run, learning_rate=1e-2)]
  whole, unfinished, stops = train(runs), tmp_path / "folder" / "run.npz", 0
  while (results := train(runs, over=lambda: True, unfinished=unfinished)) is None:
    stops += 1
  assert stops == 3  # after each test but the last
  for result, expected in zip(results, whole, strict=True):
    assert result["seconds"] > 0 and result | {"seconds": 0} == expected | {"seconds": 0}


def test_every_task_has_a_small_setting():
  assert set(SMALL) == set(TASKS) - {"mqar"}  # whose small setting is RECALL


@pytest.mark.parametrize("task", SMALL)
def test_every_task_trains(task):
  run = Run(task, "attention", SMALL[task], {"heads": 2}, width=32, depth=1, learning_rate=1e-2, batch_size=64,
            steps=90, evaluate_every=15, test_examples=128, validation_examples=128 if task == "regbench" else 0)
  [result] = train([run])
  # The first loss is already an average over 15 steps, the logarithm of the vocabulary that of an untrained model.
  assert result["curve"][-1][1] < 0.95 * math.log(run.build_task().vocab_size) and not result["diverged"]
  if task == "memorization":
    assert result["solved"]
  assert (result["class_accuracy"] is None) == (task == "regbench")
  if task == "regbench":
    assert len(result["total_variation"]) == len(result["curve"])
    assert 1 > result["total_variation"][0] > result["total_variation"][-1] > 0
    losses = [loss for loss, _ in result["validation"]]
    assert result["selected"]["validation_loss"] == min(losses) < losses[0]
    assert [result["selected"][name] for name in ("step", "loss", "accuracy")] == result["curve"][np.argmin(losses)]
  else:
    assert result["total_variation"] is result["validation"] is result["selected"] is None
    assert 0 <= result["batch_class_accuracy"] <= 1


def test_scores():
  batch = Batch(np.zeros((2, 3), np.int32), np.array([[1, 1, 2], [1, 0, 0]], np.int32),
                np.array([[1, 1, 1], [1, 0, 0]], np.float32))
  said = np.array([[1, 0, 2], [1, 5, 5]], np.int32)
  assert score(said, batch) == pytest.approx(3 / 4)
  assert class_accuracy(said, batch) == pytest.approx((0 + 2 / 3 + 1) / 3)  # of 0, which is never right, 1 and 2
  allowed = np.zeros((2, 3, 6), bool)
  allowed[0, :, 0] = allowed[1, :, 1] = True
  assert score(said, dataclasses.replace(batch, allowed=allowed)) == pytest.approx(2 / 4)


def test_total_variation():
  allowed = np.array([[[True, True, False, False], [True, False, False, False]]])
  share = lambda *p: np.log(np.array(p, np.float32))
  logits = np.stack([share(0.5, 0.25, 0.125, 0.125), share(0.1, 0.2, 0.3, 0.4)])[None]
  assert np.asarray(total_variation(logits, allowed)) == pytest.approx(np.array([[0.25, 0.9]]))


def test_dropout():
  model = Run("mqar", "attention", RECALL, width=16, depth=1).train_config().model
  plain, dropping = (Answerer(model, False, "layers", rate, rngs=nnx.Rngs(0)) for rate in (0.0, 0.5))
  tokens, positions = np.zeros((1, 2000), np.int32), np.zeros((1, 1), np.int32)
  seen = []
  for answerer in (plain, dropping):
    answerer.model.hidden_from_embeddings = lambda x: (seen.append(np.asarray(x)), (x, None))[1]
    answerer(tokens, positions, jax.random.key(0))
    answerer(tokens, positions)
  embedded, _, dropped, tested = seen
  assert (tested == embedded).all()  # a test drops nothing
  kept = dropped != 0
  assert kept.mean() == pytest.approx(0.5, abs=0.02) and dropped[kept] == pytest.approx(2 * embedded[kept])
  with pytest.raises(ValueError, match=r"embedding_dropout=1.0: must lie in \[0, 1\)"):
    Run("mqar", "attention", embedding_dropout=1.0).train_config()


def test_positions_that_count():
  batch = Run("mqar", "gla", RECALL).build_task().draw(np.random.default_rng(0), 5)
  compact = examples.compact(batch)
  assert compact["positions"].shape == (5, 4) and (compact["weights"] == 1).all()
  assert (np.take_along_axis(batch.targets, compact["positions"], axis=1) == compact["targets"]).all()
  uneven = dataclasses.replace(batch, mask=batch.mask * (np.arange(32) < 20))
  compact = examples.compact(uneven)
  assert compact["positions"].shape == (5, 32) and compact["weights"].sum() == uneven.mask.sum()


def test_epochs_take_every_example_once():
  run = Run("mqar", "gla", RECALL, examples=10, batch_size=3, evaluate_every=2)
  batches = examples.batches(run)
  rows = np.concatenate([next(batches)[1] for _ in range(3)]).reshape(2, 9)  # two epochs of three batches
  assert all(len(set(epoch)) == 9 for epoch in rows.tolist()) and (rows[0] != rows[1]).any()
  fresh = examples.batches(dataclasses.replace(run, examples=0, steps=4))
  (one, _), (two, _) = fresh
  assert (one["tokens"] != two["tokens"]).any()


def test_decoder_reads_the_last_output_alone():
  model = Run("mqar", "attention", RECALL, width=16).train_config().model
  answerer = Answerer(model, True, "layers", rngs=nnx.Rngs(0))
  tokens = jax.random.randint(jax.random.key(0), (1, 6), 0, 32)
  positions = np.arange(6, dtype=np.int32)[None]
  answer = jax.jit(lambda tokens: answerer(tokens, positions))
  before = answer(tokens)
  assert before.shape == (1, 6, 16) and np.abs(before[0, 0] - before[0, 5]).max() > 1e-3
  # All positions hear of the last token.
  assert np.abs(before - answer(tokens.at[0, 5].add(1))).max(axis=-1).min() > 1e-4


@pytest.mark.parametrize(("start", "deviation"), [("normal", 0.02), ("fan_in", (3 * 64) ** -0.5)])
@pytest.mark.parametrize("mixer", ["gla", "retention"])
def test_all_kernels_start_alike(start, deviation, mixer):
  model = Run("mqar", mixer, RECALL).train_config().model
  own, other = (Answerer(model, False, rule, rngs=nnx.Rngs(0)).model for rule in ("layers", start))
  assert (own.embedding[...] == other.embedding[...]).all()
  mixer = other.runs[0][0].mixer
  for layer in (mixer.query, mixer.value, mixer.gate):
    assert layer.kernel.shape[-2] == 64 and layer.kernel[...].std() == pytest.approx(deviation, rel=0.05)
  # No two layers of the stack start with the same numbers.
  assert (mixer.query.kernel[0] != mixer.query.kernel[1]).all()


def test_settings():
  for mixer in MIXERS:
    setting = Run("mqar", mixer, width=128).setting()
    assert setting["mixer_fields"].get("heads") == HEADS.get(mixer)
    assert setting == json.loads(json.dumps(setting)) == whole(setting)
    assert whole({name: value for name, value in setting.items() if name != "start"}) == setting
  assert Run("mqar", "gated_delta_net", width=128).setting()["mixer_fields"]["head_dim"] == 64
  with pytest.raises(ValueError, match="unexpected keyword argument 'speed'"):
    whole(setting | {"speed": 3})
  assert parse_fields(MQAR, "pairs=3,power=0.5,random_filler=true") == {
      "pairs": 3, "power": 0.5, "random_filler": True}
  for text, message in (("pears=3", "MQAR has no field 'pears'"), ("pairs=x", "pairs must be of type int"),
                        ("random_filler=2", "must be of type bool"), ("pairs", "must be of type int")):
    with pytest.raises(ValueError, match=message):
      parse_fields(MQAR, text)
