"""Products in PTX and in machine code, on what ptxas 13.0.88 made of a loop of eight chunks, cut to the essential."""

import functools
import stat
import struct

import pytest

from kernel_tuning import machine_code

WGMMA = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, %rd1, %rd2, %p1, 1, 1, 1, 1;"
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r1, %r2}, {%r3}, {%f1, %f2};"
PTX = f"""
	{MMA}
$L__BB0_1:
	{WGMMA}
	@%p3 {WGMMA}
$L__BB0_2:
	{MMA}
	@%p4 bra 	$L__BB0_2;
	wgmma.wait_group.sync.aligned 0;
	@%p5 bra 	$L__BB0_1;
	bra.uni 	$L__BB0_9;
"""
HMMA = "        /*0a40*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;"
HGMMA = "        /*0ce0*/                   HGMMA.64x8x16.F32.BF16 R32, gdesc[UR12].tnspA.tnspB, R32, gsb0 ;"
EMPTY = "        /*0c40*/                   HGMMA.64x8x16.F16 RZ, gdesc[URZ], RZ, !UPT, gsb0 ;"
OTHER = "        /*0c50*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;"


def code(hmma, hgmma, *more):
  return "\n".join([HMMA] * hmma + [OTHER] + [HGMMA] * hgmma + list(more))


def test_products_by_loop():
  assert sorted(machine_code.loops(PTX)) == [1, 1, 2] and machine_code.loops(PTX)[0] == 1


def test_machine_products():
  assert machine_code.machine_products(code(3, 2, EMPTY)) == 5
  others = "QGMMA.64x8x32 R1, gdesc[UR1], R2 ;", "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;"
  assert machine_code.machine_products("\n".join(others)) == 2


@pytest.mark.parametrize("found", [(2, 2), (5, 4), (9, 16)])
def test_whole_copies_of_loops_lose_nothing(found):
  assert machine_code.lost(PTX, code(*found), plain=pytest.fail) is None


def test_what_is_missing_is_said():
  whole = functools.partial(code, 2, 2)
  assert machine_code.lost(PTX, code(2, 1), whole) == "3 products for 1 and in loops [2, 1]"
  alone = f"$L__BB0_1:\n\t{WGMMA}\n" + f"\t{WGMMA}\n" * 7 + "\t@%p5 bra \t$L__BB0_1;\n"
  whole = functools.partial(code, 0, 8)
  assert machine_code.lost(alone, code(0, 64), whole) is None
  assert machine_code.lost(alone, code(0, 62), whole) == "62 products for 0 and in loops [8]"
  assert "and an empty one" in machine_code.lost(alone, code(0, 64, EMPTY), whole)


def test_products_that_nobody_reads_are_not_missed():
  straight = "\n".join(["\t" + MMA] * 88)
  assert machine_code.lost(straight, code(72, 0), plain=lambda: code(72, 0)) is None
  assert machine_code.lost(straight, code(70, 0), plain=lambda: code(72, 0)) == "70 products for 88 and in loops []"


def elf(sections):
  """A file of 64 bits with these sections, by name."""
  sections = {"": b"", **sections, ".shstrtab": b""}
  names = b"".join(name.encode() + b"\0" for name in sections)
  body, headers = bytes(64), b""
  for name, content in (sections | {".shstrtab": names}).items():
    start = names.index(b"\0" + name.encode() + b"\0") + 1 if name else 0
    headers += struct.pack("<IIQQQQ", start, 1, 0, 0, len(body), len(content)) + bytes(24)
    body += content
  body = bytearray(body + headers)
  struct.pack_into("<Q", body, 0x28, len(body) - len(headers))
  struct.pack_into("<HHH", body, 0x3a, 64, len(sections), len(sections) - 1)
  return bytes(body)


def test_instructions_are_the_functions_sections():
  cubin = elf({".nv.info": b"x" * 8, ".text.scan": b"a" * 16, ".nv.constant0.scan": b"y" * 8, ".text.piece": b"b" * 32})
  assert machine_code.instructions(cubin) == b"a" * 16 + b"b" * 32


def test_kernels_are_told_apart_in_one_disassembly(tmp_path):
  tool = tmp_path / "nvdisasm"
  tool.write_text("#!/bin/sh\nprintf '\t.headerflags\\n'\n"
                  "for i in 0 10 20 30; do printf '        /*00%s*/   HMMA R%s ;\\n' $i $i; done\n")
  tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
  first, second = machine_code.disassemble(tool, "SM90a", [bytes(16), bytes(48)])
  assert machine_code.machine_products(first) == 1 and machine_code.machine_products(second) == 3
