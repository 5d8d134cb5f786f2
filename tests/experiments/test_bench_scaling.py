"""Training on several devices beside one, at a small size: records, comparisons, resumption, gradients, mistakes."""

import json
import types

import pytest

from lin_jax.config import MeshConfig
from running.meshes import name_of, parse, size_of
from speed import scaling
from tests.environment import ENVIRONMENT
from tests.forked import Command

TWO = ENVIRONMENT | {"XLA_FLAGS": f"{ENVIRONMENT['XLA_FLAGS']} --xla_force_host_platform_device_count=2"}
SMALL = ["--tiny", "--models=tnl_385m", "--length=16", "--unroll=1", "--steps=3", "--timed_steps=1"]


def rows_of(path, *arguments, env=TWO):
  run = Command("bench_scaling.py", *SMALL, *arguments, f"--out={path}", env=env)
  out, err = run.communicate()
  assert run.returncode == 0, (out, err)
  return [json.loads(line) for line in path.read_text().splitlines()], out


def test_each_mesh_is_compared_with_one_device(tmp_path):
  path = tmp_path / "scaling.jsonl"
  rows, _ = rows_of(path, "--meshes=fsdp=2", "--batch=2")
  assert [(r["setting"]["mesh"], r["setting"]["batch_size"], r["setting"]["accumulation"]) for r in rows] == [
      ("one device", 2, 1), ("one device", 4, 2), ("fsdp=2", 4, 1)]
  one, same, mesh = rows
  assert mesh["tokens_per_s_per_device"] == pytest.approx(mesh["tokens_per_s"] / 2, abs=0.1)
  assert mesh["one_device_tokens_per_s"] == one["tokens_per_s"]
  assert mesh["fraction"] == pytest.approx(mesh["tokens_per_s_per_device"] / one["tokens_per_s"], rel=1e-2)
  assert mesh["losses"] == pytest.approx(same["losses"], rel=1e-5) and mesh["largest_loss_difference"] < 1e-5
  again, out = rows_of(path, "--meshes=fsdp=2", "--batch=2")
  assert again == rows and "0 runs, 3 recorded before" in out


def test_gradients_of_a_long_row_equal_one_device(tmp_path):
  row, = rows_of(tmp_path / "equality.jsonl", "--check", "--meshes=context=2", "--global_batch=1")[0]
  assert row["within_bounds"] and row["errors"].keys() == row["norms"].keys() and row["largest_error"] < 1e-5
  assert row["loss"] == pytest.approx(row["loss_one_device"], rel=1e-6) and min(row["norms"].values()) > 0


def test_a_host_of_one_device_measures_that_device(tmp_path):
  rows, out = rows_of(tmp_path / "scaling.jsonl", "--meshes=context=2", "--batch=1", env=ENVIRONMENT)
  assert [r["setting"]["mesh"] for r in rows] == ["one device"] and "fraction" not in rows[0]
  assert "context=2 is left out: it needs 2 devices" in out and "1 device: context=1 is measured" in out


@pytest.mark.parametrize("flag, message", [
    ("--meshes=rows=2", "--meshes=rows=2: must be sizes of different axes of data, fsdp, context, tensor"),
    ("--meshes=data=0", "--meshes=data=0: must be sizes"),
    ("--timed_steps=3", "--timed_steps=3: must be less than --steps=3"),
    ("--models=gpt", "--models=gpt: unknown; known: "),
    ("--length=15", "config.data.sequence_length=15: not divisible by config.mesh.context=2")])
def test_mistakes_are_refused(flag, message, tmp_path):
  run = Command("bench_scaling.py", *SMALL, "--meshes=context=2", flag, f"--out={tmp_path}/none/scaling.jsonl", env=TWO)
  _, err = run.communicate()
  assert run.returncode == 2 and message in err, err
  assert not (tmp_path / "none").exists()


def test_a_program_that_does_not_fit_is_not_run(monkeypatch):
  device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 2 << 30})
  monkeypatch.setattr(scaling.jax, "devices", lambda: [device])
  monkeypatch.setattr(scaling.training, "gibibytes", lambda step: 3.0)
  with pytest.raises(MemoryError, match="needs 3.0 GiB on each device, of which 2.0 are available"):
    scaling.measured(types.SimpleNamespace(step=None), None)


def test_meshes_by_name():
  mesh = parse("context=4,fsdp=2")
  assert mesh == MeshConfig(data=1, fsdp=2, context=4) and size_of(mesh) == 8
  assert name_of(mesh) == "fsdp=2,context=4" and parse(name_of(mesh)) == mesh
  for meshes in (["data=1", "tensor=8"], ["tensor=8"]):
    assert [name_of(m) for m in scaling.fitting(meshes, 4)] == ["one device"]
