"""The sweeps of synthetic tasks: the authors' grids, the reduced ones of the committed records, and the queue."""

import collections
import dataclasses
import json
import math

import numpy as np
import pytest

from claims import CLAIMS
from lin_jax.mixers.retention import RetentionConfig
from running import records
from synthetic import TASKS
from synthetic.costs import costs, minutes
from synthetic.reduced import HARDEST, MIXERS
from synthetic.runs import Run, whole, without_rates
from synthetic.sweeps import PARTS, SWEEPS, queue, select
from tests.experiments.synthetic_records import record_of
from tests.forked import ROOT

RECORDS = ROOT / "experiments/results/synthetic.jsonl"


def groups(runs):
  return collections.Counter(records.key(without_rates(run.setting())) for run in runs)


@pytest.mark.parametrize("name, settings, rates", [
    ("mqar", 23, 4), ("mad", 12 * 4, 6), ("mad_rest", 54 * 4, 6), ("regbench", 16, 5), ("mqar_reduced", 42, 3),
    ("mad_reduced", 84, 3), ("regbench_reduced", 28, 3)])
def test_a_sweep_tries_its_rates_for_every_setting(name, settings, rates):
  runs = SWEEPS[name]()
  found = groups(runs)
  assert len(found) == settings and set(found.values()) == {rates}
  assert len({records.key(run.setting()) for run in runs}) == len(runs)
  for run in {run.mixer: run for run in runs}.values():
    run.train_config()


def test_mads_grid_is_its_authors():
  runs = SWEEPS["mad"]() + SWEEPS["mad_rest"]()
  counts = collections.Counter(run.task for run in runs if run.mixer == "gla" and run.learning_rate == 1e-3
                               and run.weight_decay == 0)
  assert counts == {"in_context_recall": 11, "noisy_recall": 14, "fuzzy_recall": 11, "selective_copying": 13,
                    "compression": 11, "memorization": 6}
  assert all({name: value} in ({}, *({field: each} for field, values in TASKS[task].changes.items() for each in values))
             for task, change in HARDEST.items() for name, value in change.items())
  assert {(run.learning_rate, run.weight_decay) for run in runs} == {(rate, decay) for rate in (1e-4, 5e-4, 1e-3)
                                                                     for decay in (0.0, 0.1)}
  for run in runs:
    assert (run.width, run.mlp_width, run.start, run.output, run.batch_size) == (128, 352, "mad", "mad", 128)
    assert run.steps == 200 * (run.training_examples() // 128) and run.final_fraction * run.learning_rate == 1e-6
  gla = next(run for run in runs if run.mixer == "gla").setting()["mixer_fields"]
  assert (gla["heads"], gla["expand_k"], gla["expand_v"], gla["conv_width"]) == (8, 1.0, 1.0, 0)


def test_mqar_and_regbench_follow_their_authors():
  mqar = SWEEPS["mqar"]()
  assert {(run.start, run.embedding_dropout) for run in mqar} == {("zoology", 0.1)}
  assert {run.steps * run.batch_size for run in mqar} == {64 * 100_000}
  assert sorted({run.learning_rate for run in mqar}) == [1e-4, 4.6e-4, 2.2e-3, 1e-2]
  for run in SWEEPS["regbench"]():
    assert (run.test_examples, run.validation_examples, run.steps) == (250, 250, 200 * (run.training_examples() // 32))
    assert (run.mlp_width == 0) == (run.mixer == "mamba") and run.warmup_steps * 10 == run.steps


@pytest.mark.parametrize("ending, count", [("reduced", 311), ("mad", 22)])
def test_the_committed_records_belong_to_the_sweeps(ending, count):
  """Of 453. The others are older or without dropout."""
  planned = {records.key(run.setting()) for name in SWEEPS if name.endswith(ending) for run in SWEEPS[name]()}
  found = [records.key(whole(json.loads(line)["setting"])) for line in RECORDS.read_text().splitlines()]
  assert sum(setting in planned for setting in found) >= count


def test_records_have_what_a_mixer_had_before_its_newest_fields(monkeypatch):
  monkeypatch.setattr(RetentionConfig, "EARLIER", {"rope_base": 500.0}, raising=False)
  assert Run("mqar", "retention").setting()["mixer_fields"]["rope_base"] == 500
  assert Run("mqar", "retention", mixer_fields={"rope_base": 600.0}).setting()["mixer_fields"]["rope_base"] == 600


def test_the_queue_has_every_run_of_the_authors_grids_once_and_says_what_it_decides(tmp_path):
  items = queue(RECORDS)
  ordered = SWEEPS["queue"]()
  assert len({records.key(run.setting()) for run in ordered}) == len(ordered)
  assert sum(item.runs_left for item in items) <= len(ordered)
  grids = {records.key(run.setting()) for name in ("mqar", "mad", "mad_rest", "regbench") for run in SWEEPS[name]()}
  assert grids <= {records.key(run.setting()) for run in ordered}
  assert {item.decides for item in items} <= {claim.text for claim in CLAIMS}
  assert all(item.runs_left for item in items)
  empty = queue(tmp_path / "none.jsonl")
  assert len(empty) == len(PARTS) and sum(item.runs_left for item in empty) == len(ordered)
  assert all(0 < item.minutes < 600 for item in empty)
  assert empty[0].command == ("python experiments/run_synthetic.py --sweep=mqar --mixer=delta_net --until_solved "
                              "--out=experiments/results/none.jsonl")


def test_what_is_done_or_solved_leaves_the_queue(tmp_path):
  part, path = PARTS[0], tmp_path / "records.jsonl"
  write = lambda rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  first, *rest = part.runs().values()
  write([record_of(first, 0.5, steps=first.steps, seconds=1.0, device="cpu")])
  assert queue(path)[0].runs_left == len(rest)
  write([record_of(first, 0.99, steps=first.steps, seconds=1.0, device="cpu")])
  assert queue(path)[0].runs_left == len(part.runs()) - 4  # the other rates of its setting are needless
  write([record_of(run, 0.5, steps=run.steps, seconds=1.0, device="cpu") for run in part.runs().values()])
  assert part.decides != queue(path)[0].decides


def test_minutes_grow_with_the_work():

  old = Run("mqar", "gla", {"sequence_length": 64, "pairs": 4}, width=64, steps=1000)
  record = record_of(old, 0.5, steps=1000, seconds=475.0, device="NVIDIA X", side_by_side=3)
  measured = costs([record], [old])
  assert [cost.step for cost in measured] == [pytest.approx(0.45)]
  new = [dataclasses.replace(old, learning_rate=rate, width=128, steps=4000) for rate in np.geomspace(1e-4, 1e-2, 4)]
  alone = minutes(new[:1], measured)
  assert alone == pytest.approx((25 + 4000 * 0.45 * 2 / 2.2 / 4.5) / 60)
  assert minutes(new, measured) == pytest.approx((25 + 4000 * 0.45 * 2 * 2.8 / 2.2 / 4.5) / 60)
  assert math.isnan(minutes([dataclasses.replace(old, mixer="mamba")], measured))
  solved = costs([record | {"solved": True, "steps": 500}], [old])
  assert minutes([old], solved) == pytest.approx((25 + 1000 * 0.9 / 2.2 / 4.5) / 60)


def test_runs_are_selected_by_task_mixer_and_fields():
  runs = SWEEPS["mqar_reduced"]()
  assert {run.task_fields["pairs"] for run in select(runs, mixer="gla", fields="pairs=16")} == {16}
  assert len(select(runs, "mqar")) == len(runs) == 3 * 3 * len(MIXERS) * 2 and not select(runs, "mad")
  with pytest.raises(ValueError, match="MQAR has no field 'pears'"):
    select(runs, fields="pears=3")
