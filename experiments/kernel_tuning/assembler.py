"""Reads from the CUDA assembler each kernel's registers, spilled bytes, shared memory and tensor-core products.

XLA takes ptxas from the folder of its option xla_gpu_cuda_data_dir. `watch` makes such a folder of links to the
installed toolchain. A script there takes the place of ptxas; it adds -v, and keeps the printed text, input and output.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import pathlib
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence

from . import machine_code

_SCRIPT = """#!/bin/sh
'{ptxas}' -v "$@" 2> '{logs}'/$$.log || exit
if test "$2" = -o; then
  cp "$1" '{logs}'/$$.ptx
  cp "$3" '{logs}'/$$.cubin
  shift 3
  echo "$@" > '{logs}'/$$.options
fi
"""
_PTXAS = re.compile(r"Compiling entry function '(?P<name>\w+)'.*?(?P<stores>\d+) bytes spill stores, "
                    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)", re.DOTALL)
_LAUNCH = re.compile(r"kCustomKernel .*? (?P<name>\w+) grid: \[.*?\] threads: \[(?P<threads>\d+), 1, 1\].*? "
                     r"shared_memory: (?P<shared>\d+) bytes")

MEASURED_SPILL = 16
"""Bytes per thread that a measured configuration may store and load outside its registers, for instance values that a
loop only reads. The measurement includes their cost. A heuristic's answer, which nobody times, may spill nothing."""


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One compiled kernel: registers, spilled and filled bytes per thread, shared bytes, threads, and tensor-core
  products in its PTX."""

  registers: int
  spill_bytes: int
  shared_bytes: int
  threads: int
  products: int = 0


class Watch:
  """Watches one compilation: pass `options` to `lowered.compile(compiler_options=...)`, then call `kernels()`."""

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
    """Whether XLA assembled anything with these options, which it does not if it finds the program in a cache."""
    return any("Compiling entry function" in path.read_text() for path in self._logs.glob("*.log"))

  def assembled(self, assemblers: Sequence[str]) -> list["Assembled"]:
    """Returns each kernel as XLA's assembler made it, and as each of `assemblers` makes it from the same PTX."""
    found = []
    for path in sorted(self._logs.glob("*.ptx")):
      ptx, options = path.read_text(), path.with_suffix(".options").read_text().split()
      code = machine_code.instructions(path.with_suffix(".cubin").read_bytes())
      found.append(Assembled(ptx, _tool("ptxas"), tuple(options), code))
      found += [assemble(ptx, ptxas, *options) for ptxas in assemblers]
    return found

  def products(self) -> int:
    """Counts the tensor-core products in the PTX of all kernels."""
    return sum(sum(machine_code.loops(path.read_text())) for path in self._logs.glob("*.ptx"))

  def kernels(self, prefix: str) -> dict[str, Kernel]:
    """Returns the resources of each kernel whose name begins with `prefix`; a second call that differs ends in __1."""
    kernels = parse("\n".join(path.read_text() for path in self._logs.glob("*.log")),
                    "\n".join(path.read_text() for path in self._dump.glob("*thunk_sequence.txt")))
    first = lambda name: re.sub(r"__\d+$", "", name)
    return {name: kernel for name, kernel in sorted(kernels.items())
            if name.startswith(prefix) and (name == first(name) or kernel != kernels[first(name)])}


@contextlib.contextmanager
def watch() -> Iterator[Watch]:
  """Yields a `Watch` for one compilation, because XLA assembles equal code for equal options only once."""
  with tempfile.TemporaryDirectory() as folder:
    yield Watch(pathlib.Path(folder))


def parse(ptxas: str, launches: str) -> dict[str, Kernel]:
  """Reads kernels from the output of `ptxas -v`, and their threads and dynamic memory from XLA's dumped `launches`.

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


@dataclasses.dataclass(frozen=True)
class Assembled:
  """A kernel's PTX, and the machine code that an assembler made from it under `options`."""

  ptx: str
  ptxas: str | pathlib.Path
  options: tuple[str, ...]
  code: bytes


def assemble(ptx: str, ptxas: str | pathlib.Path, *options: str) -> Assembled:
  """Assembles a kernel's PTX with `ptxas`."""
  with tempfile.TemporaryDirectory() as folder:
    source, cubin = pathlib.Path(folder, "kernel.ptx"), pathlib.Path(folder, "kernel.cubin")
    source.write_text(ptx)
    subprocess.run([ptxas, source, "-o", cubin, *options], check=True, capture_output=True)
    return Assembled(ptx, ptxas, options, machine_code.instructions(cubin.read_bytes()))


def lost_products(kernels: Sequence[Assembled]) -> list[str | None]:
  """Says which tensor-core products each kernel's machine code lacks. All kernels are for one GPU."""
  found = []
  for kernel, code in zip(kernels, _disassembled(kernels), strict=True):
    plain = lambda kernel=kernel: _disassembled([assemble(kernel.ptx, kernel.ptxas, *kernel.options, "-O1")])[0]
    lost = machine_code.lost(kernel.ptx, code, plain)
    found.append(f"ptxas {version(kernel.ptxas)} loses products: {lost}" if lost else None)
  return found


def _disassembled(kernels):
  if not kernels:
    return []
  arch, = {option for kernel in kernels for option in kernel.options if option.startswith("-arch=sm_")}
  return machine_code.disassemble(_tool("nvdisasm"), arch.replace("-arch=sm_", "SM"), [x.code for x in kernels])


def version(ptxas: str | pathlib.Path | None = None) -> str:
  """Returns the version of an assembler, by default XLA's own. Raises ValueError when it does not run."""
  path = ptxas or _toolchain() / "bin" / "ptxas"
  try:
    text = subprocess.run([path, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"V([\d.]+)", text)[1]
  except (OSError, subprocess.CalledProcessError, TypeError) as e:
    raise ValueError(f"{path}: is not a ptxas that runs: {e}") from e


def _toolchain():
  """The folder whose bin/ptxas XLA would use."""
  return _tool("ptxas").parents[1]


@functools.cache
def _tool(name):
  """Finds a program of CUDA in the installed packages, or else on the system. Raises ValueError if there is none."""
  packages = importlib.util.find_spec("nvidia")
  found = [path for location in (packages.submodule_search_locations if packages else ())
           for path in sorted(pathlib.Path(location).glob(f"*/bin/{name}"))]
  found += [pathlib.Path(path) for path in (shutil.which(name), f"/usr/local/cuda/bin/{name}")
            if path and pathlib.Path(path).exists()]
  if not found:
    raise ValueError(f"no {name} was found: install nvidia-cuda-nvcc, nvidia-nvvm and nvidia-cuda-nvdisasm, or put "
                     "CUDA's bin on the PATH")
  return found[0].resolve()
