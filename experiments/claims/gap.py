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
class Curve:
  """One model's bits per byte by millions of tokens and seed, at the rate whose shortest branches are best on val."""

  rate: float
  tried: list[float]
  bits: dict[int, list[float]]


def curves(results: Results, split: str = _BOTH) -> dict[str, Curve]:
  """Returns the curves on `split` of the models that have records."""
  found = {}
  for model in sweeps.GAP_MODELS:
    records = [record for record in results.lines(sweeps.FILES[_SWEEP])
               if record["model"] == model and not record["diverged"]]
    if records:
      shortest = [record for record in records if record["tokens"] == min(r["tokens"] for r in records)]
      rate = best_rate(shortest)
      found[model] = Curve(rate, sorted({record["learning_rate"] for record in shortest}), _by_tokens(
          [record for record in records if record["learning_rate"] == rate], split))
  return found


def _by_tokens(records, split):
  losses = {}
  for record in records:
    losses.setdefault(round(record["tokens"] / 1e6), {})[record["seed"]] = record["losses"][split]["bits_per_byte"]
  return {tokens: list(seeds.values()) for tokens, seeds in sorted(losses.items())}


def above(results: Results, split: str = _BOTH) -> dict[str, list[tuple[int, float]]]:
  """Returns points of millions of tokens and bits per byte above Transformer++, means over seeds, by model."""
  found = curves(results, split)
  reference = found[_REFERENCE].bits if _REFERENCE in found else {}
  points = {model: [(tokens, statistics.mean(bits) - statistics.mean(reference[tokens]))
                    for tokens, bits in curve.bits.items() if tokens in reference] for model, curve in found.items()}
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
  """Returns the head and the rows of bits per byte by model and tokens, with the seeds where there are several."""
  found = curves(results)
  lengths = sorted({tokens for curve in found.values() for tokens in curve.bits})
  cell = lambda bits: f"{statistics.mean(bits):.4f}" + (f" ({len(bits)} seeds)" if len(bits) > 1 else "")
  return (["", "best learning rate", "tried", *(f"{tokens}M tokens" for tokens in lengths)],
          [[name(model), f"{curve.rate:g}", ", ".join(f"{rate:g}" for rate in curve.tried),
            *(cell(curve.bits[tokens]) if tokens in curve.bits else "" for tokens in lengths)]
           for model, curve in found.items()])


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
    found = {model: curves(results).get(from_normal(model)) for model in (left, right)}
    both = set.intersection(*(set(curve.bits) if curve else set() for curve in found.values()))
    if not both:
      return Finding("", (None,))
    rows = {model: language.averaged(curve.bits[max(both)]) for model, curve in found.items()}
    finding = language.compared(rows, [(left, right)], factor, results)
    return Finding(f"after {max(both)}M tokens: {finding.text}", finding.points, finding.close, finding.labels)

  return judge
