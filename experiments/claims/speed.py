"""Claims on training and decoding speed, from the records of bench_training.py and bench_decoding.py."""

from collections.abc import Iterable

from speed.training import SWEEPS

from .claim import Claim, Finding, Results

TRAINING, DECODING = "training.jsonl", "decoding.jsonl"
DECODED = "tnl_385m", "gla_340m", "deltanet_340m", "transformer_340m"
_GLA, _TNL, _DELTA = "2312.06635", "2405.17381", "2406.06484"
_CONTEXTS = tuple(2**i for i in range(10, 17))


def newest(rows: Iterable[dict], at: str) -> tuple[str, dict[tuple[str, int], dict]]:
  """Returns the device with most records, and its newest ones by model and the setting's field `at`, none failed."""
  devices = {}
  for row in rows:
    if not row["reason"] and not row["setting"]["tiny"]:
      devices.setdefault(row["device"], {})[row["setting"]["name"], row["setting"][at]] = row
  return max(devices.items(), key=lambda item: len(item[1]), default=("", {}))


def training(results: Results, name: str) -> tuple[str, dict[tuple[str, int], dict]]:
  rows = [row for row in results.lines(TRAINING) if row["setting"]["set"] == name]
  return newest(rows, "sequence_length")


def decoding(results: Results) -> tuple[str, dict[tuple[str, int], dict]]:
  rows = [row for row in results.lines(DECODING) if row["setting"]["name"] in DECODED]
  return newest([row for row in rows if row["setting"].get("batch_size") == 1], "context")  # and no prompt


def claims() -> list[Claim]:
  setting = "1.3B, 16,384 tokens per step, 2K to 16K, float32 parameters and moments, bfloat16 compute"
  command = lambda name: f"python experiments/bench_training.py --set={name} --out=experiments/results/{TRAINING}"
  fig6 = SWEEPS["gla_fig6"].lengths
  gla, transformer, mamba, delta = "gla_1b3", "transformer_1b3", "mamba_1b3", "deltanet_1b3"
  order = [(left, right, length) for left, right in ((gla, delta), (delta, mamba)) for length in fig6]
  return [
      Claim(_GLA, "figure 6", "GLA trains faster than Mamba at every length.", "curves", setting, command("gla_fig6"),
            _faster("gla_fig6", [(gla, mamba, length) for length in fig6])),
      Claim(_GLA, "figure 6", "GLA trains faster than Transformer++ from 4,096 tokens on.", "curves", setting,
            command("gla_fig6"), _faster("gla_fig6", [(gla, transformer, length) for length in fig6[1:]])),
      Claim(_DELTA, "throughput figure", "DeltaNet's training speed lies between GLA's and Mamba's.", "curves", setting,
            command("gla_fig6"), _faster("gla_fig6", order)),
      Claim(_DELTA, "throughput figure", "DeltaNet trains faster than Transformer++ from 8,192 tokens on.", "curves",
            setting, command("gla_fig6"), _faster("gla_fig6", [(delta, transformer, length) for length in fig6[2:]])),
      Claim(_TNL, "training speed table", "TransNormerLLM trains as fast at every length.",
            "38,615 tokens/s at 1K, 38,278 at 64K", "385M, 65,536 tokens per step; a point holds within 5% of 2K",
            command("tnl"), _flat_training),
      Claim(_TNL, "training speed table", "TransNormerLLM trains faster than the Transformer at every length.",
            "38,615 and 35,931 at 1K; 38,278 and 5,643 at 64K", "385M and 383M, 65,536 tokens per step", command("tnl"),
            _faster("tnl", [("tnl_385m", "transformer_385m", length) for length in SWEEPS["tnl"].lengths])),
      Claim(_TNL, "inference", "TransNormerLLM decodes in the same time and memory after any number of tokens, and "
            "the Transformer's memory grows.", "2,819.6 tokens/s; 252 to 967 of others (7B)",
            "385M and 342M, one sequence, 1K to 64K tokens before; a time holds within 10% of 1K",
            f"python experiments/bench_decoding.py --out=experiments/results/{DECODING}", _decoding)]


def _faster(name, pairs):
  """Has a point per (left, right, length), which holds if left trains more tokens per second than right."""

  def judge(results):
    device, rows = training(results, name)
    speed = {key: row["tokens_per_s"] for key, row in rows.items()}
    points = [speed[left, at] > speed[right, at] if (left, at) in speed and (right, at) in speed else None
              for left, right, at in pairs]
    models = dict.fromkeys(model for left, right, _ in pairs for model in (left, right))
    return Finding(_curves(device, {model: {at: speed[model, at] for at in sorted({at for *_, at in pairs})
                                            if (model, at) in speed} for model in models}), tuple(points))

  return judge


def _flat_training(results):
  device, rows = training(results, "tnl")
  speed = {at: row["tokens_per_s"] for (model, at), row in rows.items() if model == "tnl_385m"}
  points = [abs(speed[at] / speed[2048] - 1) <= 0.05 if at in speed and 2048 in speed else None
            for at in SWEEPS["tnl"].lengths if at != 2048]
  return Finding(_curves(device, {"tnl_385m": speed}), tuple(points))


def _decoding(results):
  device, rows = decoding(results)
  first, points = _CONTEXTS[0], []
  for at in _CONTEXTS[1:]:
    tnl = [rows.get(("tnl_385m", place)) for place in (first, at)]
    transformer = [rows.get(("transformer_340m", place)) for place in (first, at)]
    points += [_point(tnl, lambda a, b: b["ms_per_token"] <= 1.1 * a["ms_per_token"]),
               _point(tnl, lambda a, b: b["state_mib"] == a["state_mib"]),
               _point(transformer, lambda a, b: b["state_mib"] > 1.5 * a["state_mib"])]
  texts = [f"{model} {_length(at)} {rows[model, at]['ms_per_token']:.3g} ms, {rows[model, at]['state_mib']:.0f} MiB"
           for model in ("tnl_385m", "transformer_340m") for at in (_CONTEXTS[0], _CONTEXTS[-1]) if (model, at) in rows]
  return Finding(f"{device}: {'; '.join(texts)}", tuple(points))


def _point(pair, holds):
  return None if None in pair else holds(*pair)


def _curves(device, curves):
  texts = [f"{model} " + ", ".join(f"{_length(at)} {speed:,.0f}" for at, speed in sorted(points.items()))
           for model, points in curves.items() if points]
  return f"{device}, tokens/s: {'; '.join(texts)}"


def _length(tokens):
  return f"{tokens // 1024}K"
