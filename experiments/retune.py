"""Measures the kernels' configurations on this machine's GPU and lists the fastest in `kernels/tuned/<device>.json`.

  python experiments/retune.py
  python experiments/retune.py --ops=gla --shapes=128x256x4 --dtype=float32 --limit_seconds=540
  for i in $(seq 16); do python experiments/retune.py --part=$i/16 --turns=. & done; wait

For each op, shape and group of gates the search starts at the fastest of the file's entry, the entry of the nearest
wider heads, and the heuristic. It goes through the fields of the op's `Config` once, and tries each field's candidates
while the other fields stay as they are. The fastest configuration is listed after its output, its final state and all
gradients agreed with the float32 scan. Entries of other ops and shapes stay. A search that ended within the time is
marked as `complete`, and the next run skips it, so that a run continues where the limit stopped the one before.
"""

import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import re
import sys
import time

import jax
from absl import flags

from kernel_tuning import search
from kernels import tuned
from lin_jax import files
from running import commands, turns

_OPS = flags.DEFINE_list("ops", list(search.GATE_GROUPS), "Ops, comma-separated.")
# Keys of 96 and 192 channels run in the kernels of 128 and 256.
_WIDTHS = list(itertools.product((64, 128, 256), (64, 96, 128, 192, 256, 512)))
_SHAPES = flags.DEFINE_list("shapes", [f"{K}x{V}" for K, V in _WIDTHS], "KxVxH, or KxV for 2,048 channels in all "
                            "heads, but 4 to 16 heads; comma-separated.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Dtype of q, k and v; float16 takes "
                           "bfloat16's configurations.")
_TOKENS = flags.DEFINE_integer("tokens", 32768, "Tokens per timed call, in sequences of 2048.", lower_bound=1)
_LIMIT = flags.DEFINE_float("limit_seconds", 0.0, "Ends after the candidate under way when they are over; 0 for no "
                            "limit.")
_AGAIN = flags.DEFINE_bool("again", False, "Searches also where the file has a complete search.")
_PART = flags.DEFINE_string("part", "1/1", "i/n: takes every n-th problem from the i-th on, and an n-th of the cores.")
_TURNS = flags.DEFINE_string("turns", "", "A file or folder by which several of these commands take turns on one GPU: "
                             "they compile side by side and measure one at a time.")
_MAY_SPILL = flags.DEFINE_bool("may_spill", False, "Times also configurations that spill more than four registers, "
                               "which must not ship.")
_OUT = flags.DEFINE_string("out", "", "The device's file; by default kernels/tuned/<device>.json, or the file of a "
                           "device with the same multiprocessors, which then also holds what was measured here.")


def main(_):
  deadline = time.monotonic() + _LIMIT.value if _LIMIT.value else float("inf")
  part, parts = part_of(_PART.value)
  problems = [item for op in _OPS.value for shape in _SHAPES.value for item in of_shape(op, shape)]
  if not _OUT.value and jax.default_backend() != "gpu":
    raise ValueError(f"--out is empty and the default backend is {jax.default_backend()}; without a GPU it is required")
  device = jax.devices()[0].device_kind
  path = pathlib.Path(_OUT.value) if _OUT.value else tuned.file_of(device)
  empty = {"device": device, "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
           "configs": []}
  failed = []
  for item in problems[part - 1::parts]:
    record = load(path, empty)
    if time.monotonic() > deadline:
      print(f"{item}: not begun, --limit_seconds={_LIMIT.value} are over")
    elif _AGAIN.value or not is_complete(record, item):
      failed += [] if searched(path, empty, item, deadline, max(1, os.cpu_count() // parts)) else [item]
  if failed:
    sys.exit(f"no configuration works for {', '.join(map(str, failed))}")


def searched(path, empty, item, deadline, threads) -> bool:
  """Searches for one problem, lists what it finds, and returns whether it found anything."""
  module, configs = importlib.import_module(f"kernels.{item.op}.pallas_triton"), search.configurations(
      item.op, item.gates[0])
  found = search.tune(item, module, starts(load(path, empty), item, configs),
                      configs.candidates(item.K, item.V, jax.numpy.dtype(item.dtype)), deadline,
                      functools.partial(turns.turn, _TURNS.value), threads)
  if found is None:
    return False
  config, ms, complete = found
  path.parent.mkdir(parents=True, exist_ok=True)
  with turns.turn(path.parent):  # other parts may have added to the file
    save(path, load(path, empty), item, config, ms, complete)
  print(f"{item}: best {search.describe(config)}, {ms:.3f} ms", flush=True)
  return True


def part_of(text: str) -> tuple[int, int]:
  """Reads --part. Raises ValueError."""
  match = re.fullmatch(r"(\d+)/(\d+)", text)
  if not match or not 1 <= int(match[1]) <= int(match[2]):
    raise ValueError(f"--part={text}: must be i/n with i from 1 to n")
  return int(match[1]), int(match[2])


def of_shape(op: str, shape: str) -> list[search.Problem]:
  """Returns the problems that the flags name, one per group of gates. Raises ValueError for an unknown op or shape."""
  if op not in search.GATE_GROUPS:
    raise ValueError(f"--ops={op}: known ops are {', '.join(search.GATE_GROUPS)}")
  sizes = shape.split("x")
  if len(sizes) not in (2, 3) or not all(size.isdecimal() and int(size) for size in sizes):
    raise ValueError(f"--shapes={shape}: a shape is KxV or KxVxH, for instance 128x128x16")
  K, V = map(int, sizes[:2])
  H = int(sizes[2]) if len(sizes) == 3 else max(4, min(16, 2048 // max(K, V)))
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
  if made != here | ({"device": made["device"]} if path == tuned.file_of(here["device"]) else {}):
    raise ValueError(f"{path}: was measured with {made}, this is {here}; remove it or choose another --out")
  return record


def is_complete(record: dict, problem: search.Problem) -> bool:
  """Whether the record has the result of a complete search for every gate of the problem."""
  done = {gate for entry in record["configs"] if _case(entry) == _case(dataclasses.asdict(problem))
          and entry.get("complete") for gate in entry["gates"]}
  return done >= set(problem.gates)


def starts(record: dict, problem: search.Problem, configs) -> list:
  """Returns the starts of a search: the record's entry for the problem, or else the one for the nearest wider heads, if
  it fits the present kernels, and the heuristic's answer."""
  entries = {(entry["K"], entry["V"]): entry["config"] for entry in record["configs"]
             if (entry["op"], entry["dtype"]) == (problem.op, problem.dtype) and problem.gates[0] in entry["gates"]}
  nearest = tuned.nearest(problem.K, problem.V, entries)
  try:
    listed = [tuned.to_config(configs.Config, entries[nearest], str(problem))] if nearest else []
  except ValueError as e:
    print(f"entry ignored: {e}", flush=True)
    listed = []
  return [*listed, configs.heuristic(problem.K, problem.V, jax.numpy.dtype(problem.dtype), None)]


def save(path, record, problem, config, ms, complete):
  """Puts an entry into the record in the place of older ones for its gates, and writes the file."""
  entry = {"op": problem.op, "gates": list(problem.gates), "K": problem.K, "V": problem.V, "dtype": problem.dtype,
           "config": dataclasses.asdict(config), "timed": dict(zip("BTH", (*problem.timed, problem.H))),
           "forward_backward_ms": ms, "complete": complete}
  if record["device"] != jax.devices()[0].device_kind:
    entry["device"] = jax.devices()[0].device_kind
  entries = [entry]
  for old in record["configs"]:
    left = [gate for gate in old["gates"] if _case(old) != _case(entry) or gate not in entry["gates"]]
    entries += [old | {"gates": left}] if left else []
  record["configs"] = sorted(entries, key=lambda entry: (*_case(entry), entry["gates"]))
  head = json.dumps({name: x for name, x in record.items() if name != "configs"})
  lines = ",\n".join(f"  {json.dumps(entry)}" for entry in record["configs"])
  files.write(path, f'{head[:-1]}, "configs": [\n{lines}\n]}}\n')


def _case(entry):
  return entry["op"], entry["dtype"], entry["K"], entry["V"]


if __name__ == "__main__":
  commands.run(main)
