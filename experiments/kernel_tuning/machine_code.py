"""Compares the tensor-core products in a kernel's PTX with those in its machine code, to find lost ones.

ptxas 13.0 to 13.5 lost one product of a short loop whose length it knew. In its place it left `HGMMA ... RZ,
gdesc[URZ]`, which multiplies nothing. A product of the PTX is one instruction of the machine code, or one per copy of
its loop. The assembler rightly drops products that nobody reads, in the part of a triangle that is masked away. It
drops them at -O1 too, where the lost product is still there.
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
MOST_COPIES = 64  # how often an assembler may repeat a loop's body


def loops(ptx: str) -> list[int]:
  """Counts a kernel's products outside of loops, and then in each innermost loop that has any."""
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
  """Counts products in disassembled machine code, except empty ones, which multiply nothing."""
  return sum(not _EMPTY.search(line) for line in _MACHINE.findall(code))


def lost(ptx: str, code: str, plain: Callable[[], str]) -> str | None:
  """Says which product is missing, or None if each one outside of loops is there once and each loop's in whole copies.

  `plain()` is the machine code that the assembler makes at -O1. It is called only if the PTX has more products.
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
  """Reads the encoded instructions of all functions from a cubin, which is a 64-bit ELF file."""
  start, = struct.unpack_from("<Q", cubin, 0x28)
  size, count, names = struct.unpack_from("<HHH", cubin, 0x3a)
  headers = [struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(count)]  # name, ..., offset, length
  functions = [header for header in headers if cubin.startswith(b".text.", headers[names][4] + header[0])]
  return b"".join(cubin[offset:offset + length] for *_, offset, length in functions)


def disassemble(nvdisasm: pathlib.Path, arch: str, codes: Sequence[bytes]) -> list[str]:
  """Disassembles all `codes` in one run of nvdisasm, which takes longer to start than to read a kernel."""
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
