"""Training speed and memory against sequence length, at a constant number of tokens per step, for the papers' curves.

  python experiments/bench_training.py --set=gla_fig6 --out=experiments/results/training.jsonl --limit_seconds=540
  python experiments/bench_training.py --set=tnl --out=experiments/results/training.jsonl
  python experiments/bench_training.py --set=tnl --tiny                                 # proves the command on a CPU

gla_fig6 is figure 6 of arXiv:2312.06635: 1.3B parameters and 16,384 tokens per step. tnl is the training table of
arXiv:2405.17381: 385M parameters, here with 65,536 tokens per step, beside a Transformer++ of that size and vocabulary.
Each window is one document, so attention runs its causal kernel without a mask. All programs are compiled first, side
by side. A run that fails is recorded with its reason. A run is skipped when --out has its record for this device, these
versions and this setting. `report_claims.py` draws the curves. Exit codes: 0 done, or the time is over; 1 a run failed;
2 a user's error.
"""

import math
import pathlib
import sys
import time

from absl import flags

from lin_jax.config import REMAT_POLICIES, DataConfig, MeshConfig, OptimConfig, validate
from running import commands
from speed import sweeps, training
from speed.training import SWEEPS

_RESULTS = ("tokens_per_s", "step_ms", "mfu", "memory_gib", "compile_s", "losses")

_SET = flags.DEFINE_enum("set", "gla_fig6", SWEEPS, "The curve to measure: its models, lengths and tokens per step.")
_MODELS = flags.DEFINE_list("models", [], "Models of the set; all if none is given.")
_LENGTHS = flags.DEFINE_list("lengths", [], "Lengths of the set; all if none is given.")
_STEPS = flags.DEFINE_integer("steps", 12, "Optimizer steps.", lower_bound=2)
_TIMED = flags.DEFINE_integer("timed_steps", 8, "How many of the last steps are timed.", lower_bound=1)
_REMAT = flags.DEFINE_enum("remat", "dots", REMAT_POLICIES, "What a block recomputes in its backward pass.")
_TINY = flags.DEFINE_bool("tiny", False, "Trains models of width 32 with two layers, in float32, on a 256th of the "
                          "lengths and tokens.")
_OUT = flags.DEFINE_string("out", "", "JSON lines file to which each run's record is appended.")
_LIMIT = flags.DEFINE_float("limit_seconds", 0, "Begins no run that would probably end later; 0 for no limit.",
                            lower_bound=0)


def main(_):
  start = time.monotonic()
  if _TIMED.value >= _STEPS.value:
    raise ValueError(f"--timed_steps={_TIMED.value}: must be less than --steps={_STEPS.value}")
  sweep = SWEEPS[_SET.value]
  path = pathlib.Path(_OUT.value) if _OUT.value else None
  common = training.provenance()
  every = []
  for model in sweeps.chosen(_MODELS, list(sweep.models)):
    for length in sweeps.chosen(_LENGTHS, sweep.lengths):
      config = _config(f"{model} at {length}", sweep.models[model](), length, sweep.tokens)
      every.append((config, common | {"setting": _setting(model, config)}))
  runs = sweeps.missing(every, path)
  print(f"{common['device']}: {len(runs)} runs, {len(every) - len(runs)} recorded before")
  programs = training.compile_all([config for config, _ in runs], documents=False)
  runs = [(program, row) for program, (_, row) in zip(programs, runs, strict=True)]
  failed = sweeps.run(runs, _measured, _line, _RESULTS, path, begun=start, limit=_LIMIT.value)
  if failed:
    print("failed:", *failed, file=sys.stderr)
    sys.exit(1)


def _config(name, config, length, tokens):
  shrink = 256 if _TINY.value else 1
  config.name, config.remat, config.mesh = name, _REMAT.value, MeshConfig(1, 1, 1)
  config.data = DataConfig(sequence_length=length // shrink, batch_size=tokens // length)
  config.optim = OptimConfig(steps=_STEPS.value, warmup_steps=1)
  return validate(training.shrunk(config) if _TINY.value else config)


def _setting(model, config):
  return {"set": _SET.value, "tiny": _TINY.value, "name": model, **training.description(config),
          "timed_steps": _TIMED.value, "data": training.ZIPF, "documents": "one a window"}


def _measured(program):
  program = program.result()
  steps = program.config.optim.steps
  batches = training.drawn_batches(program.config, steps, documents=False)
  result = training.measure(program, batches, _TIMED.value)
  if not all(map(math.isfinite, result["losses"])):
    raise ArithmeticError(f"losses {result['losses']}: must be finite")
  return {name: result[name] for name in _RESULTS}


def _line(row):
  setting = row["setting"]
  mfu = "" if row["mfu"] is None else f", MFU {100 * row['mfu']:.1f}%"
  return (f"{setting['sequence_length']:>7,} x {setting['batch_size']:<3} {row['tokens_per_s']:>9,.0f} tokens/s, "
          f"{row['step_ms']:.1f} ms per step, {row['memory_gib']:.2f} GiB{mfu}, compiled in {row['compile_s']:.1f} s")


if __name__ == "__main__":
  commands.run(main)
