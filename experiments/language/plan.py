"""The runs of a sweep in their order: those that try rates, and those that follow from the results.

A model's highest rate is doubled while it is the best, and its lowest one is halved (`bracket`). Its best rate then
gets longer branches, further seeds, and one more seed at a time while a comparison that it takes part in is within two
standard errors. Where a sweep tries half of the best rate at some lengths (`slower`), too, longer branches than these
have the rate that is better at the last of them.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable

from .runs import Run
from .sweeps import Sweep

LOWEST_RATE, HIGHEST_RATE = 2.5e-4, 1.6e-2
MOST_SEEDS = 4
Scores = Callable[[Run], float | None]


def plan(sweep: Sweep, bits_per_byte: Scores, deviation: float = 0.0) -> list[Run]:
  """Returns all runs that are known to be wanted, those that are done included.

  `bits_per_byte` of a run is None until it is done, and infinite if it diverged. `deviation` is a run's over its seeds.
  """
  models = dict.fromkeys(run.model for run in sweep.runs)
  rates = {model: _rates(sweep, model, bits_per_byte) for model in models}
  best = {model: found for model in models if (found := _best(rates[model], bits_per_byte))}
  branches = {model: _branches(sweep, run, bits_per_byte) for model, run in best.items()}
  if sweep.longer:  # model after model
    first = [run for model in models for run in rates[model] + branches.get(model, [])]
  else:
    first = sweep.runs + [run for model in models for run in rates[model] if run not in sweep.runs]
  seeds = [dataclasses.replace(run, seed=run.seed + 1 + i) for run in best.values() for i in range(sweep.further_seeds)]
  seeds += [dataclasses.replace(run, seed=1) for model in sweep.ends if model in best
            for run in (best[model], *(run for run in branches[model] if run.steps == sweep.longer[-1][0]))]
  # One seed of every model comes before the next seed, so that a sweep that is cut short has one for all.
  planned = first + sorted(seeds, key=lambda run: run.seed)
  return planned + [run for run in _undecided(sweep, best, bits_per_byte, deviation) if run not in planned]


def _branches(sweep, run, bits_per_byte):
  """The longer branches of a model's best run, as far as their rates are known."""
  at = lambda run, lengths: [dataclasses.replace(run, steps=steps, decay_steps=decay) for steps, decay in lengths]
  if run.model not in sweep.ends or not sweep.slower:
    return at(run, sweep.longer)
  last = sweep.slower[-1]
  usual = at(run, [length for length in sweep.longer if length <= last])
  slower = at(dataclasses.replace(run, learning_rate=run.learning_rate / 2), sweep.slower)
  better = _best([usual[-1], slower[-1]], bits_per_byte)
  return usual + slower + (at(better, [length for length in sweep.longer if length > last]) if better else [])


def _rates(sweep, model, bits_per_byte):
  runs = [run for run in sweep.runs if run.model == model]
  while sweep.bracket and (best := _best(runs, bits_per_byte)):
    rates = [run.learning_rate for run in runs]
    if best.learning_rate == max(rates):
      wanted = 2 * best.learning_rate
    elif best.learning_rate == min(rates):
      wanted = best.learning_rate / 2
    else:
      break
    if not LOWEST_RATE <= wanted <= HIGHEST_RATE:
      break
    runs.append(dataclasses.replace(best, learning_rate=wanted))
  return runs


def _best(runs, bits_per_byte):
  """The best of the runs by the mean over their seeds, None until all are done or if all diverged."""
  if any(bits_per_byte(run) is None for run in runs):
    return None
  scores = {run: _over_seeds(run, bits_per_byte)[0] for run in runs}
  return None if math.isinf(min(scores.values())) else min(scores, key=scores.get)


def _undecided(sweep, best, bits_per_byte, deviation):
  """The next seed of the models whose comparisons are within two standard errors."""
  wanted = {}
  for left, right, factor in sweep.pairs:
    if left in best and right in best:
      (mean, count), (other, others) = (_over_seeds(best[model], bits_per_byte) for model in (left, right))
      if abs(factor * other - mean) < 2 * deviation * (1 / count + factor**2 / others) ** 0.5:
        wanted |= {left: count, right: others}
  return [dataclasses.replace(best[model], seed=best[model].seed + count) for model, count in wanted.items()
          if count < MOST_SEEDS]


def _over_seeds(run, bits_per_byte):
  """The mean over the seeds that are done, and their number."""
  runs = (dataclasses.replace(run, seed=run.seed + i) for i in range(MOST_SEEDS))
  scores = list(itertools.takewhile(lambda score: score is not None, map(bits_per_byte, runs)))
  return sum(scores) / len(scores), len(scores)
