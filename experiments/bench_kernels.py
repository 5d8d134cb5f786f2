"""Times every implementation of an op that can run here, forward and forward + backward, on the same inputs.

  python experiments/bench_kernels.py                                          # B1 T2048 H4 K=V=64 float32
  python experiments/bench_kernels.py --batch=16 --heads=4 --key=128 --value=256 --dtype=bfloat16 --out=gla.json

The floor is the traffic of one pass: inputs read once, results written once, gradients likewise.
"""

import importlib.metadata
import json
import statistics
import sys
import time

import jax
from absl import flags

import commands
import kernels
from kernels import dispatch

_BATCH = flags.DEFINE_integer("batch", 1, "Sequences.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 2048, "Tokens per sequence.", lower_bound=1)
_HEADS = flags.DEFINE_integer("heads", 4, "Heads.", lower_bound=1)
_KEY = flags.DEFINE_integer("key", 64, "Key channels per head.", lower_bound=1)
_VALUE = flags.DEFINE_integer("value", 64, "Value channels per head.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"], "Of q, k and v; gates are float32.")
_REPEATS = flags.DEFINE_integer("repeats", 10, "Timed calls; the median is reported.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "", "JSON file that receives the record as well.")


def main(_):
  sets = [_inputs(jax.random.key(seed)) for seed in range(3)]
  device = jax.devices()[0]
  record = {"command": " ".join(["python", *sys.argv]), "op": "gla", "device": device.device_kind,
            "jax": importlib.metadata.version("jax"),
            **{flag.name: flag.value for flag in (_BATCH, _LENGTH, _HEADS, _KEY, _VALUE, _DTYPE, _REPEATS)}}
  print(kernels.explain("gla", *sets[0][:4]))
  print(f"{'implementation':>15} {'pass':>18} {'ms':>9} {'GB/s of the floor':>18} {'scratch MB':>11}")
  rows = []
  for name in dispatch.TABLE["gla"]:
    if device.platform not in dispatch.PLATFORMS.get(name, (device.platform,)):
      continue
    for label, function in (("forward", _forward(name)), ("forward + backward", _backward(name))):
      try:
        row = {"implementation": name, "pass": label, **_measure(function, sets)}
      except NotImplementedError as e:
        print(f"{name:>15} {label:>18}  {e}")
        continue
      rows.append(row)
      print(f"{name:>15} {label:>18} {row['milliseconds']:>9.3f} {row['gigabytes_per_second']:>18.1f} "
            f"{row['scratch_bytes'] / 1e6:>11.1f}")
  if _OUT.value:
    commands.write(_OUT.value, json.dumps(record | {"rows": rows}, indent=2) + "\n")


def _inputs(key):
  """q, k, v, log_decay of a trained layer's range, and cotangents of output and final state."""
  shape = _BATCH.value, _LENGTH.value, _HEADS.value
  keys = jax.random.split(key, 6)
  q, k = (jax.random.normal(key, (*shape, _KEY.value), _DTYPE.value) for key in keys[:2])
  v, doutput = (jax.random.normal(key, (*shape, _VALUE.value), _DTYPE.value) for key in keys[2:4])
  log_decay = jax.nn.log_sigmoid(jax.random.normal(keys[4], q.shape)) / 16
  dstate = jax.random.normal(keys[5], (shape[0], shape[2], _KEY.value, _VALUE.value))
  return q, k, v, log_decay, doutput, dstate


def _forward(name):
  return lambda q, k, v, log_decay, *_: kernels.gla(q, k, v, log_decay, implementation=name)


def _backward(name):
  def run(q, k, v, log_decay, *cotangents):
    results, pullback = jax.vjp(lambda *args: kernels.gla(*args, implementation=name), q, k, v, log_decay)
    return results, pullback(cotangents)

  return run


def _measure(function, sets):
  # Arguments that the function does not read are dropped by jit and must not count towards the floor.
  run = jax.jit(function).lower(*sets[0]).compile()
  results = jax.block_until_ready([run(*inputs) for inputs in sets])[0]
  used = sets[0] if len(jax.tree.leaves(results)) > 2 else sets[0][:4]
  floor = sum(x.nbytes for x in jax.tree.leaves((used, results)))
  times = []
  for i in range(_REPEATS.value):
    start = time.perf_counter()
    jax.block_until_ready(run(*sets[i % len(sets)]))
    times.append(time.perf_counter() - start)
  seconds = statistics.median(times)
  return {"milliseconds": 1e3 * seconds, "floor_bytes": floor, "gigabytes_per_second": floor / seconds / 1e9,
          "scratch_bytes": run.memory_analysis().temp_size_in_bytes}


if __name__ == "__main__":
  commands.run(main)
