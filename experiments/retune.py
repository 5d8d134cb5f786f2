"""Measures the kernels' configurations on this machine's GPU and lists the fastest in `kernels/tuned/<device>.json`.

  python experiments/retune.py
  python experiments/retune.py --ops=gla --shapes=128x256x4 --dtype=float32 --limit_seconds=540

For each op, shape and group of gates the search starts at the faster of the file's entry and the heuristic. It goes
through the fields of the op's `Config` once, and tries each field's candidates while the other fields stay as they are.
A candidate is timed only after its output, its final state and all gradients agree with the float32 scan. Entries of
other ops and shapes stay. Each faster configuration is written when it is found.
"""

import dataclasses
import importlib.metadata
import json
import pathlib
import sys
import time

import jax
from absl import flags

from kernel_tuning import search
from kernels import tuned
from lin_jax import files
from running import commands

_OPS = flags.DEFINE_list("ops", list(search.GATE_GROUPS), "Ops, comma-separated.")
_SHAPES = flags.DEFINE_list("shapes", ["64x64x16", "128x128x16", "128x256x4", "256x512x4"],
                            "KxVxH, or KxV for 16 heads, comma-separated.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Dtype of q, k and v; float16 takes "
                           "bfloat16's configurations.")
_TOKENS = flags.DEFINE_integer("tokens", 32768, "Tokens per timed call, in sequences of 2048.", lower_bound=1)
_LIMIT = flags.DEFINE_float("limit_seconds", 0.0, "Ends after the candidate under way when they are over; 0 for no "
                            "limit.")
_MAY_SPILL = flags.DEFINE_bool("may_spill", False, "Times also configurations that spill more than four registers, "
                               "which must not ship.")
_OUT = flags.DEFINE_string("out", "", "The device's file; by default kernels/tuned/<device>.json.")


def main(_):
  deadline = time.monotonic() + _LIMIT.value if _LIMIT.value else float("inf")
  problems = [item for op in _OPS.value for shape in _SHAPES.value for item in of_shape(op, shape)]
  if not _OUT.value and jax.default_backend() != "gpu":
    raise ValueError(f"--out is empty and the default backend is {jax.default_backend()}; without a GPU it is required")
  device = jax.devices()[0].device_kind
  path = pathlib.Path(_OUT.value or tuned.FOLDER / f"{tuned.slug(device)}.json")
  record = load(path, {"device": device, "versions": {name: importlib.metadata.version(name) for name in
                                                      ("jax", "jaxlib")}, "configs": []})
  failed = []
  for item in problems:
    if time.monotonic() > deadline:
      print(f"{item}: not begun, --limit_seconds={_LIMIT.value} are over")
      continue
    module, configs = (importlib.import_module(f"kernels.{item.op}.{name}")
                       for name in ("pallas_triton", "pallas_triton_config"))
    best = search.tune(item, module, starts(record, item, configs),
                       configs.candidates(item.K, item.V, jax.numpy.dtype(item.dtype)), deadline,
                       lambda config, ms, item=item: save(path, record, item, config, ms))
    print(f"{item}: best {search.describe(best)}", flush=True)
    failed += [] if best else [item]
  if failed:
    sys.exit(f"no configuration works for {', '.join(map(str, failed))}")


def of_shape(op: str, shape: str) -> list[search.Problem]:
  """Returns the problems that the flags name, one per group of gates. Raises ValueError for an unknown op or shape."""
  if op not in search.GATE_GROUPS:
    raise ValueError(f"--ops={op}: known ops are {', '.join(search.GATE_GROUPS)}")
  sizes = shape.split("x")
  if len(sizes) not in (2, 3) or not all(size.isdecimal() and int(size) for size in sizes):
    raise ValueError(f"--shapes={shape}: a shape is KxV or KxVxH, for instance 128x128x16")
  K, V, H = map(int, (*sizes, 16)[:3])
  T = min(2048, _TOKENS.value)
  return [search.Problem(op, gates, K, V, H, _DTYPE.value, (_TOKENS.value // T, T), _MAY_SPILL.value)
          for gates in search.GATE_GROUPS[op]]


def load(path: pathlib.Path, empty: dict) -> dict:
  """Reads the device's record, or returns `empty` if there is none. Raises ValueError for other devices or versions."""
  if not path.exists():
    return empty
  tuned.read(path)
  record = json.loads(path.read_text(encoding="utf-8"))
  made = {name: record.get(name) for name in ("device", "versions")}
  here = {name: empty[name] for name in made}
  if made != here:
    raise ValueError(f"{path}: was measured with {made}, this is {here}; remove it or choose another --out")
  return record


def starts(record: dict, problem: search.Problem, configs) -> list:
  """Returns the starts of a search: the record's entry, if it fits the present kernels, and the heuristic's answer."""
  found = [entry["config"] for entry in record["configs"]
           if _case(entry) == _case(dataclasses.asdict(problem)) and problem.gates[0] in entry["gates"]]
  try:
    listed = [tuned.to_config(configs.Config, fields, str(problem)) for fields in found]
  except ValueError as e:
    print(f"entry ignored: {e}", flush=True)
    listed = []
  return [*listed, configs.heuristic(problem.K, problem.V, jax.numpy.dtype(problem.dtype), None)]


def save(path, record, problem, config, ms):
  """Puts an entry into the record in the place of older ones for its gates, and writes the file."""
  entry = {"op": problem.op, "gates": list(problem.gates), "K": problem.K, "V": problem.V, "dtype": problem.dtype,
           "config": dataclasses.asdict(config), "timed": dict(zip("BTH", (*problem.timed, problem.H))),
           "forward_backward_ms": ms}
  entries = [entry]
  for old in record["configs"]:
    left = [gate for gate in old["gates"] if _case(old) != _case(entry) or gate not in entry["gates"]]
    entries += [old | {"gates": left}] if left else []
  record["configs"] = sorted(entries, key=lambda entry: (*_case(entry), entry["gates"]))
  head = json.dumps({name: x for name, x in record.items() if name != "configs"})
  lines = ",\n".join(f"  {json.dumps(entry)}" for entry in record["configs"])
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write(path, f'{head[:-1]}, "configs": [\n{lines}\n]}}\n')


def _case(entry):
  return entry["op"], entry["dtype"], entry["K"], entry["V"]


if __name__ == "__main__":
  commands.run(main)
