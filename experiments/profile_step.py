"""Where the time of a config's training step goes, by group of kernels and by part of the model.

  python experiments/profile_step.py --config=gla_1b3 --out=runs/profiles.jsonl
  python experiments/profile_step.py --config=gla_1b3 --tiny                            # proves the command on a CPU

A few optimizer steps run untimed, then as many untraced as traced. The trace is read with jax.profiler, without
TensorFlow, and each kernel is looked up in the compiled program. By default the steps run without CUDA graphs, because
only then does every kernel name its instruction; they take a little longer so, and --command_buffers keeps the graphs.
Parameters are float32 and windows hold one document each, as in `bench_training.py`.

A record of --out has the setting, `step_ms` (untraced), `traced_ms`, and milliseconds per step by group, by part and
pass, and of the largest kernels. `recomputed` is the pass of what rematerialisation runs again. Exit codes: 0 done, 2 a
user's error.
"""

import os
import pathlib
import tempfile
import time

import jax
from absl import flags

from configs import CONFIGS, lookup
from lin_jax import sharding
from lin_jax.config import REMAT_POLICIES, DataConfig, MeshConfig, OptimConfig, validate
from running import commands, records
from speed import profile, trace, training

_UNTIMED = 3

_CONFIG = flags.DEFINE_enum("config", "gla_1b3", list(CONFIGS), "Name of the config.")
_BATCH = flags.DEFINE_integer("batch_size", 8, "Sequences per step.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("sequence_length", 2048, "Tokens per sequence.", lower_bound=2)
_REMAT = flags.DEFINE_enum("remat", None, REMAT_POLICIES, "What a block recomputes; the config's own by default.")
_UNROLL = flags.DEFINE_integer("unroll", None, "Repetitions of layers compiled together; the config's own by default.",
                               lower_bound=0)
_STEPS = flags.DEFINE_integer("steps", 3, "Traced optimizer steps.", lower_bound=1)
_LARGEST = flags.DEFINE_integer("largest", 25, "How many of the largest kernels are printed.", lower_bound=0)
_BUFFERS = flags.DEFINE_bool("command_buffers", False, "Keeps CUDA graphs, in which kernels name no instruction.")
_TINY = flags.DEFINE_bool("tiny", False, "Trains the mixer's smallest example at width 32 with two layers, in "
                          "float32, on 2 x 64 tokens.")
_TRACE = flags.DEFINE_string("trace", "", "Folder in which the trace stays; by default it is removed.")
_OUT = flags.DEFINE_string("out", "", "JSON lines file to which the record is appended.")


def main(_):
  if not _BUFFERS.value:  # before the backend starts
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
  # A cached program may have the scopes of older sources, which are no part of its key.
  jax.config.update("jax_enable_compilation_cache", False)
  path = pathlib.Path(_OUT.value) if _OUT.value else None
  if path:
    records.load(path)
  config, gpu = _configured(), jax.default_backend() == "gpu"
  program = training.compile_step(config, documents=False)
  print(f"{jax.devices()[0].device_kind}: {config.name} compiled in {program.seconds:.1f} s", flush=True)
  if _TRACE.value:
    row = _profiled(program, pathlib.Path(_TRACE.value), gpu)
  else:
    with tempfile.TemporaryDirectory() as folder:
      row = _profiled(program, pathlib.Path(folder), gpu)
  print(f"{row['step_ms']:.1f} ms per step, {row['traced_ms']:.1f} ms under the trace; kernels ran in "
        f"{row['busy_ms']:.1f} ms of it, gaps are {row['gaps_ms']:.1f} ms\n")
  print(profile.table(row, _LARGEST.value))
  if not gpu:
    print("\nA CPU's trace has no kernels. Rows are instructions of the compiled program, which run on several "
          "threads. Kernels by name, communication and gaps are seen on a GPU only.")
  if path:
    records.append(path, training.provenance() | {"run": records.now()} | row)


def _configured():
  config = lookup(_CONFIG.value)
  if _TINY.value:
    config = training.shrunk(config)
  config.name, config.mesh = _CONFIG.value, MeshConfig(1, 1, 1)
  config.data = (DataConfig(sequence_length=64, batch_size=2) if _TINY.value else
                 DataConfig(sequence_length=_LENGTH.value, batch_size=_BATCH.value))
  config.optim = OptimConfig(steps=_UNTIMED + 2 * _STEPS.value, warmup_steps=1)
  config.remat = config.remat if _REMAT.value is None else _REMAT.value
  config.unroll = config.unroll if _UNROLL.value is None else _UNROLL.value
  return validate(config)


def _profiled(program, folder, gpu):
  """Returns the setting and the results of a record."""
  config, steps = program.config, _STEPS.value
  batches = training.drawn_batches(config, _UNTIMED, documents=False)
  batches = jax.block_until_ready(jax.device_put(batches, sharding.batch_sharding(training.mesh_of(config))))
  state, _ = _run(program.step, program.create(), batches, _UNTIMED)
  state, untraced = _run(program.step, state, batches, steps)
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level, options.host_tracer_level = 0, 1 if gpu else 2
  with jax.profiler.trace(str(folder), profiler_options=options):
    _, traced = _run(program.step, state, batches, steps)
  found = trace.events(folder, program.step.as_text(), gpu)
  if not found:
    raise ValueError("the trace has no event of the device: another profiler may be attached to it")
  setting = {"name": config.name, "tiny": _TINY.value, **training.description(config),
             "command_buffers": _BUFFERS.value}
  return {"setting": setting, "step_ms": round(1000 * untraced, 2), "traced_ms": round(1000 * traced, 2),
          **profile.summary(found, steps)}


def _run(step, state, batches, count):
  """Returns the state after `count` steps, and the seconds per step."""
  start = time.perf_counter()
  for i in range(count):
    state, _ = step(state, batches[i % len(batches)])
  jax.block_until_ready(state)
  return state, (time.perf_counter() - start) / count


if __name__ == "__main__":
  commands.run(main)
