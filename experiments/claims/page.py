"""The page of claims as markdown: the answer, the measured results, a row per claim, and the tables behind them."""

import textwrap

from . import CLAIMS, KINDS, facts, gap, language, synthetic_tables
from .answer import WITH_CARE, opening
from .claim import FAILS, HOLDS, IN_PART, NOT_RUN, UNDECIDED, Results
from .measured import RESULTS
from .plots import PLOTS
from .points import CLASSES, classified, counted, decided_by

PAPERS = {"2312.06635": "Gated Linear Attention", "2405.17381": "Lightning Attention, TransNormerLLM",
          "2406.06484": "DeltaNet", "2412.06464": "Gated DeltaNet", "2405.06640": "SUPRA"}
_HEAD = """# Claims of the papers

Generated from the records beside it by `python experiments/report_claims.py`; do not edit.
"""
_READING = """
A claim is split into points, which are the comparisons that it makes; the numbers in parentheses say how many hold. It
*holds* when all of its points count and hold, and *in part* when some hold. A point is *not counted* when it was not
run, when one of its sides has no result or a wrong one, or when neither of its models learned the task. A claim that
was tried in several settings counts once for each above. It is named once, by the settings that decide it, and as
undecided where most of them decide nothing or where they contradict each other. A point on the losses of models is *too
close* when their difference is below two standard errors. {noise} A claim is *undecided* when its verdict would be
another one if its close points came out the other way. Its row says which points decided. A number after ± is the
deviation over the seeds. Settings are smaller than the papers', so a verdict is about our setting and not about the
paper's own.
"""
_MEASURED = """
In a pair of times such as 0.67 / 2.49 ms, the first is the forward pass, and the second is forward and backward pass
together. Losses to other libraries, failures and departures from the papers are in bold.
"""
_SPLITS = {"test": "Rates were chosen on the split val, and these losses are on the split test.",
           "val": "Not all of these records have a loss on the split test: val chose the rates, and these losses are "
                  "on val too."}
_PAGES = """## Other pages

- Findings by subject, with their records and commands: [numerics](numerics.md) of the kernels, [language](language.md)
  models of 42M parameters, [synthetic](synthetic.md) tasks, [training](training.md) and its speed, the
  [reliability](reliability.md) of the commands, and [rows of a million tokens](scaling.md) on many GPUs.
- [Kernels](kernels.md) beside other libraries at every shape, and the [log](kernel_log.md) of the work on them.
- [Models](models.md): the size of every config beside its paper's.
- `raw/`: printed output of programs, and the numerics case by case.
"""
_NOISE = """A run's deviation over its seeds is {deviation:.4f} bits per byte, pooled over all models with {freedom}
degrees of freedom, so that two models differ by two standard errors at {one:.3f} with one seed each and at {two:.3f}
with two."""


def render(results: Results) -> str:
  found = {claim: claim.judge(results) for claim in CLAIMS}
  parts = [_HEAD, *opening(results, found), *gap.paragraph(results), *_answer(found), "### Read with care", WITH_CARE,
           "### How a verdict is found", _reading(results), "## What was measured", _MEASURED,
           _table(["run", "machine", "result"], RESULTS), _PAGES, "## Claim by claim",
           "A synthetic task counts for a model when one of the learning rates has solved it or all were tried. The "
           "[commands](#commands) that made the records are at the end."]
  for paper, title in PAPERS.items():
    parts += [f"### {title} (arXiv:{paper})",
              _table(["claim", "where", "paper", "our setting", "our result", "points", "verdict"],
                     [_row(claim, finding) for claim, finding in found.items() if claim.paper == paper])]
  parts += ["## Tables", *_tables(results)]
  if plots := [f"![{plot.title}]({plot.file})" for plot in PLOTS if plot.drawn(results)]:
    parts += ["## Plots", *plots]
  parts += ["## Commands", _table(["records of", "command"], [
      [f"{PAPERS[claim.paper]}: {claim.place}", f"`{claim.command}`"] for claim in _first_of_each_command()])]
  return "\n\n".join(part.strip() for part in parts) + "\n"


def _answer(found):
  """Counts the verdicts by kind of claim, and lists the claims themselves."""
  counts = [[kind, *(sum(found[claim].verdict == verdict for claim in claims) for verdict in
                     (HOLDS, IN_PART, FAILS, UNDECIDED, NOT_RUN))] for kind, claims in KINDS.items()]
  total = [sum(column) for column in zip(*(numbers for _, *numbers in counts))]
  rows = [[f"**{kind}**", *map(str, numbers), str(sum(numbers))] for kind, *numbers in [*counts, ["All", *total]]]
  sentences = [[f"**{name}**", text] for name, text in zip(CLASSES, by_class(CLAIMS, found), strict=True) if text]
  holds, in_part, fails, undecided, not_run = total
  return [f"Of {sum(total)} claims, {holds} hold, {in_part} hold in part, {fails} do not hold, {undecided} are "
          f"undecided, {not_run} not run.",
          _table(["claims on", "hold", "hold in part", "do not hold", "undecided", "not run", "all"], rows),
          "Each claim once, by what the runs here say of it:",
          _table(["", "claims, and how many of their points hold"], sentences)]


def by_class(claims, found):
  """Returns a cell per class of `CLASSES` with its claims' sentences and their points, summed over settings."""
  cells = {name: [] for name in CLASSES}
  for text in dict.fromkeys(claim.text for claim in claims):
    findings = [found[claim] for claim in claims if claim.text == text]
    cells[classified(findings)].append(f"• {text.rstrip('.')} ({counted(findings)})")
  return ["<br>".join(texts) for texts in cells.values()]


def _reading(results):
  deviation, freedom = language.noise(results)
  noise = _NOISE.format(deviation=deviation, freedom=freedom, one=2 * 2**0.5 * deviation, two=2 * deviation)
  text = _READING.format(noise=noise if freedom else "No model has two seeds yet.")
  return textwrap.fill(" ".join(text.split()), width=120)


def _first_of_each_command():
  return {claim.command: claim for claim in reversed(CLAIMS)}.values()


def _row(claim, finding):
  points, result = decided_by(finding), finding.text
  if not finding.run:
    points, result = "", "some of the command's records are missing, because it takes more GPU time"
  return [claim.text, claim.place, claim.printed, claim.setting, result, points, f"**{finding.verdict}**"]


def _tables(results):
  parts = []
  for sweep in language.sweeps.SWEEPS:
    if sweep in language.sweeps.CURVES:
      continue
    found = language.rows(results, sweep)
    rows = [[language.name(model), f"{row['parameters'] / 1e6:.1f}M", f"{row['learning_rate']:g}",
             ", ".join(f"{rate:g}" for rate in row["learning_rates"]), str(row["seeds"]), language.bits(row),
             f"{row['perplexity']:.2f}"]
            for model, row in sorted(found.items(), key=lambda x: x[1]["bits_per_byte"])]
    parts += _section(f"Language models, sweep `{sweep}`: held-out text",
                      ["", "parameters", "best learning rate", "tried", "seeds", "bits per byte", "perplexity"], rows)
    if rows:
      parts.append(_SPLITS[next(iter(found.values()))["split"]])
  parts += _section("Language models, sweep `gap`: bits per byte on the split test after as many tokens",
                    *gap.table(results))
  recall = facts.table(results)
  parts += [*(_section(recall.title, recall.head, recall.rows) or [f"### {recall.title}"]), *recall.notes]
  for table in synthetic_tables.tables(results):
    if section := _section(table.title, table.head, table.rows):
      parts += [*section, *table.notes]
  return parts


def _section(title, head, rows):
  """Returns a table of the rows that have any value, or nothing if there are none."""
  known = [row for row in rows if any(row[1:])]
  return [f"### {title}", _table(head, known)] if known else []


def _table(head, rows):
  return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
