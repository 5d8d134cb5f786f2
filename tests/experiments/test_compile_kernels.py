"""The compile check: the numbers that it reads from the assembler, its faults, its exit status and its record."""

import functools
import json
import pathlib
import subprocess
import sys

import pytest

from kernel_tuning import assembler, compiled, search
from kernel_tuning.assembler import Kernel
from tests.environment import ENVIRONMENT
from tests.forked import Command

EXPERIMENTS = pathlib.Path(compiled.__file__).parents[1]
PTXAS = """\
ptxas warning : Registers are spilled to local memory in function 'gla_dqkg', 120 bytes spill stores, \
124 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'gla_dqkg' for 'sm_90a'
ptxas info    : Function properties for gla_dqkg
    120 bytes stack frame, 120 bytes spill stores, 124 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 120 bytes cumulative stack size
ptxas info    : Compile time = 37.873 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'gla_scan' for 'sm_90a'
ptxas info    : Function properties for gla_scan
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 94 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]
"""
LAUNCHES = """\
001: kCustomKernel [source       | next=005 (4)] gla_scan grid: [1, 1, 1] threads: [128, 1, 1]  \
shared_memory: 12288 bytes
002: kCustomKernel [prev=004 (1) | next=006 (1)] gla_dqkg grid: [2, 1, 1] threads: [256, 1, 1]  \
shared_memory: 20480 bytes
003: kCopy         [prev=004 (1) | sink        ] copy
"""


def test_parse():
  assert assembler.parse(PTXAS, LAUNCHES) == {
      "gla_dqkg": Kernel(255, 244, 20480, 256), "gla_scan": Kernel(94, 0, 12288 + 1024, 128)}


def test_parse_misses_no_kernel():
  with pytest.raises(ValueError, match="gla_scan is launched, but the assembler printed nothing about it"):
    assembler.parse(PTXAS.replace("'gla_scan'", "'other'"), LAUNCHES)


def test_watch_stands_before_the_assembler(tmp_path, monkeypatch):
  """The tree that XLA gets: everything of the toolchain, and a ptxas that says what the real one printed."""
  toolchain = tmp_path / "toolchain"
  (toolchain / "bin").mkdir(parents=True)
  (toolchain / "nvvm").mkdir()
  (toolchain / "bin" / "ptxas").write_text(f"#!/bin/sh\ntest \"$1 $2\" = '-v x.ptx' && cat >&2 <<'END'\n{PTXAS}END\n")
  (toolchain / "bin" / "ptxas").chmod(0o755)
  (toolchain / "bin" / "nvlink").touch()
  monkeypatch.setattr(assembler, "_toolchain", lambda: toolchain)
  with assembler.watch() as watch:
    tree, dump = (pathlib.Path(watch.options[name]) for name in ("xla_gpu_cuda_data_dir", "xla_dump_to"))
    assert (tree / "nvvm").is_dir() and (tree / "bin" / "nvlink").exists()
    subprocess.run([tree / "bin" / "ptxas", "x.ptx"], check=True)
    dump.mkdir()
    (dump / "module_0001.jit_f.thunk_sequence.txt").write_text(LAUNCHES)
    assert watch.kernels("gla_s") == {"gla_scan": Kernel(94, 0, 13312, 128)}
  assert not tree.exists()


@pytest.mark.parametrize("gpu, shared", [("sm_80", 166912), ("sm_89", 101376), ("sm_90a", 232448), ("sm_100a", 232448)])
def test_faults(gpu, shared, monkeypatch):
  width = {"op": "gla", "gate": "channel", "K": 64, "V": 64, "dtype": "bfloat16", "tokens": 256}
  entry = lambda *kernel, source="heuristic": width | {"gpu": gpu, "source": source,
                                                       "kernels": {"gla_scan": list(kernel)}}
  assert compiled.faults(entry(255, 0, shared, 128)) == []
  assert compiled.faults(entry(255, 8, shared, 128)) == ["gla_scan spills 8 bytes"]
  assert len(compiled.faults(entry(255, 8, shared + 1, 128))) == 2
  assert compiled.faults(entry(255, 16, shared, 128, source="tuned")) == []
  assert compiled.faults(entry(255, 20, shared, 128, source="tuned")) == ["gla_scan spills 20 bytes"]
  monkeypatch.setattr(compiled, "known_spills", lambda: {
      f"{gpu} gla 64x64 bfloat16 channel tuned 256 tokens gla_scan": 136})
  assert compiled.faults(entry(255, 136, shared, 128, source="tuned")) == []
  assert compiled.faults(entry(255, 140, shared, 128, source="tuned")) == ["gla_scan spills 140 bytes"]
  assert len(compiled.faults(entry(255, 136, shared, 128))) == 1
  refused = width | {"gpu": gpu, "source": "tuned"}
  refused |= compiled.outcome({"gla_scan": "RESOURCE_EXHAUSTED", "gla_dv": Kernel(255, 0, shared, 128)})
  assert compiled.faults(refused) == ["gla_scan: RESOURCE_EXHAUSTED"] and list(refused["kernels"]) == ["gla_dv"]


def test_digest_is_that_of_the_code_that_kernels_need(tmp_path, monkeypatch):
  monkeypatch.setattr(compiled, "ROOT", tmp_path)
  (tmp_path / "gla").mkdir()

  def digest(text, name="gla/pallas_triton"):
    (tmp_path / f"{name}.py").write_text(text)
    return compiled.sources("gla")

  code = digest('"""Kernels."""\ndef f():\n  """Doc."""\n  return 1\n')
  assert code == digest('"""Other."""\n\ndef f():\n  # why\n  return 1\n')
  assert code != digest('"""Kernels."""\ndef f():\n  """Doc."""\n  return 2\n')
  # Imported modules count, at any distance. Other modules and the choice of a configuration do not.
  code = digest("from kernels import blocks, tuned\nfrom kernels.gla import bodies\n")
  assert code == digest("1\n", "gla/reference") == digest("1\n", "tuned")
  code = digest("from kernels.sums import total\n", "blocks")
  assert code != (code := digest("1\n", "gla/bodies"))
  assert code != digest("1\n", "sums")


# The command on ops of one tile, with a compiler that finds what the width of the tile says.
COMMAND = """
import dataclasses, sys, types
from kernel_tuning import compiled, search
from kernel_tuning.assembler import Kernel
from kernels.tuned import Tile

@dataclasses.dataclass(frozen=True)
class Config:
  chunk: int
  scan: Tile

heuristic = lambda K, V, dtype, chunk_size: Config(64, Tile(K))
compiled.tuned.listed = lambda op, device: []
compiled._module = lambda op: types.SimpleNamespace(MOST_STATES=32, block_size=lambda N, dtype: N // 4)
for op in search.GATE_GROUPS:
  sys.modules[f"kernels.{op}.pallas_triton_config"] = types.SimpleNamespace(Config=Config, heuristic=heuristic)
compiled.sources = lambda op: op + SOURCES
compiled.calls = lambda program: {"gla_scan": compiled.Call(f"{program.K}{CALLS}", "gla_scan", None, ())}
compiled.compile_calls = lambda gpu, calls, _: {x.key: Kernel(255, SPILL[gpu], 1024, 128, 8) for x in calls}
import compile_kernels
compile_kernels.assembler.version = lambda path=None: "13"
compile_kernels.versions = lambda: dict(VERSIONS)
compile_kernels.commands.run(compile_kernels.main)
"""


def run(out, *flags, spill=None, sources="", calls="", versions=(("jax", "0"),)):
  spill = dict.fromkeys(compiled.GPUS, 0) | (spill or {})
  names = f"SPILL = {spill}; SOURCES = {sources!r}; CALLS = {calls!r}; VERSIONS = {versions}"
  (script := out.with_name("script.py")).write_text(f"{names}\n{COMMAND}")
  process = Command(script, f"--out={out}", *flags)
  stdout, stderr = process.communicate()
  assert "Traceback" not in stderr, stderr
  return subprocess.CompletedProcess(flags, process.returncode, stdout, stderr)


def test_command(tmp_path):
  out = tmp_path / "record.json"
  grid = len(compiled.WIDTHS) * (len(compiled.WIDTHS) + 1) * len(compiled.DTYPES)
  # All gates but the delta rule's per channel, which has widths of its own.
  gates = sum(len(group) for groups in search.GATE_GROUPS.values() for group in groups) - 1
  odd, others = len(compiled.ODD_WIDTHS) * len(compiled.DTYPES), len(compiled.CHANNEL_WIDTHS) + 8
  total = 3 * (grid * gates + others) + 2 * ((grid + odd) * gates + others)
  clean = run(out)
  assert clean.returncode == 0 and clean.stdout.endswith("; 0 programs with a fault\n")
  assert f"{total} programs wanted" in clean.stdout
  record = json.loads(out.read_text())
  short = {entry["gpu"]: entry["tokens"] for entry in record["programs"] if entry["tokens"] != compiled.LONG}
  assert short == dict.fromkeys(compiled.SHORT_GPUS, compiled.SHORT)
  assert len(record["programs"]) == total and record["pending"] == {}
  assert [(entry["K"], entry["V"], entry["config"]) for entry in record["programs"][-8::2]] == 2 * [
      (16, 1, "4"), (32, 1, "8")]
  first = dict(record["programs"][0])
  assert record["builds"][first.pop("build")] == {"sources": "gla", "versions": {"jax": "0"}, "assemblers": ["13"]}
  assert first == {
      "op": "gla", "gpu": "sm_80", "K": 16, "V": 16, "dtype": "bfloat16", "gate": "channel", "source": "heuristic",
      "config": "chunk=64 scan=16/4/2", "tokens": 2048, "kernels": {"gla_scan": [255, 0, 1024, 128, 8]},
      "traced": compiled.traced({"gla_scan": compiled.Call("16", "gla_scan", None, ())})}

  again = run(out)
  assert "0 programs wanted" in again.stdout and json.loads(out.read_text()) == record

  one = run(out, "--gpus=sm_89", "--match=128x64 bfloat16", spill={"sm_89": 64})
  fault = "sm_89 gla 128x64 bfloat16 channel heuristic 2048 tokens: gla_scan spills 64 bytes"
  assert one.returncode == 1 and fault in one.stdout
  assert json.loads(out.read_text()) == record

  late = run(out, "--gpus=sm_89", "--ops=gla", "--limit_seconds=1e-9", sources="changed")
  assert late.returncode == 0 and json.loads(out.read_text())["pending"]["gla sm_89"] == grid

  part = run(out, "--gpus=sm_89", "--ops=gla", spill={"sm_89": 64}, sources="changed")
  assert part.returncode == 1 and part.stdout.endswith(f"{grid} programs with a fault\n")
  record = json.loads(out.read_text())
  faulty = [entry for entry in record["programs"] if compiled.faults(entry)]
  assert {(entry["op"], entry["gpu"]) for entry in faulty} == {("gla", "sm_89")}
  assert len(record["programs"]) == total
  assert "gla sm_89" not in record["pending"] and record["pending"]["gla sm_80"] == grid

  wrong = run(out, "--gpus=sm_70")
  assert wrong.returncode == 2 and "--gpus=sm_70: known are sm_80, sm_89, sm_90a, sm_100a" in wrong.stderr


def test_rebase_accepts_sources_of_equal_calls_without_a_toolchain(tmp_path):
  out = tmp_path / "record.json"
  assert run(out).returncode == 0
  before = json.loads(out.read_text())
  rebase = functools.partial(run, out, "--rebase", versions=None)

  renamed = rebase(sources="renamed")
  assert renamed.returncode == 0 and renamed.stdout.endswith("; 0 programs with other kernel calls\n")
  after = json.loads(out.read_text())
  unnamed = lambda record: [entry | {"build": None} for entry in record["programs"]]
  assert unnamed(after) == unnamed(before) and after["pending"] == {}
  assert {build["sources"] for build in after["builds"].values()} == {f"{op}renamed" for op in compiled.OPS}
  assert all(build["versions"] == {"jax": "0"} for build in after["builds"].values())
  assert "0 programs wanted" in rebase(sources="renamed").stdout
  assert "0 programs wanted" in run(out, sources="renamed").stdout

  late = rebase("--limit_seconds=1e-9", sources="other")
  assert f"{len(before['programs'])} programs wanted, 0 done, " in late.stdout
  assert json.loads(out.read_text())["programs"] == after["programs"]

  other = rebase("--ops=gla", "--gpus=sm_80,sm_89", sources="other", calls="other")
  grid = len(compiled.WIDTHS) * (len(compiled.WIDTHS) + 1) * len(compiled.DTYPES)
  assert other.returncode == 1 and f"{2 * grid} programs with other kernel calls" in other.stdout
  assert "sm_89 gla 128x64 bfloat16 channel heuristic 2048 tokens: its kernel calls are not" in other.stdout
  assert json.loads(out.read_text())["programs"] == after["programs"]
  assert json.loads(out.read_text())["pending"]["gla sm_89"] == grid


# The digests of one program per op, in an order that the process is told.
DIGESTS = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
from kernel_tuning import compiled
for op in sys.argv[1:]:
  program = next(p for p in compiled.programs([op], ["sm_90a"]) if p.K in (16, 128) and p.tokens == compiled.SHORT)
  calls = compiled.calls(program)
  assert not any(".py" in call.key or "0x" in call.key for call in calls.values())
  print(op, compiled.traced(calls))
"""


def test_digest_of_calls_is_equal_in_every_process(tmp_path):
  (script := tmp_path / "script.py").write_text(DIGESTS)
  forked = Command(script, *compiled.OPS)
  other = subprocess.run([sys.executable, script, *compiled.OPS[::-1]], capture_output=True, text=True,
                         env=ENVIRONMENT | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(EXPERIMENTS)})
  found = [sorted(text.splitlines()) for text in (forked.communicate()[0], other.stdout)]
  assert len(found[0]) == len(compiled.OPS) and found[0] == found[1], other.stderr
