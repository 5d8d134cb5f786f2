"""Minutes that runs take on one GPU, estimated from the records of the reduced sweeps."""

import dataclasses
import math
from collections.abc import Sequence

from running import records

from .runs import Run, without_rates

# The reduced sweeps ran in about seven processes per GPU. Alone, a step takes this part of the time in their records
# (results/raw/synthetic_profile_h100.txt), and a further model side by side takes this part of the first one's time.
_ALONE, _FURTHER = 1 / 4.5, 0.6
_START = 25.0  # seconds of drawing examples and compiling
_RATES = 3  # side by side in those records
_SOLVED = 2  # times the steps after which a reduced run had solved the task


@dataclasses.dataclass(frozen=True)
class Cost:
  """The measured time of a setting: its run, seconds per step, and the step at which it was solved (None if never)."""

  run: Run
  step: float
  solved: int | None


def costs(found: Sequence[dict], planned: Sequence[Run]) -> list[Cost]:
  """Returns what the records that a GPU made of the `planned` runs cost."""
  known = {_key(run): run for run in planned}
  measured = []
  for record in found:
    run = known.get(_key(Run(**record["setting"])))
    if run and record["device"] != "cpu" and record.get("side_by_side") == _RATES:
      seconds = max(record["seconds"] - _START, 0.5 * record["seconds"]) / record["steps"]
      measured.append(Cost(run, seconds, record["steps"] if record["solved"] else None))
  return measured


def minutes(runs: Sequence[Run], measured: Sequence[Cost]) -> float:
  """Estimates the minutes of runs that are trained side by side, alone on a GPU, until the first of them has solved the
  task. NaN if nothing alike was measured."""
  run = runs[0]
  alike = [cost for cost in measured if cost.run.mixer == run.mixer]
  if not alike:
    return math.nan
  # Of equal settings the fastest was trained longest, so that compiling weighs least.
  nearest = min(alike, key=lambda cost: (cost.run.task != run.task, abs(math.log(_work(run) / _work(cost.run))),
                                         cost.step))
  together = (1 + _FURTHER * (len(runs) - 1)) / (1 + _FURTHER * (_RATES - 1))
  step = nearest.step * _work(run) / _work(nearest.run) * together * _ALONE
  same = [cost.solved for cost in alike if cost.solved and _place(cost.run) == _place(run)]
  steps = min([run.steps, *(_SOLVED * solved for solved in same)])
  return (_START + steps * step) / 60


def _key(run):
  return records.key(without_rates(run.setting()))


def _place(run):
  return run.task, run.task_fields, run.width


def _work(run):
  return run.batch_size * run.build_task().sequence_length * run.width * run.depth
