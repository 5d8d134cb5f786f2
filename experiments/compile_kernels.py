"""Compiles every configuration of the GPU kernels without a GPU, and checks that they fit and do not spill registers.

  pip install -e .[compile]
  pip install --target=cuda130 --no-deps nvidia-cuda-nvcc==13.0.88
  python experiments/compile_kernels.py --assemblers=cuda130/nvidia/cu13/bin/ptxas
  python experiments/compile_kernels.py --gpus=sm_90a --ops=gla --match='256x512 bfloat16'
  python experiments/compile_kernels.py --rebase

A program is the forward and backward pass under one configuration: the heuristic's answer at a point of a grid of
widths, dtypes and gates, or an entry of `kernels/tuned`. The exit status is 1 when a kernel does not compile, spills
registers (more than 16 bytes for an entry), or wants more shared memory than a block may have. It is also 1 when the
machine code lacks a tensor-core product of its PTX, whether the installed assembler made it or one of --assemblers.

The record keeps registers, spills, shared memory and products of every kernel, and how it was built. A run adds the
programs that the record lacks: measured configurations first, then odd widths, then the others. It continues where a
limit of time or a signal stopped it. `pending` counts the programs that were not compiled again after the kernels
changed. A run with --match only prints.

The record also keeps a digest of each program's traced kernel calls. After a change of the sources that leaves these
calls equal, as new names do, --rebase notes the new sources as what the entries were built from. It needs no CUDA
toolchain. It prints the programs whose calls differ and leaves them pending; then the exit status is 1.
"""

import collections
import concurrent.futures
import dataclasses
import functools
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
_ASSEMBLERS = flags.DEFINE_list("assemblers", [], "Further ptxas programs, which must keep every product too.")
_OUT = flags.DEFINE_string("out", "experiments/results/compiled_kernels.json", "The record.")
_REBASE = flags.DEFINE_bool("rebase", False, "Compiles nothing, and accepts sources whose traced kernel calls are "
                            "equal.")
_LIMIT = flags.DEFINE_float("limit_seconds", 0, "Begins no program after this time; 0 for no limit.", lower_bound=0)
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
  run, fault = (rebase, "other kernel calls") if _REBASE.value else (compile_missing, "a fault")
  start = time.perf_counter()
  with deadline.deadline(_LIMIT.value) as over:
    count, done, faulty = run(record, wanted, over)
  if not _MATCH.value:
    record.save()
  print(f"{count} programs wanted, {done} done, {time.perf_counter() - start:.0f} s; {faulty} programs with {fault}")
  sys.exit(1 if faulty else 0)


def compile_missing(record, wanted, over):
  """Compiles the programs that the record lacks. Returns how many are wanted, are done, and have a fault."""
  made_by = {"versions": versions(), "assemblers": [assembler.version(x) for x in (None, *_ASSEMBLERS.value)]}
  builds = {op: {"sources": compiled.sources(op)} | made_by for op in compiled.OPS}
  wanted = [program for program in wanted if _MATCH.value or record.build(program) != builds[program.op]]
  wanted.sort(key=lambda program: (record.build(program) is not None, program.source != "tuned",
                                   (program.K, program.V) not in compiled.ODD_WIDTHS))
  # Gates of one width share kernels, and tracing takes as long as compiling, so one process does both for a width.
  key = lambda p: (p.op, p.gpu, p.K, p.V, p.dtype, p.source, p.tokens)
  groups = (list(group) for _, group in itertools.groupby(wanted, key))
  done, faulty, saved = 0, 0, time.perf_counter()
  for program, entry in in_processes(functools.partial(compile_group, _ASSEMBLERS.value), groups, over):
    faults = compiled.faults(entry)
    done += 1
    faulty += bool(faults)
    print(f"{program}: {'; '.join(faults) or 'ok'} | {summary(entry)}", flush=True)
    record.add(entry, builds[program.op])
    if not _MATCH.value and time.perf_counter() - saved > SAVE_SECONDS:
      record.save()
      saved = time.perf_counter()
  return len(wanted), done, faulty


def rebase(record, wanted, over):
  """Accepts these sources where calls are equal. Returns how many programs had other sources, are done, and differ."""
  sources = {op: compiled.sources(op) for op in compiled.OPS}
  wanted = [program for program in wanted if (record.build(program) or {}).get("sources") != sources[program.op]]
  groups = collections.defaultdict(list)  # calls do not depend on the GPU
  for program in wanted:
    groups[dataclasses.replace(program, gpu="", source="")].append(program)
  done, different = 0, 0
  for program, digest in in_processes(trace_group, groups.values(), over):
    done += 1
    if not record.rebase(program, digest, sources[program.op]):
      different += 1
      print(f"{program}: its kernel calls are not the record's", flush=True)
  return len(wanted), done, different


def in_processes(function, groups, over):
  """Yields the results of `function` for each group of programs as they come; begins no group after `over()`."""
  with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
    running = set()
    for group in itertools.chain(groups, [None] * os.cpu_count()):
      if group and not over():
        running.add(pool.submit(function, group))
      while running and (len(running) >= os.cpu_count() or not group):
        done, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in done:
          yield from future.result()


def compile_group(assemblers, programs):
  """Returns pairs of program and record entry; a kernel that several programs launch is compiled once."""
  calls = [compiled.calls(program) for program in programs]
  different = {call.key: call for named in calls for call in named.values()}
  kernels = compiled.compile_calls(programs[0].gpu, list(different.values()), assemblers)
  return [(program, program.row() | {"traced": compiled.traced(named)} | compiled.outcome(
      {name: kernels[call.key] for name, call in named.items()}))
          for program, named in zip(programs, calls, strict=True)]


def trace_group(programs):
  """Returns pairs of program and digest of its kernel calls, which the whole group shares."""
  digest = compiled.traced(compiled.calls(programs[0]))
  return [(program, digest) for program in programs]


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
  """The record file: its programs, and the build of each, which is sources, versions and assemblers."""

  def __init__(self, path: pathlib.Path):
    try:
      old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"programs": [], "builds": {}}
      self._path, self._builds = path, dict(old["builds"])
      self._entries = {compiled.identity(entry): entry for entry in old["programs"]}
    except (ValueError, KeyError, TypeError) as e:
      raise ValueError(f"--out={path}: not a record of this command: {e!r}") from e

  def build(self, program: compiled.Program) -> dict | None:
    """The build that the program's entry comes from, or None if there is no entry."""
    entry = self._entries.get(compiled.identity(program.row()))
    return entry and self._builds[entry["build"]]

  def rebase(self, program: compiled.Program, digest: str, sources: str) -> bool:
    """Notes `sources` as the entry's own if the digest of the program's calls is equal; returns whether it is."""
    entry = self._entries.get(compiled.identity(program.row()))
    if entry is None or entry["traced"] != digest:
      return False
    self.add(entry, self._builds[entry["build"]] | {"sources": sources})
    return True

  def add(self, entry: dict, build: dict) -> None:
    name = hashlib.sha256(json.dumps(build).encode()).hexdigest()[:12]
    self._builds[name] = build
    self._entries[compiled.identity(entry)] = entry | {"build": name}

  def save(self) -> None:
    """Writes the programs that are still wanted, one per line, and the builds that they come from."""
    wanted = [compiled.identity(program.row()) for program in compiled.programs()]
    entries = [self._entries[key] for key in wanted if key in self._entries]
    builds = {name: self._builds[name] for name in dict.fromkeys(entry["build"] for entry in entries)}
    head = json.dumps({"columns": compiled.COLUMNS, "builds": builds, "pending": compiled.pending(entries, builds)})
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    files.write(self._path, f'{head[:-1]}, "programs": [\n{lines}\n]}}\n')


if __name__ == "__main__":
  commands.run(main)
