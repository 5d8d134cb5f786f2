"""Training on several devices of a host beside one of them: speed, memory and losses of each mesh.

  python experiments/bench_scaling.py --meshes=data=2 --meshes=fsdp=2 --meshes=tensor=2 --out=runs/scaling.jsonl
  python experiments/bench_scaling.py --models=gla_1b3 --meshes=context=2 --global_batch=1 --length=131072 \
      --remat=full --unroll=1 --steps=3 --timed_steps=2 --out=runs/scaling.jsonl
  python experiments/bench_scaling.py --check --models=gla_1b3 --meshes=context=2 --global_batch=1 --length=65536 \
      --remat=full --out=runs/equality.jsonl
  JAX_NUM_CPU_DEVICES=2 python experiments/bench_scaling.py --tiny --length=64       # proves the command on a CPU

A mesh is named by its axes, as in --meshes=fsdp=2,context=4. Without the flag each axis takes all devices in turn.
Meshes that need more devices than the host has are left out, and a host of one device measures that device alone, which
is context=1.

With --batch the global batch has that many rows for each device, so that every mesh of n devices has the same one.
Speed is compared with one device that has --batch rows, and losses with one device that has all rows, in n
microbatches. With --global_batch any mesh has that many rows, for instance one long row, and one run on one device
serves both comparisons.

--check compares the loss and the gradients of the first batch in place of training. The reference is one device in
float32, and every group of parameters has the relative error of the mesh and of one device in the model's own dtype.
The exit code is 1 if an error of the mesh exceeds twice the one of one device (`speed/gradients.py`).

--compile_only fills the compilation cache. Such commands side by side, one for each model, leave little to compile for
the commands that measure, and --turns lets these start together too. A command that waits for its turn keeps the GPU
memory in which its products were tuned, so steps that need most of a GPU run alone. When one of several devices has too
little, XLA's runtime reports that and waits for it without end: stop such a command, and the others go on.
A run is skipped when --out has its record for this device, these versions and this setting. Exit codes: 0 done, or the
time is over; 1 a run failed; 2 a user's error.
"""

import contextlib
import functools
import pathlib
import sys
import time

import jax
from absl import flags

from configs import CONFIGS
from lin_jax.config import REMAT_POLICIES
from running import commands, turns
from speed import gradients, scaling, sweeps, training

_MODELS = flags.DEFINE_list("models", ["gla_1b3", "gated_deltanet_1b3", "transformer_1b3"], "Configs to train.")
_MESHES = flags.DEFINE_multi_string("meshes", [], "A mesh, as in data=2 or fsdp=2,context=4; once for each.")
_BATCH = flags.DEFINE_integer("batch", 8, "Rows of the batch for each device.", lower_bound=1)
_GLOBAL = flags.DEFINE_integer("global_batch", 0, "Rows of the batch on all devices together, in place of --batch.",
                               lower_bound=0)
_LENGTHS = flags.DEFINE_list("length", ["2048"], "Tokens per row: one or more numbers.")
_STEPS = flags.DEFINE_integer("steps", 20, "Optimizer steps.", lower_bound=2)
_TIMED = flags.DEFINE_integer("timed_steps", 12, "How many of the last steps are timed.", lower_bound=1)
_REMAT = flags.DEFINE_enum("remat", None, REMAT_POLICIES, "What a block recomputes; by default the config's.")
_UNROLL = flags.DEFINE_integer("unroll", None, "Layers compiled in one step of their scan, 0 for all; by default the "
                               "config's.", lower_bound=0)
_CHECK = flags.DEFINE_bool("check", False, "Compares the first gradients with one device's in place of training.")
_COMPILE = flags.DEFINE_bool("compile_only", False, "Compiles the programs, and neither runs nor records anything.")
_GROUP = flags.DEFINE_integer("group", 6, "How many programs are compiled side by side before they are measured.",
                              lower_bound=1)
_TURNS = flags.DEFINE_string("turns", "", "A file or folder that commands on the same GPUs name, so that one of them "
                             "runs programs at a time, while others compile.")
_TINY = flags.DEFINE_bool("tiny", False, "Trains models of width 32 with two layers, in float32.")
_OUT = flags.DEFINE_string("out", "", "JSON lines file to which each run's record is appended.")
_LIMIT = flags.DEFINE_float("limit_seconds", 0, "Begins no run that would probably end later; 0 for no limit.",
                            lower_bound=0)


def main(_):
  start = time.monotonic()
  if _TIMED.value >= _STEPS.value:
    raise ValueError(f"--timed_steps={_TIMED.value}: must be less than --steps={_STEPS.value}")
  if unknown := [name for name in _MODELS.value if name not in CONFIGS]:
    raise ValueError(f"--models={','.join(unknown)}: unknown; known: {', '.join(CONFIGS)}")
  if unknown := [text for text in _LENGTHS.value if not text.isdecimal() or not int(text)]:
    raise ValueError(f"--length={','.join(unknown)}: must be positive numbers")
  size = scaling.Size(_BATCH.value, _GLOBAL.value, _STEPS.value, _TIMED.value, _REMAT.value, _UNROLL.value, _TINY.value)
  meshes = scaling.fitting(_MESHES.value, jax.local_device_count())
  path = pathlib.Path(_OUT.value) if _OUT.value else None
  cases = [(name, CONFIGS[name], meshes, size, int(length)) for name in _MODELS.value for length in _LENGTHS.value]
  with contextlib.ExitStack() as held:
    wait = functools.cache(lambda: held.enter_context(turns.turn(_TURNS.value)))
    if _CHECK.value:
      return _compare_gradients(cases, path, wait)
    if failed := _train(cases, size, path, start, wait):
      print("failed:", *failed, file=sys.stderr)
      sys.exit(1)


def _compare_gradients(cases, path, wait):
  models = [gradients.Comparison(*case) for case in cases]
  if _COMPILE.value:
    print(f"{sum(len(model.programs) for model in models)} programs compiled")
    return
  sweeps.check([functools.partial(model.row, number, wait) for model in models for number in range(model.count)], path,
               _LIMIT.value)


def _train(cases, size, path, start, wait):
  common = training.provenance()
  plans = [run for case in cases for run in scaling.plan(*case)]
  every = [((config, setting), common | {"setting": setting}) for config, setting in plans]
  runs = sweeps.missing(every, path)
  print(f"{common['device']}: {len(runs)} runs, {len(every) - len(runs)} recorded before", flush=True)
  configs, documents = [config for (config, _), _ in runs], [False] * len(runs)
  if _COMPILE.value:
    errors = [future.exception() for future in training.compile_all(configs, documents=documents)]
    return [str(error) for error in errors if error]
  done = [row for row in sweeps.load(path) if row["versions"] == common["versions"]] if path else []
  programs = training.compiled_in_groups(configs, _GROUP.value, documents)

  def measure(run):
    program = next(programs).result()
    wait()
    row = {"setting": run[1], "reason": ""} | scaling.measured(program, size)
    done.append(row)
    return row | scaling.compared(row, done, size)

  return sweeps.run(runs, measure, scaling.line, scaling.RESULTS, path, begun=start, limit=_LIMIT.value)


if __name__ == "__main__":
  commands.run(main, cached=True)
