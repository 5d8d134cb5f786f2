"""The training smoke on models of a few thousand parameters: records, resumption, failures, mistakes."""

import json
import math
import subprocess
import sys

import pytest

import smoke_models
from configs import page
from lin_jax.model import parameter_count
from tests.environment import ENVIRONMENT
from tests.forked import ROOT, Command

SMALL = ["--tiny", "--batch_size=8", "--sequence_length=64", "--steps=12", "--timed_steps=3", "--learning_rate=0.01"]


def start(*arguments):
  return subprocess.Popen([sys.executable, ROOT / "experiments" / "smoke_models.py", *map(str, arguments)], cwd=ROOT,
                          env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fork(*arguments):
  return Command("smoke_models.py", *arguments)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
  path = tmp_path_factory.mktemp("smoke") / "smoke.json"
  process = start(*SMALL, "--families=transformer_340m,linear_attention_340m", f"--out={path}")
  out, err = process.communicate()
  assert process.returncode == 0, (out, err)
  assert "cpu: 2 families" in out
  return path


def test_records(records):
  rows = page.load_smoke(records)
  assert [row["family"] for row in rows] == ["transformer_340m", "linear_attention_340m"]
  for row in rows:
    assert len(row["losses"]) == 12 and row["losses"][-1] == row["loss_last"] < row["loss_first"] == row["losses"][0]
    assert row["loss_first"] == pytest.approx(math.log(257), abs=0.2)
    assert row["tokens_per_s"] == pytest.approx(8 * 64 / row["step_ms"] * 1000, rel=1e-2)
    # A CPU has no known peak. Parameters, two moments and what a step keeps in between, in float32.
    assert row["mfu"] is None and row["memory_gib"] > 3 * 4 * row["parameters"] / 2**30
    assert row["device"] == "cpu" and row["versions"]["jax"] and "--tiny" in row["command"] and not row["reason"]
  assert "| `linear_attention_340m` |" in page.render(records)


def test_resume_and_failures(records, tmp_path):
  resumed = fork(*SMALL, "--families=linear_attention_340m", f"--out={records}", "--resume")
  before = records.read_text()
  # With this learning rate nothing is learnt.
  failing = fork(*SMALL[:-1], "--learning_rate=1e-12", "--families=linear_attention_340m", f"--out={tmp_path}/x.json")
  mistakes = [(fork("--families=gpt"), "--families=gpt: unknown; known: transformer_340m, "),
              (fork("--steps=3", "--timed_steps=3"), "--timed_steps=3: must be less than --steps=3")]
  out, err = resumed.communicate()
  assert resumed.returncode == 0 and "cpu: 0 families" in out, err
  assert records.read_text() == before
  out, err = failing.communicate()
  assert failing.returncode == 1 and "failed: linear_attention_340m" in err
  row, = json.loads((tmp_path / "x.json").read_text())
  assert "expected to start at 5.549 and to fall by 3%" in row["reason"] and row["loss_last"] is None
  for process, message in mistakes:
    out, err = process.communicate()
    assert process.returncode == 2 and message in err and "Traceback" not in err


def test_every_family_is_about_340m():
  for family, make in smoke_models.FAMILIES.items():
    assert parameter_count(make().model) == pytest.approx(355e6, rel=0.1), family
