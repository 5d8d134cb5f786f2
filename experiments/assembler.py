"""What the CUDA assembler says of every kernel of a compilation: registers, spilled bytes, shared memory.

XLA takes ptxas from the folder of its option xla_gpu_cuda_data_dir. `watch` makes one: links to the installed
toolchain, with a script in the place of ptxas that adds -v and keeps what it prints.
"""

import contextlib
import dataclasses
import importlib.util
import pathlib
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator

_SCRIPT = """#!/bin/sh
exec '{ptxas}' -v "$@" 2> '{logs}'/$$.log
"""
_PTXAS = re.compile(r"Compiling entry function '(?P<name>\w+)'.*?(?P<stores>\d+) bytes spill stores, "
                    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)", re.DOTALL)
_LAUNCH = re.compile(r"kCustomKernel .*? (?P<name>\w+) grid: \[.*?\] threads: \[(?P<threads>\d+), 1, 1\].*? "
                     r"shared_memory: (?P<shared>\d+) bytes")

MEASURED_SPILL = 16
"""Bytes a thread that a measured configuration may spill: four registers, such as hold what a loop only reads. Their
cost is in the measurement; a heuristic's answer, which nobody times, may spill nothing."""


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Resources of one program of a kernel: registers a thread, bytes spilled and filled a thread, bytes shared."""

  registers: int
  spill_bytes: int
  shared_bytes: int
  threads: int


class Watch:
  """`options` go to `lowered.compile(compiler_options=...)`; then `kernels()` says what was compiled."""

  def __init__(self, folder: pathlib.Path):
    self._logs, self._dump = folder / "logs", folder / "dump"
    toolchain = _toolchain()
    tree = folder / "cuda"
    for path in (self._logs, tree / "bin"):
      path.mkdir(parents=True)
    for path in (*toolchain.iterdir(), *(toolchain / "bin").iterdir()):
      if path not in (toolchain / "bin", toolchain / "bin" / "ptxas"):
        (tree / path.relative_to(toolchain)).symlink_to(path)
    script = tree / "bin" / "ptxas"
    script.write_text(_SCRIPT.format(ptxas=toolchain / "bin" / "ptxas", logs=self._logs))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    self.options = {"xla_gpu_cuda_data_dir": str(tree), "xla_dump_to": str(self._dump)}

  def used(self) -> bool:
    """Whether XLA assembled anything with these options; it does not when it finds the program in a cache."""
    return any("Compiling entry function" in path.read_text() for path in self._logs.glob("*.log"))

  def kernels(self, prefix: str) -> dict[str, Kernel]:
    """Resources by name of each kernel named `prefix`...; a second call of one is listed, as __1, where it differs."""
    kernels = parse("\n".join(path.read_text() for path in self._logs.glob("*.log")),
                    "\n".join(path.read_text() for path in self._dump.glob("*thunk_sequence.txt")))
    first = lambda name: re.sub(r"__\d+$", "", name)
    return {name: kernel for name, kernel in sorted(kernels.items())
            if name.startswith(prefix) and (name == first(name) or kernel != kernels[first(name)])}


@contextlib.contextmanager
def watch() -> Iterator[Watch]:
  """A `Watch` for one compilation: XLA assembles equal code for equal options only once."""
  with tempfile.TemporaryDirectory() as folder:
    yield Watch(pathlib.Path(folder))


def parse(ptxas: str, launches: str) -> dict[str, Kernel]:
  """Kernels in what `ptxas -v` printed, of which XLA's dumped sequence of `launches` holds threads and dynamic memory.

  Raises ValueError when a launched kernel is missing from the assembler's output.
  """
  assembled = {match["name"]: match for match in _PTXAS.finditer(ptxas)}
  kernels = {}
  for launch in _LAUNCH.finditer(launches):
    if launch["name"] not in assembled:
      raise ValueError(f"{launch['name']} is launched, but the assembler printed nothing about it")
    match = assembled[launch["name"]]
    static = re.search(r"(\d+) bytes smem", match["rest"])
    kernels[launch["name"]] = Kernel(
        int(match["registers"]), int(match["stores"]) + int(match["loads"]),
        int(launch["shared"]) + (int(static[1]) if static else 0), int(launch["threads"]))
  return kernels


def _toolchain():
  """The folder whose bin/ptxas XLA would use: the installed packages' before the system's. Raises ValueError."""
  packages = importlib.util.find_spec("nvidia")
  found = [path for location in (packages.submodule_search_locations if packages else ())
           for path in sorted(pathlib.Path(location).glob("*/bin/ptxas"))]
  found += [pathlib.Path(path) for path in (shutil.which("ptxas"), "/usr/local/cuda/bin/ptxas")
            if path and pathlib.Path(path).exists()]
  if not found:
    raise ValueError("no ptxas was found: install nvidia-cuda-nvcc and nvidia-nvvm, or put CUDA's bin on the PATH")
  return found[0].resolve().parents[1]
