"""A short form of the fault campaign, whose judge must be able to fail."""

import pytest

from faults import cases
from faults.judge import outcome
from faults.runner import Ended, Inputs

# The whole list takes minutes: one of each kind that needs no trained model.
SHORT = ("prepare_data: files of 2000 bytes", "pack: files of 1000 bytes", "train: files of 1000 bytes",
         "prepare_data: standard output closed", "prepare_data: a second process", "train: a second process",
         "prepare_data: train-00000.bin changed", "prepare_data: tokenizer.model changed",
         "join: a folder that is no dataset", "join: datasets of different tokenizers",
         "prepare_data: killed at 3/5 of its time")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
  return Inputs(tmp_path_factory.mktemp("faults") / "inputs")


@pytest.mark.parametrize("name", SHORT)
def test_a_fault_ends_in_one_message_and_its_code(inputs, tmp_path, name):
  case, = [case for case in cases.CASES if case.name == name]
  row = outcome(case, inputs, tmp_path / "case")
  assert row["outcome"] == "passed", row


def test_cases_have_names_of_their_own():
  names = [case.name for case in cases.CASES]
  assert len(names) == len(set(names)) and set(SHORT) <= set(names)


@pytest.mark.parametrize("ended, problem", [
    (Ended(2, "", "x.py: a: full\n"), ""),
    (Ended(1, "", "x.py: a: full\n"), "exit code 1, not 2"),
    (Ended(2, "", "x.py: a: other\n"), "not the one message"),
    (Ended(2, "", "x.py: a: full\nx.py: a: full\n"), "not the one message"),
    (Ended(2, "", "Traceback (most recent call last):\nE: 1\nx.py: a: full\n"), "traceback: x.py"),
])
def test_the_judge_sees_codes_messages_and_tracebacks(ended, problem):
  assert cases.Case("case", None, 2, "a: full").problem(ended).startswith(problem)


def test_a_fault_that_cannot_be_made_is_skipped_and_not_passed(inputs, tmp_path, monkeypatch):
  monkeypatch.setattr(cases.subprocess, "run", lambda words, **_: cases.subprocess.CompletedProcess(
      words, 1, "", "mount: only root can do that"))
  case = cases.full_disk("prepare_data", 0)
  row = outcome(case, inputs, tmp_path / "case")
  assert row["outcome"] == "skipped" and row["message"] == "mount -t tmpfs: mount: only root can do that"
