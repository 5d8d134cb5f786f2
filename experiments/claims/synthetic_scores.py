"""Scores of the models on MQAR, MAD and RegBench under a protocol, from the records of run_synthetic.py."""

import functools
import json
import math
import operator
import statistics
from collections.abc import Callable, Sequence

from synthetic import TASKS, sweeps
from synthetic.grids import CLAIMED
from synthetic.reduced import HARDEST
from synthetic.runs import RATES, Run, whole

from .claim import Results

FILE = "synthetic.jsonl"
NAMES = {"attention": "Transformer++", "linear_attention": "linear attention", "retention": "RetNet", "gla": "GLA",
         "mamba": "Mamba", "delta_net": "DeltaNet", "gated_delta_net": "Gated DeltaNet"}
MQAR_SETTINGS = ((256, 16), (512, 64))
WIDTHS = (64, 128, 256)
EXAMPLES = (1000, 2500, 5000, 10_000)
# Protocols by their sweeps. The first one with all values of a comparison decides it.
AUTHORS, REDUCED = "authors'", "reduced"
PROTOCOLS = {AUTHORS: {"mqar": ("mqar",), "mad": ("mad", "mad_rest"), "regbench": ("regbench",)},
             REDUCED: {"mqar": ("mqar_reduced",), "mad": ("mad_reduced",), "regbench": ("regbench_reduced",)}}



# The mixers that a mean over MAD's settings needs to have run the same ones, beside the one that it is of.
BESIDE = {AUTHORS: CLAIMED, REDUCED: ()}
BEGUN = 0.02  # a model that recalls a smaller share of MQAR's pairs has not begun to learn to

# In the place of a selected test, for a run that diverged before its first test.
_NOTHING = {"accuracy": 0.0, "total_variation": 1.0, "validation_loss": math.inf}


def place(task: str, mixer: str, width: int, fields: dict) -> str:
  """Returns a text that is equal for the runs that differ in rates and seed alone, within one protocol."""
  return json.dumps([task, mixer, width, fields], sort_keys=True)


@functools.cache
def planned(protocol: str, benchmark: str) -> dict[str, list[Run]]:
  """Returns the runs of the protocol's sweeps by their place."""
  found = {}
  for sweep in PROTOCOLS[protocol][benchmark]:
    for run in sweeps.SWEEPS[sweep]():
      found.setdefault(place(run.task, run.mixer, run.width, run.task_fields), []).append(run)
  return found


@functools.lru_cache(maxsize=8)
def _recorded(results, protocol, benchmark):
  """Returns the records of the protocol's runs with any seed, by place and rates, without runs of other settings."""
  known = {_identity(run.setting()): (at, _rates(run)) for at, runs in planned(protocol, benchmark).items()
           for run in runs}
  found = {}
  for record in results.lines(FILE):
    if key := known.get(_identity(whole(record["setting"]))):
      at, rates = key
      found.setdefault(at, {}).setdefault(rates, []).append(record)
  return found


def _identity(setting):
  return json.dumps({name: value for name, value in setting.items() if name != "seed"}, sort_keys=True)


def _rates(run):
  return tuple(getattr(run, name) for name in RATES)


def best(results: Results, protocol: str, benchmark: str, at: str, measure: Callable[[dict], float],
         choose: Callable[[dict], float] | None = None) -> float | None:
  """Returns the mean of `measure` over seeds, at the rates where the mean of `choose` (`measure` if None) is largest.

  It is None until all rates of the place were tried or one has solved the task.
  """
  found = _recorded(results, protocol, benchmark).get(at, {})
  tried = found.keys() == set(map(_rates, planned(protocol, benchmark).get(at, ())))
  if not found or not (tried or any(record["solved"] for records in found.values() for record in records)):
    return None
  mean = lambda records, of: statistics.mean(map(of, records))
  return mean(max(found.values(), key=lambda records: mean(records, choose or measure)), measure)


def mqar(results: Results, protocol: str, mixer: str, setting: tuple[int, int], width: int) -> float | None:
  """Returns the best accuracy of a learning rate."""
  fields = dict(zip(("sequence_length", "pairs"), setting, strict=True))
  return best(results, protocol, "mqar", place("mqar", mixer, width, fields), operator.itemgetter("accuracy"))


def mad(results: Results, protocol: str, mixer: str, task: str, beside: Sequence[str] = ()) -> float | None:
  """Returns the mean over the settings of a task that the mixer and those `beside` it have run.

  Under the authors' protocol the measure is theirs, the mean over batches. It is None before the baseline and the
  hardest change have been run.
  """
  settings = mad_settings(results, protocol, task, (mixer, *beside))
  if not all(setting in settings for setting in ({}, HARDEST[task])):
    return None
  return statistics.mean(_mad(results, protocol, mixer, task, setting) for setting in settings)


def all_settings(task: str) -> list[dict]:
  """Returns the authors' settings of a task of MAD: no change, and one field's change each."""
  return [{}] + [{name: value} for name, values in TASKS[task].changes.items() for value in values]


def mad_settings(results: Results, protocol: str, task: str, mixers: Sequence[str]) -> list[dict]:
  """Returns the settings of the task that all of the mixers have run."""
  return [setting for setting in all_settings(task)
          if all(_mad(results, protocol, mixer, task, setting) is not None for mixer in mixers)]


def _mad(results, protocol, mixer, task, setting):
  measure = "batch_class_accuracy" if protocol == AUTHORS else "class_accuracy"
  return best(results, protocol, "mad", place(task, mixer, 128, setting), operator.itemgetter(measure))


def mad_average(results: Results, protocol: str, mixer: str, beside: Sequence[str] = ()) -> float | None:
  """Returns the mean over the tasks."""
  scores = [mad(results, protocol, mixer, task, beside) for task in HARDEST]
  return None if None in scores else statistics.mean(scores)


def regbench(results: Results, protocol: str, mixer: str, examples: int) -> float | None:
  """Returns the share of legal symbols at a run's best test, because models then learn the few training sequences by
  heart and get worse.

  Under the authors' protocol the validation loss selects this test and the rate. Under the reduced one the share itself
  does.
  """
  return _regbench(results, protocol, mixer, examples, operator.itemgetter("accuracy"),
                   lambda record: max(accuracy for _, _, accuracy in record["curve"]))


def regbench_distance(results: Results, protocol: str, mixer: str, examples: int) -> float | None:
  """Returns the total variation from the true distribution, selected alike."""
  found = _regbench(results, protocol, mixer, examples, lambda test: -test["total_variation"],
                    lambda record: -min(record["total_variation"]))
  return None if found is None else -found


def _regbench(results, protocol, mixer, examples, of_test, of_record):
  at = place("regbench", mixer, 128, {"train_examples": examples})
  if protocol == REDUCED:
    return best(results, protocol, "regbench", at, of_record)
  selected = lambda record: record["selected"] or _NOTHING
  return best(results, protocol, "regbench", at, lambda record: of_test(selected(record)),
              lambda record: -selected(record)["validation_loss"])


def under_one_protocol(score: Callable[..., float | None], *keys: tuple) -> tuple[str, list[float | None]]:
  """Returns the first protocol under which `score(protocol, *key)` is known for all keys, and the scores. If there is
  none, the scores are None."""
  for protocol in PROTOCOLS:
    if None not in (scores := [score(protocol, *key) for key in keys]):
      return protocol, scores
  return "", [None] * len(keys)
