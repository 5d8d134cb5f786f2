"""Makes the runs of a sweep that are not recorded yet, within a time limit."""

import math
import pathlib

from lin_jax import files
from running import records
from running.deadline import deadline

from .plan import plan
from .report import seed_deviation
from .runs import Run, key
from .sweeps import Sweep
from .training import finish


def execute(sweep: Sweep, data: str, workdir: pathlib.Path, out: pathlib.Path,
            limit_seconds: float = 0) -> tuple[int, int, list[str]]:
  """Makes the runs. Returns how many it finished, how many are left by present knowledge, and why others failed.

  Each finished run adds its record to `out`, and a run with a record is not repeated. When `limit_seconds` (0 for no
  limit) are over, or at SIGTERM, the run under way is saved, and the next call resumes it.
  """
  found = records.load(out, "setting", "bits_per_byte", "diverged")
  done = {key(record["setting"]): record for record in found}
  deviation, _ = seed_deviation(found)
  failed, finished = {}, 0

  def left():
    def bits_per_byte(run):
      record = done.get(key(run.setting(data)))
      return record and (math.inf if record["diverged"] else record["bits_per_byte"])

    return [run for run in plan(sweep, bits_per_byte, deviation) if bits_per_byte(run) is None and run not in failed]

  with deadline(limit_seconds) as over:
    while (runs := left()) and not over():
      run = runs[0]
      print(f"[{len(runs)} left] {_title(run)}", flush=True)
      try:
        record = finish(run, data, workdir)
      except files.Unwritable:
        raise  # the next one could not be written either
      except Exception as e:  # one run that fails must not cost the others of the sweep their record
        failed[run] = f"{_title(run)}: {type(e).__name__}: {e}".splitlines()[0]
        continue
      if record is None:  # stopped by SIGTERM, whoever sent it
        break
      records.append(out, record)
      done[key(record["setting"])] = record
      finished += 1
  return finished, len(left()), list(failed.values())


def _title(run: Run) -> str:
  branch = f", branch of {run.steps} steps" if run.decay_steps else ""
  return f"{run.model}, learning rate {run.learning_rate:g}, seed {run.seed}{branch}"
