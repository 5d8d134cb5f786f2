"""Sweeps by name, and the parts of them in the order in which a GPU should make them.

`mqar`, `mad`, `mad_rest` and `regbench` follow the authors' protocols (`grids.py`), and `queue` has their runs in the
order of `PARTS`. The others are older and shorter (`reduced.py`).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

from lin_jax import metrics
from running import records
from running.unfinished import Unfinished

from .costs import costs, minutes
from .grids import mad, mad_rest, mqar, regbench
from .reduced import mad_reduced, mqar_reduced, regbench_reduced
from .runs import Run, parse_fields, whole, without_rates

_GRIDS = {function.__name__: function
          for function in (mqar, mad, mad_rest, regbench, mqar_reduced, mad_reduced, regbench_reduced)}


def select(runs: Sequence[Run], task: str = "", mixer: str = "", fields: str = "") -> list[Run]:
  """Returns the runs of a task and a mixer ("" for any) whose task has the fields "name=value,...".

  Raises ValueError for a field that such a task does not have.
  """
  return [run for run in runs if task in ("", run.task) and mixer in ("", run.mixer) and _has(run, fields)]


def _has(run, fields):
  built = run.build_task()
  return all(getattr(built, name) == value for name, value in parse_fields(type(built), fields).items())


@dataclasses.dataclass(frozen=True)
class Part:
  """Runs of a sweep that one command makes, and the claim that they decide."""

  sweep: str
  decides: str
  mixer: str = ""
  task: str = ""
  fields: str = ""
  seed: int = 0

  @property
  def options(self) -> dict[str, Any]:
    """The options of run_synthetic.py that select the runs."""
    listed = {"sweep": self.sweep, "task": self.task, "mixer": self.mixer, "set": self.fields, "seed": self.seed}
    return {name: value for name, value in listed.items() if value}

  def runs(self) -> dict[str, Run]:
    """Returns the runs by the text that stands for their setting."""
    return _runs(self)


@functools.cache
def _runs(part):
  chosen = select(_GRIDS[part.sweep](), part.task, part.mixer, part.fields)
  return {records.key(run.setting()): run for run in (dataclasses.replace(run, seed=part.seed) for run in chosen)}

_SOLVES = "DeltaNet without convolutions solves 64 pairs in 512 tokens at every width."
_ABOVE = "GLA recalls at least as much as RetNet at every width."
_FUZZY, _FACTS = "DeltaNet is the best at fuzzy recall.", "DeltaNet memorizes less than the others."
_RECALLS = "DeltaNet recalls in context, with and without noise, and copies without error."
_AVERAGE = "Average over the tasks: Transformer, then DeltaNet, then Mamba, then GLA."
_LANGUAGES = "DeltaNet learns regular languages in context as well as Transformer++, GLA and Mamba."
_RECALL_TASKS = "in_context_recall", "noisy_recall", "selective_copying"
PARTS = [
    Part("mqar", _SOLVES, "delta_net"),
    Part("mad", _FACTS, task="memorization"), Part("mad", _FUZZY, task="fuzzy_recall"),
    *(Part("mad", _RECALLS, "delta_net", task) for task in _RECALL_TASKS),
    *(Part("mqar", _ABOVE, mixer, fields="pairs=16") for mixer in ("gla", "retention")),
    *(Part("regbench", _LANGUAGES, fields=f"train_examples={examples}") for examples in (1000, 2500, 5000)),
    *(Part("mad", _AVERAGE, task=task) for task in (*_RECALL_TASKS, "compression")),
    Part("mqar", "DeltaNet recalls more than Mamba at small widths.", "mamba"),
    Part("mqar", "Softmax attention solves MQAR at every setting.", "attention"),
    *(Part("mqar", _ABOVE, mixer, fields="pairs=64") for mixer in ("gla", "retention")),
    Part("regbench", _LANGUAGES, fields="train_examples=10000"),
    *(Part("mqar", _ABOVE, mixer, fields="pairs=16", seed=seed) for seed in (1, 2, 3)
      for mixer in ("gla", "retention")),
    Part("mad_rest", _FACTS, task="memorization"), Part("mad_rest", _FUZZY, task="fuzzy_recall"),
    *(Part("mad_rest", _AVERAGE, task=task) for task in (*_RECALL_TASKS, "compression")),
]


def ordered() -> list[Run]:
  """Returns the runs of all parts in their order, each once."""
  return list({key: run for part in PARTS for key, run in part.runs().items()}.values())


def queue(path: pathlib.Path | str) -> list[Unfinished]:
  """Returns the parts that the records in the file `path` leave to be done, the most valuable per minute first.

  The minutes are estimates for a GPU that does nothing else, and are too high where a model solves its task early. A
  run that belongs to several parts counts for the first one.
  """
  path, items = pathlib.Path(path), []
  found = metrics.read(path) if path.exists() else []
  settings = [whole(record["setting"]) for record in found]
  done = set(map(records.key, settings))
  solved = {records.key(without_rates(setting)) for setting, record in zip(settings, found) if record["solved"]}
  for part in PARTS:
    groups = {}
    for key, run in part.runs().items():
      if key not in done and (shared := records.key(without_rates(run.setting()))) not in solved:
        groups.setdefault(shared, []).append(run)
    done |= part.runs().keys()
    if groups:
      options = " ".join(f"--{name}={value}" for name, value in part.options.items())
      items.append(Unfinished(
          ", ".join(f"seed {value}" if name == "seed" else value for name, value in part.options.items()),
          f"python experiments/run_synthetic.py {options} --until_solved --out=experiments/results/{path.name}",
          sum(map(len, groups.values())), sum(minutes(runs, _measured()) for runs in groups.values()), part.decides))
  return items


@functools.cache
def _measured():
  path = pathlib.Path(__file__).parents[1] / "results" / "synthetic.jsonl"
  return costs(metrics.read(path), [run for sweep in (mqar_reduced, mad_reduced, regbench_reduced) for run in sweep()])


SWEEPS = _GRIDS | {"queue": ordered}
