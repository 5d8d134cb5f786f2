"""Which programs the compile check covers, for which GPUs, and how one is compiled without a GPU."""

import ast
import dataclasses
import functools
import hashlib
import importlib
import itertools
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import assembler
import kernels
import tuning
from kernels import dispatch, tuned

ROOT = pathlib.Path(kernels.__file__).parent
WIDTHS = (16, 32, 64, 128, 256)
DTYPES = ("bfloat16", "float32")
OPS = tuple(tuning.GATES)
COLUMNS = [field.name for field in dataclasses.fields(assembler.Kernel)]
# Long enough that no compiler unrolls the loop over chunks; strides of few heads are as good as of many.
B, T, H = 1, 2048, 2


@dataclasses.dataclass(frozen=True)
class Gpu:
  """What XLA wants to know of a GPU. Shared memory in bytes: what one block may take, and what a multiprocessor has."""

  device: str
  capability: tuple[int, int]
  cores: int
  shared_per_block: int
  shared_per_core: int
  threads_per_core: int
  lanes: int
  gigahertz: float
  memory: int
  bytes_per_second: int
  l2: int

  @property
  def abstract(self) -> AbstractMesh:
    return AbstractMesh((), (), abstract_device=AbstractDevice(self.device, self.cores, "gpu"))


# From the vendor's datasheets and the tables of compute capabilities in the CUDA C++ Programming Guide.
GPUS = {
    "sm_80": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912, 167936, 2048, 64, 1.41, 80 << 30, 2039 * 10**9,
                 40 << 20),
    "sm_89": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 101376, 102400, 1536, 128, 2.52, 24 << 30, 1008 * 10**9,
                 72 << 20),
    "sm_90a": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448, 233472, 2048, 128, 1.98, 79 << 30, 3352 * 10**9,
                  50 << 20),
    "sm_100a": Gpu("NVIDIA B200", (10, 0), 148, 232448, 233472, 2048, 128, 1.96, 180 << 30, 7700 * 10**9, 126 << 20),
}
_TARGET = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads_per_core}
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared_per_block}
  shared_memory_per_core: {shared_per_core} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: {cores} fpus_per_core: {lanes} clock_rate_ghz: {gigahertz}
  device_memory_size: {memory} memory_bandwidth: {bytes_per_second} l2_cache_size: {l2}
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{device}"
"""


@dataclasses.dataclass(frozen=True)
class Program:
  """Forward and backward pass of an op under one configuration, for one GPU. `source`: heuristic, or tuned."""

  op: str
  gpu: str
  K: int
  V: int
  dtype: str
  gate: str
  source: str
  config: object

  def row(self) -> dict:
    """The program as JSON; its configuration on one line."""
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return fields | {"config": tuning.describe(self.config)}

  def __str__(self):
    return f"{self.gpu} {self.op} {self.K}x{self.V} {self.dtype} {self.gate} {self.source}"


def programs(ops=OPS, gpus=tuple(GPUS)) -> Iterator[Program]:
  """The heuristic's answer at every point of the grid, and every configuration in a device's file."""
  for op, gpu in itertools.product(ops, gpus):
    module = _module(op)
    for dtype, K, V in itertools.product(DTYPES, WIDTHS, (*WIDTHS, 512)):
      with use_abstract_mesh(GPUS[gpu].abstract):
        config = module.heuristic(K, V, jnp.dtype(dtype), None)
      for gate in tuning.GATES[op]:
        yield Program(op, gpu, K, V, dtype, gate, "heuristic", config)
    for K, V, dtype in tuned.listed(op, GPUS[gpu].device):
      with use_abstract_mesh(GPUS[gpu].abstract):
        config = tuned.lookup(op, module.Config, K=K, V=V, dtype=dtype)
      for gate in tuning.GATES[op]:
        yield Program(op, gpu, K, V, dtype, gate, "tuned", config)


def compile_program(program: Program) -> dict:
  """`kernels`, the resources of each by name, or the compiler's `error`."""
  gpu = GPUS[program.gpu]
  sharding = jax.NamedSharding(_mesh(program.gpu), jax.P())
  problem = tuning.Problem(program.op, program.K, program.V, H, program.dtype, (B, T))
  inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                        jax.eval_shape(lambda: tuning.draw(problem, program.gate, B=B, T=T, H=H)))
  op = tuning.call(_module(program.op), program.K**-0.5, program.config)
  with use_abstract_mesh(gpu.abstract), assembler.watch() as watch:
    try:
      jax.jit(functools.partial(tuning.results, op)).lower(*inputs).compile(compiler_options=watch.options)
    except jax.errors.JaxRuntimeError as e:
      return {"error": str(e).splitlines()[0]}
    return {"kernels": {name: list(dataclasses.astuple(kernel)) for name, kernel in watch.kernels(program.op).items()}}


def kernel(row: list) -> assembler.Kernel:
  """A kernel's resources from its row of `COLUMNS` in the record."""
  return assembler.Kernel(*row)


def faults(entry: dict) -> list[str]:
  """Why a recorded program must not ship: it does not compile, or a kernel spills or wants more than a block has."""
  limit = GPUS[entry["gpu"]].shared_per_block
  found = [entry["error"]] if "error" in entry else []
  for name, row in entry.get("kernels", {}).items():
    if spilled := kernel(row).spill_bytes:
      found.append(f"{name} spills {spilled} bytes")
    if (shared := kernel(row).shared_bytes) > limit:
      found.append(f"{name} takes {shared} bytes of shared memory, a block may have {limit}")
  return found


def sources(op: str) -> str:
  """Digest of the code that an op's kernels are compiled from; comments and docstrings do not count."""
  digest = hashlib.sha256()
  others = {"__init__", *dispatch.TABLE[op]} - {"pallas_triton"}
  for path in (ROOT / "triton_blocks.py", *sorted(x for x in (ROOT / op).glob("*.py") if x.stem not in others)):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
      if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
        node.body = node.body[1:] or [ast.Pass()]
    digest.update(ast.unparse(tree).encode())
  return digest.hexdigest()


@functools.cache
def _mesh(gpu):
  """One compile-only device. Raises ValueError where JAX's CUDA plugin is missing."""
  target = _TARGET.format(**dataclasses.asdict(GPUS[gpu]))
  try:
    topology = topologies.get_topology_desc("", platform="cuda", target_config=target, topology="1x1x1")
  except (RuntimeError, KeyError, ValueError) as e:
    raise ValueError(f"JAX cannot compile for CUDA: {e}; install the extra 'compile'") from e
  return topologies.make_mesh(topology, (1,), ("device",))


def _module(op):
  return importlib.import_module(f"kernels.{op}.pallas_triton")
