"""Times the fused elementwise kernels against XLA's own code for the same definition, and training steps with both.

  python experiments/bench_fused.py --out=fused.jsonl --limit_seconds=60
  python experiments/bench_fused.py --ops= --models=gla_1b3,gated_deltanet_1b3 --out=fused.jsonl --limit_seconds=300
  python experiments/bench_fused.py --batch=2 --length=64 --narrow=8 --repeats=1 --implementation=pallas_triton

The third line proves the command on a CPU. Each kernel is compared with the definition in float32 before it is timed.
A training step is that of a named config at --batch sequences of --length tokens without accumulation. It is compiled
and timed with the kernels, and with each op of --without computed by its definition.
"""

import functools
import pathlib

import jax
from absl import flags

from configs import CONFIGS
from kernel_bench import fused
from kernels import dispatch
from lin_jax.config import MeshConfig
from running import commands
from speed import sweeps, training

_OPS = flags.DEFINE_list("ops", list(dispatch.FUSED), "Ops to time.")
_MODELS = flags.DEFINE_list("models", [], "Named configs whose training step is timed.")
_WITHOUT = flags.DEFINE_list("without", list(dispatch.FUSED), "Ops that the second training step computes in jnp.")
_BATCH = flags.DEFINE_integer("batch", 8, "Sequences.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 2048, "Tokens per sequence.", lower_bound=1)
_NARROW = flags.DEFINE_integer("narrow", 1, "Divisor of the models' widths, to prove the command on a CPU.",
                               lower_bound=1)
_TINY = flags.DEFINE_bool("tiny", False, "Trains every mixer's smallest example instead of --models themselves.")
_IMPLEMENTATION = flags.DEFINE_string("implementation", "", "The implementation to time; by default the one that is "
                                      "chosen on this device.")
_STEPS = flags.DEFINE_integer("steps", 12, "Training steps, of which all but the first two are timed.", lower_bound=3)
_REPEATS = flags.DEFINE_integer("repeats", 7, "Batches of calls that are timed; their median counts.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "", "JSON lines file to which one record per measurement is appended.")
_LIMIT = flags.DEFINE_float("limit_seconds", 0, "Begins no measurement after this time; 0 for no limit.", lower_bound=0)


def main(_):
  for flag, known in (("ops", dispatch.FUSED), ("without", dispatch.FUSED), ("models", CONFIGS)):
    if unknown := [name for name in flags.FLAGS[flag].value if name not in known]:
      raise ValueError(f"--{flag}={','.join(unknown)}: unknown; known: {', '.join(known)}")
  work = [(_timed, case, label) for case in fused.cases(_BATCH.value, _LENGTH.value, _NARROW.value)
          if case.op in _OPS.value for label in fused.PASSES]
  work += [(_trained, name, without) for name in _MODELS.value for without in ([], _WITHOUT.value)]
  path = pathlib.Path(_OUT.value) if _OUT.value else None
  sweeps.check([functools.partial(*measurement) for measurement in work], path, _LIMIT.value)


def _timed(case, label):
  """One call of the kernels and of XLA's own code for the definition."""
  sets = [fused.inputs(case, seed) for seed in range(2)]
  row = {"case": str(case), "model": case.model, "pass": label}
  for name, implementation in (("kernels", _IMPLEMENTATION.value or None), ("xla", "reference")):
    run = fused.program(case, label, implementation)
    if name == "kernels":
      found = fused.errors(case, label, run(*sets[0]))
      row |= {"errors": {tensor: float(f"{error:.1e}") for tensor, error in found.items()},
              "within_bounds": all(error <= fused.BOUNDS[case.dtype] for error in found.values())}
    seconds = fused.seconds(run, sets, _REPEATS.value)
    row |= {f"{name}_ms": round(1e3 * seconds, 4),
            f"{name}_gb_per_s": round(fused.floor_bytes(case, label) / seconds / 1e9, 1)}
  return row


def _trained(name, without):
  """A training step of a config with the ops of `without` in jnp."""
  config = CONFIGS[name]()
  config.name, config.mesh, config.optim.accumulation = name, MeshConfig(1, 1, 1), 1
  config.data.batch_size, config.data.sequence_length = _BATCH.value, _LENGTH.value
  config = training.shrunk(config) if _TINY.value else config
  kept = dict(dispatch.TABLE)
  dispatch.TABLE.update({op: ("reference",) for op in without})
  try:
    jax.clear_caches()  # a traced op keeps its choice
    program = training.compile_step(config)
  finally:
    dispatch.TABLE.update(kept)
  measured = training.measure(program, training.drawn_batches(config, _STEPS.value), _STEPS.value - 2)
  return {"model": name, "without": without, **measured}


if __name__ == "__main__":
  commands.run(main)
