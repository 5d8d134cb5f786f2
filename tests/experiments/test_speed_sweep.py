"""Sweeps of speed measurements skip what is done, end at a limit, and record failures, in both commands."""

import json
import subprocess
import sys
import types

import numpy as np
import pytest

from lin_jax.model import parameter_count
from speed import packing, serving, sweeps, training
from tests.environment import ENVIRONMENT
from tests.forked import ROOT, Command

FIELDS = ("ms",)


def row(name, **changes):
  return {"device": "d", "versions": {"jax": "1"}, "setting": {"name": name}} | changes


def sweep(path, names, measure, limit=0.0):
  runs = sweeps.missing([(name, row(name)) for name in names], path)
  return sweeps.run(runs, measure, lambda row: f"{row['ms']} ms", FIELDS, path, begun=0.0, limit=limit)


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
  found = [(record["setting"]["name"], record["ms"], record["reason"]) for record in sweeps.load(path)]
  assert found == [("a", 1.5, ""), ("b", None, "MemoryError: too large"), ("c", 9.0, ""), ("c", 2.5, "")]


def test_no_run_begins_that_would_end_beyond_the_limit(tmp_path, capsys, monkeypatch):
  measured, clock = [], types.SimpleNamespace(monotonic=lambda: 1.0 + 2 * len(measured))
  monkeypatch.setattr(sweeps, "time", clock)
  sweep(tmp_path / "speed.jsonl", "abcd", lambda name: measured.append(name) or {"ms": 1.0}, limit=5.5)
  assert measured == ["a", "b"] and "with 2 left" in capsys.readouterr().out


def test_sizes_are_those_of_the_papers():
  for name, sweep in training.CURVES.items():
    size = {"gla_fig6": 1.32e9, "tnl": 384e6}[name]
    for make in sweep.models.values():
      assert parameter_count(make().model) == pytest.approx(size, rel=0.03 if name == "gla_fig6" else 0.005)
    assert all(sweep.tokens % length == 0 for length in sweep.lengths)


def test_unknown_names_are_refused():
  flag = types.SimpleNamespace(name="lengths", value=["3000"])
  with pytest.raises(ValueError, match="--lengths=3000: unknown; known: 1024, 2048"):
    sweeps.chosen(flag, (1024, 2048))
  flag.value = ["2048"]
  assert sweeps.chosen(flag, (1024, 2048)) == [2048]


def start(command, *arguments):
  return subprocess.Popen([sys.executable, ROOT / "experiments" / command, *arguments], cwd=ROOT, env=ENVIRONMENT,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def records_of(begin, command, folder, *arguments):
  """The records that a tiny sweep writes."""
  path = folder / "speed.jsonl"
  process = begin(command, "--tiny", f"--out={path}", *arguments)
  output = process.communicate()
  assert process.returncode == 0, output
  rows = sweeps.load(path)
  for r in rows:
    assert r["device"] == "cpu" and r["versions"]["sources"] and "--tiny" in r["command"] and not r["reason"]
  return rows


def test_training_speed_against_length(tmp_path):
  rows = records_of(start, "bench_training.py", tmp_path, "--set=tnl", "--models=transformer_385m", "--lengths=32768",
                    "--steps=3", "--timed_steps=2", "--unroll=0,1", "--remat=none,dots", "--group=3")
  assert [(r["setting"]["unroll"], r["setting"]["remat"]) for r in rows] == [
      (0, "none"), (0, "dots"), (1, "none"), (1, "dots")]
  for r in rows:
    assert (r["setting"]["sequence_length"], r["setting"]["batch_size"]) == (128, 2)
    assert r["tokens_per_s"] == pytest.approx(256 / r["step_ms"] * 1000, rel=1e-2)
    assert r["losses"] == pytest.approx(rows[0]["losses"], rel=1e-4) and len(r["losses"]) == 3


def test_fine_tuning_with_adapters(tmp_path):
  row, = records_of(Command, "bench_training.py", tmp_path, "--set=finetune", "--models=transformer_340m",
                    "--lora_rank=2", "--steps=3", "--timed_steps=2")
  assert row["setting"]["lora"] == {"rank": 2, "alpha": 16.0, "targets": ""} and row["mfu"] is None
  assert (row["setting"]["batch_size"], row["setting"]["sequence_length"]) == (4, 16)
  assert 0 < row["setting"]["trainable"] < row["setting"]["parameters"] / 4 and len(row["losses"]) == 3


def test_packed_documents_beside_windows_of_one(tmp_path):
  rows = records_of(Command, "bench_training.py", tmp_path, "--set=step", "--models=retnet_1b3,transformer_1b3",
                    "--steps=3", "--timed_steps=2", "--documents=one,packed")
  assert [(r["setting"]["name"], r["setting"]["documents"]) for r in rows] == [
      (name, how) for name in ("retnet_1b3", "transformer_1b3") for how in packing.DOCUMENTS.values()]
  assert all(len(r["losses"]) == 3 for r in rows)


def test_windows_are_cut_from_documents_of_the_corpus():
  ids = packing.windows(200, 8, 2049)
  assert ids.shape == (200, 8, 2049) and (ids[..., 0] == 1).all()
  steps = np.diff(ids, axis=2)
  assert steps.min() == 0 and steps.max() == 1
  random = np.random.default_rng(0)
  lengths = np.array([packing.drawn_length(random) for _ in range(100_000)])
  assert np.median(lengths) == pytest.approx(dict(packing.LENGTHS)[0.5], rel=0.05)
  assert lengths.mean() == pytest.approx(packing.MEAN, rel=0.05)
  np.testing.assert_array_equal(ids, packing.windows(200, 8, 2049))


def test_the_last_token_of_a_document_has_no_target():
  config = training.shrunk(training.SWEEPS["step"].models["gla_1b3"]())
  config.data.batch_size, config.data.sequence_length = 4, 2048
  one, packed = (training.drawn_batches(config, 5, documents=False, packed=packed) for packed in (False, True))
  for a, b in zip(one, packed, strict=True):
    np.testing.assert_array_equal(a["tokens"], b["tokens"])
    assert a["segment_ids"] is None and a["mask"].all()
    inner = np.diff(b["segment_ids"], axis=1) == 0
    np.testing.assert_array_equal(b["mask"][:, :-1], inner)
  assert any(not batch["mask"].all() for batch in packed)


def test_decoding_against_context(tmp_path):
  rows = records_of(start, "bench_decoding.py", tmp_path, "--models=gla_340m,transformer_340m",
                    "--contexts=4096,65536", "--tokens=4", "--repeats=2")
  assert [(r["setting"]["name"][:3], r["setting"]["context"]) for r in rows] == [
      ("gla", 16), ("gla", 256), ("tra", 16), ("tra", 256)]
  # A memory of 2 layers, 2 heads of 8 x 16 floats; 2 layers of 32 float keys and values and a position for each token.
  assert [r["state_mib"] * 2**20 for r in rows] == pytest.approx([2048, 2048, 8456, 135176], rel=0.03)
  for r in rows:
    assert r["ms_per_token"] > 0 and r["tokens_per_s"] == pytest.approx(1000 / r["ms_per_token"], rel=1e-2)
    assert r["memory_gib"] * 2**30 > 4 * r["setting"]["parameters"]


def test_batches_and_prompts(tmp_path):
  rows = records_of(Command, "bench_decoding.py", tmp_path, "--models=gla_340m", "--contexts=4096",
                    "--batch_sizes=1,3", "--prompts=8192", "--tokens=2", "--repeats=2")
  assert [r["setting"].get("batch_size") for r in rows] == [1, 3, None, None]
  assert rows[1]["state_mib"] == pytest.approx(3 * rows[0]["state_mib"], rel=0.03)
  assert [(r["setting"]["prompt"], r["setting"]["piece"]) for r in rows[2:]] == [(32, 16), (32, 0)]
  for r in rows[2:]:
    assert r["tokens_per_s"] == pytest.approx(32000 / r["first_token_ms"], rel=1e-2) and r["memory_gib"] > 0


def test_servers_with_mixed_lengths(tmp_path):
  rows = records_of(Command, "bench_decoding.py", tmp_path, "--models=gla_340m", "--servers=1,4", "--requests=12",
                    "--repeats=1")
  assert [r["setting"]["rows"] for r in rows] == [1, 4]
  drawn = serving.Serving("", True, 1, 12, 64, 16, 32, 8, 1).drawn(50)
  assert max(len(r.prompt) for r in drawn) <= 64 and max(r.max_tokens for r in drawn) <= 16
  assert len({len(r.prompt) for r in drawn}) > 6
  for r in rows:
    assert r["tokens_per_s"] == pytest.approx(sum(r.max_tokens for r in drawn) / r["seconds"], rel=1e-2)
    assert r["prompt_tokens_per_s"] == pytest.approx(sum(len(r.prompt) for r in drawn) / r["seconds"], rel=1e-2)
    assert 0 < r["rows_in_use"] <= 1 and r["cache_mib_per_row"] == 0
    # One more row for the prompt that is being read; a memory of 2 layers, 2 heads of 8 x 16 floats.
    assert r["state_mib"] * 2**20 == pytest.approx(2048 * (r["setting"]["rows"] + 1), rel=0.03)
