"""The step of an op on one token: a kernel on a GPU, the definition elsewhere."""

import functools
import importlib
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels import dispatch


def on_gpu(definition: Callable) -> Callable:
  """`definition`, the step of an op that keeps a matrix per head, with the GPU's kernel in its place where that runs.

  The kernel runs on CUDA, for the states that it takes, on one device: a mesh splits heads that a kernel does not.
  Its derivatives, in reverse mode, are those of the definition.
  """
  signature = inspect.signature(definition)

  @functools.wraps(definition)
  def step(*args, **options):
    if not has_kernels() or _kernels().declines(args[0]):
      return definition(*args, **options)
    run = jax.custom_vjp(lambda *args: launch(signature, *args, **options))
    run.defvjp(lambda *args: (run(*args), args),
               lambda args, cotangents: jax.vjp(lambda *args: definition(*args, **options), *args)[1](cotangents))
    return run(*args)

  return step


def has_kernels() -> bool:
  """Whether a kernel of one token may run: on one CUDA device, because the compiler cannot split a kernel over several.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return dispatch.platform() == "cuda" and (mesh.empty or mesh.size == 1)


def launch(signature: inspect.Signature, *args, **options):
  """The kernel on the arguments of a definition with this signature, whatever the platform."""
  given = signature.bind(*args, **options).arguments
  state, log_decay, beta = (given.get(name) for name in ("state", "log_decay", "beta"))
  if log_decay is not None:
    log_decay = log_decay.astype(jnp.float32)
    if log_decay.ndim < 3:
      log_decay = jnp.broadcast_to(log_decay, state.shape[:2])[..., None]
  return _kernels().step(state, given["q"], given["k"], given["v"], None if log_decay is None else jnp.exp(log_decay),
                         None if beta is None else beta[..., None], given.get("normalize_qk", False))


def _kernels():
  # Pallas' Triton backend warns and costs time on import.
  return importlib.import_module("kernels.pallas_triton_step")
