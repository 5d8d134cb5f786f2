"""Tensor-core products in a kernel's PTX and in the machine code that an assembler makes of it: is any lost?

ptxas 13.0 to 13.5 lost one of a short loop whose length it knew: it left `HGMMA ... RZ, gdesc[URZ]`, which multiplies
nothing, in its place. A product of the PTX is one instruction of the machine code, or as many as copies of its loop.
Products that nobody reads, of the part of a triangle that is masked away, are dropped rightly: at -O1 too, where the
lost one is still there.
"""

import bisect
import itertools
import pathlib
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence

_PTX = re.compile(r"^\s*(?:@!?%\w+\s+)?(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b", re.MULTILINE)
_MACHINE = re.compile(r"\b(?:[HQI]G?MMA|UTC\w*MMA)\b[^;]*;")
_EMPTY = re.compile(r"\bRZ, gdesc\[URZ\]")
_ADDRESS = re.compile(r"^\s*/\*([0-9a-f]+)\*/", re.MULTILINE)
_LABEL, _BRANCH = re.compile(r"^(\$\w+):"), re.compile(r"\bbra(?:\.uni)?\s+(\$\w+)\s*;")
MOST_COPIES = 64  # of a loop's body that an assembler makes


def loops(ptx: str) -> list[int]:
  """How many products of one kernel stand in no loop, and then in each innermost loop that has any."""
  lines, start, ends = ptx.splitlines(), {}, []
  for i, line in enumerate(lines):
    if label := _LABEL.match(line):
      start[label[1]] = i
    if (branch := _BRANCH.search(line)) and branch[1] in start:
      ends.append((start[branch[1]], i))
  found = {None: 0}
  for i, line in enumerate(lines):
    if _PTX.match(line):
      around = [(last - first, first) for first, last in ends if first <= i <= last]
      key = min(around, default=None)
      found[key] = found.get(key, 0) + 1
  return list(found.values())


def machine_products(code: str) -> int:
  """Products in disassembled machine code, but for those that multiply nothing."""
  return sum(not _EMPTY.search(line) for line in _MACHINE.findall(code))


def lost(ptx: str, code: str, plain: Callable[[], str]) -> str | None:
  """What contradicts that each product outside of loops is there once, and each loop's in whole copies; or None.

  `plain()` is the machine code that the assembler makes at -O1: it is asked for where the PTX has more products.
  """
  (outside, *inside), found = loops(ptx), machine_products(code)
  if _EMPTY.search(code):
    return f"{found} products and an empty one for {outside} and in loops {inside}"
  possible = {outside}
  for products in inside:
    possible = {n + copies * products for n, copies in itertools.product(possible, range(1, MOST_COPIES + 1))
                if n + copies * products <= found}
  if found in possible or found == machine_products(plain()):
    return None
  return f"{found} products for {outside} and in loops {inside}"


def instructions(cubin: bytes) -> bytes:
  """The encoded instructions of all functions of a cubin, which is an ELF file of 64 bits."""
  start, = struct.unpack_from("<Q", cubin, 0x28)
  size, count, names = struct.unpack_from("<HHH", cubin, 0x3a)
  headers = [struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(count)]  # name, ..., offset, length
  functions = [header for header in headers if cubin.startswith(b".text.", headers[names][4] + header[0])]
  return b"".join(cubin[offset:offset + length] for *_, offset, length in functions)


def disassemble(nvdisasm: pathlib.Path, arch: str, codes: Sequence[bytes]) -> list[str]:
  """The text of each of `codes`, in one run of nvdisasm: it takes longer to start than to read a kernel."""
  ends = list(itertools.accumulate(map(len, codes)))
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, "code")
    file.write_bytes(b"".join(codes))
    run = subprocess.run([nvdisasm, "-ndf", "-b", arch, file], check=True, capture_output=True, text=True)
  found = [[] for _ in codes]
  for line in run.stdout.splitlines():
    if address := _ADDRESS.match(line):
      found[bisect.bisect(ends, int(address[1], 16))].append(line)
  return ["\n".join(lines) for lines in found]
