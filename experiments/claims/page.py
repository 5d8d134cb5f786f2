"""The page of claims as markdown: the answer, the measured results, a row per claim, and the tables behind them."""

from . import CLAIMS, KINDS, language, synthetic
from .claim import FAILS, HOLDS, IN_PART, NOT_RUN, Results, percent
from .measured import RESULTS
from .plots import PLOTS

PAPERS = {"2312.06635": "Gated Linear Attention", "2405.17381": "Lightning Attention, TransNormerLLM",
          "2406.06484": "DeltaNet", "2412.06464": "Gated DeltaNet", "2405.06640": "SUPRA"}
_HEAD = """# Claims of the papers

Generated from the records beside it by `python experiments/report_claims.py`; do not edit.
"""
_READING = """
A claim is split into points, which are the comparisons that it makes; the numbers in parentheses say how many hold. It
*holds* when all of its points were run and hold, and *in part* when some hold. A claim that was tried in two settings
counts twice above and is named once. It is *undecided* when its settings disagree, when its verdict rests on a
difference no larger than that of two seeds, or when it was not run. Settings are smaller than the papers', so a verdict
is about our setting and not about the paper's own.
"""
_MEASURED = """
In a pair of times such as 0.67 / 2.49 ms, the first is the forward pass, and the second is forward and backward pass
together. Losses to other libraries, failures and departures from the papers are in bold.
"""
_PAGES = """## Other pages

- Findings by subject, with their records and commands: [numerics](numerics.md) of the kernels, [language](language.md)
  models of 42M parameters, [synthetic](synthetic.md) tasks, [training](training.md) and its speed, the
  [reliability](reliability.md) of the commands, and [rows of a million tokens](scaling.md) on many GPUs.
- [Kernels](kernels.md) beside other libraries at every shape, and the [log](kernel_log.md) of the work on them.
- [Models](models.md): the size of every config beside its paper's.
- `raw/`: printed output of programs, and the numerics case by case.
"""
_CLASSES = "reproduced", "contradicted", "in part", "undecided"


def render(results: Results) -> str:
  found = {claim: claim.judge(results) for claim in CLAIMS}
  commands = list(dict.fromkeys(claim.command for claim in CLAIMS))
  parts = [_HEAD, *_answer(found), "## What was measured", _MEASURED,
           _table(["run", "machine", "result"], RESULTS), _PAGES, "## Claim by claim",
           "A synthetic task counts for a model when one of the learning rates has solved it or all were tried. The "
           "last column leads to the command that makes the records."]
  for paper, title in PAPERS.items():
    parts += [f"### {title} (arXiv:{paper})",
              _table(["claim", "where", "paper", "our setting", "our result", "points", "verdict", "made by"],
                     [_row(claim, finding, commands) for claim, finding in found.items() if claim.paper == paper])]
  parts += ["## Tables", *_tables(results)]
  if plots := [f"![{plot.title}]({plot.file})" for plot in PLOTS if plot.drawn(results)]:
    parts += ["## Plots", *plots]
  parts += ["## Commands", "\n".join(f"{number}. `{command}`" for number, command in enumerate(commands, 1))]
  return "\n\n".join(part.strip() for part in parts) + "\n"


def _answer(found):
  """Counts the verdicts by kind of claim, and lists the claims themselves."""
  counts = [[kind, *(sum(found[claim].verdict == verdict for claim in claims) for verdict in
                     (HOLDS, IN_PART, FAILS, NOT_RUN))] for kind, claims in KINDS.items()]
  total = [sum(column) for column in zip(*(numbers for _, *numbers in counts))]
  rows = [[f"**{kind}**", *map(str, numbers), str(sum(numbers))] for kind, *numbers in [*counts, ["All", *total]]]
  sentences = [[f"**{name}**", text] for name, text in zip(_CLASSES, by_class(CLAIMS, found), strict=True) if text]
  holds, in_part, fails, not_run = total
  return [f"Of {sum(total)} claims, {holds} hold, {in_part} hold in part, {fails} do not hold, {not_run} are not run.",
          _table(["claims on", "hold", "hold in part", "do not hold", "not run", "all"], rows),
          "Each claim once, by what the runs here say of it:",
          _table(["", "claims, and how many of their points hold"], sentences), _READING]


def by_class(claims, found):
  """Returns a cell per class of `_CLASSES` with its claims' sentences and their points, summed over settings."""
  cells = {name: [] for name in _CLASSES}
  for text in dict.fromkeys(claim.text for claim in claims):
    findings = [found[claim] for claim in claims if claim.text == text]
    points = sum((finding.points for finding in findings), ())
    cells[classified(findings)].append(f"• {text.rstrip('.')} ({_points(points)})")
  return ["<br>".join(texts) for texts in cells.values()]


def classified(findings):
  """Returns the one of `_CLASSES` for a sentence, given its findings, one per setting."""
  verdicts = {finding.verdict for finding in findings}
  if verdicts == {HOLDS, FAILS} or not all(finding.decided for finding in findings):
    return "undecided"
  return {(HOLDS,): "reproduced", (FAILS,): "contradicted"}.get(tuple(verdicts), "in part")


def _points(points):
  known = [point for point in points if point is not None]
  missing = len(points) - len(known)
  return f"{sum(known)} of {len(known)}" + (f", {missing} not run" if missing else "")


def _row(claim, finding, commands):
  points = _points(finding.points)
  if not finding.run:
    points, result = "", "some of the command's records are missing, because it takes more GPU time"
  else:
    result = finding.text
  return [claim.text, claim.place, claim.printed, claim.setting, result, points, f"**{finding.verdict}**",
          f"[{commands.index(claim.command) + 1}](#commands)"]


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
      parts.append(f"Seeds of one model are up to {apart:.3f} bits per byte apart. A smaller difference says little.")
    elif rows and (apart := _apart(language.rows(results, "main"))):
      parts.append(f"One seed per model. The seeds of sweep `main` are up to {apart:.3f} bits per byte apart. A "
                   "smaller difference says little.")
  points = [(setting, width) for setting in synthetic.MQAR_SETTINGS for width in synthetic.WIDTHS]
  rows = [[synthetic.NAMES[mixer], *(_cell(synthetic.mqar(results, mixer, *point)) for point in points)]
          for mixer in synthetic.NAMES]
  parts += _section("MQAR, tokens/pairs and width: accuracy, in percent",
                    ["", *(f"{length}/{pairs} d{width}" for (length, pairs), width in points)], rows)
  not_begun, tried = synthetic.mqar_not_begun(results)
  if not_begun:
    length, pairs = synthetic.MQAR_SETTINGS[-1]
    parts.append(f"{not_begun} of {tried} models recall less than 2% of {pairs} pairs in {length} tokens: a quarter of "
                 "the papers' epochs ends before they begin to learn. The order of such models says nothing.")
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
  """Returns the largest difference between seeds of one model, 0 if none has two."""
  return max((row["range"][1] - row["range"][0] for row in found.values() if row["seeds"] > 1), default=0.0)


def _section(title, head, rows):
  """Returns a table of the rows that have any value, or nothing if there are none."""
  known = [row for row in rows if any(row[1:])]
  return [f"### {title}", _table(head, known)] if known else []


def _cell(share, form=percent):
  return "" if share is None else form(share)


def _table(head, rows):
  return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
