"""Records of runs as rows of a table."""

import math
import statistics
from collections.abc import Sequence

from lin_jax.metrics import perplexity

from .runs import key


def summary(rows: list[dict]) -> list[dict]:
  """Returns a row per model and way of training, in the records' order: its best learning rate and the results.

  The best rate has the lowest mean loss on the split val over its seeds, and the results are means over these. A rate
  that was best with one seed thus yields to another one when its further seeds are worse. The results are on the split
  test if all rows' runs have a loss there, and otherwise on val for all rows, so that rows are compared on the same
  text. Fields:
  `model`, `sequence_length`, `parameters`, `tokens`, `epochs`, `learning_rate`, `learning_rates` (all that were tried),
  `split` (test or val), `seeds` (how many), `bits_per_byte` (mean), `spread` (sample standard deviation over seeds,
  None for one), `range` (lowest, highest), `perplexity` (of the mean loss), `tokens_per_second` (median), `diverged`
  (number of runs), `device`, `pair_losses` and `facts` (means as the records have them, None if a run lacks them).
  Losses are None if every rate diverged.
  """
  chosen = [_at_best_rate(group) for group in _groups(rows, _trained_alike)]
  split = "test" if all("test" in (record.get("losses") or {}) for *_, runs in chosen for record in runs) else "val"
  return [_row(group, rates, best, runs, split) for group, rates, best, runs in chosen]


def seed_deviation(rows: list[dict]) -> tuple[float, int]:
  """Returns the pooled standard deviation over seeds, in bits per byte, and its degrees of freedom.

  Runs that differ in the seed alone form a group, and of repetitions the last counts. Without a group of two or more
  there is nothing to pool, which gives (0.0, 0).
  """
  by_seed = lambda group: {record["setting"]["seed"]: record["bits_per_byte"] for record in group
                           if not record["diverged"]}
  groups = [list(by_seed(group).values()) for group in _groups(rows, _but_for_the_seed)]
  return pooled(groups)


def pooled(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
  """Returns the pooled standard deviation within the groups of values, and its degrees of freedom."""
  groups = [values for values in groups if len(values) > 1]
  freedom = sum(len(values) - 1 for values in groups)
  squares = sum(statistics.variance(values) * (len(values) - 1) for values in groups)
  return (math.sqrt(squares / freedom) if freedom else 0.0), freedom


def best_rate(group: list[dict]) -> float:
  """Returns the rate with the lowest mean loss on val over its seeds, of those that ran with the first seed."""
  rates = _rates(group)
  return min(rates, key=rates.get)


def _rates(group):
  first, by_rate = min(record["seed"] for record in group), {}
  for record in group:  # of repetitions, the last counts
    bits = math.inf if record["diverged"] else record["bits_per_byte"]
    by_rate.setdefault(record["learning_rate"], {})[record["seed"]] = bits
  return {rate: statistics.mean(seeds.values()) for rate, seeds in by_rate.items() if first in seeds}


def _at_best_rate(group):
  """The group, its rates with their losses, the best rate and the runs with it that did not diverge."""
  rates, best = _rates(group), best_rate(group)
  # A record may occur twice after two files were joined, and then counts once.
  runs = {record["seed"]: record for record in group if record["learning_rate"] == best and not record["diverged"]}
  return group, rates, best, list(runs.values())


def _row(group, rates, best, runs, split):
  first = group[0]
  scores = [record["losses"]["test"] if split == "test" else
            {"bits_per_byte": record["bits_per_byte"], "loss": record["held_out_loss"]} for record in runs]
  bits = [score["bits_per_byte"] for score in scores]
  speeds = [record["tokens_per_second"] for record in group if record["tokens_per_second"]]
  return {
      "model": first["model"], "sequence_length": first["setting"]["data"]["sequence_length"],
      **{name: first[name] for name in ("parameters", "tokens", "epochs")},
      "learning_rate": best, "learning_rates": sorted(rates), "split": split,
      "seeds": len(runs), "bits_per_byte": statistics.mean(bits) if bits else None,
      "spread": statistics.stdev(bits) if len(bits) > 1 else None, "range": [min(bits), max(bits)] if bits else None,
      "perplexity": perplexity(statistics.mean(score["loss"] for score in scores)) if bits else None,
      "tokens_per_second": statistics.median(speeds) if speeds else None,
      **{name: _mean([record.get(name) for record in runs]) for name in ("pair_losses", "facts")},
      "diverged": sum(record["diverged"] for record in group),
      "device": ", ".join(sorted({record["device"] for record in group}))}


def _mean(values):
  """The means of all numbers in records of one form, or None if there is no record or one is None."""
  if not values or None in values:
    return None
  if isinstance(values[0], dict):
    return {name: _mean([value[name] for value in values]) for name in values[0]}
  if isinstance(values[0], list):
    return [_mean(parts) for parts in zip(*values, strict=True)]
  return statistics.mean(values)


def _but_for_the_seed(record):
  return key({name: value for name, value in record["setting"].items() if name != "seed"})


def _trained_alike(record):
  setting = {name: value for name, value in record["setting"].items() if name != "seed"}
  varying = "learning_rate", "final_learning_rate"
  return key(setting | {"optim": {k: v for k, v in setting["optim"].items() if k not in varying}})


def _groups(rows, key):
  groups = {}
  for row in rows:
    groups.setdefault(key(row), []).append(row)
  return list(groups.values())
