"""The kernels of the Mosaic GPU backend: the programs of the compile check, and their compilation for Hopper."""

import contextlib
import dataclasses
import functools
import itertools
import os
import re
import sys
import tempfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import use_abstract_mesh

import kernels
from kernels.delta_rule.mosaic_gpu_forward import forward_scan
from kernels.delta_rule.mosaic_gpu_reverse import reverse_scan
from kernels.delta_rule.mosaic_gpu_ring import C, Problem
from kernels.delta_rule.pallas_triton_operands import Operands

from . import assembler, compiled
from .gpus import GPUS, mesh

GPU = "sm_90a"
WIDTHS = (64, 64), (64, 128), (128, 64), (128, 128), (128, 192), (128, 256), (256, 256), (256, 512)
SHORT_WIDTHS = (128, 128), (256, 512)
SHORT, LONG = (1, 2, 3, 4, 8, 16, 17), 32  # chunks of a sequence; compilers may unroll short loops
MOST_SPILLED = 200
"""Bytes per thread that a kernel may spill: a scan's program already has all registers of a multiprocessor."""
_PRINTED = [f"MOSAIC_GPU_DUMP_{part}" for part in ("PTX", "PTXAS", "SASS")]
_RESOURCES = re.compile(r"(?P<stores>\d+) bytes spill stores.*?Used (?P<registers>\d+) registers", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Program:
  """Both scans of the delta rule on `chunks` chunks."""

  K: int
  V: int
  gated: bool
  normalized: bool
  chunks: int

  def __str__(self):
    return f"{self.K}x{self.V} {'token' if self.gated else 'none'}{' norms' * self.normalized} {self.chunks} chunks"


@dataclasses.dataclass(frozen=True)
class Scan:
  """A compiled scan: registers and spilled bytes per thread, and tensor-core products in its PTX and in its code.

  The products are those of one chunk, as the code of all warpgroups has them. `registers` is the number at the launch.
  """

  registers: int
  spill_bytes: int
  products: int
  kept: int


def programs() -> Iterator[Program]:
  """Yields all widths at one length, and two of them at short lengths."""
  for (K, V), gated, normalized in itertools.product(WIDTHS, (False, True), (False, True)):
    yield Program(K, V, gated, normalized, LONG)
  for (K, V), gated, chunks in itertools.product(SHORT_WIDTHS, (False, True), SHORT):
    yield Program(K, V, gated, True, chunks)


def compile_scans(program: Program) -> dict[str, Scan]:
  """Compiles a program without a GPU, and returns its scans by name.

  Raises ValueError if JAX's CUDA plugin is missing.
  """
  sharding = jax.NamedSharding(mesh(GPU), jax.P())
  array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
  B, T, H, N, K, V = 1, program.chunks * C, 2, program.chunks, program.K, program.V
  vectors = array(B, H, N, 3 if program.normalized else 1, C, dtype=jnp.float32)
  keys, sums = array(B, T, H, K), array(B, H, T, dtype=jnp.int32) if program.gated else None
  operands = Operands(keys, keys, array(B, H, N, 2, C, C), None, None, sums, None, None, vectors)
  arrays = operands, array(B, T, H, V), array(B, H, V, K, dtype=jnp.float32)
  problem = functools.partial(Problem, B, T, H, H, K, V, program.gated, program.normalized, K**-0.5)
  scans = {"forward_alone": (forward_scan, False), "forward": (forward_scan, True), "reverse": (reverse_scan, True)}
  found = {}
  for name, (scan, save) in scans.items():
    with _printed() as printed, use_abstract_mesh(GPUS[GPU].abstract):
      jax.jit(functools.partial(scan, p=problem(save))).lower(*arrays).compile()
      found[name] = _scan(printed())
  return found


def compile_others(program: Program) -> dict[str, assembler.Kernel | str]:
  """Compiles the kernels of Triton's backend that the op launches beside its scans; a string says what is wrong."""
  array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
  B, T, H = 1, program.chunks * C, 2
  keys, values, token = array(B, T, H, program.K), array(B, T, H, program.V), array(B, T, H, dtype=jnp.float32)
  op = functools.partial(kernels.delta_rule, implementation="mosaic_gpu", normalize_qk=program.normalized)
  both = lambda arrays, doutput: jax.vjp(lambda *x: op(*x)[0], *arrays)[1](doutput)
  with use_abstract_mesh(GPUS[GPU].abstract):
    jaxpr = jax.make_jaxpr(both)((keys, keys, values, token, token if program.gated else None), values).jaxpr
  calls = list(dict.fromkeys(compiled.launched(jaxpr)))
  found = compiled.compile_calls(GPU, calls)
  return {call.name: found[call.key] for call in calls}


def faults(name: str, found: Scan | assembler.Kernel | str) -> list[str]:
  """Says what must not be: a kernel that does not compile, lost products, or more spilled bytes than are known."""
  if isinstance(found, str):
    return [f"{name}: {found}"]
  wrong = []
  if isinstance(found, Scan) and found.kept != found.products:
    wrong.append(f"{name} has {found.products} products in its PTX and {found.kept} in its code")
  if found.spill_bytes > MOST_SPILLED:
    wrong.append(f"{name} spills {found.spill_bytes} bytes")
  return wrong


@contextlib.contextmanager
def _printed():
  """Makes the backend print what it compiles, and yields a function that returns the text so far."""
  sys.stdout.flush()
  kept = os.dup(1)
  with tempfile.TemporaryFile("w+") as file:
    os.environ.update(dict.fromkeys(_PRINTED, "1"))
    os.dup2(file.fileno(), 1)
    try:
      def read():
        sys.stdout.flush()
        file.seek(0)
        return file.read()
      yield read
    finally:
      os.dup2(kept, 1)
      os.close(kept)
      for name in _PRINTED:
        del os.environ[name]


def _scan(text):
  """The resources of a kernel from its PTX, the assembler's report and the machine code."""
  found = _RESOURCES.search(text)
  # The assembler once put a product without its operand in the place of a lost one.
  kept = len(re.findall(r"HGMMA(?!.*gdesc\[URZ\])", text))
  return Scan(int(found["registers"]), int(found["stores"]), text.count("wgmma.mma_async"), kept)
