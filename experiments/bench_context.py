"""Times every op on sequences that are split over devices of a host, and compares the results with one device's.

  python experiments/bench_context.py --parts=1,2 --out=context.jsonl --limit_seconds=300
  JAX_NUM_CPU_DEVICES=2 python experiments/bench_context.py --parts=1,2 --length=64 --heads=2 --key=16 --value=16 \
      --repeats=1

The second line proves the command on a CPU. A record has one op on one number of parts: the time of a forward and a
backward pass, and the relative errors of the output, of the final state and of every gradient. They are measured
against the chunked form in jnp on float32 copies of the inputs on one device. The exit status is 1 if an error exceeds
its bound in `kernels.accuracy`.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from kernel_bench import fused
from kernels.accuracy import relative_error, tolerance
from lin_jax import context, sharding
from lin_jax.config import MeshConfig
from running import commands
from speed import sweeps

# For each op on parts, the names of its arrays and their axes in the letters of `map_over_heads`.
OPS = {
    "gla": (context.gla, dict(q="bthk", k="bthk", v="bthv", log_decay="bthk")),
    "linear_attention": (context.linear_attention, dict(q="bthk", k="bthk", v="bthv", log_decay="bth")),
    "delta_rule": (context.delta_rule, dict(q="bthk", k="bthk", v="bthv", beta="bth", log_decay="bth")),
    "selective_scan": (context.selective_scan, dict(x="bth", step_size="bth", a="hn", b="btn", c="btn")),
}
FLOAT32 = ("log_decay", "beta", "step_size", "a")
_OPS = flags.DEFINE_list("ops", list(OPS), "Ops to time.")
_PARTS = flags.DEFINE_list("parts", ["1", "2"], "Numbers of devices over which a sequence is split.")
_BATCH = flags.DEFINE_integer("batch", 1, "Sequences.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 32768, "Tokens per sequence.", lower_bound=1)
_HEADS = flags.DEFINE_integer("heads", 16, "Heads.", lower_bound=1)
_KEY = flags.DEFINE_integer("key", 128, "Key channels per head.", lower_bound=1)
_VALUE = flags.DEFINE_integer("value", 128, "Value channels per head. Mamba has as many channels as all heads.",
                              lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16", "float32"],
                           "Of all arrays but gates and rates.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Batches of calls that are timed; their median counts.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "", "JSON lines file to which one record per measurement is appended.")
_LIMIT = flags.DEFINE_float("limit_seconds", 0, "Begins no measurement after this time; 0 for no limit.", lower_bound=0)


def main(_):
  if unknown := [name for name in _OPS.value if name not in OPS]:
    raise ValueError(f"--ops={','.join(unknown)}: unknown; known: {', '.join(OPS)}")
  known = [str(parts) for parts in range(1, jax.local_device_count() + 1) if _LENGTH.value % parts == 0]
  if unknown := [parts for parts in _PARTS.value if parts not in known]:
    raise ValueError(f"--parts={','.join(unknown)}: must divide --length={_LENGTH.value} and not exceed the "
                     f"{jax.local_device_count()} devices")
  path = pathlib.Path(_OUT.value) if _OUT.value else None
  sweeps.check([functools.partial(_row, op, int(parts)) for op in _OPS.value for parts in _PARTS.value], path,
               _LIMIT.value)


def _row(op, parts):
  expected = _expected(op)
  found, seconds = _run(op, parts, None, _DTYPE.value)
  errors = {name: relative_error(x, expected[name]) for name, x in found.items()}
  shape = dict(batch=_BATCH.value, length=_LENGTH.value, heads=_HEADS.value, key=_KEY.value, value=_VALUE.value)
  return shape | {
      "op": op, "parts": parts, "dtype": _DTYPE.value, "ms": round(1e3 * seconds, 4),
      "errors": {name: float(f"{error:.1e}") for name, error in errors.items()},
      "within_bounds": all(error <= tolerance(name, _DTYPE.value, multi_pass=True) for name, error in errors.items())}


@functools.cache
def _expected(op):
  return _run(op, 1, "xla_chunked", "float32")[0]


def _run(op, parts, implementation, dtype):
  """The results on the first input set by name, and the median seconds of a call."""
  function, layouts = OPS[op]
  results = ("bth", "bhn") if op == "selective_scan" else ("bthv", "bhkv")
  mesh = sharding.make_mesh(MeshConfig(data=1, context=parts), jax.devices()[:parts])
  options = dict(normalize_qk=True) if op == "delta_rule" else {}
  split = sharding.map_over_heads(lambda *x: function(*x, implementation=implementation, **options),
                                  f"{','.join(layouts.values())}->{','.join(results)}")

  @jax.jit
  def run(arrays, cotangents):
    (output, state), pull = jax.vjp(lambda arrays: split(*(arrays[name] for name in layouts)), arrays)
    gradients, = pull(cotangents)
    return {"output": output, "final_state": state} | {f"d{name}": x for name, x in gradients.items()}

  def place(x, axes, dtype):
    spec = jax.P(*("context" if axis == "t" else None for axis in axes))
    return jax.device_put(x.astype(dtype), jax.NamedSharding(mesh, spec))

  with jax.set_mesh(mesh):
    sets = []
    for seed in range(2):
      arrays, (doutput, dstate) = _inputs(op, layouts, results, seed)
      placed = {name: place(x, layouts[name], "float32" if name in FLOAT32 else dtype) for name, x in arrays.items()}
      sets.append((placed, (place(doutput, results[0], dtype), place(dstate, results[1], "float32"))))
    found = {name: np.asarray(x, np.float32) for name, x in run(*sets[0]).items()}
    return found, 0.0 if implementation else fused.seconds(run, sets, _REPEATS.value)


def _inputs(op, layouts, results, seed):
  """The op's arrays by name, and the cotangents of its results, rounded to --dtype where they have it."""
  sizes = dict(b=_BATCH.value, t=_LENGTH.value, h=_HEADS.value, k=_KEY.value, v=_VALUE.value, n=16)
  if op == "selective_scan":
    sizes["h"] *= _VALUE.value
  rng = np.random.default_rng(seed)
  draw = lambda axes: rng.standard_normal([sizes[axis] for axis in axes], np.float32)
  arrays = {name: draw(axes) for name, axes in layouts.items()}
  for name, gate in (("log_decay", lambda x: -np.log1p(np.exp(-x)) / 16), ("beta", lambda x: 1 / (1 + np.exp(-x))),
                     ("step_size", lambda x: np.log1p(np.exp(x - 4))), ("a", lambda x: -np.exp(x))):
    if name in arrays:
      arrays[name] = gate(arrays[name])
  rounded = lambda x: x.astype(jnp.dtype(_DTYPE.value)).astype(np.float32)
  arrays = {name: x if name in FLOAT32 else rounded(x) for name, x in arrays.items()}
  return arrays, (rounded(draw(results[0])), draw(results[1]))


if __name__ == "__main__":
  commands.run(main)
