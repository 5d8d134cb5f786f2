"""Compiles every configuration of the GPU kernels for a list of GPUs, without having one: do they fit, do they spill?

  pip install -e .[compile]
  pip install --target=cuda130 --no-deps nvidia-cuda-nvcc==13.0.88
  python experiments/compile_kernels.py --assemblers=cuda130/nvidia/cu13/bin/ptxas
  python experiments/compile_kernels.py --gpus=sm_90a --ops=gla --match='256x512 bfloat16'

A program is the forward and backward pass under the heuristic's answer, at every point of a grid of widths, dtypes and
gates, or under an entry of `kernels/tuned`. Exit status 1 when a kernel spills registers (for an entry more than
four), wants more shared memory than a block may have, does not compile, or when its machine code lacks a tensor-core
product of its PTX, as the installed assembler makes it or one of --assemblers. The record keeps registers, spills,
shared memory and products of every kernel: a run with --gpus or --ops replaces its part of it, one with --match only
prints.
"""

import concurrent.futures
import functools
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import sys
import time

import jax
from absl import flags

import assembler
import commands
import compiled

_OPS = flags.DEFINE_list("ops", list(compiled.OPS), "Ops, comma-separated.")
_GPUS = flags.DEFINE_list("gpus", list(compiled.GPUS), "Architectures, comma-separated.")
_MATCH = flags.DEFINE_string("match", "", "Compiles only the programs whose line contains this regular expression.")
_ASSEMBLERS = flags.DEFINE_list("assemblers", [], "Further ptxas programs that have to keep every product.")
_OUT = flags.DEFINE_string("out", "experiments/results/compiled_kernels.json", "The record.")
_PACKAGES = "jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "nvidia-nvvm"


def main(_):
  for flag, known in ((_OPS, compiled.OPS), (_GPUS, compiled.GPUS)):
    for value in flag.value:
      if value not in known:
        raise ValueError(f"--{flag.name}={value}: known are {', '.join(known)}")
  jax.config.update("jax_platforms", "cpu")
  record = load(pathlib.Path(_OUT.value), {"columns": compiled.COLUMNS, "versions": versions(),
                                           "assemblers": [assembler.version(x) for x in (None, *_ASSEMBLERS.value)],
                                           "sources": {op: compiled.sources(op) for op in compiled.OPS}})
  faulty = 0
  for op in _OPS.value:
    for gpu in _GPUS.value:
      entries = compile_all([p for p in compiled.programs([op], [gpu]) if re.search(_MATCH.value, str(p))])
      faulty += sum(bool(compiled.faults(entry)) for entry in entries)
      if not _MATCH.value:
        save(pathlib.Path(_OUT.value), record, op, gpu, entries)
  print(f"{faulty} programs with a fault")
  sys.exit(1 if faulty else 0)


def compile_all(programs):
  """Record entries of `programs` for one GPU, each printed on a line when it is there."""
  start, entries = time.perf_counter(), []
  # Gates of one width share kernels, and tracing takes as long as compiling: a process does both, for one width.
  groups = [list(group) for _, group in itertools.groupby(programs, lambda p: (p.K, p.V, p.dtype, p.source, p.tokens))]
  with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
    for found in pool.map(functools.partial(compile_group, _ASSEMBLERS.value), groups):
      for program, entry in found:
        print(f"{program}: {'; '.join(compiled.faults(entry)) or 'ok'} | {summary(entry)}", flush=True)
        entries.append(entry)
  print(f"{len(programs)} programs in {time.perf_counter() - start:.0f} s", flush=True)
  return entries


def compile_group(assemblers, programs):
  """Pairs of program and record entry, each kernel that several programs launch compiled once."""
  kernels, found = {}, []
  for program in programs:
    calls = compiled.calls(program)
    for call in calls.values():
      if call.key not in kernels:
        kernels[call.key] = compiled.compile_call(program.gpu, call, assemblers)
    found.append((program, program.row() | compiled.outcome({name: kernels[call.key] for name, call in calls.items()})))
  return found


def summary(entry: dict) -> str:
  """Registers and KB of shared memory of each kernel, on one line."""
  kernels = {name.removeprefix(f"{entry['op']}_"): compiled.kernel(row) for name, row in entry["kernels"].items()}
  return ", ".join(f"{name} {kernel.registers}r {kernel.shared_bytes / 1024:.0f}K" for name, kernel in kernels.items())


def versions() -> dict:
  """Versions of the packages that decide what is compiled. Raises ValueError when one is missing."""
  try:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}
  except importlib.metadata.PackageNotFoundError as e:
    raise ValueError(f"package {e.name} is not installed; this command needs the extra 'compile'") from e


def load(path: pathlib.Path, head: dict) -> dict:
  """`head` with those `programs` of the record at `path` that were made by the same versions from the same sources."""
  old = json.loads(path.read_text()) if path.exists() else {}
  made = "columns", "versions", "assemblers"
  same = [op for op, digest in old.get("sources", {}).items()
          if digest == head["sources"].get(op) and all(old.get(name) == head[name] for name in made)]
  return head | {"programs": [entry for entry in old.get("programs", []) if entry["op"] in same]}


def save(path, record, op, gpu, entries):
  """Puts the programs of one op and GPU into the record, in the place of older ones, and writes it: one a line."""
  record["programs"] = [old for old in record["programs"] if (old["op"], old["gpu"]) != (op, gpu)] + entries
  head = json.dumps({name: x for name, x in record.items() if name != "programs"})
  lines = ",\n".join(f"  {json.dumps(entry)}" for entry in record["programs"])
  commands.write(path, f'{head[:-1]}, "programs": [\n{lines}\n]}}\n')


if __name__ == "__main__":
  commands.run(main)
