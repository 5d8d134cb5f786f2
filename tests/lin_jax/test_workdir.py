"""Whose a workdir is: of which run, on which data, and which process."""

import json

import pytest

from lin_jax import workdir as workdirs
from lin_jax.manifests import describe
from tests.lin_jax import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return tiny.write_dataset(tmp_path_factory.mktemp("workdir") / "data")


def test_a_run_on_other_data_is_refused_by_both_digests(data, tmp_path):
  config, was = tiny.config(data), describe(data)
  workdirs.prepare(tmp_path / "run", config, was)
  assert json.loads((tmp_path / "run" / "data.json").read_text()) == was
  now = was | {"sha256": "0" * 64}
  with pytest.raises(ValueError, match=f"holds a run on other data .*{was['sha256']} .*now .*{now['sha256']} "):
    workdirs.prepare(tmp_path / "run", config, now)
  (tmp_path / "run" / "data.json").write_text("[]")
  with pytest.raises(ValueError, match="data.json: not a run's record of its data"):
    workdirs.prepare(tmp_path / "run", config, was)


def test_a_run_that_is_older_than_the_record_of_data_gets_one(data, tmp_path):
  workdirs.prepare(tmp_path / "run", tiny.config(data))
  assert not (tmp_path / "run" / "data.json").exists()
  workdirs.prepare(tmp_path / "run", tiny.config(data), describe(data))
  assert json.loads((tmp_path / "run" / "data.json").read_text()) == describe(data)


def test_a_run_keeps_its_start_unless_another_one_is_named(data, tmp_path):
  older, now = tiny.config(data), tiny.config(data)
  older.model.start = "layers"
  assert now.model.start == "normal"
  workdirs.prepare(tmp_path / "run", older)
  assert workdirs.continued(tmp_path / "run", now)[0] == older
  assert workdirs.continued(tmp_path / "new", now)[0] == now
  workdirs.prepare(tmp_path / "other", now)
  with pytest.raises(ValueError, match="model.start was 'normal', now 'layers'"):
    workdirs.prepare(tmp_path / "other", workdirs.continued(tmp_path / "other", older)[0])


def test_a_second_trainer_is_refused_and_leaves_no_trace(tmp_path):
  with workdirs.locked(tmp_path / "run"):
    with pytest.raises(ValueError, match="run' is in use by process .* on host"), workdirs.locked(tmp_path / "run"):
      pass
  assert not list(tmp_path.iterdir())


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(ValueError, match="file/run' cannot be written: Not a directory"):
    with workdirs.locked(tmp_path / "file" / "run"):
      pass
