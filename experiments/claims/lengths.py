"""Claims on texts longer than in training, from evaluations in the folder `lengths`."""

import statistics

from language.models import CARRIED
from language.report import pooled

from .claim import Claim, Finding, Results
from .language import name

FOLDER = "lengths"
MODELS = "gla", "retnet", "tnl", "deltanet", "transformer", *CARRIED
_TRAINED, _FAR = (256, 512), (8192, 16384)
_FLAT, _RISEN = 1.02, 1.1
_GLA, _DELTA = "2312.06635", "2406.06484"


def losses(results: Results, model: str) -> dict[tuple[int, int], float]:
  """Returns losses by bucket of positions, averaged over evaluations with a context of 512 and windows of 16,384."""
  return {bucket: statistics.mean(values) for bucket, values in _of_seeds(results, model).items()}


def _of_seeds(results, model):
  found = {}
  for record in results.objects(FOLDER):
    if (record["model"], record["trained_length"], record["sequence_length"]) == (model, 512, 16384):
      for bucket in record["buckets"]:
        found.setdefault((bucket["start"], bucket["stop"]), []).append(bucket["loss"])
  return found


def claims() -> list[Claim]:
  command = ("python experiments/run_language.py --sweep=lengths --out=experiments/results/language.jsonl; for each "
             "run python experiments/evaluate.py --workdir=RUN --split=long --sequence_length=16384 --piece=2048 "
             "--noreset_at_documents")
  setting = "42M, trained on 512 tokens, read to 16,384; loss at 8K to 16K over that at 256 to 512, flat up to x1.02"
  return [
      Claim(_GLA, "figure 5", "GLA, RetNet and TransNormerLLM stay as good far beyond the length of training.",
            "curves, flat to 18K (trained on 2K; GLA and RetNet)", setting, command,
            _growth([("gla", True), ("retnet", True), ("tnl", True)])),
      Claim(_GLA, "figure 5", "Softmax attention gets worse far beyond the length of training (here: by 10% or more).",
            "no curve", setting, command, _growth([("transformer", False)])),
      Claim(_GLA, "figure 5", "Trained on 12 windows in a row with the state carried, GLA and RetNet read the far end "
            "of a long text better than trained on single windows.", "a curve for 12 windows of 2K beside that for 2K",
            "42M, windows of 512 tokens, no gradient across; loss at 8K to 16K", command, _carried),
      Claim(_DELTA, "limitations", "DeltaNet holds less well than GLA and RetNet beyond the length of training.",
            "in words", setting, command, _worse)]


def growth(results: Results, model: str) -> float | None:
  """Returns the loss far beyond the training length over the loss within it."""
  found = losses(results, model)
  return found[_FAR] / found[_TRAINED] if _FAR in found and _TRAINED in found else None


def _growth(wanted):
  def judge(results):
    ratios = {model: growth(results, model) for model, _ in wanted}
    points = tuple(None if ratios[model] is None else ratios[model] <= _FLAT if flat else ratios[model] >= _RISEN
                   for model, flat in wanted)
    return Finding(_text(ratios), points)

  return judge


def _carried(results):
  found = {model: _of_seeds(results, model).get(_FAR, []) for model in MODELS}
  deviation, _ = pooled(list(found.values()))
  points, close, texts = [], [], []
  for carried, plain in CARRIED.items():
    if not (found[carried] and found[plain]):
      points.append(None)
      close.append(False)
      continue
    difference = statistics.mean(found[plain]) - statistics.mean(found[carried])
    error = deviation * (1 / len(found[carried]) + 1 / len(found[plain])) ** 0.5
    points.append(difference > 0)
    close.append(abs(difference) < 2 * error)
    texts += [f"{name(model)} {statistics.mean(found[model]):.4f}" for model in (carried, plain)]
  return Finding("; ".join(texts), tuple(points), tuple(close), tuple(map(name, CARRIED)))


def _worse(results):
  ratios = {model: growth(results, model) for model in ("deltanet", "gla", "retnet")}
  delta = ratios["deltanet"]
  return Finding(_text(ratios), tuple(None if delta is None or ratios[other] is None else delta > ratios[other]
                                      for other in ("gla", "retnet")))


def _text(ratios):
  return "; ".join(f"{name(model)} x{ratio:.3f}" for model, ratio in ratios.items() if ratio is not None)
