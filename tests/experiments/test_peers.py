"""Models of other libraries train in processes of their own, and within a limit."""

import subprocess
import sys
import textwrap

import pytest

from speed import peers, sweeps
from tests.environment import ENVIRONMENT
from tests.forked import ROOT, Command

# In the place of a library: a model that trains, two that fail, one that never ends.
LIBRARY = """
    import sys, time, types

    def prepare(setting):
      print("a line of the library's own")
      if setting["name"] == "refuses":
        raise NotImplementedError("no such width")
      if setting["name"] == "dies":
        sys.exit("killed by its own")
      def train():
        time.sleep(60 if setting["name"] == "hangs" else 0)
        results = dict(tokens_per_s=2.0, step_ms=1.0, memory_gib=0.5, parameters=3, kernels=1, losses=[1.0])
        return results, time.monotonic()
      return train

    sys.modules["speed.peer_jla"] = types.ModuleType("speed.peer_jla")
    sys.modules["speed.peer_jla"].prepare = prepare
"""


def results(names, limit):
  with peers.prepared_in_groups([{"library": "jla", "name": name} for name in names], 2, limit) as processes:
    for process in processes:
      try:
        yield process.measure()
      except (RuntimeError, TimeoutError) as e:
        yield f"{type(e).__name__}: {e}"


def test_each_model_has_a_process_and_a_failure_costs_no_other(tmp_path, monkeypatch):
  (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(LIBRARY))
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))
  trains, refuses, dies, again = results(["trains", "refuses", "dies", "trains"], 60)
  assert trains.keys() == again.keys() == set(peers.FIELDS)
  assert trains["tokens_per_s"] == 2.0 and trains["first_step_s"] >= trains["compile_s"] >= 0
  assert refuses == "RuntimeError: NotImplementedError: no such width"
  assert dies == "RuntimeError: the process ended with code 1: killed by its own"


def test_a_model_is_stopped_at_its_limit(tmp_path, monkeypatch):
  (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(LIBRARY))
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))
  assert list(results(["hangs"], 3)) == ["TimeoutError: stopped after 3 s"]


def test_a_library_that_is_not_installed_costs_a_line(monkeypatch, capsys):
  monkeypatch.setattr(peers.peers, "missing", {"jla": None, "fla": "not installed: torch"}.get)
  found = peers.chosen(["fla", "jla"], ["gla_1b3", "mamba2_1b3"], ["dots", "amp"])
  assert capsys.readouterr().out == "fla is left out: not installed: torch\n"
  assert [(run["library"], run["name"], run["variant"]) for run in found] == [
      ("jla", "gla_1b3", "dots"), ("jla", "mamba2_1b3", "dots")]
  with pytest.raises(ValueError, match="--peers=torch: 'torch' is unknown; known: jla, fla"):
    peers.chosen(["torch"], [], [])


def test_the_command_trains_theirs_and_ours_into_one_file(tmp_path):
  (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(LIBRARY))
  (tmp_path / "jla.py").touch()  # installed, so that the command asks for it
  path = tmp_path / "steps.jsonl"
  result = subprocess.run([sys.executable, ROOT / "experiments/bench_training.py", "--tiny", "--steps=3",
                           "--timed_steps=2", "--set=step", "--peers=jla,fla", "--models=transformer_1b3",
                           "--variants=lean", f"--out={path}"], cwd=ROOT, capture_output=True, text=True,
                          env=ENVIRONMENT | {"PYTHONPATH": str(tmp_path)})
  assert result.returncode == 0, (result.stdout, result.stderr)
  assert "fla is left out: " in result.stdout and "1 runs of other libraries, 0 recorded before" in result.stdout
  theirs, ours = sweeps.load(path)
  assert (theirs["setting"]["library"], theirs["setting"]["variant"], theirs["kernels"]) == ("jla", "lean", 1)
  assert ours["setting"]["library"] == "lin_jax" and ours["first_step_s"] >= ours["compile_s"] > 0


def test_other_sets_have_no_peers():
  process = Command("bench_training.py", "--set=tnl", "--peers=jla")
  _, err = process.communicate()
  assert process.returncode == 2 and "--peers=jla: goes with --set=step, not with --set=tnl" in err
