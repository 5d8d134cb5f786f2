"""Claims on kernels against sequence length, from the records of bench_kernels.py."""

import dataclasses
from collections.abc import Sequence

from kernel_bench.cases import PASSES, Case, named

from .claim import Claim, Finding, Results

_COMMAND = ("XLA_PYTHON_CLIENT_PREALLOCATE=false python experiments/bench_kernels.py --shapes={} "
            "--out=experiments/results/kernels.jsonl")
_SCANS = " --ops=delta_rule --implementations=pallas_triton,reference --peers=none"
_RECURRENT = " --ops=delta_rule --peers=fla_recurrent"


def claims() -> list[Claim]:
  figure, table = _cases("figures", "gla"), _cases("figures", "linear_attention")
  length = "H16 K=V=128 bfloat16, 131,072 tokens per call"
  gla = "GLA's kernel is faster than softmax attention's from 4,096 tokens on."
  flat = "Lightning attention's kernel takes the same time per token at every length."
  faster = "Lightning attention's kernel is faster than softmax attention's from 8,192 tokens on."
  chunks = "The chunkwise form is at least five times as fast as the recurrent form."
  return [
      Claim("2312.06635", "figure 2", gla, "faster (the sixth version: from 1,024 tokens on)",
            "B32 H16 K=V=64 bfloat16, beside cuDNN", _COMMAND.format("figures"), _faster_from(figure, 4096)),
      Claim("2312.06635", "figure 2", gla, "the same at twice the width of a head", f"{length}, beside cuDNN",
            _COMMAND.format("length"), _faster_from(_cases("length", "gla"), 4096)),
      Claim("2405.17381", "kernel table of the code", flat, "17.66 ms for 32K, 64 times the length of 0.352 ms: x50",
            "B4 H32 K=V=128 bfloat16, 1K to 32K; a point holds within 10% of 4K", _COMMAND.format("figures"),
            _flat(table, 0.1)),
      Claim("2405.17381", "kernel table of the code", flat, "the same",
            f"{length}, 1K to 128K; a point holds within 10% of 4K", _COMMAND.format("length"),
            _flat(_cases("length", "linear_attention", "constant"), 0.1)),
      Claim("2405.17381", "kernel table of the code", faster, "4.41 and 10.4 ms forward at 8K",
            "B4 H32 K=V=128 bfloat16, beside cuDNN", _COMMAND.format("figures"), _faster_from(table, 8192)),
      Claim("2406.06484", "speed-up figure", chunks, "5.5 at 2K to 11.5 at 8K for 64 channels, 8.9 and 13.2 for 128",
            "16,384 tokens, 2,048 channels, forward and backward, beside this repository's token scan, no kernel",
            _COMMAND.format("figures") + _SCANS, _at_least_five_times(_cases("figures", "delta_rule"), "reference")),
      Claim("2406.06484", "speed-up figure", chunks, "the same",
            "16,384 tokens, 2,048 channels, forward and backward, beside flash-linear-attention's recurrent kernel",
            _COMMAND.format("figures") + _RECURRENT,
            _at_least_five_times(_cases("figures", "delta_rule"), "fla_recurrent"))]


def times(results: Results, name: str, op: str) -> tuple[str, dict[str, dict[int, float]]]:
  """Returns a device and its milliseconds per pair of passes by length, for `op` and cuDNN's attention in set `name`.

  The device is the one that has most of them.
  """

  def on(device):
    cases, label = _cases(name, op), "forward_backward"
    found = {op: {case.T: _ours(results, device, case, label) for case in cases},
             "attention": {case.T: results.kernels.rivals(device, case, label).get("cudnn") for case in cases}}
    return device, {line: {T: row["ms"] for T, row in rows.items() if row} for line, rows in found.items()}

  return max(map(on, _devices(results)), key=lambda found: sum(map(len, found[1].values())), default=("", {}))


def _cases(name, op, gate=None):
  return [case for case in named(name, [op]) if gate in (None, case.gate)]


def _devices(results):
  """Lists GPUs with records, the most measured first. A claim is judged on the first that has most of its points."""
  found = [row["device"] for row in results.kernels if row["platform"] == "gpu"]
  return sorted(set(found), key=lambda device: (-found.count(device), device))


def _first(results, judge) -> Finding:
  found = [(judge(device), device) for device in _devices(results)]
  finding, device = max(found, key=lambda x: x[0].run, default=(Finding("", (None,)), ""))
  return dataclasses.replace(finding, text=f"{device}: {finding.text}") if finding.run else finding


def _faster_from(cases: Sequence[Case], start):
  """Has a point per length from `start` on and pass, which holds if ours takes less time than cuDNN's attention."""

  def judge(results):
    def on(device):
      texts, points = [], []
      for label in PASSES:
        times = {case.T: (_ours(results, device, case, label), results.kernels.rivals(device, case, label).get("cudnn"))
                 for case in cases}
        ratios = {T: cudnn["ms"] / ours["ms"] for T, (ours, cudnn) in times.items() if ours and cudnn}
        points += [ratios[T] > 1 if T in ratios else None for T in times if T >= start]
        texts += [f"{_pass(label)} " + ", ".join(f"{_length(T)} x{x:.2f}" for T, x in ratios.items())] if ratios else []
      return Finding("speed over attention: " + "; ".join(texts), tuple(points))

    return _first(results, on)

  return judge


def _flat(cases: Sequence[Case], slack):
  """Has a point per length from 1,024 on and pass, which holds if the time per token is within `slack` of 4,096's."""

  def judge(results):
    def on(device):
      texts, points = [], []
      for label in PASSES:
        rows = {case.T: (row["ms"] / (case.B * case.T) * 1e6) for case in cases
                if case.T >= 1024 and (row := _ours(results, device, case, label))}
        middle = rows.get(4096)
        points += [abs(rows[case.T] / middle - 1) <= slack if middle and case.T in rows else None
                   for case in cases if case.T >= 1024 and case.T != 4096]
        if rows:
          texts.append(f"{_pass(label)} " + ", ".join(f"{_length(T)} {ns:.3g}" for T, ns in rows.items()))
      return Finding("ns per token: " + "; ".join(texts), tuple(points))

    return _first(results, on)

  return judge


def _at_least_five_times(cases: Sequence[Case], recurrent):
  """Has a point per case, which holds if ours takes at most a fifth of the time of `recurrent`, a recurrent form.

  A case in which the recurrent form's results are wrong, or in which it cannot run, is named and does not count.
  """

  def judge(results):
    def on(device):
      texts, points = [], []
      for case in cases:
        kernel = _ours(results, device, case, "forward_backward")
        slow = results.kernels.counted(device, case, recurrent, "forward_backward")
        points.append(slow["ms"] / kernel["ms"] >= 5 if kernel and slow else None)
        ratio = f"x{slow['ms'] / kernel['ms']:.0f}" if kernel and slow else ""
        if ratio or (ratio := _why_uncounted(results.kernels.row(device, case, recurrent, "forward_backward"))):
          texts.append(f"{case.K} channels {_length(case.T)} {ratio}")
      return Finding("; ".join(texts), tuple(points))

    return _first(results, on)

  return judge


def _why_uncounted(row):
  """Why a call has no time that counts, "" if no record says so."""
  if row is None:
    return ""
  if row["ms"] is None:
    return "not counted, it cannot run"
  if row["within_bounds"]:
    return ""
  name, error = max(row["errors"].items(), key=lambda item: item[1])
  return f"not counted, its {name} is off by {error:.0e}"


def _ours(results, device, case, label):
  return results.kernels.ours(device, case, label)


def _pass(label):
  return {"forward": "fwd", "forward_backward": "fwd+bwd"}[label]


def _length(tokens):
  return f"{tokens // 1024}K" if tokens >= 1024 else str(tokens)
