"""Claims on the synthetic tasks: MQAR, MAD and RegBench, from the records of run_synthetic.py.

A point is decided under the protocol of the task's authors as soon as all runs that it compares were made so. Until
then the reduced protocol decides it, as its text says.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable

from synthetic.grids import CLAIMED

from .claim import Claim, Finding, percent
from .synthetic_scores import (
    AUTHORS,
    BEGUN,
    BESIDE,
    EXAMPLES,
    FILE,
    MQAR_SETTINGS,
    NAMES,
    REDUCED,
    WIDTHS,
    mad,
    mad_average,
    mqar,
    regbench,
    under_one_protocol,
)

_GLA, _DELTA = "2312.06635", "2406.06484"
_SOLVED = 0.99


@dataclasses.dataclass(frozen=True)
class Point:
  """A comparison: the protocol under which it was made, the obtained numbers, and whether it holds (None: not run)."""

  protocol: str
  text: str
  holds: bool | None


def _finding(points: Iterable[Point]) -> Finding:
  points = list(points)
  authors, reduced = ("; ".join(point.text for point in points if point.text and point.protocol == protocol)
                      for protocol in (AUTHORS, REDUCED))
  texts = filter(None, [authors, reduced and f"{REDUCED}: {reduced}"])
  return Finding("; ".join(texts), tuple(point.holds for point in points))


def _solves(label: str, score: Callable, key: tuple) -> Point:
  protocol, (found,) = under_one_protocol(score, key)
  if found is None:
    return Point(protocol, "", None)
  return Point(protocol, f"{label}: {percent(found)}", found >= _SOLVED)


def _above(label: str, score: Callable, left: tuple, right: tuple, begun: float = 0.0) -> Point:
  """Holds if the left score is not below the right one. Scores that are both below `begun` count as not run."""
  protocol, scores = under_one_protocol(score, left, right)
  if None in scores:
    return Point(protocol, "", None)
  if max(scores) < begun:
    return Point(protocol, f"{label}: neither has begun", None)
  return Point(protocol, f"{label}: {percent(scores[0])} and {percent(scores[1])}", scores[0] >= scores[1])


def _mqar_solved(mixer, settings):
  return lambda results: _finding(_solves(_place(setting, width), functools.partial(mqar, results),
                                          (mixer, setting, width)) for setting in settings for width in WIDTHS)


def _mqar_above(left, right, settings=MQAR_SETTINGS, widths=WIDTHS):
  return lambda results: _finding(
      _above(_place(setting, width), functools.partial(mqar, results), (left, setting, width),
             (right, setting, width), BEGUN) for setting in settings for width in widths)


def _place(setting, width):
  return f"{setting[0]}/{setting[1]} d{width}"


def _mad_solved(mixer, tasks):
  return lambda results: _finding(_solves(task.replace("_", " "), functools.partial(mad, results), (mixer, task))
                                  for task in tasks)


def _mad_above(task, pairs):
  def judge(results):
    score = lambda protocol, mixer: mad(results, protocol, mixer, task, BESIDE[protocol])
    return _finding(_above(_names(left, right), score, (left,), (right,)) for left, right in pairs)

  return judge


def _mad_order(*mixers):
  def judge(results):
    score = lambda protocol, mixer: mad_average(results, protocol, mixer, BESIDE[protocol])
    return _finding(_above(_names(left, right), score, (left,), (right,)) for left, right in zip(mixers, mixers[1:]))

  return judge


def _names(left, right):
  return f"{NAMES[left]} and {NAMES[right]}"


def _regbench_level(results):
  """Compares DeltaNet with the others at each size, where all were run under the authors' protocol by it."""
  points = []
  for examples in EXAMPLES:
    score = functools.partial(regbench, results)
    protocol = under_one_protocol(score, *((mixer, examples) for mixer in CLAIMED))[0] or REDUCED
    scores = {mixer: score(protocol, mixer, examples) for mixer in CLAIMED}
    known = ", ".join(f"{NAMES[mixer]} {percent(found)}" for mixer, found in scores.items() if found is not None)
    ours, *others = scores.values()
    texts = [f"{examples:,}: {known}" if known else "", *[""] * (len(others) - 1)]
    points += [Point(protocol, text, None if None in (ours, found) else ours >= found - 0.01)
               for text, found in zip(texts, others, strict=True)]
  return _finding(points)


_MQAR = ("two blocks without MLP, bfloat16, zoology's starts, best of 4 learning rates from 1e-4 to 1e-2, 64 epochs "
         "of 100,000; reduced: the library's starts, best of 3 learning rates, 16 epochs")
_MAD = ("width 128, bfloat16, the authors' starts, heads and measure, best of 3 learning rates and 2 weight decays, "
        "200 epochs, mean over the settings that all have run; reduced: baseline and hardest change, the library's "
        "starts, tied heads, best of 3 learning rates, 50 epochs but 200 of memorization")
_REGBENCH = ("width 128, 4 blocks, bfloat16, a tenth of the embeddings dropped, Mamba without MLP, 200 epochs; legal "
             "next symbols on 250 sequences, at the test and the learning rate of 5 that 250 others select; reduced: "
             "Mamba with an MLP, 50 epochs, the best test and the best of 3 learning rates on 500 sequences")


def _command(sweep):
  return f"python experiments/run_synthetic.py --sweep={sweep} --until_solved --out=experiments/results/{FILE}"


def claims() -> list[Claim]:
  mqar_claim = lambda paper, place, text, printed, judge: Claim(paper, place, text, printed, _MQAR, _command("mqar"),
                                                                judge)
  mad_claim = lambda text, printed, judge: Claim(_DELTA, "MAD table", text, printed, _MAD, _command("mad"), judge)
  return [
      mqar_claim(_GLA, "figure 4", "Softmax attention solves MQAR at every setting.", "100",
                 _mqar_solved("attention", MQAR_SETTINGS)),
      mqar_claim(_GLA, "figure 4", "GLA recalls at least as much as RetNet at every width.", "curves: GLA above RetNet",
                 _mqar_above("gla", "retention")),
      mqar_claim(_DELTA, "MQAR figure", "DeltaNet without convolutions solves 64 pairs in 512 tokens at every width.",
                 "curve near 100", _mqar_solved("delta_net", MQAR_SETTINGS[1:])),
      mqar_claim(_DELTA, "MQAR figure", "DeltaNet recalls more than Mamba at small widths.",
                 "curves: DeltaNet above Mamba", _mqar_above("delta_net", "mamba", MQAR_SETTINGS[1:], WIDTHS[:2])),
      mad_claim("DeltaNet recalls in context, with and without noise, and copies without error.", "100, 100, 100",
                _mad_solved("delta_net", ("in_context_recall", "noisy_recall", "selective_copying"))),
      mad_claim("DeltaNet is the best at fuzzy recall.", "35.7; Transformer 29.8, GLA 6.9, Mamba 6.7",
                _mad_above("fuzzy_recall", [("delta_net", other) for other in ("attention", "gla", "mamba")])),
      mad_claim("DeltaNet memorizes less than the others.", "52.8; Transformer 85.2, GLA 63.3, Mamba 89.5",
                _mad_above("memorization", [(other, "delta_net") for other in ("attention", "gla", "mamba")])),
      mad_claim("Average over the tasks: Transformer, then DeltaNet, then Mamba, then GLA.", "74.5, 71.8, 69.3, 60.0",
                _mad_order("attention", "delta_net", "mamba", "gla")),
      Claim(_DELTA, "RegBench figure", "DeltaNet learns regular languages in context as well as Transformer++, GLA and "
            "Mamba.", "curves: at or above (within a point here)", _REGBENCH, _command("regbench"), _regbench_level)]
