"""What the language sweeps have left, from records; and the command that says so."""

import dataclasses
import json

import pytest

from language import waiting
from language.runs import TOKENS_PER_STEP, Run
from language.sweeps import SWEEPS
from tests.forked import Command

PER_MINUTE = 0.65e6 * 60 / TOKENS_PER_STEP  # steps


def record(run, bits):
  optim = {"steps": run.steps, "decay_steps": run.decay_steps}
  data = {"sequence_length": run.sequence_length, "carried_windows": run.carried_windows, "staggered": run.staggered}
  return {"model": run.model, "learning_rate": run.learning_rate, "seed": run.seed, "diverged": False,
          "bits_per_byte": bits, "setting": {"model": {}, "optim": optim, "data": data, "seed": run.seed}}


def test_the_queue_counts_what_records_leave(tmp_path):
  before = {item.name: item for item in waiting.queue(tmp_path)}
  assert list(before) == list(waiting.ORDER) and set(waiting.ORDER) == set(SWEEPS)
  assert all(item.decides and f"--sweep={name} " in item.command for name, item in before.items())
  runs = SWEEPS["carried"]().runs
  (tmp_path / "language.jsonl").write_text("".join(json.dumps(record(run, 1.5)) + "\n" for run in runs))
  carried, = (item for item in waiting.queue(tmp_path) if item.name == "carried")
  assert carried.runs_left == len(runs)  # a second seed of each
  done = [dataclasses.replace(run, seed=seed) for run in runs for seed in (0, 1)]
  (tmp_path / "language.jsonl").write_text("".join(json.dumps(record(run, 1.5)) + "\n" for run in done))
  assert "carried" not in {item.name for item in waiting.queue(tmp_path)}


def test_a_trunk_is_counted_once():
  branches = [Run("gla", 2e-3, steps=steps, decay_steps=steps // 5) for steps in (1000, 2000, 4000)]
  steps = 3200 + 200 + 400 + 800
  assert waiting._minutes(branches, []) == pytest.approx(1 / 3 + steps / PER_MINUTE)
  assert waiting._minutes(branches[1:], branches[:1]) == pytest.approx(1 / 3 + (steps - 1000) / PER_MINUTE)


def test_command_lists_and_refuses(tmp_path):
  out, err = Command("next_runs.py", f"--results={tmp_path}", "--minutes=8").communicate()
  assert "carried: " in out and "gap: " not in out and "--sweep=carried" in out, (out, err)
  missing = Command("next_runs.py", f"--results={tmp_path / 'none'}")
  _, err = missing.communicate()
  assert missing.returncode == 2 and "no such folder" in err
