"""The benchmark of the fused kernels on small shapes: records, the check, mistakes."""

import json

from tests.forked import Command

SMALL = ["--batch=1", "--length=16", "--narrow=32", "--repeats=1"]


def test_records_and_limit(tmp_path):
  path = tmp_path / "fused.jsonl"
  run = Command("bench_fused.py", *SMALL, "--ops=swiglu", "--implementation=pallas_triton", f"--out={path}")
  out, err = run.communicate()
  assert run.returncode == 0, (out, err)
  rows = list(map(json.loads, path.read_text().splitlines()))
  assert [row["pass"] for row in rows] == ["forward", "forward_backward"]
  assert all(row["within_bounds"] and row["kernels_ms"] > 0 and row["xla_ms"] > 0 for row in rows)
  run = Command("bench_fused.py", *SMALL, "--limit_seconds=1e-9")
  out, err = run.communicate()
  assert run.returncode == 0 and "measurements left" in out, (out, err)


def test_unknown_names_are_refused():
  for flag in ("--ops=norm", "--without=norm", "--models=gla_9b"):
    run = Command("bench_fused.py", flag)
    _, err = run.communicate()
    assert run.returncode == 2 and "unknown; known:" in err, err
