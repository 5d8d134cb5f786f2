"""RMSNorm with an optional scale and an optional output gate: the op's contract and its checks."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import contract, dispatch
from kernels.dispatch import Implementation
from kernels.rms_norm.reference import ACTIVATIONS

__all__ = ["rms_norm"]


def rms_norm(x: Float[Array, "*rows C"], scale: Float[Array, "C"] | None = None,
             gate: Float[Array, "*rows C"] | None = None, *, eps: float,
             activation: Literal["swish", "identity"] = "swish", implementation: Implementation | None = None,
             ) -> Float[Array, "*rows C"]:
  """RMSNorm over the last axis: y = x / sqrt(mean(x²) + eps) * scale * activation(gate).

  Args:
    scale: float32, one factor per channel; 1 if None.
    gate: in x's shape and dtype; without it the last factor is left out.
    activation: of the gate: "swish" is g sigmoid(g), "identity" is g.
    implementation: "pallas_triton" (`supports` says for which C) or "reference"; None takes the first that supports
      the inputs and the default backend.
  Returns:
    The output in x's dtype.
  Raises:
    ValueError: a shape, dtype or name breaks a rule; the message names the value and the rule.
    NotImplementedError: the named implementation cannot run these inputs.
  Precision: everything between the inputs and the output is float32, so that a 16-bit output is rounded once.
  Memory: the backward pass keeps the inputs alone. Each pass reads every array once and writes every result once.
  Derivatives: both have reverse mode, second derivatives and forward mode over reverse mode; on a GPU the kernels
    have the first derivatives and jnp has the others. "reference" alone supports jax.jvp of the op itself.
  Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4; with a gate it is the output of the layer of Yang et
    al. 2024, arXiv:2312.06635, section 4.4.
  Example:
    >>> import jax, jax.numpy as jnp
    >>> from kernels import rms_norm
    >>> o, gate = jax.random.normal(jax.random.key(0), (2, 3, 100, 4, 64))  # [batch, time, heads, channels]
    >>> rms_norm(o, jnp.ones(64), gate, eps=1e-6).shape
    (3, 100, 4, 64)
  """
  _check(x, scale, gate, activation)
  run = dispatch.choose("rms_norm", implementation, x, scale, gate)
  return run(x, scale, gate, eps, activation)


def _check(x, scale, gate, activation):
  """Raises ValueError with one message for the first broken rule."""

  def rule(ok, message):
    contract.require("rms_norm", ok, message)

  contract.require_arrays("rms_norm", optional=("scale", "gate"), x=x, scale=scale, gate=gate)
  rule(x.ndim >= 1 and min(x.shape) >= 1, f"x has shape {x.shape}; every dimension must be at least 1")
  rule(x.dtype in contract.DTYPES, f"x has dtype {x.dtype}; it must be bfloat16, float16 or float32")
  if scale is not None:
    rule(scale.shape == x.shape[-1:] and scale.dtype == jnp.float32,
         f"scale is {scale.dtype}{scale.shape}; it must be float32{x.shape[-1:]}")
  if gate is not None:
    rule(gate.shape == x.shape and gate.dtype == x.dtype,
         f"gate is {gate.dtype}{gate.shape}; it must be as x, {x.dtype}{x.shape}")
  rule(activation in ACTIVATIONS, f"activation={activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
