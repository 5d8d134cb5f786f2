"""The search for an op's fastest configuration: candidates are timed, and the fastest is checked against the float32
scan."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

import kernels
from kernels import accuracy, chunks, tuned

from . import assembler

# Forms of log_decay that an op takes, in groups that share a configuration: all are checked, the first is timed.
GATE_GROUPS = {"gla": [("channel",)], "linear_attention": [("token",), ("constant", "none")],
               "delta_rule": [("none",), ("token",), ("channel",)]}
CHECKED = 1100  # tokens in the check
BATCHES = 10  # of timed calls


@dataclasses.dataclass(frozen=True)
class Problem:
  """The call for which a configuration is chosen, the `timed` (B, T), and whether kernels may spill."""

  op: str
  gates: tuple[str, ...]
  K: int
  V: int
  H: int
  dtype: str
  timed: tuple[int, int]
  may_spill: bool = False

  def __str__(self):
    return f"{self.op} {self.gates[0]} {self.K}x{self.V} {self.dtype}"


class Rejected(Exception):
  """A configuration must not ship; the message says why."""


def configurations(op: str, gate: str):
  """Returns the module with the configurations of an op's kernels for one form of log_decay."""
  of_gate = "pallas_triton_channels_config" if (op, gate) == ("delta_rule", "channel") else "pallas_triton_config"
  return importlib.import_module(f"kernels.{op}.{of_gate}")


def tune(problem: Problem, module, starts: list, candidates: dict[str, list], deadline: float,
         turn: Callable = contextlib.nullcontext, threads: int | None = None):
  """Goes once over the fields, from the fastest of `starts`, and returns the fastest configuration that is right.

  `candidates` are the values that are tried for each field. Compilation takes as long as everything else, so nothing is
  checked until all is timed. `turn()` is a context in which this process has the GPU alone. `deadline` is a
  `time.monotonic()`; no candidate is timed behind it. Programs are compiled on `threads`, by default one per core.

  Returns:
    The configuration, its milliseconds, and whether every candidate was timed; None if no configuration works.
  """
  measure, times, whole = Measure(problem, module), {}, True
  for field, values in {"": starts, **candidates}.items():
    if not whole:
      break
    best = min(times, key=times.get, default=None)
    configs = [dataclasses.replace(best, **{field: value}) if field else value for value in values]
    left = [config for config in dict.fromkeys(configs) if config not in times]
    for config, program in compiled(measure, left, threads):
      if time.monotonic() > deadline:
        whole = False
        break
      times[config] = timed(problem, field, config, measure, program, turn)
    if not times or min(times.values()) == float("inf"):
      return None
  check = Check(problem, module)
  for config in sorted(times, key=times.get):
    try:
      if times[config] < float("inf"):
        programs = check.compile(config)
        with turn():
          check(programs)
        return config, times[config], whole
    except (Rejected, jax.errors.JaxRuntimeError) as e:
      print(f"{problem} {describe(config)}: rejected: {first_line(e)}", flush=True)
  return None


def compiled(measure, configs, threads):
  """Returns each configuration and the future of its program. All are done."""
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    # Compilation takes all cores, so calls could not be issued fast enough beside it.
    return [(config, pool.submit(measure.compile, config)) for config in configs]


def timed(problem, field, config, measure, program, turn) -> float:
  """Prints and returns the milliseconds of a compiled `program`, which are infinite when it cannot run."""
  try:
    program = program.result()
    with turn():
      found = measure(program)
    outcome = f"{found:.3f} ms"
  except (Rejected, jax.errors.JaxRuntimeError) as e:
    found, outcome = float("inf"), f"rejected: {first_line(e)}"
  label = f"{field}={describe(getattr(config, field))}" if field else f"start {describe(config)}"
  print(f"{problem} {label}: {outcome}", flush=True)
  return found


def first_line(error: Exception) -> str:
  return str(error).splitlines()[0][:200]


def describe(config) -> str:
  """Writes a configuration, or one field of it, on one line, with a tile as block/num_warps/num_stages."""
  if isinstance(config, tuned.Tile):
    return "/".join(map(str, dataclasses.astuple(config)))
  if not dataclasses.is_dataclass(config):
    return str(config)
  return " ".join(f"{field.name}={describe(getattr(config, field.name))}" for field in dataclasses.fields(config))


class Check:
  """Compares a configuration with the float32 scan for every form of the gate, on a small batch that is ragged and so
  long that the kernels cut it into pieces."""

  def __init__(self, problem, module):
    self.problem, self.module, self.scale = problem, module, problem.K**-0.5
    self.inputs = {gate: draw(problem, gate, B=2, T=CHECKED, H=2) for gate in problem.gates}
    op = getattr(kernels, problem.op)
    scan = functools.partial(op, implementation="reference", scale=self.scale)
    with jax.default_matmul_precision("highest"):
      self.expected = {
          gate: jax.jit(functools.partial(results, scan))(*jax.tree.map(lambda x: x.astype(jnp.float32), inputs))
          for gate, inputs in self.inputs.items()}

  def compile(self, config):
    """Compiles the programs of one configuration, by gate."""
    op = functools.partial(results, call(self.module, self.scale, config))
    return {gate: compile_for(self.problem, op, *inputs) for gate, inputs in self.inputs.items()}

  def __call__(self, programs):
    """Raises Rejected."""
    for gate, program in programs.items():
      actual = program(*self.inputs[gate])
      # Nothing of a configuration decides the gradient of a constant decay, which always takes the heuristic's.
      for name in actual.keys() - ({"dlog_decay"} if gate == "constant" else set()):
        error = accuracy.relative_error(actual[name], self.expected[gate][name])
        bound = accuracy.tolerance(name, self.problem.dtype, multi_pass=True)
        if not error <= bound:
          raise Rejected(f"gate {gate}: {name} has relative error {error:.1e} over {bound:.0e}")


class Measure:
  """Times forward and backward pass in one call of a configuration. As in models, a constant decay gets no gradient."""

  def __init__(self, problem, module):
    self.problem, self.module, self.scale = problem, module, problem.K**-0.5
    B, T = problem.timed
    arrays, cotangents = draw(problem, problem.gates[0], B=B, T=T, H=problem.H, trained=True)
    self.constants = {"log_decay": arrays.pop("log_decay")} if problem.gates[0] == "constant" else {}
    self.inputs = arrays, cotangents

  def compile(self, config):
    op = functools.partial(call(self.module, self.scale, config), **self.constants)
    return compile_for(self.problem, functools.partial(results, op), *self.inputs)

  def __call__(self, program):
    return milliseconds(program, self.inputs)


def call(module, scale, config):
  """Returns the op of `module` under one configuration, to be called by keywords."""
  return lambda *, log_decay=None, **arrays: module.configured(
      log_decay=log_decay, **arrays, scale=scale, config=config)


def results(op, arrays, cotangents):
  """Returns both results of `op(**arrays)` and every gradient, by name."""
  (output, final_state), pullback = jax.vjp(lambda arrays: op(**arrays), arrays)
  gradients = {f"d{name}": x for name, x in pullback(cotangents)[0].items()}
  return {"output": output, "final_state": final_state, **gradients}


def compile_for(problem, function, *inputs):
  """Compiles `function` for these inputs. Raises Rejected when a GPU kernel of the op spills more than it may."""
  lowered = jax.jit(function).lower(*inputs)
  if problem.may_spill or jax.default_backend() != "gpu":
    return lowered.compile()
  with assembler.watch() as watch:
    program = lowered.compile(compiler_options=watch.options)
    if not watch.used():
      print(f"{problem}: the compiler did not call the watched ptxas, so that spills are not seen", flush=True)
      return program
    spills = {name: kernel.spill_bytes for name, kernel in watch.kernels(problem.op).items()
              if kernel.spill_bytes > assembler.MEASURED_SPILL}
  if spills:
    raise Rejected(f"spills bytes of registers: {spills}")
  return program


def draw(problem, gate, *, B, T, H, trained=False):
  """Makes arrays of the op by name, and the cotangents of its results.

  Gates are as in a `trained` layer, or go from nearly open to nearly shut side by side. Gates per token or channel then
  have the resets of segments too.
  """
  keys = iter(jax.random.split(jax.random.key(0), 8))
  normal = lambda *shape, dtype="float32": jax.random.normal(next(keys), shape, dtype)
  K, V, dtype = problem.K, problem.V, problem.dtype
  arrays = {"q": normal(B, T, H, K, dtype=dtype), "k": normal(B, T, H, K, dtype=dtype),
            "v": normal(B, T, H, V, dtype=dtype), "initial_state": normal(B, H, K, V)}
  if problem.op == "delta_rule":
    arrays["k"] = chunks.normalize(arrays["k"]).astype(dtype)
    arrays["beta"] = jax.nn.sigmoid(normal(B, T, H))
  shape = {"channel": (B, T, H, K), "token": (B, T, H), "constant": (H,), "none": None}[gate]
  if shape is not None and trained:
    arrays["log_decay"] = jax.nn.log_sigmoid(normal(*shape)) / 16
  elif shape is not None:
    log_decay = -(10 ** jax.random.uniform(next(keys), shape, minval=-4, maxval=1))
    resets = [t for t in (15, 100, 101) if t < T and len(shape) > 1]
    arrays["log_decay"] = log_decay.at[:, resets].set(chunks.RESET) if resets else log_decay
  return arrays, (normal(B, T, H, V, dtype=dtype), normal(B, H, K, V))


def milliseconds(program, inputs) -> float:
  """Returns the time per call in the fastest of several batches of back-to-back calls, which take at least 10 ms
  together. Work beside it, such as compilation, can only delay a batch."""

  def run(calls):
    start = time.perf_counter()
    for _ in range(calls):
      result = program(*inputs)
    jax.block_until_ready(result)
    return time.perf_counter() - start

  calls = 1
  run(calls)
  while run(calls) < 0.01:
    calls *= 2
  return round(1e3 * min(run(calls) for _ in range(BATCHES)) / calls, 4)
