"""What the sweeps of language models have left to run: how many runs, how many minutes of one GPU, to decide what."""

import math
import pathlib

from lin_jax import metrics
from running.unfinished import Unfinished

from .models import WIDE
from .plan import plan
from .report import seed_deviation
from .runs import TOKENS_PER_STEP, Run
from .sweeps import FILES, SWEEPS

# By what a minute decides: protocols that the claims' doubts name, then bracketed rates and seeds, then long curves.
ORDER = ("main_normal", "starts", "gap", "main", "convolutions", "norms_eps", "carried", "long", "gates", "linearized",
         "norms", "lengths", "papers_layer")
# Tokens per second on one H200, as predicted from the recorded sweeps.
_SPEED = {"mamba": 0.22e6} | dict.fromkeys(WIDE, 0.35e6)
_WORST = 1e3  # bits per byte of a run that is not done, when the runs that follow are counted
_USUAL_SPEED, _COMPILATION = 0.65e6, 20.0  # seconds for a model's first run


def queue(folder: pathlib.Path | str) -> list[Unfinished]:
  """Returns the sweeps that the records in the results folder leave to be done, the most decisive first.

  Runs that follow from results count as if a model's rates that are not done were not better than those that are, and
  the first one the best where none is done. A record is known by its run's fields, so that no dataset is needed.
  """
  return [item for name in ORDER if (item := _item(name, pathlib.Path(folder)))]


def _item(name, folder):
  file, sweep = folder / FILES.get(name, "language.jsonl"), SWEEPS[name]()
  found = metrics.read(file)
  done = {_identity_of(record): math.inf if record["diverged"] else record["bits_per_byte"] for record in found}
  first_seeds = {(run.model, run.seed) for run in sweep.runs}
  assumed = lambda run: _WORST if (run.model, run.seed) in first_seeds else None
  planned = plan(sweep, lambda run: done.get(_identity(run), assumed(run)), seed_deviation(found)[0])
  left = [run for run in planned if _identity(run) not in done]
  if not left:
    return None
  command = f"python experiments/run_language.py --sweep={name} --out=experiments/results/{file.name}"
  minutes = _minutes(left, [run for run in planned if run not in left])
  return Unfinished(name, command, len(left), minutes, sweep.decides)


def _minutes(left: list[Run], done: list[Run]) -> float:
  """Of branches, the trunk counts once, and not as far as a branch that is done has taken it."""
  seconds = _COMPILATION * len({run.model for run in left})
  trunks = {}
  for run in done + left:
    speed, steps = _SPEED.get(run.model, _USUAL_SPEED), 0
    if run.decay_steps:
      trunk, key = run.trunk().steps, (run.model, run.learning_rate, run.seed)
      steps = max(0, trunk - trunks.get(key, 0))
      trunks[key] = max(trunk, trunks.get(key, 0))
    if run in left:
      seconds += (steps + (run.decay_steps or run.steps)) * TOKENS_PER_STEP / speed
  return seconds / 60


def _identity(run):
  return (run.model, run.learning_rate, run.seed, run.steps, run.decay_steps, run.sequence_length, run.carried_windows,
          run.staggered)


def _identity_of(record):
  optim, data = record["setting"]["optim"], record["setting"]["data"]
  return (record["model"], record["learning_rate"], record["seed"], optim["steps"], optim.get("decay_steps", 0),
          data["sequence_length"], data["carried_windows"], data.get("staggered", False))
