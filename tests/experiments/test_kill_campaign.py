"""A short form of the campaign that kills runs at random moments, which must see a difference."""

import pytest

from faults import killed_runs
from tests.environment import ENVIRONMENT
from tests.lin_jax import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return tiny.write_dataset(tmp_path_factory.mktemp("killed") / "data")


def test_killed_runs_end_like_an_unbroken_one(data, tmp_path, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", ENVIRONMENT["XLA_FLAGS"])  # one device
  counts = killed_runs.campaign(tmp_path, data, runs=2, steps=8, seed=1)
  assert counts["equal"] == 2 and not counts["different"] and sum(counts["signals"].values()) == 2
  unbroken = killed_runs.end(tmp_path / "unbroken")
  assert [r["step"] for r in unbroken["records"] if "loss" in r] == [1, 2, 4, 6, 8]
  assert unbroken["kept"] == [4, 8] and unbroken["best"] == 8 and unbroken["state"]["step"] == 8
  file = tmp_path / "000" / "metrics.jsonl"
  file.write_text(file.read_text().replace('"skipped": 0', '"skipped": 1', 1))
  assert [name for name, value in killed_runs.end(tmp_path / "000").items() if value != unbroken[name]] == ["records"]
