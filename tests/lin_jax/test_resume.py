"""A run that was stopped and resumed equals one that was not, bit for bit."""

import shutil
import signal

import jax
import numpy as np
import pytest

from lin_jax import metrics as reporting
from lin_jax.checkpoint import Checkpoints, load_model
from lin_jax.config import load as load_config
from lin_jax.damage import DamagedCheckpoint
from lin_jax.training import train
from tests.lin_jax import tiny
from tests.lin_jax.runs import at, compilation_cache, on_step, shared_steps, terminate


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return tiny.write_dataset(tmp_path_factory.mktemp("resume") / "data")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory):
  """Every run of this file compiles the same three functions."""
  with compilation_cache(tmp_path_factory.mktemp("cache")), shared_steps():
    yield


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("unbroken")
  train(tiny.config(data), workdir)
  return workdir


def scalars(workdir):
  """Every record but for what depends on the clock."""
  timed = ("tokens_per_second", "mfu", "evaluation_seconds", "save_seconds")
  return [{k: v for k, v in r.items() if k not in timed} for r in reporting.read(workdir / "metrics.jsonl")]


def assert_same_run(actual, expected):
  assert scalars(actual) == scalars(expected)
  for a, e in zip(*(jax.tree.leaves(load_model(workdir)[1]) for workdir in (actual, expected)), strict=True):
    assert np.array_equal(a, e)


@pytest.fixture
def heard():
  """SIGINT comes as in a shell's foreground, also where the tests are a background command, which ignores it."""
  inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, inherited)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_the_same_command_resumes_exactly(data, unbroken, tmp_path, monkeypatch, heard, name):
  number = signal.Signals[name]
  before = signal.getsignal(number)
  with monkeypatch.context() as patch:
    on_step(patch, 5, lambda: signal.raise_signal(number))
    result = train(tiny.config(data), tmp_path)
  # The signal comes while step 6 is under way, past the save of step 4 and in the second epoch.
  assert result["preempted"] == name and result["step"] == 6
  assert Checkpoints(tmp_path).steps() == [4, 6]
  assert signal.getsignal(number) is before is not None
  result = train(tiny.config(data), tmp_path)
  assert not result["preempted"] and result["step"] == 12
  assert_same_run(tmp_path, unbroken)


def test_sigterm_at_any_moment_loses_no_evaluation_and_no_best_checkpoint(data, tmp_path, monkeypatch):
  config = tiny.config(data)
  config.eval.every, config.log.every, config.checkpoint.every, config.checkpoint.keep_last = 3, 5, 4, 1
  train(config, tmp_path / "unbroken")
  # The step after the signal is the last one of that process.
  for method, step, last in [
      (reporting.Reporter.evaluation, 0, 1),
      (reporting.Reporter.step, 2, 3),  # due for evaluation only
      (Checkpoints.save, 4, 5),  # due for logging only
      (reporting.Reporter.step, 7, 8),  # due for saving only
      (reporting.Reporter.evaluation, 9, 10),
      (reporting.Reporter.step, 11, 12),  # due for everything
  ]:
    with monkeypatch.context() as patch:
      at(patch, method, step, terminate)
      result = train(config, tmp_path / "broken")
    assert result["step"] == last and bool(result["preempted"]) == (last < 12)
  assert_same_run(tmp_path / "broken", tmp_path / "unbroken")
  broken, unbroken = (Checkpoints(tmp_path / name) for name in ("broken", "unbroken"))
  assert broken.steps() == unbroken.steps() == [12] and broken.best() == unbroken.best() == 12
  assert [r["step"] for r in scalars(tmp_path / "broken") if "eval_loss" in r] == [0, 3, 6, 9, 12]


def test_a_crash_resumes_from_the_last_save_and_forgets_what_was_logged_after_it(data, unbroken, tmp_path, monkeypatch):

  class Crash(Exception):
    pass

  def crash():
    raise Crash

  with monkeypatch.context() as patch:
    on_step(patch, 6, crash)
    with pytest.raises(Crash):
      train(tiny.config(data), tmp_path)
  assert Checkpoints(tmp_path).steps() == [4]
  assert scalars(tmp_path)[-1]["step"] == 6
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 7, "lo')
  config = tiny.config(data)
  config.log.every = config.checkpoint.every = 3
  config.optim.nonfinite = "skip"
  train(config, tmp_path)
  steps = [r["step"] for r in scalars(tmp_path) if "loss" in r]
  assert steps == [1, 2, 3, 4, 6, 9, 12]
  expected = {r["step"]: r for r in scalars(unbroken) if "loss" in r}
  assert [r for r in scalars(tmp_path) if "loss" in r] == [expected[step] for step in steps]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(data, unbroken, tmp_path):
  shutil.copytree(unbroken, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "12" / "optimizer")
  with pytest.raises(DamagedCheckpoint, match="checkpoints/12 is damaged.*--checkpoint=8 goes on from it"):
    train(tiny.config(data), tmp_path / "run")
  assert scalars(tmp_path / "run") == scalars(unbroken)
  result = train(tiny.config(data), tmp_path / "run", "previous")
  assert result["step"] == 12 and [path.name for path in (tmp_path / "run" / "set_aside").iterdir()] == ["12"]
  assert_same_run(tmp_path / "run", unbroken)


def test_a_finished_run_is_lengthened_to_the_one_that_its_config_then_describes(data, unbroken, tmp_path, capsys):
  shutil.copytree(unbroken, tmp_path / "run")
  with pytest.raises(ValueError, match="config.optim.steps=11: this run has 12 steps, and a run is not shortened"):
    train(tiny.config(data, steps=11), tmp_path / "run")
  assert scalars(tmp_path / "run") == scalars(unbroken)
  result = train(tiny.config(data, steps=14), tmp_path / "run")
  assert result["step"] == 14 and "from step 12 to 14; lengthened from 12 to 14 steps: " in capsys.readouterr().out
  recorded = load_config(tmp_path / "run" / "config.json")
  assert recorded == tiny.config(data, steps=14, decay_steps=12)
  assert train(tiny.config(data, steps=14), tmp_path / "run") == result
  train(recorded, tmp_path / "planned")
  assert_same_run(tmp_path / "run", tmp_path / "planned")
