"""The command that trains on synthetic tasks: sweeps that resume, and mistakes."""

import json
import pathlib
import subprocess
import sys

from tests.environment import ENVIRONMENT

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ["--width=16", "--steps=2", "--evaluate_every=1", "--batch_size=4", "--test_examples=4"]


def start(*arguments):
  return subprocess.Popen([sys.executable, ROOT / "experiments" / "run_synthetic.py", *map(str, arguments)], cwd=ROOT,
                          env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
  out, err = process.communicate()
  assert process.returncode == 0, (out, err)
  return out


def test_sweep_resumes(tmp_path):
  path = tmp_path / "results" / "synthetic.jsonl"
  sweep = ["--sweep=mqar", "--mixer=linear_attention", "--until_solved", "--examples=8", "--stop_accuracy=0", *TINY,
           f"--out={path}"]
  assert "0 run, 0 skipped, 8 left" in finish(start(*sweep, "--limit_seconds=1e-6"))
  assert "2 run, 6 skipped, 0 left" in finish(start(*sweep))  # one learning rate of four solves each
  first, second = path.read_text().splitlines()
  assert [json.loads(line)["setting"]["task_fields"]["pairs"] for line in (first, second)] == [16, 64]
  path.write_text(f"{first}\n{second[:40]}")  # a kill has cut the last line
  assert "1 run, 7 skipped, 0 left" in finish(start(*sweep))
  again = [json.loads(line) for line in path.read_text().splitlines()]
  assert again[0] == json.loads(first) and again[1]["setting"] == json.loads(second)["setting"]
  assert again[1]["curve"] == json.loads(second)["curve"]  # the same run on the same device
  assert again[1]["device"] == "cpu" and again[1]["versions"]["jax"] and "--sweep=mqar" in again[1]["command"]


def test_mistakes(tmp_path):
  (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
  mistakes = [(["--task=foo"], "--task=foo: must be one of "),
              (["--task=mqar", "--mixer=gla", "--mixer_set=heads=3"], "not divisible by heads=3"),
              (["--sweep=mqar"], "--sweep needs --out"),
              (["--task=mqar", "--mixer=gla", "--limit_seconds=9"], "--limit_seconds=9 needs --out"),
              (["--sweep=mqar", f"--out={tmp_path}/other.jsonl"], "not a file of this command's records")]
  for first in range(0, len(mistakes), 2):
    for process, message in [(start(*arguments), message) for arguments, message in mistakes[first:first + 2]]:
      out, err = process.communicate()
      assert process.returncode == 2 and message in err and "Traceback" not in err, (out, err)
      assert not out
