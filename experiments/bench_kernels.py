"""Times every implementation of the ops that can run here, beside other libraries, on the same inputs in one run.

  python experiments/bench_kernels.py                                  # every op, B1 T2048 H4 K=V=64 float32
  python experiments/bench_kernels.py --shapes=cpu --repeats=30 --out=experiments/results/kernels.jsonl
  XLA_PYTHON_CLIENT_PREALLOCATE=false python experiments/bench_kernels.py --shapes=paper,grid,length \
      --implementations=pallas_triton --out=experiments/results/kernels.jsonl --resume --limit_seconds=540

Without that variable JAX takes most of a GPU's memory before PyTorch asks for any. `kernel_bench/cases.py` describes
the sets, and `kernel_bench/timing.py` how time is taken. A call is timed after its output and gradients were compared
with the float32 scan. A call that cannot run is recorded with its reason. `report_kernels.py` makes the page.
"""

import concurrent.futures
import datetime
import functools
import hashlib
import json
import os
import pathlib
import platform
import re
import sys
import time

import jax
from absl import flags

from kernel_bench import cases, peers, timing
from kernels import dispatch
from lin_jax import files
from running import commands, records, turns

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_KEY = ("device", "op", "implementation", "pass", "gate", "B", "T", "H", "K", "V", "dtype", "versions")

_SHAPES = flags.DEFINE_list("shapes", [], f"Sets of shapes: {', '.join(cases.SETS)}, or `all` for those that "
                            "fit the device. If none is given, the one shape that --batch to --value describe.")
_OPS = flags.DEFINE_list("ops", list(cases.TIMED), "Ops to time; attention runs cuDNN's, for comparison.")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", [], "This repository's implementations to time, or 'none' for "
                                     "peers alone. If none is given, all that are meant for the device; the token scan "
                                     "runs on a CPU only.")
_PEERS = flags.DEFINE_list("peers", list(peers.RIVALS), "Other libraries to time where they are installed, or 'none'; "
                           "fla_recurrent, too, which takes one token of the delta rule after the other.")
_BATCH = flags.DEFINE_integer("batch", 1, "Sequences.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 2048, "Tokens per sequence.", lower_bound=1)
_HEADS = flags.DEFINE_integer("heads", 4, "Heads.", lower_bound=1)
_KEY_HEADS = flags.DEFINE_integer("key_heads", 0, "Heads of q and k, which the heads share; 0 for one per head.",
                                  lower_bound=0)
_KEY_CHANNELS = flags.DEFINE_integer("key", 64, "Key channels per head.", lower_bound=1)
_VALUE_CHANNELS = flags.DEFINE_integer("value", 64, "Value channels per head.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"],
                           "Dtype of q, k and v; gates are float32. The set's own by default, and float32 for a "
                           "single shape.")
_REPEATS = flags.DEFINE_integer("repeats", 10, "Batches of calls that are timed; their median counts.", lower_bound=1)
_INPUTS = flags.DEFINE_integer("input_sets", 2, "How many sets of inputs the calls rotate through.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "", "JSON lines file to which one record per measurement is appended.")
_RESUME = flags.DEFINE_bool("resume", False, "Skips the calls that --out has for this device, these versions and "
                            "these kernels.")
_MATCH = flags.DEFINE_string("match", "", "Times only the calls whose line contains this regular expression.")
_TURNS = flags.DEFINE_string("turns", "", "Existing file or folder by which several of these commands, each with its "
                             "part of the calls, take turns on one GPU: they compile side by side and measure one at a "
                             "time.")
_LIMIT = flags.DEFINE_float("limit_seconds", 0, "Begins no measurement after this time; 0 for no limit.", lower_bound=0)


def main(_):
  start = time.monotonic()
  names = _peers()
  chosen = _chosen()
  done = _recorded() if _RESUME.value else set()
  common = {"device": _device(), "platform": jax.default_backend(), "command": records.command(),
            "run": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
  print(f"{common['device']}: {len(chosen)} calls")
  wanted = []
  for case in chosen:
    for label in cases.PASSES:
      for name in _implementations(case) + [name for name in names if case.op in peers.OPS[name]]:
        row = common | {"op": case.op, "implementation": name, "pass": label, "gate": case.gate, "B": case.B,
                        "T": case.T, "H": case.H, "K": case.K, "V": case.V, "dtype": case.dtype,
                        "G": case.G, "versions": _versions(name)}
        if _identity(row) not in done:
          wanted.append((row, case, label, name))
  wrong, left, before = [], 0, None
  for (row, case, label, name), compiled in zip(wanted, _compiled(wanted)):
    if case != before:
      _prepared.cache_clear()  # before the next inputs take memory
      before = case
    if _LIMIT.value and time.monotonic() - start > _LIMIT.value:
      left += 1
      continue
    row |= _measured(name, case, label, compiled)
    _report(case, row)
    if name in (*dispatch.TABLE.get(case.op, ()), timing.REPEATED) and _is_wrong(row):
      wrong.append(f"{case} {name} {label}")
  if left:
    print(f"stopped after {_LIMIT.value:g} s with {left} measurements left; --resume goes on")
  if wrong:
    print("not exact, or failed:", *wrong, sep="\n  ", file=sys.stderr)
    sys.exit(1)


def _chosen():
  return [case for case in _named_cases() if re.search(_MATCH.value, str(case))]


def _named_cases():
  if not _SHAPES.value:
    shape = [flag.value for flag in (_BATCH, _LENGTH, _HEADS, _KEY_CHANNELS, _VALUE_CHANNELS, _KEY_HEADS)]
    return cases.of_shape(shape, _OPS.value, _DTYPE.value or "float32")
  names = _SHAPES.value
  if names == ["all"]:
    names = [name for name in cases.SETS if name != "cpu"] if jax.default_backend() == "gpu" else ["cpu"]
  # Sets overlap; the first mention of a call counts.
  return list(dict.fromkeys(case for name in names for case in cases.named(name, _OPS.value, _DTYPE.value)))


def _peers():
  if _PEERS.value == ["none"]:
    return []
  names = []
  for name in _PEERS.value:
    if name not in peers.OPS:
      raise ValueError(f"--peers={name}: unknown; known: {', '.join(peers.OPS)}, none")
    if reason := peers.missing(name):
      print(f"{name} is left out: {reason}")
    else:
      names.append(name)
  return names


def _implementations(case):
  platform = jax.default_backend()
  known = (*dispatch.TABLE.get(case.op, ()), *([timing.REPEATED] if case.G else []))
  if _IMPLEMENTATIONS.value:
    everything = {name for names in dispatch.TABLE.values() for name in names} | {timing.REPEATED, "none"}
    for name in _IMPLEMENTATIONS.value:
      if name not in everything:
        raise ValueError(f"--implementations={name}: unknown; known: {', '.join(sorted(everything))}")
    return [name for name in _IMPLEMENTATIONS.value if name in known]
  if case.op not in dispatch.TABLE:
    return []
  reasons = dispatch.reasons(case.op, cases.arrays(case))
  return [name for name in known if reasons.get(name) is None and (name != "reference" or platform == "cpu")]


@functools.lru_cache(maxsize=1)
def _prepared(case):
  sets = [jax.block_until_ready(cases.inputs(case, seed)) for seed in range(_INPUTS.value)]
  return sets, cases.expected(case, *sets[0])


def _compiled(wanted):
  """Returns for each measurement a function that gives its compiled pass, or None if a library compiles when called.

  On a GPU all passes are compiled first and side by side, because compilation takes most of the time of a long list. On
  a CPU each is compiled in its turn, because compilation would disturb the measurement beside it.
  """
  calls = [functools.partial(_compile, name, case, label) for _, case, label, name in wanted]
  if jax.default_backend() != "gpu":
    return calls
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return [future.result for future in [pool.submit(call) for call in calls]]


def _compile(name, case, label):
  function = peers.jax_function(name, case) if name in peers.OPS else timing.ours(case, name)
  return function and timing.compile_pass(case, label, function)


def _measured(name, case, label, compiled):
  try:
    run = compiled()  # what cannot run this shape raises here
    with turns.turn(_TURNS.value):  # inputs stay in memory between the turns
      sets, wanted = _prepared(case)
      program = timing.jax_program(run, sets) if run else peers.fla_program(name, case, label, sets)
      return timing.measure(case, label, program, wanted, _REPEATS.value)
  except Exception as e:  # one call that cannot run must not cost the others their measurement
    return {"ms": None, "gb_per_s": None, "peak_mib": None, "reason": timing.reason(e),
            "declined": isinstance(e, NotImplementedError)}
  finally:
    run = program = None
    peers.release()


def _is_wrong(row):
  return not row["declined"] if row["ms"] is None else not row["within_bounds"]


def _report(case, row):
  head = f"{str(case):>60} {row['pass']:>16} {row['implementation']:>13}"
  if row["ms"] is None:
    print(f"{head}  cannot run: {row['reason']}", flush=True)
  else:
    worst = max(row["errors"].items(), key=lambda item: item[1])
    print(f"{head} {row['ms']:9.3f} ms {row['gb_per_s']:7.1f} GB/s {row['peak_mib']:8.0f} MiB  {worst[0]} off by "
          f"{worst[1]:.1e}{'' if row['within_bounds'] else '  TOO MUCH'}", flush=True)
  if _OUT.value:
    files.append(_OUT.value, json.dumps(row) + "\n")


def _recorded():
  if not _OUT.value:
    raise ValueError("--resume needs --out, the file to go on with")
  return set(map(_identity, records.load(pathlib.Path(_OUT.value), *_KEY)))


def _identity(row):
  return json.dumps([*(row[name] for name in _KEY), row.get("G", 0)])  # older records have no G


def _versions(name):
  if name in peers.OPS:
    return peers.versions(peers.PACKAGES[name])
  # A digest of the sources says which kernels a record belongs to, even where there is no git.
  digest = hashlib.sha256()
  for path in sorted((_ROOT / "kernels").rglob("*")):
    if path.suffix in (".py", ".json"):
      digest.update(path.read_bytes())
  return {**peers.versions(("jax", "jaxlib")), "kernels": digest.hexdigest()[:12]}


def _device():
  device = jax.devices()[0]
  if device.platform != "cpu":
    return device.device_kind
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
  except (OSError, StopIteration):
    model = platform.machine()
  return f"{model}, {os.cpu_count()} cores"


if __name__ == "__main__":
  commands.run(main)
