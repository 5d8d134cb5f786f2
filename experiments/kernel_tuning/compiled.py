"""The programs and GPUs that the compile check covers, and the compilation of one without a GPU."""

import ast
import collections
import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import use_abstract_mesh

import kernels
from kernels import tuned

from . import assembler, search
from .gpus import GPUS, mesh

ROOT = pathlib.Path(kernels.__file__).parent
SPILLS = pathlib.Path(__file__).parents[1] / "results" / "known_spills.json"
WIDTHS = (16, 32, 64, 128, 256)
DTYPES = ("bfloat16", "float32")
OPS = (*search.GATE_GROUPS, "selective_scan")
COLUMNS = [field.name for field in dataclasses.fields(assembler.Kernel)]
# Tokens of a long program, which is cut into pieces of 8 chunks or more, and of a short one, which has 4 to 16 chunks.
# Few heads suffice, because their strides test as much as those of many.
LONG, SHORT = 2048, 256
B, H, D = 1, 2, 128
SHORT_GPUS = ("sm_90a",)
# Widths that are not listed, and take a measured configuration of wider heads where there is one.
BORROWING_WIDTHS = (33, 96), (96, 160), (96, 192), (192, 192)
# Widths of heads that no tile divides, compiled for the same GPUs.
CHANNEL_WIDTHS = (("bfloat16", 64, 64), ("bfloat16", 128, 128), ("bfloat16", 128, 256), ("float32", 64, 64),
                  ("float32", 128, 128))
"""Widths of the delta rule with a decay per key channel that are compiled: those of published models."""
ODD_WIDTHS = (1, 7), (3, 1), (7, 33), (33, 96), (96, 160), (160, 3)


@dataclasses.dataclass(frozen=True)
class Program:
  """Forward and backward pass of an op under one configuration, for one GPU. `source` is "heuristic" or "tuned".

  A channel of the selective scan has a state of K x 1. Its gate is "token" if segments reset it, and its configuration
  is the number of tokens that are unrolled.
  """

  op: str
  gpu: str
  K: int
  V: int
  dtype: str
  gate: str
  source: str
  config: object
  tokens: int = LONG

  def row(self) -> dict:
    """Returns the program as JSON, with its configuration on one line."""
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return fields | {"config": search.describe(self.config)}

  def __str__(self):
    return f"{self.gpu} {self.op} {self.K}x{self.V} {self.dtype} {self.gate} {self.source} {self.tokens} tokens"


def programs(ops=OPS, gpus=tuple(GPUS)) -> Iterator[Program]:
  """Yields the heuristic's answer at every point of the grid, and every configuration in a device's file."""
  for op, gpu in itertools.product(ops, gpus):
    found = list(_selective_scans(gpu) if op == "selective_scan" else _of_heads(op, gpu))
    yield from found
    if gpu in SHORT_GPUS:
      yield from (dataclasses.replace(program, tokens=SHORT) for program in found)


def _of_heads(op, gpu):
  widths = [*itertools.product(WIDTHS, (*WIDTHS, 512)), *(ODD_WIDTHS if gpu in SHORT_GPUS else ())]
  for dtype, (K, V) in itertools.product(DTYPES, widths):
    for gate in itertools.chain(*search.GATE_GROUPS[op]):
      if (op, gate) == ("delta_rule", "channel") and (dtype, K, V) not in CHANNEL_WIDTHS:
        continue
      with use_abstract_mesh(GPUS[gpu].abstract):
        config = search.configurations(op, gate).heuristic(K, V, jnp.dtype(dtype), None)
      yield Program(op, gpu, K, V, dtype, gate, "heuristic", config)
  listed = tuned.listed(op, GPUS[gpu].device)
  borrowing = itertools.product(dict.fromkeys((gate, dtype) for gate, _, _, dtype in listed), BORROWING_WIDTHS)
  for gate, K, V, dtype in [*listed, *((gate, *width, dtype) for (gate, dtype), width in borrowing)]:
    with use_abstract_mesh(GPUS[gpu].abstract):
      config = tuned.lookup(op, search.configurations(op, gate).Config, gate=gate, K=K, V=V, dtype=dtype)
    if config:
      yield Program(op, gpu, K, V, dtype, gate, "tuned", config)


def _selective_scans(gpu):
  module = _module("selective_scan")
  for dtype, N, gate in itertools.product(DTYPES, (16, module.MOST_STATES), ("none", "token")):
    yield Program("selective_scan", gpu, N, 1, dtype, gate, "heuristic", module.block_size(N, jnp.dtype(dtype)))


@dataclasses.dataclass(frozen=True)
class Call:
  """One kernel launch. Calls with equal `key` compile to the same code."""

  key: str
  name: str
  function: Callable = dataclasses.field(compare=False)
  arguments: tuple = dataclasses.field(compare=False)


def calls(program: Program) -> dict[str, Call]:
  """Returns the different kernels of the forward pass and of both passes; the second of one name ends in __1."""
  found = {}
  names = "op", "K", "V", "dtype", "gate", "config", "tokens"
  for call in dict.fromkeys(_calls(*(getattr(program, name) for name in names))):
    before = sum(other.name == call.name for other in found.values())
    found[f"{call.name}__{before}" if before else call.name] = call
  return found


def traced(calls: dict[str, Call]) -> str:
  """Returns a digest of a program's calls. If it is equal, one version of JAX compiles the same code."""
  text = "\n".join(f"{name}\n{call.key}" for name, call in calls.items())
  return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _calls(op, K, V, dtype, gate, config, T):
  if op == "selective_scan":
    function, inputs = _selective_scan(K, dtype, gate, config, T)
  else:
    problem = search.Problem(op, (gate,), K, V, H, dtype, (B, T))
    inputs = jax.eval_shape(lambda: search.draw(problem, gate, B=B, T=T, H=H))
    function = search.call(_module(op), K**-0.5, config)
  both = lambda arrays, cotangents: (function(**arrays), search.results(function, arrays, cotangents))
  return launched(jax.make_jaxpr(both)(*inputs).jaxpr)


def launched(jaxpr) -> list[Call]:
  """Returns the launches of a traced program's kernels of Triton's backend, in its order."""
  return [_call(eqn) for eqn in _launches(jaxpr)]


def _selective_scan(N, dtype, gate, block, T):
  """Returns the op on a sequence in two pieces, which launches every kernel, and its arrays' and cotangents' shapes."""
  array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
  wide = functools.partial(array, dtype="float32")
  arrays = {"x": array(B, T, D), "step_size": wide(B, T, D), "a": wide(D, N), "b": array(B, T, N),
            "c": array(B, T, N), "resets": wide(B, T) if gate == "token" else None, "initial_state": wide(B, D, N)}
  function = functools.partial(_module("selective_scan").configured, block=block, count=2)
  return function, (arrays, (array(B, T, D), wide(B, D, N)))


def _launches(jaxpr):
  """Yields every equation that launches a compiled kernel, in the order of the program."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "pallas_call":
      if not eqn.params["interpret"]:
        yield eqn
      continue
    inner = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
    for x in inner:
      x = getattr(x, "jaxpr", x)
      if hasattr(x, "eqns"):
        yield from _launches(x)


def _call(eqn):
  """Describes a launch whose code follows from the equation's text, and from its arguments and index maps."""
  arguments = tuple(jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in eqn.invars)
  maps = [str(block.index_map_jaxpr) for block in eqn.params["grid_mapping"].block_mappings]
  return Call("\n".join([str(eqn), str(arguments), *maps]), eqn.params["name"],
              lambda *args: eqn.primitive.bind(*args, **eqn.params), arguments)


def compile_calls(gpu: str, calls: Sequence[Call],
                  assemblers: Sequence[str] = ()) -> dict[str, assembler.Kernel | str]:
  """Maps each call's key to its resources on `gpu`, or to the compiler's error or lost product that forbids it."""
  found, made = {}, {}
  for call in calls:
    found[call.key], made[call.key] = _compile(gpu, call, assemblers)
  lost = iter(assembler.lost_products(list(itertools.chain(*made.values()))))
  for key, code in made.items():
    if errors := [error for _, error in zip(code, lost) if error]:
      found[key] = "; ".join(errors)
  return found


def _compile(gpu, call, assemblers):
  """Returns a kernel's resources and its machine code, or an error and nothing."""
  sharding = jax.NamedSharding(mesh(gpu), jax.P())
  arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in call.arguments]
  with use_abstract_mesh(GPUS[gpu].abstract), assembler.watch() as watch:
    try:
      jax.jit(call.function).lower(*arguments).compile(compiler_options=watch.options)
    except jax.errors.JaxRuntimeError as e:
      return str(e).splitlines()[0], []
    kernel = dataclasses.replace(watch.kernels(call.name)[call.name], products=watch.products())
    return kernel, watch.assembled(assemblers)


def identity(entry: dict) -> str:
  """Returns the fields that tell a program of the record from the others."""
  return json.dumps({name: entry[name] for name in (field.name for field in dataclasses.fields(Program))})


def pending(entries: list[dict], builds: dict) -> dict[str, int]:
  """Counts the programs of each op and GPU that the record lacks, or has from other sources than the present ones."""
  digest = {op: sources(op) for op in OPS}
  fresh = {identity(entry) for entry in entries if builds[entry["build"]]["sources"] == digest[entry["op"]]}
  left = [f"{program.op} {program.gpu}" for program in programs() if identity(program.row()) not in fresh]
  return dict(sorted(collections.Counter(left).items()))


def outcome(kernels: dict) -> dict:
  """Returns `kernels`, the resources of each by name, and `errors` of the kernels that did not compile."""
  errors = {name: x for name, x in kernels.items() if isinstance(x, str)}
  rows = {name: list(dataclasses.astuple(x)) for name, x in kernels.items() if name not in errors}
  return {"kernels": rows} | ({"errors": errors} if errors else {})


def kernel(row: list) -> assembler.Kernel:
  """Reads a kernel's resources from its row of `COLUMNS` in the record."""
  return assembler.Kernel(*row)


def faults(entry: dict) -> list[str]:
  """Says why a recorded program must not ship: it does not compile, or a kernel spills or wants too much memory."""
  limit = GPUS[entry["gpu"]].shared_per_block
  allowed = assembler.MEASURED_SPILL if entry["source"] == "tuned" else 0
  of = "{gpu} {op} {K}x{V} {dtype} {gate} {source} {tokens} tokens".format(**entry)
  found = [f"{name}: {error}" for name, error in entry.get("errors", {}).items()]
  for name, row in entry["kernels"].items():
    if (spilled := kernel(row).spill_bytes) > known_spills().get(f"{of} {name}", allowed):
      found.append(f"{name} spills {spilled} bytes")
    if (shared := kernel(row).shared_bytes) > limit:
      found.append(f"{name} takes {shared} bytes of shared memory, a block may have {limit}")
  return found


@functools.cache
def known_spills() -> dict[str, int]:
  """Reads the bytes, by program and kernel, that may spill; the file says why."""
  return json.loads(SPILLS.read_text(encoding="utf-8"))["bytes"]


def sources(op: str, implementation: str = "pallas_triton") -> str:
  """Returns a digest of the code that an op's kernels are compiled from, without comments and docstrings."""
  digest = hashlib.sha256()
  for path in sorted(_imported(ROOT / op / f"{implementation}.py", set())):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
      if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
        node.body = node.body[1:] or [ast.Pass()]
    digest.update(ast.unparse(tree).encode())
  return digest.hexdigest()


def _imported(path, found):
  """Lists `path` and all modules of `kernels` that it needs, except the one that chooses between configurations."""
  found.add(path)
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "kernels":
      folder = ROOT.joinpath(*node.module.split(".")[1:])
      for module in (folder.with_suffix(".py"), *(folder / f"{name.name}.py" for name in node.names)):
        if module.exists() and module not in found and module != ROOT / "tuned.py":
          _imported(module, found)
  return found


def _module(op):
  return importlib.import_module(f"kernels.{op}.pallas_triton")
