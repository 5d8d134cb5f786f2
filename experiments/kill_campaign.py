"""Kills training runs at random moments, resumes them, and compares their ends with an unbroken run's end.

  python experiments/kill_campaign.py --runs=46 --out=kills.json

Each run is tiny and has its own process. It gets SIGTERM or SIGKILL once, up to 0.3 s after one of the lines that it
prints or up to 3 s after its start, and is then started again until it finishes. These must be equal: the parameters
and the optimizer state bit for bit, the records except for what depends on the clock, the steps in TensorBoard, the
kept checkpoints, and the best one. The exit code is 1 when a run differs.
"""

import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile

from absl import flags

from faults.killed_runs import campaign
from lin_jax import files
from running import commands, records

_RUNS = flags.DEFINE_integer("runs", 46, "Runs to kill.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 24, "Steps per run.", lower_bound=3)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the signals and their moments.")
_DATA = flags.DEFINE_string("data", "", "Dataset directory; by default one is made of this repository's README.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Directory that keeps the runs; by default they are deleted.")
_OUT = flags.DEFINE_string("out", "", "JSON file that receives the counts.")

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def main(_):
  with contextlib.ExitStack() as stack:
    folder = pathlib.Path(_WORKDIR.value or stack.enter_context(tempfile.TemporaryDirectory())).absolute()
    if any(folder.glob("*")):
      raise ValueError(f"--workdir={_WORKDIR.value}: must be empty or missing")
    data = pathlib.Path(_DATA.value) if _DATA.value else _dataset(folder / "data")
    counts = campaign(folder, data, _RUNS.value, _STEPS.value, _SEED.value)
  print(json.dumps(counts), flush=True)
  if _OUT.value:
    record = {"run": records.now(), **records.provenance(), **counts}
    files.write(_OUT.value, json.dumps(record, indent=1) + "\n")
  if counts["different"]:
    sys.exit(1)


def _dataset(path):
  subprocess.run([sys.executable, _ROOT / "experiments" / "prepare_data.py", f"--input={_ROOT}/README.md",
                  "--separator=\n\n", "--tokenizer=bytes", "--val_fraction=0.3", "--test_fraction=0", f"--out={path}"],
                 check=True)
  return path


if __name__ == "__main__":
  commands.run(main)
