"""Times one pass of one implementation, by the same measure for JAX and PyTorch, on a GPU and on a CPU."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kernels

from . import cases
from .cases import Case

_BATCH_SECONDS = 0.02  # calls queued between two waits take at least this long
_MOST_CALLS = 500
REPEATED = "repeated_heads"  # in the place of an implementation: key heads are repeated before the op gets them


@dataclasses.dataclass
class Program:
  """A compiled pass and its input sets, in whichever library.

  Attributes:
    calls: a function per way of launching, which queues the pass on input set `i` and returns its results by name. The
      fastest way counts, so a library that has a cheaper launch may use it.
    wait: blocks until a call's results are there.
    to_numpy: one result as a float32 numpy array.
    peak_bytes: memory of arguments, results and everything between.
  """

  calls: dict[str, Callable[[int], dict]]
  wait: Callable[[Any], object]
  to_numpy: Callable[[Any], np.ndarray]
  peak_bytes: int


def ours(case: Case, implementation: str) -> Callable[[dict], jax.Array]:
  """Returns a function from the op's arguments by name to the output of this repository's `implementation`."""
  op = getattr(kernels, case.op)
  if implementation == REPEATED:
    return lambda arguments: op(**{name: jnp.repeat(x, case.H // case.G, axis=2) if x.ndim > 2 and x.shape[2] == case.G
                                   else x for name, x in arguments.items()})[0]
  return lambda arguments: op(**arguments, implementation=implementation)[0]


def compile_pass(case: Case, label: str, function: Callable[[dict], jax.Array]):
  """Compiles the pass `label` of `function` for the case's shapes. Raises whatever `function` raises on them."""
  names = cases.differentiated(case)

  def backward(arguments, doutput):
    output, pullback = jax.vjp(lambda chosen: function({**arguments, **chosen}),
                               {name: arguments[name] for name in names})
    return {"output": output, **{f"d{name}": gradient for name, gradient in pullback(doutput)[0].items()}}

  run = backward if label == "forward_backward" else lambda arguments, _: {"output": function(arguments)}
  return jax.jit(run).lower(*jax.eval_shape(lambda: cases.inputs(case, 0))).compile()


def jax_program(run, sets: list) -> Program:
  """Binds the compiled pass `run` to the input sets."""
  memory = run.memory_analysis()
  peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
  return Program({"jit": lambda i: run(*sets[i % len(sets)])}, jax.block_until_ready,
                 lambda x: np.asarray(x.astype(jnp.float32)), peak)


def measure(case: Case, label: str, program: Program, wanted: dict, repeats: int) -> dict:
  """Checks the pass on input set 0 against `wanted` (`cases.expected`), then times it.

  On a GPU a batch of calls over the input sets is queued back to back and waited for once, and its time is divided by
  the number of calls. So the launches hide behind the work, unless the work is shorter. On a CPU each call is waited
  for. The median of `repeats` batches counts.

  Returns:
    The measured fields of a record: ms, gb_per_s (of `cases.floor_bytes`), peak_mib, bytes, errors,
    within_bounds, launch.
  """
  found = {}
  for call in program.calls.values():
    result = call(0)
    program.wait(result)
    actual = {tensor: program.to_numpy(cases.corners(case, x)) for tensor, x in result.items()}
    errors = cases.errors(actual, wanted)
    found = {tensor: max(error, found.get(tensor, 0.0)) for tensor, error in errors.items()}
    del result, actual
  seconds = {name: _time(call, program.wait, repeats) for name, call in program.calls.items()}
  launch = min(seconds, key=seconds.get)
  size = cases.floor_bytes(case, label)
  return {"ms": 1e3 * seconds[launch], "gb_per_s": size / seconds[launch] / 1e9, "peak_mib": program.peak_bytes / 2**20,
          "bytes": size, "errors": found, "within_bounds": cases.within_bounds(case, found), "launch": launch}


def reason(error: Exception) -> str:
  """Returns the kind of `error` and the first line of its message."""
  return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def _time(call, wait, repeats):
  once = _seconds(call, wait, 0, 3) / 3
  count = 1
  if jax.default_backend() == "gpu":
    count = min(_MOST_CALLS, max(3, round(_BATCH_SECONDS / once)))
  return statistics.median(_seconds(call, wait, i * count, count) / count for i in range(repeats))


def _seconds(call, wait, first, count):
  start = time.perf_counter()
  for i in range(first, first + count):
    result = call(i)
  wait(result)
  return time.perf_counter() - start
