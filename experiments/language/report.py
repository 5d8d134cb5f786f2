"""Records of runs as rows of a table."""

import math
import statistics

from lin_jax.metrics import perplexity

from .runs import key


def summary(rows: list[dict]) -> list[dict]:
  """Returns a row per model and way of training, in the records' order: its best learning rate and the results.

  The best rate has the lowest loss among the runs with the first seed, and the mean is over all seeds of it. Fields:
  `model`, `sequence_length`, `parameters`, `tokens`, `epochs`, `learning_rate`, `learning_rates` (all that were tried),
  `seeds` (how many), `bits_per_byte` (mean), `spread` (sample standard deviation over seeds, None for one), `range`
  (lowest, highest), `perplexity` (of the mean loss), `tokens_per_second` (median), `diverged` (number of runs),
  `device`, `pair_losses` (means, None if a run lacks them). Losses are None if every rate diverged.
  """
  return [_row(group) for group in _groups(rows, _trained_alike)]


def _row(group):
  first = group[0]
  seed = min(record["seed"] for record in group)
  rates = {record["learning_rate"]: math.inf if record["diverged"] else record["bits_per_byte"]
           for record in group if record["seed"] == seed}
  best = min(rates, key=rates.get)
  # A record may occur twice after two files were joined, and then counts once.
  runs = list({record["seed"]: record for record in group
               if record["learning_rate"] == best and not record["diverged"]}.values())
  bits = [record["bits_per_byte"] for record in runs]
  speeds = [record["tokens_per_second"] for record in group if record["tokens_per_second"]]
  return {
      "model": first["model"], "sequence_length": first["setting"]["data"]["sequence_length"],
      **{name: first[name] for name in ("parameters", "tokens", "epochs")},
      "learning_rate": best, "learning_rates": sorted(rates),
      "seeds": len(runs), "bits_per_byte": statistics.mean(bits) if bits else None,
      "spread": statistics.stdev(bits) if len(bits) > 1 else None, "range": [min(bits), max(bits)] if bits else None,
      "perplexity": perplexity(statistics.mean(record["held_out_loss"] for record in runs)) if bits else None,
      "tokens_per_second": statistics.median(speeds) if speeds else None,
      "pair_losses": _mean_losses([record.get("pair_losses") for record in runs]),
      "diverged": sum(record["diverged"] for record in group),
      "device": ", ".join(sorted({record["device"] for record in group}))}


def _mean_losses(losses):
  if not losses or None in losses:
    return None
  return {kind: statistics.mean(loss[kind] for loss in losses) for kind in ("repeated", "other")}


def _trained_alike(record):
  setting = {name: value for name, value in record["setting"].items() if name != "seed"}
  varying = "learning_rate", "final_learning_rate"
  return key(setting | {"optim": {k: v for k, v in setting["optim"].items() if k not in varying}})


def _groups(rows, key):
  groups = {}
  for row in rows:
    groups.setdefault(key(row), []).append(row)
  return list(groups.values())
