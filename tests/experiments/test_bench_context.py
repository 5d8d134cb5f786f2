"""The benchmark of ops on split sequences at a small size: records, the check, mistakes."""

import json

from tests.forked import Command

SMALL = ["--length=16", "--heads=2", "--key=8", "--value=8", "--repeats=1"]


def test_a_record_for_each_number_of_parts(tmp_path):
  path = tmp_path / "context.jsonl"
  run = Command("bench_context.py", *SMALL, "--ops=linear_attention", "--dtype=float32", "--parts=1", f"--out={path}")
  out, err = run.communicate()
  assert run.returncode == 0, (out, err)
  row, = map(json.loads, path.read_text().splitlines())
  assert row["parts"] == 1 and row["ms"] > 0 and row["within_bounds"] and len(row["errors"]) == 6


def test_mistakes_are_refused():
  for flag, message in (("--parts=3", "must divide --length=16"), ("--ops=norm", "unknown; known:")):
    run = Command("bench_context.py", *SMALL, flag)
    _, err = run.communicate()
    assert run.returncode == 2 and message in err, err
