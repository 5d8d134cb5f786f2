"""The fused elementwise ops at the shapes of the models: inputs, check against the definition, bytes and time."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

import kernels
from kernels.accuracy import relative_error

PASSES = ("forward", "forward_backward")
# Relative RMS error against the definition on float32 copies of the inputs.
BOUNDS = {"bfloat16": 4e-3, "float16": 1e-3, "float32": 1e-5}
_BATCH_SECONDS = 0.02  # calls queued between two waits take at least this long


@dataclasses.dataclass(frozen=True)
class Case:
  """An op on arrays of `shape`, [B, T, heads or groups, C] for norms and [B, T, C] for convolutions, as in a model."""

  op: str
  model: str
  shape: tuple[int, ...]
  dtype: str = "bfloat16"
  options: tuple[tuple[str, object], ...] = ()
  segments: bool = False

  def __str__(self):
    options = "".join(f" {name}={value}" for name, value in self.options if name != "eps")
    return f"{self.op} {'x'.join(map(str, self.shape))} {self.dtype}{options}{' segments' if self.segments else ''}"


def cases(B: int, T: int, narrow: int = 1) -> list[Case]:
  """The shapes of the models of 1.3B parameters for B sequences of T tokens, with a share of 1 / `narrow` of the width.
  """
  norm = lambda model, heads, C, *options: Case("rms_norm", model, (B, T, heads, C // narrow),
                                                options=(("eps", 1e-5), *options))
  convolution = lambda model, C, **more: Case("short_convolution", model, (B, T, C // narrow),
                                              options=(("silu", True),), **more)
  return [norm("gla_1b3", 4, 512), norm("retnet_1b3", 8, 512), norm("deltanet_1b3", 16, 128),
          norm("gated_deltanet_1b3", 6, 512), norm("tnl_1b", 1, 2048, ("activation", "identity")),
          convolution("deltanet_1b3", 2048), convolution("gated_deltanet_1b3", 1536),
          convolution("gated_deltanet_1b3", 3072), convolution("mamba2_1b3", 4096),
          convolution("deltanet_1b3", 2048, segments=True),
          Case("skip_gate_norm", "mamba2_1b3", (B, T, 1, 4096 // narrow), options=(("eps", 1e-5),)),
          Case("swiglu", "gla_1b3", (B, T, 5632 // narrow))]


def inputs(case: Case, seed: int) -> tuple[dict, jax.Array]:
  """The arrays by name, and the cotangent of the output."""
  keys = jax.random.split(jax.random.key(seed), 5)
  draw = lambda key: jax.random.normal(key, case.shape, case.dtype)
  C = case.shape[-1]
  if case.op == "rms_norm":
    arrays = {"x": draw(keys[0]), "scale": 1 + 0.1 * jax.random.normal(keys[1], (C,)), "gate": draw(keys[2])}
  elif case.op == "skip_gate_norm":
    arrays = {"x": draw(keys[0]), "v": draw(keys[1]), "gate": draw(keys[2]), "skip": jnp.ones(case.shape[2:]),
              "scale": 1 + 0.1 * jax.random.normal(keys[4], case.shape[2:])}
  elif case.op == "swiglu":
    arrays = {"gate": draw(keys[0]), "up": draw(keys[1])}
  else:
    arrays = {"x": draw(keys[0]), "kernel": jax.random.normal(keys[1], (4, C))}
  return arrays, draw(keys[3])


def program(case: Case, label: str, implementation: str | None) -> Callable[[dict, jax.Array], dict]:
  """Returns the function of `inputs` that gives the output, and with the backward pass every gradient, by name."""
  options = dict(case.options)
  if case.segments:
    B, T = case.shape[:2]
    options["segment_ids"] = jnp.broadcast_to(jnp.arange(T)[None] // 300, (B, T))

  def function(arrays):
    result = getattr(kernels, case.op)(**arrays, **options, implementation=implementation)
    return result[0] if case.op == "short_convolution" else result

  def run(arrays, dy):
    if label == "forward":
      return {"output": function(arrays)}
    y, pull = jax.vjp(function, arrays)
    return {"output": y, **{f"d{name}": gradient for name, gradient in pull(dy)[0].items()}}

  return jax.jit(run)


def errors(case: Case, label: str, found: dict) -> dict[str, float]:
  """Compares the results on input set 0 with the definition's in float32. The first sequence stands for all."""
  wide = jax.tree.map(lambda a: a.astype(jnp.float32), inputs(case, 0))
  wanted = program(dataclasses.replace(case, dtype="float32"), label, "reference")(*wide)
  one = lambda a: a[:1].astype(jnp.float32) if a.ndim > 2 else a
  return {name: relative_error(one(found[name]), one(a)) for name, a in wanted.items()}


def floor_bytes(case: Case, label: str) -> int:
  """Bytes of one read of every large array and one write of every large result, in each pass."""
  arrays = {"short_convolution": 1, "skip_gate_norm": 3}.get(case.op, 2)
  count = arrays + 1 + (0 if label == "forward" else 2 * arrays + 1)
  return count * functools.reduce(int.__mul__, case.shape) * jnp.dtype(case.dtype).itemsize


def seconds(run: Callable, sets: list, repeats: int) -> float:
  """The median over `repeats` of the time of a call, of which many are queued before the clock is read."""

  def queue(count):
    start = time.perf_counter()
    for i in range(count):
      result = run(*sets[i % len(sets)])
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / count

  queue(2)
  count = min(500, max(3, round(_BATCH_SECONDS / queue(3))))
  return statistics.median(queue(count) for _ in range(repeats))
