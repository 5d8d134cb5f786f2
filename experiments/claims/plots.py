"""Plots of the page of claims. A plot is drawn once it has two points."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable

from lin_jax import files
from speed.training import CURVES

from . import gap, kernels, language, lengths, speed, synthetic_scores
from .claim import Results
from .language_plots import Dots

_TRAINED = tuple(name for sweep in CURVES.values() for name in sweep.models)

# Each line has its own marker and dash, so that lines are distinct in black and white.
_STYLES = "ko-", "C1s--", "C2^-.", "C0D-", "C4v:", "C3P-", "C5X--", "C6<-.", "C7>:"


@dataclasses.dataclass(frozen=True)
class Plot:
  """Panels by title, each with points by line. A line of `names` has the same style in all panels."""

  file: str
  title: str
  axis: str
  panels: Callable[[Results], dict[str, dict[str, list[tuple[int, float]]]]]
  names: dict[str, str] = dataclasses.field(default_factory=lambda: synthetic_scores.NAMES)
  label: str = "accuracy (%)"
  limits: tuple[float | None, float | None] = (-3, 103)
  logarithmic: bool = False  # the vertical axis; the horizontal one always is

  def drawn(self, results: Results) -> bool:
    return any(sum(not math.isnan(y) for _, y in points) > 1
               for lines in self.panels(results).values() for points in lines.values())

  def draw(self, results: Results, folder: pathlib.Path) -> pathlib.Path:
    from matplotlib.figure import Figure  # a second of import that the page alone does not pay

    panels = {title: lines for title, lines in self.panels(results).items() if lines}
    styles = dict(zip(self.names, _STYLES))
    figure = Figure(figsize=(2.2 + 4.8 * len(panels), 4), layout="constrained")
    legend = {}
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
      for mixer, points in lines.items():
        legend[self.names[mixer]], = axes.plot(*zip(*points), styles[mixer], markersize=6)
      ticks = sorted({x for points in lines.values() for x, _ in points})
      axes.set_xscale("log", base=2)
      axes.set_yscale("log" if self.logarithmic else "linear")
      axes.set_xticks(ticks, [f"{x // 1024}K" if x >= 1024 and x % 1024 == 0 else f"{x:,}" for x in ticks], minor=False)
      axes.minorticks_off()
      low, high = self.limits
      if low == 0 and high is None:  # matplotlib leaves no room above lines that are flat
        high = 1.08 * axes.dataLim.y1
      axes.set(xlabel=self.axis, ylabel=self.label, ylim=(low, high))
      axes.set_title(title)
      axes.grid(alpha=0.3)
    figure.legend(legend.values(), legend, loc="outside right center", fontsize=8)  # where it hides no point
    figure.suptitle(self.title)
    with files.replacing(folder / self.file) as file:
      figure.savefig(file, format="png", dpi=120)
    return folder / self.file


def _lines(values):
  """Turns shares (or None) by mixer and x into points by mixer. A line has a gap where nothing was run."""
  return {mixer: [(x, math.nan if y is None else 100 * y) for x, y in points.items()]
          for mixer, points in values.items() if any(y is not None for y in points.values())}


def _mqar(results):
  return {f"{length} tokens, {pairs} pairs, {protocol} protocol": _lines(
      {mixer: {width: synthetic_scores.mqar(results, protocol, mixer, (length, pairs), width)
               for width in synthetic_scores.WIDTHS} for mixer in synthetic_scores.NAMES})
          for protocol in synthetic_scores.PROTOCOLS for length, pairs in synthetic_scores.MQAR_SETTINGS}


def _regbench(results):
  return {f"legal next symbols, {protocol} protocol": _lines(
      {mixer: {examples: synthetic_scores.regbench(results, protocol, mixer, examples)
               for examples in synthetic_scores.EXAMPLES} for mixer in synthetic_scores.NAMES})
          for protocol in synthetic_scores.PROTOCOLS}


def _lengths(results):
  found = {model: lengths.losses(results, model) for model in lengths.MODELS}
  return {"trained on 512 tokens": {model: [(stop, loss) for (_, stop), loss in sorted(losses.items())]
                                    for model, losses in found.items() if losses}}


def _kernels(results):
  panels = {}
  for op, shape in (("gla", "32 sequences, 16 heads of 64"), ("linear_attention", "4 sequences, 32 heads of 128")):
    device, found = kernels.times(results, "figures", op)
    panels[f"{shape} channels\n{device}"] = _of_some(found)
  return panels


def _training(results, field):
  panels = {}
  for name, sweep in CURVES.items():
    device, rows = speed.training(results, name)
    panels[f"{sweep.title}, {sweep.tokens:,} tokens per step\n{device}"] = _by_model(rows, field)
  return panels


def _decoding(results, field):
  device, rows = speed.decoding(results)
  return {f"340M to 385M parameters\n{device}": _by_model(rows, field)}


def _by_model(rows, field):
  """Makes lines from a field of `speed.newest`'s records."""
  lines = {}
  for (model, tokens), row in rows.items():
    lines.setdefault(model, {})[tokens] = row[field]
  return _of_some(lines)


def _of_some(lines):
  return {name: sorted(points.items()) for name, points in lines.items() if points}


PLOTS = [Dots(),
         Plot("gap.png", gap.TITLE, "millions of tokens", gap.panels,
              {model: gap.name(model) for model in language.sweeps.GAP_MODELS}, "bits per byte above", (None, None)),
         Plot("mqar.png", "Multi-query associative recall", "width of the model", _mqar),
         Plot("regbench.png", "RegBench", "training sequences", _regbench),
         Plot("lengths.png", "Text beyond the length of training", "position in the text (end of the bucket)", _lengths,
              {model: language.name(model) for model in lengths.MODELS}, "loss (nats per token)", (None, 6.5)),
         Plot("kernel_lengths.png", "Time of a layer's kernels, forward and backward", "tokens per sequence", _kernels,
              {"gla": "GLA", "linear_attention": "lightning attention", "attention": "softmax attention (cuDNN)"},
              "ms", (None, None), logarithmic=True),
         Plot("training.png", "Training speed", "tokens per sequence",
              functools.partial(_training, field="tokens_per_s"), dict(zip(_TRAINED, _TRAINED)), "tokens per second",
              (0, None)),
         Plot("training_memory.png", "Memory of a training step", "tokens per sequence",
              functools.partial(_training, field="memory_gib"), dict(zip(_TRAINED, _TRAINED)), "GiB", (0, None)),
         Plot("decoding.png", "Decoding one sequence", "tokens before",
              functools.partial(_decoding, field="ms_per_token"), dict(zip(speed.DECODED, speed.DECODED)),
              "ms per token", (0, None)),
         Plot("decoding_memory.png", "State of one sequence", "tokens before",
              functools.partial(_decoding, field="state_mib"), dict(zip(speed.DECODED, speed.DECODED)), "MiB",
              (None, None), logarithmic=True)]
