"""Plots of the page of claims; each is drawn once it has two points."""

import dataclasses
import pathlib
from collections.abc import Callable

from . import language, lengths, synthetic
from .claim import Results

# Distinct in black and white: a marker and a dash for each line.
_STYLES = "ko-", "C1s--", "C2^-.", "C0D-", "C4v:", "C3P-", "C5X--"


@dataclasses.dataclass(frozen=True)
class Plot:
  """Panels (title -> line -> points), each line of `names` in the same style in all of them."""

  file: str
  title: str
  axis: str
  panels: Callable[[Results], dict[str, dict[str, list[tuple[int, float]]]]]
  names: dict[str, str] = dataclasses.field(default_factory=lambda: synthetic.NAMES)
  label: str = "accuracy (%)"
  limits: tuple[float, float] | None = (-3, 103)

  def drawn(self, results: Results) -> bool:
    return any(len(points) > 1 for lines in self.panels(results).values() for points in lines.values())

  def draw(self, results: Results, folder: pathlib.Path) -> pathlib.Path:
    from matplotlib.figure import Figure  # a second of import that the page alone does not pay

    panels = {title: lines for title, lines in self.panels(results).items() if lines}
    styles = dict(zip(self.names, _STYLES, strict=True))
    figure = Figure(figsize=(5.2 * len(panels), 4), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels.items()):
      for mixer, points in lines.items():
        axes.plot(*zip(*points), styles[mixer], markersize=6, label=self.names[mixer])
      ticks = sorted({x for points in lines.values() for x, _ in points})
      axes.set_xscale("log", base=2)
      axes.set_xticks(ticks, [f"{x:,}" for x in ticks], minor=False)
      axes.minorticks_off()
      axes.set(xlabel=self.axis, ylabel=self.label, ylim=self.limits)
      axes.set_title(title)
      axes.grid(alpha=0.3)
      axes.legend(fontsize=8)
    figure.suptitle(self.title)
    figure.savefig(folder / self.file, dpi=120)
    return folder / self.file


def _lines(values):
  """mixer -> points out of mixer -> {x: share or None}, without what was not run."""
  kept = {mixer: [(x, 100 * y) for x, y in points.items() if y is not None] for mixer, points in values.items()}
  return {mixer: points for mixer, points in kept.items() if points}


def _mqar(results):
  return {f"{length} tokens, {pairs} pairs": _lines(
      {mixer: {width: synthetic.mqar(results, mixer, (length, pairs), width) for width in synthetic.WIDTHS}
       for mixer in synthetic.NAMES}) for length, pairs in synthetic.MQAR_SETTINGS}


def _regbench(results):
  return {"legal next symbols": _lines(
      {mixer: {examples: synthetic.regbench(results, mixer, examples) for examples in synthetic.EXAMPLES}
       for mixer in synthetic.NAMES})}


def _lengths(results):
  found = {model: lengths.losses(results, model) for model in lengths.MODELS}
  return {"trained on 512 tokens": {model: [(stop, loss) for (_, stop), loss in sorted(losses.items())]
                                    for model, losses in found.items() if losses}}


PLOTS = [Plot("mqar.png", "Multi-query associative recall", "width of the model", _mqar),
         Plot("regbench.png", "RegBench", "training sequences", _regbench),
         Plot("lengths.png", "Text beyond the length of training", "up to this token of the text", _lengths,
              {model: language.name(model) for model in lengths.MODELS}, "loss (nats a token)", None)]
