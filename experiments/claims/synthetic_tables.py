"""The synthetic tasks' tables on the page of claims."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from synthetic.reduced import HARDEST

from .claim import Results, percent
from .synthetic_scores import (
    AUTHORS,
    BEGUN,
    BESIDE,
    EXAMPLES,
    MQAR_SETTINGS,
    NAMES,
    PROTOCOLS,
    REDUCED,
    WIDTHS,
    all_settings,
    mad,
    mad_average,
    mad_settings,
    mqar,
    planned,
    regbench,
    regbench_distance,
)

_ARROW = ("A number alone was made under the reduced protocol. The number behind an arrow was made under the authors' "
          "protocol, which the claims describe.")


@dataclasses.dataclass(frozen=True)
class Table:
  """A title, the names of columns, rows of cells, and sentences below."""

  title: str
  head: list[str]
  rows: list[list[str]]
  notes: list[str]


def tables(results: Results) -> list[Table]:
  return [_mqar(results), _mad(results),
          _regbench(results, "legal next symbols at the best test of a run, in percent", regbench, percent),
          _regbench(results, "least total variation from the true distribution of the next symbol", regbench_distance,
                    "{:.3f}".format)]


def _mqar(results):
  score = functools.partial(mqar, results)
  points = [(setting, width) for setting in MQAR_SETTINGS for width in WIDTHS]
  rows = _rows("mqar", lambda mixer: [_both(score, mixer, *point) for point in points])
  largest = MQAR_SETTINGS[-1]
  scores = [score(REDUCED, mixer, largest, width) for mixer in NAMES for width in WIDTHS]
  scores, notes = [found for found in scores if found is not None], [_ARROW]
  if not_begun := sum(found < BEGUN for found in scores):
    notes.append(f"{not_begun} of {len(scores)} models recall less than 2% of {largest[1]} pairs in {largest[0]} "
                 "tokens under the reduced protocol: a quarter of the papers' epochs ends before they begin to learn. "
                 "The order of such models says nothing, and a comparison of two of them counts as not run.")
  return Table("MQAR, tokens/pairs and width: accuracy, in percent",
               ["", "convolutions", *(f"{length}/{pairs} d{width}" for (length, pairs), width in points)], rows, notes)


def _mad(results):
  of_task = lambda protocol, mixer, task: mad(results, protocol, mixer, task, BESIDE[protocol])
  of_all = lambda protocol, mixer: mad_average(results, protocol, mixer, BESIDE[protocol])
  rows = _rows("mad", lambda mixer: [*(_both(of_task, mixer, task) for task in HARDEST), _both(of_all, mixer)])
  counts = {task: len(mad_settings(results, AUTHORS, task, BESIDE[AUTHORS])) for task in HARDEST}
  notes = [_ARROW + " There the measure is the mean over batches of the mean over tokens, as MAD's authors log it. In "
           "the reduced one all test examples are one batch."]
  if any(counts.values()):
    notes.append("Settings under the authors' protocol: "
                 + ", ".join(f"{count} of {len(all_settings(task))} of {task.replace('_', ' ')}"
                             for task, count in counts.items()) + ".")
  return Table("MAD: mean over the settings of a task, in percent; reduced: baseline and hardest change",
               ["", "convolutions", *(task.replace("_", " ") for task in HARDEST), "average"], rows, notes)


def _regbench(results, title, score, form):
  score = functools.partial(score, results)
  rows = _rows("regbench", lambda mixer: [_both(score, mixer, examples, form=form) for examples in EXAMPLES])
  return Table(f"RegBench: {title}, by training sequences",
               ["", "convolutions", *(f"{examples:,}" for examples in EXAMPLES)], rows,
               [_ARROW + " There 250 sequences select the test of a run and the rate, and 250 others score it. Under "
                "the reduced protocol the same 500 sequences do both."])


def _rows(benchmark: str, cells: Callable[[str], Sequence[str]]) -> list[list[str]]:
  """Returns a row per mixer that has any cell."""
  return [[name, _convolutions(benchmark, mixer), *found] for mixer, name in NAMES.items()
          if any(found := cells(mixer))]


def _convolutions(benchmark: str, mixer: str) -> str:
  """Says which short convolution the mixer has in the benchmark."""
  taps = {run.setting()["mixer_fields"].get("conv_width", 0) for protocol in PROTOCOLS
          for run, *_ in planned(protocol, benchmark).values() if run.mixer == mixer}
  return " or ".join(f"{count} taps" if count else "none" for count in sorted(taps))


def _both(score: Callable[..., float | None], *key, form: Callable[[float], str] = percent) -> str:
  """Writes the score under the reduced protocol, and behind an arrow the one under the authors'."""
  old, new = score(REDUCED, *key), score(AUTHORS, *key)
  return ("" if old is None else form(old)) + ("" if new is None else f" → {form(new)}")
