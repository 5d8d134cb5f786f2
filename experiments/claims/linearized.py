"""Claims on Transformers that were made linear and trained further, from the records of the sweep `linearized`."""

from .claim import Claim, Finding, Results
from .language import FILES, LEVEL, fewer_bits, name, rows

_SUPRA, _SWEEP = "2405.06640", "linearized"
_UPTRAINED = "linearized_5", "linearized_20"


def claims() -> list[Claim]:
  setting = "42M parameters, 29.5M tokens of English in all, of which 5% or 20% after the conversion, bits per byte"
  command = f"python experiments/run_language.py --sweep={_SWEEP} --out=experiments/results/{FILES[_SWEEP]}"
  claim = lambda place, text, printed, judge: Claim(_SUPRA, place, text, printed, setting, command, judge)
  pairs = lambda *others: [(model, other) for model in _UPTRAINED for other in others]
  return [
      claim("main table", "A Transformer that was made linear and uptrained is level with linear models of the same "
            "tokens (here: at most 1% more bits than GLA).", "average of six tasks 61.2 (Mistral and 20B tokens) and "
            "60.3 (RWKV-5, 1.1T), 7B", fewer_bits(_SWEEP, pairs("gla"), LEVEL)),
      claim("ablations", "After as few tokens in all, the linear layer is better from scratch than uptrained.",
            "HellaSwag 54.7 (100B from scratch) and 51.7 (100B and 10B), 1B", fewer_bits(_SWEEP, [
                ("supra", model) for model in _UPTRAINED])),
      claim("ablations", "After as many tokens, Transformer++ is better than the linear layer, from scratch or "
            "uptrained.", "HellaSwag 55.9 (100B); 54.7 (100B from scratch), 51.7 (100B and 10B), 1B",
            fewer_bits(_SWEEP, [("transformer", model) for model in ("supra", *_UPTRAINED)])),
      claim("main table", "The linear model lacks recall from its context most (here: it loses more to Transformer++ "
            "on pairs of tokens that repeat in their document than on others).", "HellaSwag 77.1 of 81.0, MMLU with "
            "five examples 34.2 of 62.4 (Mistral and 100B tokens, 7B)", _recall)]


def _recall(results: Results) -> Finding:
  found, texts, points = rows(results, _SWEEP), [], []
  for model in _UPTRAINED:
    losses = [found.get(key, {}).get("pair_losses") for key in (model, "transformer")]
    if None in losses:
      points.append(None)
      continue
    lost = {kind: losses[0][kind] - losses[1][kind] for kind in ("repeated", "other")}
    points.append(lost["repeated"] > lost["other"])
    texts.append(f"{name(model)}: {lost['repeated']:+.3f} nats on repeated pairs, {lost['other']:+.3f} on others")
  return Finding("; ".join(texts), tuple(points))
