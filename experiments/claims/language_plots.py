"""The picture of the language models: bits per byte with their noise."""

import dataclasses
import pathlib

from lin_jax import files

from . import language
from .claim import Results

_SWEEPS = {"main": "29.5M tokens", "main_normal": "29.5M tokens, kernels from N(0, 0.02)", "long": "118M tokens",
           "gates": "GLA's decay", "convolutions": "short convolutions", "norms": "DeltaNet's keys",
           "starts": "slow decays", "linearized": "Transformers made linear"}


@dataclasses.dataclass(frozen=True)
class Dots:
  """Panels of models from best to worst, each a mean over seeds with two standard errors to both sides."""

  file: str = "language.png"
  title: str = "Held-out bits per byte of models of 42M parameters, with two standard errors"

  def panels(self, results: Results) -> dict[str, list[tuple[str, float, float]]]:
    """Returns name, bits per byte and two standard errors of each model, by the panel's title, which has the split."""
    deviation, _ = language.noise(results)
    panels = {}
    for sweep, title in _SWEEPS.items():
      rows = sorted(language.rows(results, sweep).items(), key=lambda item: item[1]["bits_per_byte"])
      if rows:
        panels[f"{title}, split {rows[0][1]['split']}"] = [
            (language.name(model), row["bits_per_byte"], 2 * deviation / row["seeds"] ** 0.5) for model, row in rows]
    return panels

  def drawn(self, results: Results) -> bool:
    return any(len(rows) > 1 for rows in self.panels(results).values())

  def draw(self, results: Results, folder: pathlib.Path) -> pathlib.Path:
    from matplotlib.figure import Figure  # a second of import that the page alone does not pay

    panels = self.panels(results)
    heights = [len(rows) + 1.5 for rows in panels.values()]
    figure = Figure(figsize=(8, 0.3 * sum(heights) + 0.8), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0],
                                   panels.items(), strict=True):
      names, bits, errors = zip(*rows, strict=True)
      axes.errorbar(bits, range(len(rows)), xerr=errors, fmt="ko", markersize=5, capsize=3)
      axes.set_yticks(range(len(rows)), names)
      axes.invert_yaxis()
      axes.grid(axis="x", alpha=0.3)
      axes.set_title(title, fontsize=10)
    figure.suptitle(self.title, fontsize=11)
    with files.replacing(folder / self.file) as file:
      figure.savefig(file, format="png", dpi=120)
    return folder / self.file

