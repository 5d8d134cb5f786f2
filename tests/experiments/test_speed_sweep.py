"""Sweeps of speed measurements: what is done is skipped, a limit ends them, failures are recorded; that of training."""

import json
import os
import pathlib
import subprocess
import sys
import types

import pytest

import speed_sweep
import training_speed
from lin_jax.model import parameter_count

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIELDS = ("ms",)


def row(name, **changes):
  return {"device": "d", "versions": {"jax": "1"}, "setting": {"name": name}} | changes


def sweep(path, names, measure, limit=0.0):
  runs = speed_sweep.missing([(name, row(name)) for name in names], path)
  return speed_sweep.run(runs, measure, lambda row: f"{row['ms']} ms", FIELDS, path, begun=0.0, limit=limit)


def test_a_sweep_records_failures_and_does_nothing_twice(tmp_path, capsys):
  path = tmp_path / "speed.jsonl"

  def measure(name):
    if name == "b":
      raise MemoryError("too large\nsecond line")
    return {"ms": 1.5}

  assert sweep(path, "ab", measure) == ["b"]
  assert "a 1.5 ms" in capsys.readouterr().out
  # A record of other versions does not count.
  with path.open("a") as file:
    file.write(json.dumps(row("c", versions={"jax": "0"}, reason="", ms=9.0)) + "\n")
  assert sweep(path, "abc", lambda name: {"ms": 2.5}) == []
  found = [(record["setting"]["name"], record["ms"], record["reason"]) for record in speed_sweep.load(path)]
  assert found == [("a", 1.5, ""), ("b", None, "MemoryError: too large"), ("c", 9.0, ""), ("c", 2.5, "")]


def test_no_run_begins_that_would_end_beyond_the_limit(tmp_path, capsys, monkeypatch):
  measured, clock = [], types.SimpleNamespace(monotonic=lambda: 1.0 + 2 * len(measured))
  monkeypatch.setattr(speed_sweep, "time", clock)
  sweep(tmp_path / "speed.jsonl", "abcd", lambda name: measured.append(name) or {"ms": 1.0}, limit=5.5)
  assert measured == ["a", "b"] and "with 2 left" in capsys.readouterr().out


def test_sizes_are_those_of_the_papers():
  for name, sweep in training_speed.SWEEPS.items():
    size = {"gla_fig6": 1.32e9, "tnl": 384e6}[name]
    for make in sweep.models.values():
      assert parameter_count(make().model) == pytest.approx(size, rel=0.03 if name == "gla_fig6" else 0.005)
    assert all(sweep.tokens % length == 0 for length in sweep.lengths)


def start(*arguments):
  return subprocess.Popen([sys.executable, ROOT / "experiments" / "bench_training.py", *arguments], cwd=ROOT,
                          env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_training_speed_against_length(tmp_path):
  path, plot = tmp_path / "training.jsonl", tmp_path / "training.png"
  arguments = ["--set=tnl", "--tiny", "--models=transformer_385m", "--steps=3", "--timed_steps=2", f"--out={path}"]
  mistake = start("--lengths=3000")
  first = start(*arguments, "--lengths=8192,32768")
  out, err = first.communicate()
  assert first.returncode == 0 and "cpu: 2 runs, 0 recorded before" in out, (out, err)
  again = start(*arguments, "--lengths=32768", f"--plot={plot}")
  out, err = again.communicate()
  assert again.returncode == 0 and "cpu: 0 runs, 1 recorded before" in out, (out, err)
  assert plot.read_bytes()[:4] == b"\x89PNG"
  rows = speed_sweep.load(path)
  assert [(r["setting"]["sequence_length"], r["setting"]["batch_size"]) for r in rows] == [(32, 8), (128, 2)]
  for r in rows:
    assert r["tokens_per_s"] == pytest.approx(256 / r["step_ms"] * 1000, rel=1e-2) and len(r["losses"]) == 3
    assert r["device"] == "cpu" and r["versions"]["sources"] and "--tiny" in r["command"] and not r["reason"]
  out, err = mistake.communicate()
  assert mistake.returncode == 2 and "--lengths=3000: unknown; known: 2048, 4096" in err and "Traceback" not in err
