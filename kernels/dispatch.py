"""Which implementation of an op runs: the first of `TABLE` that the platform and the inputs allow, or the named one.

An implementation is a module `kernels/<op>/<name>.py` with the op under its own name and
`supports(*arrays, chunk_size) -> str | None`, the reason why it declines. A module may also have
`avoids(*arrays) -> str | None`, the reason why it runs on some inputs only if it is named. Modules load on first use,
because Pallas' Triton backend warns and costs time on import.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Literal

import jax

from kernels import cpu_compiler

Implementation = Literal["pallas_triton", "mosaic_gpu", "xla_chunked", "reference"]
RECURRENT = {
    "delta_rule": ("mosaic_gpu", "pallas_triton", "xla_chunked", "reference"),
    "gla": ("pallas_triton", "xla_chunked", "reference"),
    "linear_attention": ("pallas_triton", "xla_chunked", "reference"),
    "selective_scan": ("pallas_triton", "xla_chunked", "reference"),
}
# Elementwise work around the recurrent ops, whose definition in jnp is what XLA fuses well elsewhere.
FUSED = {
    "rms_norm": ("pallas_triton", "reference"),
    "short_convolution": ("pallas_triton", "reference"),
    "skip_gate_norm": ("pallas_triton", "reference"),
    "swiglu": ("pallas_triton", "reference"),
}
TABLE = RECURRENT | FUSED
# Platforms where an implementation is worth choosing. A named one runs elsewhere too: interpreted, or lowered for
# another platform than the host's.
PLATFORMS = {"pallas_triton": ("cuda",), "mosaic_gpu": ("cuda",)}
CAPABILITIES = {"mosaic_gpu": "9.0"}  # compute capability of the GPUs for which the code is written


def choose(op: str, implementation: Implementation | None, *arrays, chunk_size: int | None = None) -> Callable:
  """The function that computes `op` on `arrays`.

  Raises:
    ValueError: no implementation has this name.
    NotImplementedError: the named implementation declines these inputs; the message carries its reason.
  """
  if implementation is None:
    implementation = next(name for name, reason in reasons(op, arrays, chunk_size).items() if reason is None)
    if op in RECURRENT:  # the others are too small to tell a user about
      _log_once(op, implementation, platform())
  elif implementation not in TABLE[op]:
    raise ValueError(f"{op}: implementation={implementation!r} is unknown; known: {', '.join(TABLE[op])}")
  elif reason := _module(op, implementation).supports(*arrays, chunk_size=chunk_size):
    raise NotImplementedError(f"{op}: implementation={implementation!r} declines these inputs: {reason}")
  if platform() == "cpu":
    cpu_compiler.probe()
  return getattr(_module(op, implementation), op)


def explain(op: str, *arrays, chunk_size: int | None = None) -> str:
  """Says which implementation of `op` would run on `arrays` when none is named, and why each other one would not.

  Args:
    arrays: the op's arrays in its order; anything with `shape` and `dtype` does, for instance `jax.ShapeDtypeStruct`.
  Raises:
    ValueError: `op` is unknown.
  """
  if op not in TABLE:
    raise ValueError(f"op={op!r} is unknown; known: {', '.join(TABLE)}")
  found = reasons(op, arrays, chunk_size)
  chosen = next(name for name, reason in found.items() if reason is None)
  lines = [f"{op} runs as {chosen} on {platform()}"]
  lines += [f"  {name}: {reason or f'can run, {chosen} comes first'}"
            for name, reason in found.items() if name != chosen]
  return "\n".join(lines)


def platform() -> str:
  """The default backend: cpu, tpu, or the GPU platform's own name (cuda, rocm or oneapi), where JAX says only gpu."""
  backend = jax.default_backend()
  if backend != "gpu":
    return backend
  version = jax.devices()[0].client.platform_version
  return next((name for name in ("cuda", "rocm", "oneapi") if name in version), backend)


def capability() -> str:
  """The compute capability of the default GPU, for instance "9.0" for Hopper; empty elsewhere."""
  return str(getattr(jax.devices()[0], "compute_capability", ""))


def reasons(op: str, arrays, chunk_size: int | None = None) -> dict[str, str | None]:
  """For each implementation the reason why it would not run unnamed, or None. `reference` never declines."""
  return {name: _elsewhere(name) or declined(op, name, arrays, chunk_size) for name in TABLE[op]}


def _elsewhere(name):
  """Why the default device is not one for the implementation, or None."""
  present = platform()
  wanted = PLATFORMS.get(name, (present,))
  if present not in wanted:
    return f"the default backend is {present}, it needs {' or '.join(wanted)}"
  if CAPABILITIES.get(name, capability()) != capability():
    return f"the GPU has compute capability {capability() or 'unknown'}, it needs {CAPABILITIES[name]}"
  return None


def declined(op: str, name: str, arrays, chunk_size: int | None = None) -> str | None:
  """Why the implementation would not run unnamed on a device that it is for, or None."""
  try:
    module = _module(op, name)
  except ImportError as e:  # a backend of Pallas that this JAX does not have, or no longer has under these names
    return f"it does not load: {e}"
  reason = module.supports(*arrays, chunk_size=chunk_size)
  return reason or (module.avoids(*arrays) if hasattr(module, "avoids") else None)


def _module(op, name):
  return importlib.import_module(f"kernels.{op}.{name}")


@functools.cache
def _log_once(op, implementation, platform):
  logging.getLogger(__name__).info("%s runs as %s on %s", op, implementation, platform)
