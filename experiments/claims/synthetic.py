"""Claims on the synthetic tasks: MQAR, MAD and RegBench, from the records of run_synthetic.py."""

import functools
import json
import operator
import statistics
from collections.abc import Callable

from synthetic import sweeps
from synthetic.runs import Run, whole

from .claim import Claim, Finding, Results, compared, percent

FILE = "synthetic.jsonl"
NAMES = {"attention": "Transformer++", "linear_attention": "linear attention", "retention": "RetNet", "gla": "GLA",
         "mamba": "Mamba", "delta_net": "DeltaNet", "gated_delta_net": "Gated DeltaNet"}
MQAR_SETTINGS = ((256, 16), (512, 64))
WIDTHS = (64, 128, 256)
EXAMPLES = (1000, 2500, 5000, 10_000)
_GLA, _DELTA = "2312.06635", "2406.06484"


@functools.lru_cache(maxsize=8)
def of_sweep(results: Results, name: str) -> list[tuple[Run, dict]]:
  """Returns the records of the sweep's runs with any seed, without runs of other settings."""
  planned = {_identity(run.setting()): run for run in sweeps.SWEEPS[name]()}
  found = [(planned.get(_identity(whole(record["setting"]))), record) for record in results.lines(FILE)]
  return [(run, record) for run, record in found if run]


def best(results: Results, sweep: str, wanted: Callable[[Run], bool],
         measure: Callable[[dict], float] = operator.itemgetter("accuracy")) -> float | None:
  """Returns the best mean over seeds among the wanted runs' learning rates, None until all were tried or one solved."""
  found, solved = {}, False
  for run, record in of_sweep(results, sweep):
    if wanted(run):
      found.setdefault(run.learning_rate, []).append(measure(record))
      solved |= record["solved"]
  planned = {run.learning_rate for run in sweeps.SWEEPS[sweep]() if wanted(run)}
  return max(map(statistics.mean, found.values())) if found and (solved or found.keys() == planned) else None


def mqar(results: Results, mixer: str, setting: tuple[int, int], width: int) -> float | None:
  fields = dict(zip(("sequence_length", "pairs"), setting, strict=True))
  return best(results, "mqar", lambda run: (run.mixer, run.width, run.task_fields) == (mixer, width, fields))


def mqar_not_begun(results: Results) -> tuple[int, int]:
  """Returns how many scores at the larger setting are below 2%, and how many scores there are."""
  scores = [mqar(results, mixer, MQAR_SETTINGS[-1], width) for mixer in NAMES for width in WIDTHS]
  scores = [score for score in scores if score is not None]
  return sum(score < 0.02 for score in scores), len(scores)


def mad(results: Results, mixer: str, task: str) -> float | None:
  """Returns the mean of the task's baseline and its hardest change, None before both were run."""
  def score(change):
    return best(results, "mad", lambda run: (run.task, run.mixer, run.task_fields) == (task, mixer, change),
                operator.itemgetter("class_accuracy"))

  changes = {repr(run.task_fields): run.task_fields for run in sweeps.mad() if run.task == task}
  scores = [score(change) for change in changes.values()]
  return None if None in scores else statistics.mean(scores)


def mad_average(results: Results, mixer: str) -> float | None:
  scores = [mad(results, mixer, task) for task in dict.fromkeys(run.task for run in sweeps.mad())]
  return None if None in scores else statistics.mean(scores)


def regbench(results: Results, mixer: str, examples: int) -> float | None:
  """Scores a run at its best test, because models then learn the few training sequences by heart and get worse."""
  return best(results, "regbench", lambda run: (run.mixer, run.task_fields["train_examples"]) == (mixer, examples),
              lambda record: max(accuracy for _, _, accuracy in record["curve"]))


def regbench_distance(results: Results, mixer: str, examples: int) -> float | None:
  """Returns the least total variation from the true distribution over tests and learning rates."""
  found = best(results, "regbench", lambda run: (run.mixer, run.task_fields["train_examples"]) == (mixer, examples),
               lambda record: -min(record["total_variation"]))
  return None if found is None else -found


def _identity(setting):
  return json.dumps({name: value for name, value in setting.items() if name != "seed"}, sort_keys=True)


def _solved(scores):
  """Returns a finding of (label, score), in which a point holds at 99% or more."""
  scores = list(scores)
  return Finding("; ".join(f"{label}: {percent(score)}" for label, score in scores if score is not None),
                 tuple(None if score is None else score >= 0.99 for _, score in scores))


def _mqar_pairs(left, right, settings=MQAR_SETTINGS, widths=WIDTHS):
  return lambda results: compared((f"{setting[0]}/{setting[1]} d{width}", mqar(results, left, setting, width),
                                   mqar(results, right, setting, width)) for setting in settings for width in widths)


def _mqar_solved(mixer, settings):
  return lambda results: _solved((f"{setting[0]}/{setting[1]} d{width}", mqar(results, mixer, setting, width))
                                 for setting in settings for width in WIDTHS)


def _command(sweep):
  return f"python experiments/run_synthetic.py --sweep={sweep} --until_solved --out=experiments/results/{FILE}"


def claims() -> list[Claim]:
  mqar_setting = "two blocks without MLP, bfloat16, best of 3 learning rates, 16 of 64 epochs of 100,000"
  mad_setting = "baseline and hardest change of a task, width 128, bfloat16, best of 3 learning rates, 50 of 200 epochs"
  regbench_setting = ("width 128, 4 blocks, bfloat16, a tenth of the embeddings dropped, best of 3 learning rates, 50 "
                      "of 200 epochs; legal next symbols at the best test of a run")
  return [
      Claim(_GLA, "figure 4", "Softmax attention solves MQAR at every setting.", "100", mqar_setting, _command("mqar"),
            _mqar_solved("attention", MQAR_SETTINGS)),
      Claim(_GLA, "figure 4", "GLA recalls at least as much as RetNet at every width.", "curves: GLA above RetNet",
            mqar_setting, _command("mqar"), _mqar_pairs("gla", "retention")),
      Claim(_DELTA, "MQAR figure", "DeltaNet without convolutions solves 64 pairs in 512 tokens at every width.",
            "curve near 100", mqar_setting, _command("mqar"), _mqar_solved("delta_net", MQAR_SETTINGS[1:])),
      Claim(_DELTA, "MQAR figure", "DeltaNet recalls more than Mamba at small widths.", "curves: DeltaNet above Mamba",
            mqar_setting, _command("mqar"), _mqar_pairs("delta_net", "mamba", MQAR_SETTINGS[1:], WIDTHS[:2])),
      Claim(_DELTA, "MAD table", "DeltaNet recalls in context, with and without noise, and copies without error.",
            "100, 100, 100", mad_setting, _command("mad"),
            lambda results: _solved((task.replace("_", " "), mad(results, "delta_net", task))
                                    for task in ("in_context_recall", "noisy_recall", "selective_copying"))),
      Claim(_DELTA, "MAD table", "DeltaNet is the best at fuzzy recall.", "35.7; Transformer 29.8, GLA 6.9, Mamba 6.7",
            mad_setting, _command("mad"), _mad_pairs("fuzzy_recall", [("delta_net", other) for other in
                                                                      ("attention", "gla", "mamba")])),
      Claim(_DELTA, "MAD table", "DeltaNet memorizes less than the others.",
            "52.8; Transformer 85.2, GLA 63.3, Mamba 89.5", mad_setting, _command("mad"),
            _mad_pairs("memorization", [(other, "delta_net") for other in ("attention", "gla", "mamba")])),
      Claim(_DELTA, "MAD table", "Average over the tasks: Transformer, then DeltaNet, then Mamba, then GLA.",
            "74.5, 71.8, 69.3, 60.0", mad_setting, _command("mad"),
            lambda results: compared((f"{NAMES[left]} and {NAMES[right]}", mad_average(results, left),
                                      mad_average(results, right)) for left, right in
                                     (("attention", "delta_net"), ("delta_net", "mamba"), ("mamba", "gla")))),
      Claim(_DELTA, "RegBench figure", "DeltaNet learns regular languages in context as well as Transformer++, GLA and "
            "Mamba.", "curves: at or above (within a point here)", regbench_setting, _command("regbench"),
            _regbench_level)]


def _regbench_level(results):
  texts, points = [], []
  for examples in EXAMPLES:
    scores = {mixer: regbench(results, mixer, examples) for mixer in ("delta_net", "attention", "gla", "mamba")}
    ours = scores["delta_net"]
    points += [None if ours is None or score is None else ours >= score - 0.01
               for mixer, score in scores.items() if mixer != "delta_net"]
    known = [f"{NAMES[mixer]} {percent(score)}" for mixer, score in scores.items() if score is not None]
    texts += [f"{examples:,}: {', '.join(known)}"] if known else []
  return Finding("; ".join(texts), tuple(points))


def _mad_pairs(task, pairs):
  return lambda results: compared((f"{NAMES[left]} and {NAMES[right]}", mad(results, left, task),
                                   mad(results, right, task)) for left, right in pairs)
