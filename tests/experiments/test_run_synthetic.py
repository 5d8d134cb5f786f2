"""The command that trains on synthetic tasks: sweeps that resume, and mistakes."""

import json
import subprocess
import sys

from tests.environment import ENVIRONMENT
from tests.forked import ROOT, Command

TINY = ["--width=16", "--steps=2", "--evaluate_every=1", "--batch_size=4", "--test_examples=4"]


def start(*arguments):
  return subprocess.Popen([sys.executable, ROOT / "experiments" / "run_synthetic.py", *map(str, arguments)], cwd=ROOT,
                          env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fork(*arguments):
  return Command("run_synthetic.py", *arguments)


def finish(process):
  out, err = process.communicate()
  assert process.returncode == 0, (out, err)
  return out


def test_sweep_resumes(tmp_path):
  path = tmp_path / "results" / "synthetic.jsonl"
  sweep = ["--sweep=mqar_reduced", "--mixer=linear_attention", "--examples=8", "--stop_accuracy=0", *TINY,
           f"--out={path}"]
  assert "0 run, 0 skipped, 3 left" in finish(fork(*sweep, "--limit_seconds=1e-6", "--set=pairs=16"))
  assert "6 run, 0 skipped, 0 left" in finish(start(*sweep))  # three learning rates of two settings
  *kept, cut, last = path.read_text().splitlines(keepends=True)
  path.write_text("".join(kept) + cut[:40])  # a kill has cut a line, and the next one was not written
  assert "0 run, 6 skipped, 0 left" in finish(fork(*sweep, "--until_solved"))
  assert "2 run, 4 skipped, 0 left" in finish(fork(*sweep))
  again = [json.loads(line) for line in path.read_text().splitlines()]
  assert again[:4] == [json.loads(line) for line in kept]
  assert [record["setting"] for record in again[4:]] == [json.loads(line)["setting"] for line in (cut, last)]
  assert again[5]["curve"] == json.loads(last)["curve"]  # the same run on the same device
  assert [record["setting"]["task_fields"]["pairs"] for record in again] == [16] * 3 + [64] * 3
  assert [record["side_by_side"] for record in again] == [3] * 4 + [2] * 2
  assert again[5]["device"] == "cpu" and again[5]["versions"]["jax"] and "--sweep=mqar_reduced" in again[5]["command"]


def test_mistakes(tmp_path):
  (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
  mistakes = [(["--task=foo"], "--task=foo: must be one of "),
              (["--task=mqar", "--mixer=gla", "--mixer_set=heads=3"], "not divisible by heads=3"),
              (["--sweep=mqar"], "--sweep needs --out"),
              (["--sweep=mqar", "--set=pairs=3", f"--out={tmp_path}/new.jsonl"], "has no run of task any and mixer any "
                                                                                 "with pairs=3"),
              (["--task=mqar", "--mixer=gla", "--limit_seconds=9"], "--limit_seconds=9 needs --out"),
              (["--sweep=mqar", f"--out={tmp_path}/other.jsonl"], "other.jsonl: line 1 is not a record of this "
                                                                   "command: it has no '")]
  for arguments, message in mistakes:
    process = fork(*arguments)
    out, err = process.communicate()
    assert process.returncode == 2 and message in err and "Traceback" not in err, (out, err)
    assert not out
