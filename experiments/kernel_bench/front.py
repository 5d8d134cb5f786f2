"""The front page's picture: the speed of both passes against length, beside softmax attention and other libraries."""

import dataclasses
import pathlib

from lin_jax import files

from .cases import named
from .records import Records

DEVICE = "NVIDIA H200"
PANELS = {("gla", "channel"): "Gated linear attention", ("delta_rule", "none"): "Delta rule (DeltaNet)"}
# Colours that readers who do not tell red from green can tell apart (Okabe and Ito), with a marker for each.
LINES = {"ours": ("lin_jax", "#0072B2", "o", 2.5), "jla": ("jax-linear-attention", "#E69F00", "s", 1.5),
         "fla": ("flash-linear-attention", "#009E73", "D", 1.5),
         "cudnn": ("softmax attention (cuDNN)", "#000000", "^", 1.5)}
SHORT_CALL = 16  # sequences of 2,048 tokens, the only call in which flash-linear-attention was measured


def speeds(records: Records, op: str, gate: str) -> dict[str, list[tuple[int, float]]]:
  """Maps a name to pairs of length and million tokens per second. A peer that lacks a length has fewer points."""
  found = {name: [] for name in LINES}
  for case in named("length", [op]):
    if case.gate == gate and (ours := records.ours(DEVICE, case, "forward_backward")):
      rows = {"ours": ours} | records.rivals(DEVICE, case, "forward_backward")
      for name, row in rows.items():
        found[name].append((case.T, case.B * case.T / row["ms"] / 1e3))
      short = dataclasses.replace(case, B=SHORT_CALL)
      if case.T == 2048 and "fla" not in rows and (row := records.rivals(DEVICE, short, "forward_backward").get("fla")):
        found["fla"].append((short.T, short.B * short.T / row["ms"] / 1e3))
  return {name: sorted(points) for name, points in found.items() if points}


def draw(records: Records, file: pathlib.Path) -> bool:
  """Writes the picture to `file`. Returns False, and writes nothing, if the records lack the lengths."""
  panels = {key: speeds(records, *key) for key in PANELS}
  if not all(panels.values()):
    return False
  from matplotlib.figure import Figure  # a second of import that the page alone does not pay

  figure = Figure(figsize=(9, 4.2), layout="constrained")
  axes = figure.subplots(1, len(panels), sharey=True)
  for axis, (key, found) in zip(axes, panels.items()):
    for name, points in found.items():
      label, color, marker, width = LINES[name]
      axis.plot(*zip(*points), color=color, marker=marker, linewidth=width, label=label)
    axis.set(xscale="log", yscale="log", xlabel="tokens per sequence", title=PANELS[key])
    axis.set_xticks([length for length, _ in found["ours"]])
    axis.xaxis.set_major_formatter(lambda length, _: f"{length / 1024:g}K")
    axis.yaxis.set_major_formatter(lambda speed, _: f"{speed:g}")
    axis.minorticks_off()
    axis.grid(alpha=0.3)
  axes[0].set_ylabel("million tokens per second")
  handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
  figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
  figure.suptitle(f"One layer's kernels, forward and backward: {DEVICE}, bfloat16, 16 heads of 128 channels")
  with files.replacing(file) as target:
    figure.savefig(target, format="png", dpi=140)
  return True
