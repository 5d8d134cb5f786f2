"""Ops and mixers at the edges of a chunk: the parallel form as users compile it, against the recurrence.

The recurrence is compiled once, for the longest sequence and without the fusions of `kernels.cpu_compiler`. A shorter
one is that sequence with tokens behind it which change nothing: zeros, and for a mixer a cotangent of zero.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import kernels
from kernels.accuracy import relative_error
from kernels.cpu_compiler import FLAG
from lin_jax import mixers

TIMES = (1, 2, 15, 16, 17, 63, 64, 65, 130)
# One chunk that is not full, one that is, and several of which the last is not full: between the lengths of each kind
# the code around an op is the same. The ops get all of TIMES, mixers and an op's programs without a gradient these.
FEW_TIMES = (1, 16, 130)
B, H, K, V, WIDTH = 2, 2, 64, 64, 64
SHAPES = {"q": (H, K), "k": (H, K), "v": (H, V), "channel": (H, K), "token": (H,), "beta": (H,),
          "x": (K,), "step_size": (K,), "b": (8,), "c": (8,)}
trusted = functools.partial(jax.jit, compiler_options={
    FLAG: "", "xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1})


def op_errors(op: str, decay: str | None) -> dict[str, dict[int, float]]:
  """Relative errors by tensor and length of the op without initial state, `decay` being what has a gate of its own.

  "alone" is the output of a program that computes nothing else, and "repeated" that of one whose values, or what
  stands for them, are one number repeated.
  """
  arrays, constants, cotangents = _op_inputs(op, decay)
  call = functools.partial(_op_results, op)
  expected = trusted(functools.partial(call, "reference"))
  errors = {}
  for T in TIMES:
    cut = _first(arrays, T)
    # As NumPy's, because JAX would compile a program for every cut.
    right = jax.device_get(expected(
        _zeros_behind(arrays, T), constants, (_zeros_behind(cotangents[0], T), cotangents[1])))
    found = jax.jit(functools.partial(call, "xla_chunked"))(cut, constants, (_first(cotangents[0], T), cotangents[1]))
    if T in FEW_TIMES:
      alone = jax.jit(lambda x: getattr(kernels, op)(**x, implementation="xla_chunked")[0])(cut | constants)
      errors.setdefault("alone", {})[T] = relative_error(alone, right["output"][:, :T])
    for name, x in found.items():
      same = right[name][:, :T] if name in ("output", *(f"d{array}" for array in arrays)) else right[name]
      errors.setdefault(name, {})[T] = relative_error(x, same)
  values = "x" if op == "selective_scan" else "v"
  cut = _first(arrays, 16) | constants
  shape = cut.pop(values).shape
  repeated = lambda implementation: lambda x: getattr(kernels, op)(
      **x, **{values: jnp.full(shape, 3.0)}, implementation=implementation)[0]
  errors["repeated"] = {16: relative_error(jax.jit(repeated("xla_chunked"))(cut), trusted(repeated("reference"))(cut))}
  return errors


def _first(arrays, T):
  return jax.tree.map(lambda x: x[:, :T], arrays)


def _zeros_behind(arrays, T):
  return jax.tree.map(lambda x: np.concatenate([x[:, :T], np.zeros_like(x[:, T:])], axis=1), arrays)


def _op_inputs(op, decay):
  """Arrays with a row per token, those without, and the cotangents of output and final state."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype("float32")
  T, names = TIMES[-1], ("x", "step_size", "b", "c") if op == "selective_scan" else ("q", "k", "v")
  arrays = {name: normal(B, T, *SHAPES[name]) for name in names}
  constants = {}
  if decay in ("channel", "token"):
    arrays["log_decay"] = -0.2 * rng.random((B, T, *SHAPES[decay])).astype("float32")
  if op == "selective_scan":
    arrays["step_size"] = np.abs(arrays["step_size"])
    constants["a"] = -rng.random((K, 8)).astype("float32")
    return arrays, constants, (normal(B, T, K), normal(B, K, 8))
  if op == "delta_rule":
    arrays["beta"] = rng.random((B, T, H)).astype("float32")
    arrays["k"] /= np.linalg.norm(arrays["k"], axis=-1, keepdims=True)
  return arrays, constants, (normal(B, T, H, V), normal(B, H, K, V))


def _op_results(op, implementation, arrays, constants, cotangents):
  call = lambda x: getattr(kernels, op)(**x, implementation=implementation)
  (output, state), vjp = jax.vjp(call, arrays | constants)
  return {"output": output, "final_state": state} | {f"d{name}": x for name, x in vjp(cotangents)[0].items()}


def mixer_errors(name: str, example: int) -> dict[str, dict[int, float]]:
  """Relative errors of a mixer's output and gradients, parallel against steps, by length.

  "alone" is the output of a program that computes nothing else, at the longest length: `op_errors` has it at three.
  """
  config = mixers.config_class(name).examples()[example]
  start = lambda: mixers.build(config, width=WIDTH, norm_eps=1e-6, dtype=jnp.float32, rngs=nnx.Rngs(0))
  enlarge = lambda x: 5 * x if x.ndim > 1 else x  # scores and gates that are not all alike
  mixer = trusted(lambda: jax.tree.map(enlarge, start()))()
  rng, T = np.random.default_rng(0), TIMES[-1]
  x, dy = rng.standard_normal((2, B, T, WIDTH)).astype("float32")
  expected, errors = trusted(functools.partial(_mixer_results, _steps)), {"output": {}, "gradients": {}}
  for T in FEW_TIMES:
    right = jax.device_get(expected(mixer, x, np.where(np.arange(x.shape[1])[:, None] < T, dy, 0)))
    output, gradients = jax.jit(functools.partial(_mixer_results, _parallel))(mixer, x[:, :T], dy[:, :T])
    errors["output"][T] = relative_error(output, right[0][:, :T])
    same = jax.tree.leaves((right[1][0], right[1][1][:, :T]))
    pairs = [(np.ravel(a), np.ravel(b)) for a, b in zip(jax.tree.leaves(gradients), same, strict=True)]
    errors["gradients"][T] = relative_error(*(np.concatenate(x) for x in zip(*pairs)))
  errors["alone"] = {T: relative_error(jax.jit(_parallel)(mixer, x), right[0])}
  return errors


def _parallel(mixer, x):
  return mixer(x, None, None)[0]


def _steps(mixer, x):
  state = mixer.init_state(x.shape[0], x.shape[1])
  step = lambda state, x: mixer.step(x, state)[::-1]
  return jnp.moveaxis(jax.lax.scan(step, state, jnp.moveaxis(x, 1, 0))[1], 0, 1)


def _mixer_results(forward, mixer, x, dy):
  y, vjp = jax.vjp(forward, mixer, x)
  return y, vjp(dy)
