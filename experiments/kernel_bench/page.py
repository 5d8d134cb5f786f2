"""Makes the kernels' page and plots from the benchmark's records: aims, won and lost, every shape, versions."""

import pathlib
import re
import statistics

from kernels import dispatch
from lin_jax import files

from . import peers, timing
from .cases import PASSES, SETS, TIMED, named
from .records import Records, aims

_HEAD = """# Kernel benchmarks

Generated from `kernels.jsonl` by `python experiments/report_kernels.py`; do not edit.

- A time is in milliseconds per call of one layer's op as training makes it, without an initial state and with the final
  state unused. It counts only after output and gradients were compared with the float32 scan. On a GPU the calls are
  queued back to back and the median batch counts. A PyTorch peer gets the better of eager calls and a CUDA graph.
- GB/s refers to the one-pass floor, which reads every argument once and writes every result once, and does so again in
  the backward pass. MiB is the peak memory of one call: arguments, results and everything between. Both are given for
  the implementation that runs when none is named.
- `xN` is the peer's time divided by ours, and counts as even within 3% of 1. cuDNN's column is causal softmax attention
  at the same shape, which is another function and stands there for comparison.
- `H16/32` is 16 key heads for 32 heads. `repeated_heads` is the implementation that runs when none is named, behind a
  `jnp.repeat` of the key heads.
- The last three columns are about our record: its date, the digest of its kernel sources, and whether the program that
  was measured is the one that ships. The newest record of every call counts, so an aim or `xN` may compare records of
  different days and sources. [Kernel sources](#kernel-sources) explains each digest.

The records are made by the following command:

    XLA_PYTHON_CLIENT_PREALLOCATE=false python experiments/bench_kernels.py --shapes=all \\
        --out=experiments/results/kernels.jsonl
"""
_SOURCES = """## Kernel sources

The column "ships" says *yes* where the present sources give the traced kernels that were measured. It says *no (loop
starts)* where that was true until 29 November 2026. On that day the loops of all GPU kernels began to start at an
index from memory, so that no compiler knows how many chunks they run over. The passes of 16 shapes together take 0.96
to 1.01 times as long as before, and a forward pass 0.89 to 1.03 times (`raw/loop_start_speed_h200.json`). On the same
day `gla` and `linear_attention` got faster tiles for heads of 64/64 and 128/256 (`raw/retune_widths_h200.txt`), and
`gla` no longer runs its kernel of factors twice, so that these rows are slower than what ships. Where the column says
*no* alone, the program has changed in other ways too.
"""
_EVEN = 1.03


def render(records: Records) -> str:
  """Returns the page as markdown."""
  parts = [_HEAD]
  for device in records.devices():
    parts += [f"## {device}", *_aims(records, device), *_summary(records, device)]
    if _lengths(records, device):
      parts.append(f"![Tokens per second against length]({_plot_name(device)})")
    for name, (heading, cases) in _sections(records, device).items():
      for op, gate in dict.fromkeys((case.op, case.gate) for case in cases if case.op != "attention"):
        chosen = [case for case in cases if (case.op, case.gate) == (op, gate)]
        parts += [f"### {heading}: `{op}`, {_gate_text(gate)}", *_comparison(records, device, chosen, name)]
    parts += _provenance(records, device)
  if records.sources:
    parts += [_SOURCES, _table(["sources", "date", "ships", "what was measured"], [
        [f"`{digest}`", source["date"], _shipping(source), source["what"]]
        for digest, source in records.sources.items()])]
  return "\n\n".join(part.strip() for part in parts) + "\n"


def _sections(records, device):
  """Maps a name to a heading and measured cases: the named sets, then the cases that are in none of them."""
  measured, sections, seen = records.cases(device), {}, set()
  for name in SETS:
    cases = [case for case in named(name, list(TIMED)) if case in measured]
    seen.update(cases)
    sections[name] = f"Set `{name}`", cases
  sections[""] = "Other shapes", [case for case in measured if case not in seen]
  return sections


def _aims(records, device):
  platforms = {row["platform"] for row in records if row["device"] == device}
  rows = []
  for aim in aims():
    if aim.device not in device and aim.device not in platforms:
      continue
    obtained, cells = aim.value(records, device), ["not measured", "", ""]
    if obtained is not None:
      margin = aim.margin(obtained)
      cells = [f"{_digits(obtained)} {aim.unit}", f"{margin:.2f}", "yes" if margin >= 1 else "**no**"]
    rows.append([aim.text, f"{'>=' if aim.at_least else '<='} {aim.wanted:g} {aim.unit}", *cells])
  return ["### Aims", _table(["aim", "wanted", "obtained", "margin", "met"], rows)] if rows else []


def _summary(records, device):
  """Counts what is won and lost against each peer, over all shapes."""
  groups = {}
  for case in records.cases(device):
    for label in PASSES:
      if ours := records.ours(device, case, label):
        for peer, row in records.rivals(device, case, label).items():
          groups.setdefault((case.op, case.gate, label, peer), []).append((row["ms"] / ours["ms"], case))
  rows = []
  for (op, gate, label, peer), found in sorted(groups.items()):
    ratios = [ratio for ratio, _ in found]
    worst, where = min(found, key=lambda x: x[0])
    rows.append([f"`{op}`", gate, label, peer, f"{sum(ratio >= _EVEN for ratio in ratios)} of {len(ratios)}",
                 str(sum(ratio <= 1 / _EVEN for ratio in ratios)),
                 f"x{worst:.2f}", f"x{statistics.median(ratios):.2f}", f"x{max(ratios):.2f}", where.shape])
  head = ["op", "gate", "pass", "against", "won", "lost", "worst", "median", "best", "worst shape"]
  return ["### Won and lost", _table(head, rows)] if rows else []


def _comparison(records, device, cases, name):
  names = [name for name in (*dispatch.TABLE.get(cases[0].op, ()), timing.REPEATED, *peers.RIVALS)
           if any(_row(records, device, case, name, label) for case in cases for label in PASSES)]
  rivals = [name for name in names if name in peers.RIVALS]
  rows, reasons, mixed = [], {}, False
  for case in cases:
    for label in PASSES:
      ours, others = records.ours(device, case, label), records.rivals(device, case, label)
      cells = []
      for name in names:
        row = _row(records, device, case, name, label)
        other_run = bool(ours and row and row["run"] != ours["run"] and row["ms"] is not None)
        mixed |= other_run
        cells.append(_cell(row) + "*" * other_run)
        if row and row["ms"] is None:
          reasons.setdefault((name, row["reason"]), []).append(f"{case.shape} {label}")
      ratios = {peer: row["ms"] / ours["ms"] for peer, row in others.items()} if ours else {}
      cost = [_digits(ours["gb_per_s"]), f"{ours['peak_mib']:.0f}"] if ours else ["", ""]
      rows.append([case.shape, label, *cells, *cost,
                   *(f"x{ratios[peer]:.2f}" if peer in ratios else "" for peer in rivals), _verdict(ratios),
                   *_origin(records, ours)])
  head = ["shape", "pass", *names, "GB/s", "MiB", *(f"{peer} / ours" for peer in rivals), "verdict", "date", "sources",
          "ships"]
  notes = [f"- `{name}` cannot run {calls[0]}{f' and {len(calls) - 1} more' * (len(calls) > 1)}: {reason}"
           for (name, reason), calls in reasons.items()]
  notes += ["- \\* measured in another run than ours"] * mixed
  return [_table(head, rows), "\n".join(notes)] if notes else [_table(head, rows)]


def _verdict(ratios):
  lost = [peer for peer, ratio in ratios.items() if ratio <= 1 / _EVEN]
  even = [peer for peer, ratio in ratios.items() if 1 / _EVEN < ratio < _EVEN]
  if lost:
    return f"lost to {', '.join(lost)}"
  return f"even with {', '.join(even)}" if even else "won" if ratios else ""


def _origin(records, row):
  """Returns the record's date, its kernel sources, and whether its program ships, "unknown" if nothing says so."""
  if row is None:
    return ["", "", ""]
  digest = row["versions"].get("kernels", "")
  ships = _ships(records.sources[digest], f"{row['op']} {row['gate']}") if digest in records.sources else "unknown"
  return [row["run"][:10], f"`{digest}`" if digest else "", ships]


def _ships(source, kernel):
  return ("yes" if kernel in source["same_program_as_ships"] else
          "no (loop starts)" if kernel in source["loop_start_differs"] else "no")


def _shipping(source):
  named = [*source["same_program_as_ships"], *source["loop_start_differs"]]
  return "<br>".join(f"{kernel}: {_ships(source, kernel)}" for kernel in named) or "no"


def _row(records, device, case, name, label):
  if name == "cudnn":
    return records.rivals(device, case, label).get(name)
  return records.row(device, case, name, label)


def _cell(row):
  if row is None:
    return ""
  if row["ms"] is None:
    return "cannot run"
  return _digits(row["ms"]) + ("" if row["within_bounds"] else f" (off by {max(row['errors'].values()):.0e})")


def _provenance(records, device):
  rows = [row for row in records if row["device"] == device and row["ms"] is not None]
  versions = dict.fromkeys((row["implementation"], ", ".join(f"{k} {v}" for k, v in sorted(row["versions"].items())))
                           for row in rows)
  lines = [f"- `{name}`: {text}" for name, text in sorted(versions)]
  found = dict.fromkeys(f"{row['run']}: `{row['command']}`" for row in sorted(rows, key=lambda row: row["run"]))
  return ["### Versions and commands", "\n".join(lines), "\n".join(f"- {line}" for line in found)]


def _lengths(records, device):
  """Maps (op, gate), name and pass to pairs of length and tokens per second, for the set `length`."""
  found = {}
  for case in named("length", [op for op in TIMED if op != "attention"]):
    for label in PASSES:
      for name in (*dispatch.TABLE.get(case.op, ()), *peers.OPS):
        row = _row(records, device, case, name, label)
        if row and row["ms"] is not None and row["within_bounds"]:
          lines = found.setdefault((case.op, case.gate), {}).setdefault(name, {})
          lines.setdefault(label, []).append((case.T, case.B * case.T / row["ms"] * 1e3))
  return found


def draw(records: Records, device: str, folder: pathlib.Path) -> pathlib.Path | None:
  """Draws speed against length, with a row per op and gate, a column per pass and a line per implementation.

  Returns:
    The file, or None if the lengths were not measured on `device`.
  """
  if not (found := _lengths(records, device)):
    return None
  from matplotlib.figure import Figure  # a second of import that the page alone does not pay

  styles = dict(zip(["mosaic_gpu", "pallas_triton", "xla_chunked", "reference", *peers.OPS],
                    ["kD-", "ko-", "ks:", "kx:", "C0^--", "C1v-.", "C2D:"]))
  figure = Figure(figsize=(10, 3.2 * len(found)), layout="constrained")
  axes = figure.subplots(len(found), 2, squeeze=False, sharex=True)
  for row, ((op, gate), lines) in zip(axes, found.items()):
    for axis, label in zip(row, PASSES):
      for name, points in lines.items():
        if label in points:
          axis.plot(*zip(*sorted(points[label])), styles.get(name, "k.-"), markersize=5,
                    label="cudnn (softmax attention)" if name == "cudnn" else name)
      axis.set(yscale="log", ylabel="tokens per second")
      axis.set_title(f"{op}, {_gate_text(gate)}: {label.replace('_', ' + ')}", fontsize=10)
      axis.set_xscale("log", base=2)
      axis.xaxis.set_major_formatter(lambda length, _: f"{length / 1024:g}K")
      axis.grid(alpha=0.3, which="both")
      if axis.lines:
        axis.legend(fontsize=8)
  for axis in axes[-1]:
    axis.set_xlabel("tokens per sequence, 131,072 per call")
  figure.suptitle(f"{device}, bfloat16, H16 K=V=128")
  with files.replacing(folder / _plot_name(device)) as file:
    figure.savefig(file, format="png", dpi=110)
  return folder / _plot_name(device)


def _gate_text(gate):
  return {"none": "no decay", "constant": "constant decay", "token": "decay per token",
          "channel": "decay per channel"}.get(gate, gate)


def _plot_name(device):
  return f"kernels_{re.sub('[^a-z0-9]+', '_', device.lower())}.png"


def _digits(value):
  return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:.0f}"


def _table(head, rows):
  lines = [head, ["---"] * len(head), *rows]
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
