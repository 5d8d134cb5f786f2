"""Training speed and memory against sequence length, at a constant number of tokens per step, for the papers' curves.

  python experiments/bench_training.py --set=gla_fig6 --out=experiments/results/training.jsonl --limit_seconds=540
  python experiments/bench_training.py --set=tnl --out=experiments/results/training.jsonl
  python experiments/bench_training.py --set=step --unroll=0,1 --remat=none,dots --out=runs/step.jsonl
  python experiments/bench_training.py --set=step_340m --unroll=0 --out=experiments/results/training.jsonl
  python experiments/bench_training.py --set=step --peers=jla,fla --out=experiments/results/training.jsonl
  python experiments/bench_training.py --set=step --documents=one,packed --out=experiments/results/training.jsonl
  python experiments/bench_training.py --set=finetune --models=gla_1b3 --lora_rank=0,16 --out=runs/finetune.jsonl
  python experiments/bench_training.py --set=tnl --tiny                                 # proves the command on a CPU

gla_fig6 is figure 6 of arXiv:2312.06635: 1.3B parameters and 16,384 tokens per step. tnl is the training table of
arXiv:2405.17381: 385M parameters, here with 65,536 tokens per step, beside a Transformer++ of that size and vocabulary.
step is 16,384 tokens in 8 windows for each family at the size of its paper, to compare values of --unroll and --remat,
and step_340m is 32,768 tokens in 16 windows for families at 340M parameters. Runs go through all models with the first
values of --unroll and --remat before they take the next.

finetune is any config by name, with 16,384 tokens in 4 windows. --lora_rank=0,16 takes full training and low-rank
adapters of rank 16 beside all Linear layers, whose base is frozen and kept in the compute dtype. Their records have no
MFU.

With --documents=one each window is one document, so attention runs its causal kernel without a mask. With packed, the
windows are cut from a row of documents of the English corpus's lengths (`speed/packing.py`), and the state restarts at
each document. Both in one command run one after the other for each model, for the table of what packing costs.

With --peers the set step also trains other libraries' own models of the same sizes, before ours and each in a process
of its own, within --peer_seconds (`speed/peers.py`). A library that is not installed costs one line. `report_claims.py`
writes the table of ours beside theirs.

Programs are compiled in groups, side by side, and a group is measured before the next is compiled. A run that fails is
recorded with its reason. A run is skipped when --out has its record for this device, these versions and this setting.
`report_claims.py` draws the curves of gla_fig6 and tnl. A program of an earlier run comes out of the compilation cache,
so records of `compile_s` need --compilation_cache=off. Exit codes: 0 done, or the time is over; 1 a run failed; 2 a
user's error.
"""

import itertools
import math
import os
import pathlib
import sys
import time

from absl import flags

from lin_jax.config import REMAT_POLICIES, DataConfig, MeshConfig, OptimConfig, validate
from running import commands
from speed import packing, peers, sweeps, training
from speed.training import SWEEPS

_RESULTS = ("tokens_per_s", "step_ms", "mfu", "memory_gib", "compile_s", "first_step_s", "losses")

_SET = flags.DEFINE_enum("set", "gla_fig6", SWEEPS, "The curve to measure: its models, lengths and tokens per step.")
_MODELS = flags.DEFINE_list("models", [], "Models of the set; all if none is given.")
_LENGTHS = flags.DEFINE_list("lengths", [], "Lengths of the set; all if none is given.")
_STEPS = flags.DEFINE_integer("steps", 12, "Optimizer steps.", lower_bound=2)
_TIMED = flags.DEFINE_integer("timed_steps", 8, "How many of the last steps are timed.", lower_bound=1)
_REMAT = flags.DEFINE_list("remat", ["dots"], "What a block recomputes in its backward pass: one or more of "
                           f"{', '.join(REMAT_POLICIES)}.")
_UNROLL = flags.DEFINE_list("unroll", ["1"], "Repetitions of layers compiled in one step of their scan, 0 for all: one "
                            "or more numbers.")
_DOCUMENTS = flags.DEFINE_list("documents", ["one"], "How windows hold documents: one or more of "
                               f"{', '.join(packing.DOCUMENTS)}.")
_LORA_RANK = flags.DEFINE_list("lora_rank", ["0"], "Ranks of low-rank adapters to train in place of the parameters, 0 "
                               "for full training: one or more numbers.")
_GROUP = flags.DEFINE_integer("group", 4, "How many programs are compiled side by side before they are measured.",
                              lower_bound=1)
_PEERS = flags.DEFINE_list("peers", [], f"Other libraries to train beside ours, of {', '.join(peers.VARIANTS)}.")
_VARIANTS = flags.DEFINE_list("variants", [], "Variants of the other libraries' training; all if none is given.")
_PEER_LIMIT = flags.DEFINE_float("peer_seconds", 240, "Limit for preparing a model of another library, and again for "
                                 "training it.", lower_bound=1)
_TINY = flags.DEFINE_bool("tiny", False, "Trains models of width 32 with two layers, in float32, on a 256th of the "
                          "lengths and tokens.")
_OUT = flags.DEFINE_string("out", "", "JSON lines file to which each run's record is appended.")
_LIMIT = flags.DEFINE_float("limit_seconds", 0, "Begins no run that would probably end later; 0 for no limit.",
                            lower_bound=0)


def main(_):
  start = time.monotonic()
  if _TIMED.value >= _STEPS.value:
    raise ValueError(f"--timed_steps={_TIMED.value}: must be less than --steps={_STEPS.value}")
  if _PEERS.value and _SET.value != "step":
    raise ValueError(f"--peers={','.join(_PEERS.value)}: goes with --set=step, not with --set={_SET.value}")
  if _SET.value == "finetune" and not _MODELS.value:
    raise ValueError(f"--models is required with --set=finetune: one or more of {', '.join(SWEEPS['finetune'].models)}")
  path = pathlib.Path(_OUT.value) if _OUT.value else None
  failed = _train_peers(path, start) if _PEERS.value else []
  failed += _train_ours(path, start)
  if failed:
    print("failed:", *failed, file=sys.stderr)
    sys.exit(1)


def _train_peers(path, start):
  # The backend of this process starts now. It must leave the device's memory to the other processes.
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  common, (length,), tokens = training.provenance(), SWEEPS["step"].lengths, SWEEPS["step"].tokens
  every, size = [], {"batch_size": tokens // length, "sequence_length": length}
  if _TINY.value:
    size = {"batch_size": 2, "sequence_length": 64}
  for chosen in peers.chosen(_PEERS.value, _MODELS.value, _VARIANTS.value):
    setting = {"set": "step", "tiny": _TINY.value, **chosen, **size, "steps": _STEPS.value,
               "timed_steps": _TIMED.value, "data": training.ZIPF, "documents": packing.DOCUMENTS["one"]}
    every.append((setting, common | {"versions": peers.versions(chosen["library"]), "setting": setting}))
  runs = sweeps.missing(every, path)
  print(f"{common['device']}: {len(runs)} runs of other libraries, {len(every) - len(runs)} recorded before",
        flush=True)
  with peers.prepared_in_groups([setting for setting, _ in runs], _GROUP.value, _PEER_LIMIT.value) as processes:
    return sweeps.run(runs, lambda setting: _finite(next(processes).measure()), _line, peers.FIELDS, path, begun=start,
                      limit=_LIMIT.value)


def _train_ours(path, start):
  sweep, common, every = SWEEPS[_SET.value], training.provenance(), []
  if unknown := set(_DOCUMENTS.value) - set(packing.DOCUMENTS):
    raise ValueError(f"--documents={','.join(unknown)}: unknown; known: {', '.join(packing.DOCUMENTS)}")
  for unroll, remat, rank, model, length, documents in itertools.product(
      _numbers(_UNROLL), _REMAT.value, _numbers(_LORA_RANK), sweeps.chosen(_MODELS, list(sweep.models)),
      sweeps.chosen(_LENGTHS, sweep.lengths), _DOCUMENTS.value):
    config = sweep.models[model]()
    config.remat, config.unroll, config.lora.rank = remat, unroll, rank
    config = _config(f"{model} at {length}", config, length, sweep.tokens)
    every.append(((config, documents == "packed"), common | {"setting": _setting(model, config, documents)}))
  runs = sweeps.missing(every, path)
  print(f"{common['device']}: {len(runs)} runs, {len(every) - len(runs)} recorded before", flush=True)
  programs = training.compiled_in_groups([config for (config, _), _ in runs], _GROUP.value,
                                         [packed for (_, packed), _ in runs])
  # Runs are measured in their order, and none after one is left.
  measure = lambda run: _measured(next(programs), packed=run[1])
  return sweeps.run(runs, measure, _line, _RESULTS, path, begun=start, limit=_LIMIT.value)


def _numbers(flag):
  for text in flag.value:
    if not text.isdecimal():
      raise ValueError(f"--{flag.name}={text}: must be whole numbers that are not negative")
  return list(map(int, flag.value))


def _config(name, config, length, tokens):
  shrink = 256 if _TINY.value else 1
  config.name, config.mesh = name, MeshConfig(1, 1, 1)
  config.data = DataConfig(sequence_length=length // shrink, batch_size=tokens // length)
  config.optim = OptimConfig(steps=_STEPS.value, warmup_steps=1)
  return validate(training.shrunk(config) if _TINY.value else config)


def _setting(model, config, documents):
  return {"library": "lin_jax", "set": _SET.value, "tiny": _TINY.value, "name": model, **training.description(config),
          "timed_steps": _TIMED.value, "data": training.ZIPF, "documents": packing.DOCUMENTS[documents]}


def _measured(program, packed):
  program = program.result()
  steps = program.config.optim.steps
  batches = training.drawn_batches(program.config, steps, documents=False, packed=packed)
  result = training.measure(program, batches, _TIMED.value)
  return _finite({name: result[name] for name in _RESULTS})


def _finite(result):
  if not all(map(math.isfinite, result["losses"])):
    raise ArithmeticError(f"losses {result['losses']}: must be finite")
  return result


def _line(row):
  setting = row["setting"]
  how = f"{setting['library']} {setting['variant']}" if "variant" in setting else (
      f"unroll {setting['unroll']:<2} {setting['remat']:<5}")
  mfu = "" if row.get("mfu") is None else f", MFU {100 * row['mfu']:.1f}%"
  how += f" LoRA of rank {setting['lora']['rank']}" if "lora" in setting else ""
  how += "" if setting["documents"] == packing.DOCUMENTS["one"] else " packed"
  return (f"{setting['sequence_length']:>7,} x {setting['batch_size']:<3} {how} {row['tokens_per_s']:>9,.0f} tokens/s, "
          f"{row['step_ms']:.1f} ms per step, {row['memory_gib']:.2f} GiB{mfu}, compiled in {row['compile_s']:.1f} s, "
          f"first step after {row['first_step_s']:.1f} s")


if __name__ == "__main__":
  commands.run(main, cached=True)
