"""Compiles every configuration of the GPU kernels for a list of GPUs, without having one: do they fit, do they spill?

  pip install -e .[compile]
  pip install --target=cuda130 --no-deps nvidia-cuda-nvcc==13.0.88
  python experiments/compile_kernels.py --assemblers=cuda130/nvidia/cu13/bin/ptxas
  python experiments/compile_kernels.py --gpus=sm_90a --ops=gla --match='256x512 bfloat16'

A program is the forward and backward pass under the heuristic's answer, at every point of a grid of widths, dtypes and
gates, or under an entry of `kernels/tuned`. Exit status 1 when a kernel spills registers (for an entry more than 16
bytes), wants more shared memory than a block may have, does not compile, or when its machine code lacks a tensor-core
product of its PTX, as the installed assembler makes it or one of --assemblers. The record keeps registers, spills,
shared memory and products of every kernel, and how it was built. A run adds what the record lacks of its kernels,
measured configurations first, then odd widths, and goes on where a limit of time or a signal stopped it; `pending`
counts what is not compiled since the kernels changed. One with --match only prints.
"""

import concurrent.futures
import hashlib
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

from kernel_tuning import assembler, compiled
from lin_jax import files
from running import commands, deadline

_OPS = flags.DEFINE_list("ops", list(compiled.OPS), "Ops, comma-separated.")
_GPUS = flags.DEFINE_list("gpus", list(compiled.GPUS), "Architectures, comma-separated.")
_MATCH = flags.DEFINE_string("match", "", "Compiles only the programs whose line contains this regular expression.")
_ASSEMBLERS = flags.DEFINE_list("assemblers", [], "Further ptxas programs that have to keep every product.")
_OUT = flags.DEFINE_string("out", "experiments/results/compiled_kernels.json", "The record.")
_LIMIT = flags.DEFINE_float("limit_seconds", 0, "Begin no program after this time; 0 for no limit.", lower_bound=0)
SAVE_SECONDS = 30
_PACKAGES = "jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "nvidia-nvvm"


def main(_):
  for flag, known in ((_OPS, compiled.OPS), (_GPUS, compiled.GPUS)):
    for value in flag.value:
      if value not in known:
        raise ValueError(f"--{flag.name}={value}: known are {', '.join(known)}")
  jax.config.update("jax_platforms", "cpu")
  record = Record(pathlib.Path(_OUT.value))
  wanted = [program for program in compiled.programs(_OPS.value, _GPUS.value) if re.search(_MATCH.value, str(program))]
  wanted = [program for program in wanted if _MATCH.value or not record.has(program)]
  wanted.sort(key=lambda program: (program.source != "tuned", (program.K, program.V) not in compiled.ODD_WIDTHS))
  faulty, start = 0, time.perf_counter()
  saved = start
  with deadline.deadline(_LIMIT.value) as over:
    for program, entry in compile_all(wanted, over):
      faults = compiled.faults(entry)
      faulty += bool(faults)
      print(f"{program}: {'; '.join(faults) or 'ok'} | {summary(entry)}", flush=True)
      record.add(program, entry)
      if not _MATCH.value and time.perf_counter() - saved > SAVE_SECONDS:
        record.save()
        saved = time.perf_counter()
  if not _MATCH.value:
    record.save()
  print(f"{len(wanted)} programs wanted, {time.perf_counter() - start:.0f} s; {faulty} programs with a fault")
  sys.exit(1 if faulty else 0)


def compile_all(programs, over):
  """Pairs of program and record entry, as they are there; none is begun after `over()`."""
  # Gates of one width share kernels, and tracing takes as long as compiling: a process does both, for one width.
  key = lambda p: (p.op, p.gpu, p.K, p.V, p.dtype, p.source, p.tokens)
  groups = (list(group) for _, group in itertools.groupby(programs, key))
  with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
    running = set()
    for group in itertools.chain(groups, [None] * os.cpu_count()):
      if group and not over():
        running.add(pool.submit(compile_group, _ASSEMBLERS.value, group))
      while running and (len(running) >= os.cpu_count() or not group):
        done, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in done:
          yield from future.result()


def compile_group(assemblers, programs):
  """Pairs of program and record entry, each kernel that several programs launch compiled once."""
  calls = [compiled.calls(program) for program in programs]
  different = {call.key: call for named in calls for call in named.values()}
  kernels = compiled.compile_calls(programs[0].gpu, list(different.values()), assemblers)
  return [(program, program.row() | compiled.outcome({name: kernels[call.key] for name, call in named.items()}))
          for program, named in zip(programs, calls, strict=True)]


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


class Record:
  """Programs by what identifies them, with the build that each comes from: sources, versions and assemblers."""

  def __init__(self, path: pathlib.Path):
    try:
      old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"programs": [], "builds": {}}
      self._path, self._builds = path, dict(old["builds"])
      self._entries = {compiled.identity(entry): entry for entry in old["programs"]}
    except (ValueError, KeyError, TypeError) as e:
      raise ValueError(f"--out={path}: not a record of this command: {e!r}") from e
    made_by = {"versions": versions(), "assemblers": [assembler.version(x) for x in (None, *_ASSEMBLERS.value)]}
    self._current = {op: {"sources": compiled.sources(op)} | made_by for op in compiled.OPS}

  def has(self, program: compiled.Program) -> bool:
    """Whether the program was compiled from these sources by these versions."""
    entry = self._entries.get(compiled.identity(program.row()))
    return entry is not None and self._builds[entry["build"]] == self._current[program.op]

  def add(self, program: compiled.Program, entry: dict) -> None:
    build = self._current[program.op]
    name = hashlib.sha256(json.dumps(build).encode()).hexdigest()[:12]
    self._builds[name] = build
    self._entries[compiled.identity(entry)] = entry | {"build": name}

  def save(self) -> None:
    """Writes the programs that are still wanted, one on a line, and the builds that they come from."""
    wanted = [compiled.identity(program.row()) for program in compiled.programs()]
    entries = [self._entries[key] for key in wanted if key in self._entries]
    builds = {name: self._builds[name] for name in dict.fromkeys(entry["build"] for entry in entries)}
    head = json.dumps({"columns": compiled.COLUMNS, "builds": builds, "pending": compiled.pending(entries, builds)})
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    files.write(self._path, f'{head[:-1]}, "programs": [\n{lines}\n]}}\n')


if __name__ == "__main__":
  commands.run(main)
