"""Skip connection, output gate and RMSNorm of Mamba-2: the op's contract and its checks."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import contract, dispatch
from kernels.dispatch import Implementation

__all__ = ["skip_gate_norm"]


def skip_gate_norm(x: Float[Array, "*rows G C"], v: Float[Array, "*rows G C"], gate: Float[Array, "*rows G C"],
                   skip: Float[Array, "G C"], scale: Float[Array, "G C"], *, eps: float,
                   implementation: Implementation | None = None) -> Float[Array, "*rows G C"]:
  """RMSNorm behind a gate and a skip connection: h = (x + skip v) swish(gate), y = h / sqrt(mean(h²) + eps) * scale.

  The mean is over the C channels of a group.

  Args:
    x, v, gate: of one shape and dtype.
    skip, scale: float32, one factor per group and channel.
    implementation: "pallas_triton" (`supports` says for which C) or "reference"; None takes the first that supports
      the inputs and the default backend.
  Returns:
    The output in x's dtype.
  Raises:
    ValueError: a shape or dtype breaks a rule; the message names the value and the rule.
    NotImplementedError: the named implementation cannot run these inputs.
  Precision: everything between the inputs and the output is float32, so that a 16-bit output is rounded once.
    "pallas_triton" forms the gradient of v from that of x, which rounds it twice.
  Memory: the backward pass keeps the inputs alone. Each pass reads every array once and writes every result once.
  Derivatives: both have reverse mode, second derivatives and forward mode over reverse mode; on a GPU the kernels
    have the first derivatives and jnp has the others. "reference" alone supports jax.jvp of the op itself.
  Source: Dao and Gu 2024, arXiv:2405.21060, section 7; the order of gate and norm is that of the authors' code.
  Example:
    >>> import jax, jax.numpy as jnp
    >>> from kernels import skip_gate_norm
    >>> x, v, gate = jax.random.normal(jax.random.key(0), (3, 2, 100, 1, 64))  # [batch, time, groups, channels]
    >>> skip_gate_norm(x, v, gate, jnp.ones((1, 64)), jnp.ones((1, 64)), eps=1e-5).shape
    (2, 100, 1, 64)
  """
  _check(x, v, gate, skip, scale)
  return dispatch.choose("skip_gate_norm", implementation, x, v, gate, skip, scale)(x, v, gate, skip, scale, eps)


def _check(x, v, gate, skip, scale):
  """Raises ValueError with one message for the first broken rule."""

  def rule(ok, message):
    contract.require("skip_gate_norm", ok, message)

  contract.require_arrays("skip_gate_norm", x=x, v=v, gate=gate, skip=skip, scale=scale)
  rule(x.ndim >= 2 and min(x.shape) >= 1, f"x has shape {x.shape}; it must be [..., groups, channels], none of them 0")
  rule(x.dtype in contract.DTYPES, f"x has dtype {x.dtype}; it must be bfloat16, float16 or float32")
  for name, array in (("v", v), ("gate", gate)):
    rule(array.shape == x.shape and array.dtype == x.dtype,
         f"{name} is {array.dtype}{array.shape}; it must be as x, {x.dtype}{x.shape}")
  for name, array in (("skip", skip), ("scale", scale)):
    rule(array.shape == x.shape[-2:] and array.dtype == jnp.float32,
         f"{name} is {array.dtype}{array.shape}; it must be float32{x.shape[-2:]}")
