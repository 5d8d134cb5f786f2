"""The distance to Transformer++ against tokens: its claims, table and picture, from the records of the sweep `gap`."""

import dataclasses
import statistics
import textwrap

from language import sweeps
from language.models import from_normal
from language.report import best_rate

from . import language
from .claim import Claim, Finding, Results

TITLE = "Bits per byte above Transformer++ after as many tokens, 42M parameters, kernels from N(0, 0.02)"
TEXTS = {"test_english": "English", "test_code": "source code"}
_SWEEP, _BOTH, _REFERENCE = "gap", "test", sweeps.GAP_MODELS[0]
_GLA, _DELTA = "2312.06635", "2406.06484"


@dataclasses.dataclass(frozen=True)
class Point:
  """One model after one number of tokens: bits per byte of each seed at the learning rate that is best on val."""

  rate: float
  others: list[float]  # rates that were tried and are not the best
  bits: list[float]


def curves(results: Results, split: str = _BOTH) -> dict[str, dict[int, Point]]:
  """Returns the points on `split` by millions of tokens of each model that has records."""
  found = {model: {} for model in sweeps.GAP_MODELS}
  for record in sorted(results.lines(sweeps.FILES[_SWEEP]), key=lambda record: record["tokens"]):
    if not record["diverged"]:
      found[record["model"]].setdefault(round(record["tokens"] / 1e6), []).append(record)
  return {model: {tokens: _point(records, split) for tokens, records in by_tokens.items()}
          for model, by_tokens in found.items() if by_tokens}


def _point(records, split):
  rate = best_rate(records)
  by_seed = {record["seed"]: record["losses"][split]["bits_per_byte"] for record in records
             if record["learning_rate"] == rate}
  return Point(rate, sorted({record["learning_rate"] for record in records} - {rate}), list(by_seed.values()))


def above(results: Results, split: str = _BOTH) -> dict[str, list[tuple[int, float]]]:
  """Returns points of millions of tokens and bits per byte above Transformer++, means over seeds, by model."""
  found = curves(results, split)
  reference = found.get(_REFERENCE, {})
  points = {model: [(tokens, statistics.mean(point.bits) - statistics.mean(reference[tokens].bits))
                    for tokens, point in curve.items() if tokens in reference] for model, curve in found.items()}
  return {model: line for model, line in points.items() if line}


def panels(results: Results) -> dict[str, dict[str, list[tuple[int, float]]]]:
  """Returns the lines of the picture by kind of text."""
  return {title: above(results, split) for split, title in TEXTS.items()}


def name(model: str) -> str:
  """All models of the sweep start from N(0, 0.02), so that their names need not say it."""
  return language.name(model.removesuffix("_normal"))


def paragraph(results: Results) -> list[str]:
  """Returns what the opening of the page says of the curves; nothing while no other model has two lengths."""
  said = lambda line: ", ".join(f"{bits:+.3f} after {tokens}M" for tokens, bits in line)
  lines = [f"{name(model)} {said(line)}"
           for model, line in above(results).items() if model != _REFERENCE and len(line) > 1]
  if not lines:
    return []
  text = ("**The distance to Transformer++ changes with the number of tokens** ([picture](gap.png)). These are bits "
          f"per byte above it, on English and source code, from N(0, 0.02). {'. '.join(lines)}.")
  return [textwrap.fill(text, width=120, break_on_hyphens=False)]


def table(results: Results) -> tuple[list[str], list[list[str]]]:
  """Returns the head and the rows of bits per byte by model and tokens, with the rates that were tried, of which the
  best comes first, and the seeds where there are several."""
  found = curves(results)
  lengths = sorted({tokens for curve in found.values() for tokens in curve})
  return (["", *(f"{tokens}M tokens" for tokens in lengths)],
          [[name(model), *(_cell(curve[tokens]) if tokens in curve else "" for tokens in lengths)]
           for model, curve in found.items()])


def _cell(point):
  others = ", ".join(f"{rate:g}" for rate in point.others)
  return (f"{statistics.mean(point.bits):.4f} at {point.rate:g}"
          + (f" ({len(point.bits)} seeds)" if len(point.bits) > 1 else "") + (f"; tried {others}" if others else ""))


def claims() -> list[Claim]:
  setting = ("42M parameters, the most tokens of English and source code that both models have seen, all kernels from "
             "N(0, 0.02), bits per byte on the split test (table below)")
  command = f"python experiments/run_language.py --sweep={_SWEEP} --out=experiments/results/{sweeps.FILES[_SWEEP]}"
  claim = lambda paper, text, printed, judge: Claim(paper, "main table", text, printed, setting, command, judge)
  return [claim(_GLA, language.GLA_LEVEL, "28.65, 28.39", _fewer_bits("gla", "transformer", language.LEVEL)),
          claim(_DELTA, language.GLA_UNAIDED, "28.65 and 29.47 (340M)", _fewer_bits("gla", "gla_conv"))]


def _fewer_bits(left: str, right: str, factor: float = 1.0):
  """As `language.fewer_bits` of one pair, after the most tokens that both models have seen."""

  def judge(results):
    found = {model: curves(results).get(from_normal(model), {}) for model in (left, right)}
    both = set.intersection(*map(set, found.values()))
    if not both:
      return Finding("", (None,))
    rows = {model: language.averaged(curve[max(both)].bits) for model, curve in found.items()}
    finding = language.compared(rows, [(left, right)], factor, results)
    return Finding(f"after {max(both)}M tokens: {finding.text}", finding.points, finding.close, finding.labels)

  return judge
