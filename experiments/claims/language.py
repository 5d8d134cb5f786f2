"""Claims on language modelling at matched size and tokens, from the records of run_language.py."""

import functools
import statistics
from collections.abc import Mapping, Sequence

from language import sweeps
from language.models import from_normal
from language.report import seed_deviation, summary

from .claim import Claim, Finding, Results

FILE, FILES, LEVEL = "language.jsonl", sweeps.FILES, sweeps.LEVEL  # the file of all sweeps but those of FILES
NAMES = {"transformer": "Transformer++", "retnet": "RetNet", "tnl": "TransNormerLLM", "gla": "GLA", "mamba": "Mamba",
         "deltanet": "DeltaNet", "gated_deltanet": "Gated DeltaNet", "deltanet_swa": "DeltaNet with sliding windows",
         "deltanet_global": "DeltaNet with two attention layers", "gla_conv": "GLA with convolutions",
         "deltanet_no_conv": "DeltaNet without convolutions",
         "gla_carried": "GLA with carried state", "retnet_carried": "RetNet with carried state", "no_decay": "no decay",
         "constant_decay": "constant decay", "scalar_decay": "decay per token",
         "supra": "SUPRA's layer", "linearized_5": "Transformer++ linearized, 5% more tokens",
         "linearized_20": "Transformer++ linearized, 20% more tokens",
         "retnet_slow": "RetNet with slow heads", "constant_decay_slow": "constant decay, slow too",
         "gla_spread": "GLA, gates spread", "deltanet_eps": "DeltaNet, small eps",
         "gla_staggered": "GLA, carried and staggered",
         "retnet_slow_staggered": "RetNet with slow heads, carried and staggered", "kda": "Kimi Delta Attention"}
GLA_LEVEL = "GLA is level with Transformer++ and Mamba (here: at most 1% more bits)."
GLA_UNAIDED = "Short convolutions do not make GLA better."
_GLA, _TNL, _DELTA, _GATED = "2312.06635", "2405.17381", "2406.06484", "2412.06464"


@functools.lru_cache(maxsize=64)
def rows(results: Results, sweep: str) -> dict[str, dict]:
  """Returns the sweep's models by name as in `language.report.summary`, each with its best rate and its seeds."""
  planned = {(run.model, run.steps, run.sequence_length, 32768 // run.sequence_length)
             for run in sweeps.SWEEPS[sweep]().runs}
  records = [record for record in results.lines(FILES.get(sweep, FILE)) if _kind(record) in planned]
  return {row["model"]: row for row in summary(records) if row["bits_per_byte"] is not None}


def _kind(record):
  data = record["setting"]["data"]
  return record["model"], record["setting"]["optim"]["steps"], data["sequence_length"], data["batch_size"]


def name(model: str) -> str:
  if model.startswith("wide_"):
    return f"{name(model.removeprefix('wide_'))}, width 1024"
  if model.endswith("_normal"):
    return f"{name(model.removesuffix('_normal'))}, N(0, 0.02)"
  if model in NAMES:
    return NAMES[model]
  _, norm, activation, *eps = model.split("_")
  return f"{norm.upper()} and {activation}{', small eps' if eps else ''}"


def fewer_bits(sweep: str, pairs: Sequence[tuple[str, str]], factor: float = 1.0):
  """Has a point per pair of models, which holds if the first has fewer bits per byte than the second times `factor`.

  A pair is close when its difference is below two standard errors, by the deviation of a run that `noise` pools. In
  `main_normal`, a model's name stands for the one whose kernels start from N(0, 0.02).
  """
  if sweep == "main_normal":
    pairs = [(from_normal(left), from_normal(right)) for left, right in pairs]

  return lambda results: compared(rows(results, sweep), pairs, factor, results)


def compared(found: Mapping[str, dict], pairs: Sequence[tuple[str, str]], factor: float, results: Results) -> Finding:
  """Returns what `fewer_bits` says of rows by model, which have at least the fields of `averaged`."""
  deviation, _ = noise(results)
  known = [pair for pair in pairs if all(model in found for model in pair)]
  margin = {(left, right): factor * found[right]["bits_per_byte"] - found[left]["bits_per_byte"]
            for left, right in known}
  error = {(left, right): deviation * (1 / found[left]["seeds"] + factor**2 / found[right]["seeds"]) ** 0.5
           for left, right in known}
  models = dict.fromkeys(model for pair in pairs for model in pair if model in found)
  return Finding("; ".join(f"{name(model)} {bits(found[model])}" for model in models),
                 tuple(margin[pair] > 0 if pair in margin else None for pair in pairs),
                 tuple(pair in margin and abs(margin[pair]) < 2 * error[pair] for pair in pairs),
                 tuple(f"{name(left)} and {name(right)}" for left, right in pairs))


def averaged(scores: Sequence[float]) -> dict:
  """Returns the fields of a row that comparisons read, for one model's bits per byte by seed."""
  return {"bits_per_byte": statistics.mean(scores), "seeds": len(scores),
          "spread": statistics.stdev(scores) if len(scores) > 1 else None}


@functools.lru_cache(maxsize=8)
def noise(results: Results) -> tuple[float, int]:
  """Returns the standard deviation of a run over its seeds, in bits per byte, pooled over all models and sweeps, and
  its degrees of freedom. It is on val, which every record has."""
  return seed_deviation([record for file in (FILE, *FILES.values()) for record in results.lines(file)])


def bits(row: dict) -> str:
  """Writes the mean over the seeds, with their sample standard deviation if there are two or more."""
  spread = "" if row["spread"] is None else f" ± {row['spread']:.4f}"
  return f"{row['bits_per_byte']:.4f}{spread}"


def claims() -> list[Claim]:
  size = "42M parameters, {} tokens of English, bits per byte at the best of the learning rates tried (table below)"
  settings = dict.fromkeys(("main", "gates", "convolutions"), size.format("29.5M")) | {
      "main_normal": f"{size.format('29.5M')}, all kernels from N(0, 0.02) but Mamba's",
      "norms": size.format("19.7M"), "long": f"{size.format('118M')}, 2.5 epochs",
      "starts": f"{size.format('29.5M')}, RetNet's heads spread over 32 to 256 tokens, GLA's gates over 16 to 1,024"}
  claim = lambda sweep, paper, place, text, printed, judge: Claim(
      paper, place, text, printed, settings[sweep],
      f"python experiments/run_language.py --sweep={sweep} --out=experiments/results/{FILE}", judge)
  # A claim of a main table is tried at both numbers of tokens, and from both starts. So are convolutions.
  tried = lambda *words, judge: [claim(sweep, *words, judge(sweep)) for sweep in ("main", "main_normal", "long")]
  convolved = lambda *words, pairs: [claim(sweep, _DELTA, "main table", *words, fewer_bits(sweep, pairs))
                                     for sweep in ("convolutions", "main_normal")]
  below = lambda pairs, factor=1.0: lambda sweep: fewer_bits(sweep, pairs, factor)
  return [
      *tried(_GLA, "main table", "GLA models text better than RetNet.", "28.65 and 32.33 (340M, WikiText perplexity)",
            judge=below([("gla", "retnet")])),
      claim("starts", _GLA, "main table", "GLA models text better than RetNet.", "the same",
            fewer_bits("starts", [("gla_spread", "retnet_slow"), ("gla_spread_normal", "retnet_slow_normal")])),
      *tried(_GLA, "main table", GLA_LEVEL, "28.65, 28.39, 28.39",
             judge=below([("gla", "transformer"), ("gla", "mamba")], LEVEL)),
      claim("gates", _GLA, "ablation of the gate",
            "The finer the decay the better: none, constant, one per token.",
            "23.21, 16.55, 15.56 (340M, training perplexity)",
            fewer_bits("gates", [("constant_decay", "no_decay"), ("scalar_decay", "constant_decay")])),
      claim("gates", _GLA, "ablation of the gate", "A decay per key channel is better than one per token.",
            "14.77 and 15.56", fewer_bits("gates", [("gla", "scalar_decay")])),
      *tried(_TNL, "table of baselines", "TransNormerLLM models text better than the Transformer.",
            "2.248 and 2.362 (385M, loss in bits)", judge=below([("tnl", "transformer")])),
      *tried(_DELTA, "main table", "DeltaNet models text better than RetNet and GLA, and is level with Mamba and "
            "Transformer++ (here: at most 1% more bits).", "28.24; 32.33, 28.65; 28.39, 28.39 (340M)",
            judge=lambda sweep: functools.partial(_deltanet, sweep)),
      *tried(_DELTA, "main table", "Both hybrids are better than DeltaNet and Transformer++.",
            "27.06 and 27.51; 28.24, 28.39 (340M)",
            judge=below([(hybrid, other) for hybrid in ("deltanet_swa", "deltanet_global")
                         for other in ("deltanet", "transformer")])),
      claim("norms", _DELTA, "ablation", "Under 1 + ELU, keys of L2 norm are better than keys of L1 norm.",
            "28.03 and 31.12 (340M)", fewer_bits("norms", [(_normed("l2", "elu1"), _normed("l1", "elu1"))])),
      *convolved("Short convolutions make DeltaNet better.", "28.24 and 29.08 (340M)",
                 pairs=[("deltanet", "deltanet_no_conv")]),
      *convolved("Without short convolutions, too, DeltaNet is better than RetNet.", "29.08 and 32.33 (340M)",
                 pairs=[("deltanet_no_conv", "retnet")]),
      *convolved(GLA_UNAIDED, "28.65 and 29.47 (340M)", pairs=[("gla", "gla_conv")]),
      *tried(_GATED, "main table", "Gated DeltaNet models text better than DeltaNet.", "16.42 and 17.71 (1.3B)",
            judge=below([("gated_deltanet", "deltanet")]))]


def _normed(norm, activation):
  return "deltanet" if (norm, activation) == ("l2", "silu") else f"deltanet_{norm}_{activation}"


def _deltanet(sweep, results):
  better = fewer_bits(sweep, [("deltanet", "retnet"), ("deltanet", "gla")])(results)
  level = fewer_bits(sweep, [("deltanet", "mamba"), ("deltanet", "transformer")], LEVEL)(results)
  texts = dict.fromkeys(text for finding in (better, level) for text in finding.text.split("; ") if text)
  return Finding("; ".join(texts), better.points + level.points, better.close + level.close,
                 better.labels + level.labels)
