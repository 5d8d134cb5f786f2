"""The page of claims as markdown: a row for each, with its verdict, and the tables behind them."""

from . import CLAIMS, language, synthetic
from .claim import FAILS, HOLDS, IN_PART, NOT_RUN, Results, percent
from .plots import PLOTS

PAPERS = {"2312.06635": "Gated Linear Attention", "2405.17381": "Lightning Attention, TransNormerLLM",
          "2406.06484": "DeltaNet", "2412.06464": "Gated DeltaNet"}
_HEAD = """# Claims of the papers

Generated from the records beside it by `python experiments/report_claims.py`; do not edit.

Each row is a claim of a paper, and what this repository's runs say of it. A claim is split into points, the comparisons
that it makes; it *holds* when all of them were run and hold, *in part* when some hold, and is *not run* before any has
its record. Settings are smaller than the papers'. A verdict is of the setting beside it and not of the paper's own.
A synthetic task counts for a model when one of the learning rates has solved it or all were tried.

Other pages: [runs](runs.md), what each record is and how it was made; [kernels](kernels.md), every kernel against other
libraries; [models](models.md), every config beside its paper's size; [kernel log](kernel_log.md), what was tried.
"""


def render(results: Results) -> str:
  found = [(claim, claim.judge(results)) for claim in CLAIMS]
  verdicts = [finding.verdict for _, finding in found]
  counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in (HOLDS, IN_PART, FAILS, NOT_RUN))
  parts = [_HEAD, f"{len(found)} claims: {counts}."]
  for paper, title in PAPERS.items():
    parts += [f"## {title} (arXiv:{paper})",
              _table(["claim", "where", "paper", "our setting", "our result", "points", "verdict", "command"],
                     [_row(claim, finding) for claim, finding in found if claim.paper == paper])]
  parts += _tables(results)
  parts += [f"![{plot.title}]({plot.file})" for plot in PLOTS if plot.drawn(results)]
  return "\n\n".join(part.strip() for part in parts) + "\n"


def _row(claim, finding):
  points = f"{sum(map(bool, finding.points))} of {finding.run}" + (
      f", {len(finding.points) - finding.run} not run" if finding.run < len(finding.points) else "")
  if not finding.run:
    points, result = "", "the command's records are not all there: it takes more GPU time"
  else:
    result = finding.text
  return [claim.text, claim.place, claim.printed, claim.setting, result, points, f"**{finding.verdict}**",
          f"`{claim.command}`"]


def _tables(results):
  parts = []
  for sweep in language.sweeps.SWEEPS:
    found = language.rows(results, sweep)
    rows = [[language.name(model), f"{row['parameters'] / 1e6:.1f}M", f"{row['learning_rate']:g}",
             ", ".join(f"{rate:g}" for rate in row["learning_rates"]), str(row["seeds"]), language.bits(row),
             f"{row['perplexity']:.2f}"]
            for model, row in sorted(found.items(), key=lambda x: x[1]["bits_per_byte"])]
    parts += _section(f"Language models, sweep `{sweep}`: held-out text",
                      ["", "parameters", "best learning rate", "tried", "seeds", "bits per byte", "perplexity"], rows)
    if apart := _apart(found):
      parts.append(f"Seeds of one model are up to {apart:.3f} bits per byte apart: a smaller difference says little.")
    elif rows and (apart := _apart(language.rows(results, "main"))):
      parts.append(f"One seed a model. Those of sweep `main` are up to {apart:.3f} bits per byte apart: a smaller "
                   "difference says little.")
  points = [(setting, width) for setting in synthetic.MQAR_SETTINGS for width in synthetic.WIDTHS]
  rows = [[synthetic.NAMES[mixer], *(_cell(synthetic.mqar(results, mixer, *point)) for point in points)]
          for mixer in synthetic.NAMES]
  parts += _section("MQAR, tokens/pairs and width: accuracy, in percent",
                    ["", *(f"{length}/{pairs} d{width}" for (length, pairs), width in points)], rows)
  not_begun, tried = synthetic.mqar_not_begun(results)
  if not_begun:
    length, pairs = synthetic.MQAR_SETTINGS[-1]
    parts.append(f"{not_begun} of {tried} models recall less than 2% of {pairs} pairs in {length} tokens: a quarter of "
                 "the papers' epochs ends before they begin to learn, and which of two such is ahead says nothing.")
  tasks = list(dict.fromkeys(run.task for run in synthetic.sweeps.mad()))
  rows = [[synthetic.NAMES[mixer], *(_cell(synthetic.mad(results, mixer, task)) for task in tasks),
           _cell(synthetic.mad_average(results, mixer))] for mixer in synthetic.NAMES]
  parts += _section("MAD: mean of baseline and hardest change, in percent",
                    ["", *(task.replace("_", " ") for task in tasks), "average"], rows)
  sizes = [f"{examples:,}" for examples in synthetic.EXAMPLES]
  for title, score, form in (
      ("RegBench: legal next symbols at the best test of a run, in percent, by training sequences",
       synthetic.regbench, percent),
      ("RegBench: least total variation from the true distribution of the next symbol, by training sequences",
       synthetic.regbench_distance, "{:.3f}".format)):
    rows = [[synthetic.NAMES[mixer], *(_cell(score(results, mixer, examples), form) for examples in synthetic.EXAMPLES)]
            for mixer in synthetic.NAMES]
    parts += _section(title, ["", *sizes], rows)
  return parts


def _apart(found):
  """The largest difference between seeds of one model, 0 where none has two."""
  return max((row["range"][1] - row["range"][0] for row in found.values() if row["seeds"] > 1), default=0.0)


def _section(title, head, rows):
  """A table of the rows of which something is known; nothing if that is none."""
  known = [row for row in rows if any(row[1:])]
  return [f"### {title}", _table(head, known)] if known else []


def _cell(share, form=percent):
  return "" if share is None else form(share)


def _table(head, rows):
  return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
