"""The language sweeps: their runs, runs that a time limit stops, seeds after records, the summary, mistakes."""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx

from language import execution
from language.models import CARRIED, COMPARED, DECAYS, MODELS
from language.report import summary
from language.runs import Run, folder, key
from language.sweeps import SWEEPS, Sweep
from language.training import finish
from lin_jax import metrics as reporting
from lin_jax.checkpoint import load_model
from lin_jax.config import validate
from running import records
from tests.environment import ENVIRONMENT
from tests.forked import ROOT, Command
from tests.lin_jax import tiny
from tests.lin_jax.runs import compilation_cache


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return str(tiny.write_dataset(tmp_path_factory.mktemp("language") / "data", test=700, val_code=600))


def test_sweeps_hold_each_claims_runs(data):
  main, started, gates, norms, convolutions, lengths, long, linearized, *_ = (
      sweep().runs for sweep in SWEEPS.values())
  assert {run.model for run in main} == set(COMPARED) and len(main) == 27
  assert {run.model for run in gates} == {"no_decay", "constant_decay", "scalar_decay", "gla"} and len(gates) == 12
  assert {(c.qk_norm, c.qk_activation) for c in (MODELS[run.model]().mixer for run in norms)} == {
      (norm, f) for norm in ("l1", "l2") for f in ("identity", "relu", "elu1", "silu")}
  carried = {run.model: run.train_config(data).data.carried_windows for run in lengths}
  assert carried == dict.fromkeys(("gla", "retnet", "tnl", "transformer", "deltanet"), 1) | dict.fromkeys(CARRIED, 12)
  assert CARRIED == {"gla_carried": "gla", "retnet_carried": "retnet"}
  assert {run.sequence_length for run in lengths} == {512}
  assert {run.steps for run in long} == {4 * main[0].steps}
  assert [run.model for run in long if run.learning_rate == 2e-3] == list(COMPARED)
  assert [run.model for run in long if run.learning_rate == 4e-3] == ["gla", "tnl", "mamba"]
  widths = {run.model: MODELS[run.model]().mixer.conv_width for run in convolutions}
  assert widths == {"deltanet": 4, "deltanet_no_conv": 0, "gla": 0, "gla_conv": 4, "retnet": 0}
  assert {MODELS[run.model]().start for run in main} == {"layers"}  # as it was when its records were made
  assert {run.model for run in started if MODELS[run.model]().start == "layers"} == {"mamba", "deltanet_no_conv"}
  for runs in (main, started, gates, norms, convolutions, lengths, long):
    sizes = {(c.optim.steps, c.data.batch_size * c.data.sequence_length) for c in (r.train_config(data) for r in runs)}
    assert len(sizes) == 1  # matched tokens
    assert all(validate(run.train_config(data)) for run in runs)
    assert len({key(run.setting(data)) for run in runs}) == len(runs)
  for runs, models in ((main, COMPARED), (gates, [*DECAYS, "gla"]), (convolutions, widths)):
    assert all(len({run.learning_rate for run in runs if run.model == model}) == 3 for model in models)
  assert {run.steps + (run.start.steps if run.start else 0) for run in linearized} == {main[0].steps}
  assert {(run.model, round(run.steps / run.start.steps, 3)) for run in linearized if run.start} == {
      ("linearized_5", 0.05), ("linearized_20", 0.2)}
  assert [SWEEPS[name]().further_seeds for name in SWEEPS] == [1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0]


def test_setting_says_what_determines_a_run(data, tmp_path):
  run = Run("gla", 1e-3, tiny=True)
  first = run.setting(data)
  assert run.setting(data) == first == json.loads(json.dumps(first))
  changes = dict(seed=1, learning_rate=2e-3, steps=5, model="scalar_decay", start=Run("transformer", 1e-3))
  changed = [dataclasses.replace(run, **{field: value}) for field, value in changes.items()]
  started = [dataclasses.replace(run, start=Run("transformer", 1e-3, seed=seed)) for seed in (1, 2)]
  assert len({key(other.setting(data)) for other in (run, *changed, *started)}) == 8
  other = str(tiny.write_dataset(tmp_path / "data", train_tokens=3001))
  assert key(run.setting(other)) != key(first)
  moved = pathlib.Path(data).rename(tmp_path / "moved")
  assert run.setting(str(moved)) == first
  moved.rename(data)


def test_older_records_lack_fields_that_came_later(data):
  run = Run("linearized_5", 1e-3, tiny=True, start=Run("transformer", 1e-3, tiny=True))
  older = run.setting(data)
  for part in (older, older["start"]):
    for fields, name in ((part["optim"], "decay_steps"), (part["model"], "scale_embeddings"), (part, "unroll"),
                         (part["model"]["mixer"], "rope_base")):
      fields.pop(name, None)
  assert key(older) == key(run.setting(data))
  older["start"]["model"]["mixer"]["rope_base"] = 5.0
  assert key(older) != key(run.setting(data))


TRANSFORMER = Run("transformer", 4e-3, steps=6, tiny=True)


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
  """Folder and records of a run. Other runs of the module compile the same functions and find them in a cache."""
  paths = tmp_path_factory.mktemp("unbroken") / "runs", tmp_path_factory.mktemp("unbroken") / "out.jsonl"
  with compilation_cache(tmp_path_factory.mktemp("cache")):
    assert execution.execute(Sweep([TRANSFORMER], further_seeds=0), data, *paths) == (1, 0, [])
    yield paths


def test_stopped_by_the_limit_and_resumed_equals_unbroken(data, tmp_path, monkeypatch, capsys, unbroken):
  sweep = Sweep([TRANSFORMER], further_seeds=0)
  report = reporting.Reporter.step

  def slow(self, step, metrics):
    report(self, step, metrics)
    if step == 2:
      time.sleep(max(0, begin + limit + 0.5 - time.monotonic()))

  workdir, out = tmp_path / "broken", tmp_path / "broken.jsonl"
  with monkeypatch.context() as patch:
    patch.setattr(reporting.Reporter, "step", slow)
    begin, limit = time.monotonic(), 1.0
    assert execution.execute(sweep, data, workdir, out, limit_seconds=limit) == (0, 1, [])
  assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and out.read_text() == ""
  step, = workdir.glob("*/checkpoints/*")
  assert 1 <= int(step.name) < 6 and (step / "optimizer").exists()
  assert execution.execute(sweep, data, workdir, out) == (1, 0, [])
  assert f"from step {step.name} to 6" in capsys.readouterr().out

  (expected,), (record,) = (records.load(path) for path in (unbroken[1], out))
  assert record["held_out_loss"] == expected["held_out_loss"] and record["setting"] == expected["setting"]
  assert record["tokens"] == 6 * 8 * 64 and record["epochs"] == round(6 * 8 * 64 / 3000, 4)
  # Two bytes an id in this dataset.
  assert record["bits_per_byte"] == pytest.approx(record["held_out_loss"] / 0.6931472 / 2)
  assert {split: losses["tokens"] for split, losses in record["losses"].items()} == {"test": 700, "val_code": 600}
  assert all(losses["bits_per_byte"] == pytest.approx(losses["loss"] / 0.6931472 / 2)
             for losses in record["losses"].values())
  assert record["device"] == "cpu" and record["versions"]["jax"] == jax.__version__ and record["command"]
  # One checkpoint stays, with what evaluation needs.
  place, = workdir.iterdir()
  step, = place.glob("checkpoints/*")
  assert step.name == "6" and not (step / "optimizer").exists()
  assert load_model(place)[0].model == sweep.runs[0].train_config(data).model

  monkeypatch.setattr("language.training.train", lambda *_: pytest.fail("a run that is done was made again"))
  before = out.read_text()
  assert execution.execute(sweep, data, workdir, out) == (0, 0, [])
  assert out.read_text() == before
  out.unlink()  # what was done is known without the file too
  assert execution.execute(sweep, data, workdir, out) == (1, 0, [])
  assert out.read_text() == before


def test_a_transformer_is_linearized_and_trained_further(data, tmp_path, unbroken):
  workdir, out = unbroken[0], tmp_path / "out.jsonl"
  run = Run("linearized_20", 1e-6, seed=1, steps=2, tiny=True, start=TRANSFORMER)
  assert execution.execute(Sweep([run], further_seeds=0), data, workdir, out) == (1, 0, [])
  (record,), (start,) = records.load(out), records.load(unbroken[1])
  assert record["start"] == {"model": "transformer", "tokens": 6 * 512, "bits_per_byte": start["bits_per_byte"]}
  assert record["tokens"] == 8 * 512 and record["setting"]["model"]["mixer"]["type"] == "supra"
  assert record["setting"]["start"] == start["setting"] and record["setting"]["optim"]["steps"] == 2
  losses = record["pair_losses"]
  assert losses["repeated"] < record["held_out_loss"] < losses["other"]
  assert record["held_out_loss"] == pytest.approx(
      np.interp(losses["repeated_share"], (0, 1), (losses["other"], losses["repeated"])), rel=1e-3)
  # The uptraining goes on from what the Transformer has learnt, and leaves nothing else behind.
  made, source = ({path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(load_model(folder(
      workdir, run, data))[1], nnx.Param))} for run in (run, TRANSFORMER))
  assert all(abs(made[path] - value).max() < 1e-5 for path, value in source.items()) and len(made) == len(source) + 2
  assert {path.name for path in workdir.iterdir()} == {folder(workdir, run, data).name for run in (run, TRANSFORMER)}


def test_branches_go_off_a_trunk(data, tmp_path):
  runs = [Run("transformer", 4e-3, steps=steps, decay_steps=decay, tiny=True) for steps, decay in ((4, 2), (8, 3))]
  out = tmp_path / "out.jsonl"
  assert execution.execute(Sweep(runs), data, tmp_path / "runs", out) == (2, 0, [])
  first, second = records.load(out)
  assert [first["tokens"], second["tokens"]] == [4 * 512, 8 * 512]
  read = lambda run: reporting.read(folder(tmp_path / "runs", run, data) / "metrics.jsonl")
  rates = {name: [line["learning_rate"] for line in read(run) if "learning_rate" in line]
           for name, run in (("trunk", runs[1].trunk()), *enumerate(runs))}
  assert rates["trunk"][1:] == pytest.approx([4e-3] * 4) and len(rates["trunk"]) == 5
  assert rates[0][1:2] == pytest.approx([4e-3]) and rates[0][-1] == pytest.approx(4e-4)
  assert rates[1][1:5] == pytest.approx([4e-3] * 4) and rates[1][-1] == pytest.approx(4e-4) and len(rates[1]) == 8
  # A trunk that has gone on cannot be branched before its end.
  finished, left, failed = execution.execute(
      Sweep([dataclasses.replace(runs[0], steps=3, decay_steps=1)]), data, tmp_path / "runs", out)
  assert (finished, left) == (0, 0) and "a run is not shortened" in failed[0]


def test_a_run_waits_for_the_one_that_it_starts_from(data, tmp_path, monkeypatch):
  monkeypatch.setattr("language.training.train", lambda *_: {"preempted": "SIGTERM"})
  run = Run("linearized_20", 1e-3, tiny=True, start=TRANSFORMER)
  assert finish(run, data, tmp_path) is None and not any(tmp_path.iterdir())


def test_seeds_follow_from_the_records(data, tmp_path, monkeypatch):
  made, out = [], tmp_path / "out.jsonl"

  def fake(run, data, workdir):
    made.append((run.model, run.learning_rate, run.seed))
    bits = {1e-3: 1.2, 2e-3: 1.1, 4e-3: None}[run.learning_rate]
    return {"setting": run.setting(data), "bits_per_byte": bits, "diverged": bits is None}

  monkeypatch.setattr(execution, "finish", fake)
  sweep = Sweep([Run("gla", rate, tiny=True) for rate in (1e-3, 2e-3, 4e-3)], further_seeds=2)
  assert execution.execute(sweep, data, tmp_path, out) == (5, 0, [])
  assert made[3:] == [("gla", 2e-3, 1), ("gla", 2e-3, 2)]
  lines = out.read_text().splitlines()
  out.write_text("\n".join(lines[:4]) + "\n" + lines[4][:30])  # a kill has cut the last line
  assert execution.execute(sweep, data, tmp_path, out) == (1, 0, [])
  assert made[5:] == [("gla", 2e-3, 2)] and out.read_text().splitlines() == lines


def test_failure_of_one_run_leaves_the_others(data, tmp_path, monkeypatch):
  def fake(run, data, workdir):
    if run.model == "gla":
      raise RuntimeError("out of memory")
    return {"setting": run.setting(data), "bits_per_byte": None, "diverged": True}

  monkeypatch.setattr(execution, "finish", fake)
  sweep = Sweep([Run(model, 1e-3, tiny=True) for model in ("gla", "tnl")], further_seeds=1)
  finished, left, failed = execution.execute(sweep, data, tmp_path, tmp_path / "out.jsonl")
  assert (finished, left) == (1, 0) and "RuntimeError: out of memory" in failed[0]


def test_diverged_run_has_a_record_too(data, tmp_path, monkeypatch):
  def train(config, workdir):
    workdir.mkdir()
    raise FloatingPointError("step 2: loss nan")

  monkeypatch.setattr("language.training.train", train)
  run = Run("gla", 1e-3, tiny=True)
  record = finish(run, data, tmp_path)
  assert record["diverged"] and record["held_out_loss"] is record["bits_per_byte"] is record["perplexity"] is None
  assert record["pair_losses"] is record["losses"] is None and record["setting"] == run.setting(data)
  assert record == json.loads((folder(tmp_path, run, data) / "record.json").read_text())
  uptrained = Run("linearized_5", 1e-3, tiny=True, start=run)
  with pytest.raises(ValueError, match="gla, from which it starts, has diverged"):
    finish(uptrained, data, tmp_path)


def test_a_run_that_sigterm_stopped_is_not_begun_again(data, tmp_path, monkeypatch):
  made = []

  def fake(run, data, workdir):
    made.append(run.model)
    assert len(made) == 1
    return None  # as after a signal that only the run has heard

  monkeypatch.setattr(execution, "finish", fake)
  sweep = Sweep([Run(model, 1e-3, tiny=True) for model in ("gla", "tnl")], further_seeds=1)
  assert execution.execute(sweep, data, tmp_path, tmp_path / "out.jsonl") == (0, 2, [])


def record(model, rate, seed, bits):
  optim = {"learning_rate": rate, "final_learning_rate": rate / 10, "steps": 9}
  return {"model": model, "learning_rate": rate, "seed": seed, "parameters": 7, "tokens": 8, "epochs": 0.5,
          "held_out_loss": bits, "bits_per_byte": bits, "diverged": bits is None, "tokens_per_second": 100.0 * seed,
          "device": "cpu",
          "setting": {"name": model, "seed": seed, "optim": optim, "data": {"sequence_length": 64}}}


def test_summary():
  rows = [record("gla", 1e-3, 0, 1.3), record("gla", 2e-3, 0, 1.4), record("gla", 4e-3, 0, None),
          record("gla", 2e-3, 1, 1.6), record("gla", 2e-3, 1, 1.6), record("gla", 1e-3, 1, 1.9),
          record("tnl", 1e-3, 0, 1.5), record("tnl", 2e-3, 0, 1.2), record("mamba", 1e-3, 0, None)]
  gla, tnl, mamba = summary(rows)
  # 1e-3 has the best run, and with both seeds the worse mean.
  assert gla["model"] == "gla" and gla["learning_rate"] == 2e-3 and gla["learning_rates"] == [1e-3, 2e-3, 4e-3]
  assert gla["seeds"] == 2 and gla["bits_per_byte"] == pytest.approx(1.5) and gla["range"] == [1.4, 1.6]
  assert gla["spread"] == pytest.approx(0.2 / 2**0.5) and gla["diverged"] == 1
  assert tnl["spread"] is None and tnl["perplexity"] == pytest.approx(3.3201169)
  assert mamba["bits_per_byte"] is None and mamba["seeds"] == 0 and mamba["diverged"] == 1


def test_command(data, tmp_path):
  common = [f"--data={data}", f"--workdir={tmp_path}/runs", f"--out={tmp_path}/out.jsonl", "--tiny"]
  limited = subprocess.run([sys.executable, "experiments/run_language.py", "--sweep=main", *common,
                            "--limit_seconds=1e-6"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
  assert limited.returncode == 0 and "0 run, 27 left: the same command goes on" in limited.stdout, limited
  mistaken = Command("run_language.py", "--sweep=lengths", "--models=mamba", *common)
  out, err = mistaken.communicate()
  assert mistaken.returncode == 2 and "--models=mamba: --sweep=lengths has gla, " in err and not out, (out, err)
  assert "Traceback" not in err
