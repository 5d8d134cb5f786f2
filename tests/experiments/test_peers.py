"""Models of other libraries train in processes of their own, and within a limit."""

import textwrap

import pytest

from speed import peers

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
        return dict(tokens_per_s=2.0, step_ms=1.0, memory_gib=0.5, parameters=3, losses=[1.0]), time.monotonic()
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
  assert list(results(["hangs"], 10)) == ["TimeoutError: stopped after 10 s"]


def test_a_library_that_is_not_installed_costs_a_line(monkeypatch, capsys):
  monkeypatch.setattr(peers.peers, "missing", {"jla": None, "fla": "not installed: torch"}.get)
  found = peers.chosen(["fla", "jla"], ["gla_1b3", "mamba2_1b3"], ["dots", "amp"])
  assert capsys.readouterr().out == "fla is left out: not installed: torch\n"
  assert [(run["library"], run["name"], run["variant"]) for run in found] == [
      ("jla", "gla_1b3", "dots"), ("jla", "mamba2_1b3", "dots")]
  with pytest.raises(ValueError, match="--peers=torch: 'torch' is unknown; known: jla, fla"):
    peers.chosen(["torch"], [], [])
