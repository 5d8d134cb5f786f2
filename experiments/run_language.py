"""Trains the language models of a sweep at matched size and tokens. The same command continues where it stopped.

  python experiments/prepare_data.py --corpus=english --out=data/english
  JAX_COMPILATION_CACHE_DIR=runs/compiled python experiments/run_language.py --sweep=main --limit_seconds=540 \
      --out=experiments/results/language.jsonl

The first runs of a sweep try learning rates. When all rates of a model have a line in --out, the runs follow that
`language/plan.py` describes: a higher rate if the highest is the best, longer branches, other seeds. Each run has its
own directory in --workdir, where it is saved when the time is over or SIGTERM comes, and from which it resumes exactly.
Each adds one JSON line to --out when it ends, and keeps its parameters. Several commands may share a GPU (--models,
XLA_PYTHON_CLIENT_MEM_FRACTION) if each has its own --out. Exit codes: 0 done, or the time is over; 1 a run failed;
2 a user's error.
"""

import dataclasses
import pathlib
import sys

from absl import flags

from language.execution import execute
from language.facts import questions
from language.runs import Run
from language.sweeps import DATA, SWEEPS, Sweep
from lin_jax.config import validate
from lin_jax.data import TokenDataset
from lin_jax.model import abstract_model
from running import commands

_SWEEP = flags.DEFINE_enum("sweep", None, list(SWEEPS), "Name of the sweep.", required=True)
_OUT = flags.DEFINE_string("out", None, "JSON lines file to which each run's record is appended.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", "runs/language", "Directory that holds a directory per run.")
_DATA = flags.DEFINE_string("data", "", "Dataset directory; by default the sweep's own.")
_MODELS = flags.DEFINE_list("models", [], "Models of the sweep; all if none is given.")
_STEPS = flags.DEFINE_integer("steps", 0, "Optimizer steps per run, and of the shortest branch; 0 for the sweep's own.",
                              lower_bound=0)
_TINY = flags.DEFINE_bool("tiny", False, "Trains models of width 32 with two layers on batches of 8 x 64 tokens, to "
                          "prove the command on a CPU.")
_LIMIT = flags.DEFINE_float("limit_seconds", 0, "Stops after this time, or after a compilation under way; 0 for no "
                            "limit.", lower_bound=0)


def main(_):
  sweep = _chosen()
  data = _DATA.value or DATA.get(_SWEEP.value, "data/english")
  TokenDataset(data, "val")  # refuses a directory without a dataset before anything is made
  configs = [validate(run.train_config(data)) for run in sweep.runs]
  if asked := [config for run, config in zip(sweep.runs, configs, strict=True) if run.by_place]:
    questions(asked[0].data)  # refuses a dataset without facts, before the hours of training and not after them
  for model in {config.name: config.model for config in configs}.values():
    abstract_model(model)  # checks the layers' own rules
  finished, left, failed = execute(sweep, data, pathlib.Path(_WORKDIR.value), pathlib.Path(_OUT.value),
                                   _LIMIT.value)
  print(f"{finished} run, {left} left" + (": the same command goes on" if left else ""))
  if failed:
    print("failed:", *failed, sep="\n  ", file=sys.stderr)
    sys.exit(1)


def _chosen() -> Sweep:
  sweep = SWEEPS[_SWEEP.value]()
  known = list(dict.fromkeys(run.model for run in sweep.runs))
  if unknown := [name for name in _MODELS.value if name not in known]:
    raise ValueError(f"--models={unknown[0]}: --sweep={_SWEEP.value} has {', '.join(known)}")
  runs = [_changed(run) for run in sweep.runs if run.model in (_MODELS.value or known)]
  scale = _STEPS.value / min(run.steps for run in sweep.runs) if _STEPS.value else 1
  longer, slower = (tuple((round(steps * scale), max(1, round(decay * scale))) for steps, decay in lengths)
                    for lengths in (sweep.longer, sweep.slower))
  return dataclasses.replace(sweep, runs=runs, longer=longer, slower=slower)


def _changed(run: Run) -> Run:
  steps = {"steps": _STEPS.value} if _STEPS.value else {}
  if steps and run.decay_steps:
    steps["decay_steps"] = max(1, _STEPS.value // 5)
  return run.changed(tiny=_TINY.value, **steps)


if __name__ == "__main__":
  commands.run(main, cached=True)
