"""The command `harness.py`, as a user types it, on a task of local files."""

import contextlib
import json
import subprocess
import sys

import pytest

from lin_jax import sharding
from lin_jax.checkpoint import Checkpoints
from lin_jax.config import CheckpointConfig
from lin_jax.config import save as save_config
from lin_jax.data import train_iterator
from lin_jax.training import make_state
from tests.environment import ENVIRONMENT
from tests.forked import ROOT, Command
from tests.lin_jax import tiny

# As about thirty tasks of the package do, for their metrics: a module of that name is among the commands too.
SCORING = f"""
import evaluate

def documents(docs):
  assert not evaluate.__file__.startswith({str(ROOT / "experiments")!r})
  assert evaluate.EvaluationModule
  return docs
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A workdir with an untrained model that reads bytes."""
  workdir = tmp_path_factory.mktemp("run")
  config = tiny.config(tiny.write_dataset(tmp_path_factory.mktemp("data") / "tokens"))
  config.model.vocab_size = 257
  state = make_state(config, sharding.make_mesh(config.mesh))[3]()
  save_config(config, workdir / "config.json")
  with contextlib.closing(Checkpoints(workdir, CheckpointConfig())) as checkpoints:
    rest = {"opt_state": state.opt_state, "step": state.step, "skipped": state.skipped}
    checkpoints.save(1, state.params, rest, train_iterator(config.data, 0, vocab_size=257), config)
  return workdir


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tasks")
  docs = [{"query": "1, 2, 3,", "choices": [" 4", " five"], "gold": 0}, {"query": "a b", "choices": [" c", " d e"],
                                                                       "gold": 1}]
  (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs * 2))
  for name, file in (("counting", "docs.jsonl"), ("nothing", "missing.jsonl")):
    task = dict(task=name, dataset_path="json", dataset_kwargs={"data_files": {"test": str(folder / file)}},
                test_split="test", output_type="multiple_choice", doc_to_text="{{query}}", target_delimiter="",
                doc_to_choice="{{choices}}", doc_to_target="{{gold}}", metric_list=[{"metric": "acc"}])
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
  task |= dict(task="last", dataset_kwargs={"data_files": {"test": str(folder / "docs.jsonl")}},
               output_type="loglikelihood", doc_to_target="{{choices[gold]}}", metric_list=[{"metric": "perplexity"}])
  (folder / "last.yaml").write_text(json.dumps(task))
  (folder / "scoring.py").write_text(SCORING)
  scored = json.dumps(task | dict(task="scored", process_docs="FUNCTION"))
  (folder / "scored.yaml").write_text(scored.replace('"FUNCTION"', "!function scoring.documents"))
  return folder


def environment(cache):
  """Users have no fake devices; the package keeps downloads and tables where HF_HOME says."""
  return ENVIRONMENT | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}


def start(cache, *arguments):
  return subprocess.Popen([sys.executable, ROOT / "experiments" / "harness.py", *map(str, arguments)], cwd=ROOT,
                          env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_results_are_printed_and_written(run, tasks, tmp_path):
  process = start(tmp_path / "cache", f"--workdir={run}", "--tasks=count*,last,scored", f"--include_path={tasks}",
                  "--limit=3", f"--out={tmp_path}/results.json", "--batch_size=4")
  out, err = process.communicate()
  assert process.returncode == 0, err
  assert "|counting|" in out and "results.json" in out
  record = json.loads((tmp_path / "results.json").read_text())
  assert record["results"]["counting"]["acc,none"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
  assert record["n-samples"]["counting"]["effective"] == 3
  # An untrained model gives each of 257 bytes about the same probability; the targets are of two and four bytes.
  assert 257**2 < record["results"]["last"]["perplexity,none"] < 257**4
  assert record["results"]["last"]["perplexity_stderr,none"] > 0 and "os.fork" not in err
  assert record["results"]["scored"]["perplexity,none"] == record["results"]["last"]["perplexity,none"]
  assert record["context"] is None and record["environment"]["lm_eval"]


def test_mistakes_exit_with_2_and_one_message(run, tasks, tmp_path):
  cases = [
      (["--tasks=counting", f"--include_path={tasks}/none"], "none: no such directory"),
      (["--tasks=nothing", f"--include_path={tasks}"], "--tasks=nothing: Unable to find"),
      (["--tasks=counting", f"--include_path={tasks}", "--checkpoint=7"], "no checkpoint of step 7; saved: [1]"),
      (["--tasks=counting", f"--include_path={tasks}", "--mesh=1,8"], "--mesh=1,8: must be sizes of different axes"),
  ]
  processes = [Command("harness.py", f"--workdir={run}", *arguments, env=environment(tmp_path / "cache"))
               for arguments, _ in cases]
  for process, (arguments, message) in zip(processes, cases, strict=True):
    out, err = process.communicate()
    assert process.returncode == 2, (arguments, out, err)
    assert message in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("harness.py: ")]) == 1
