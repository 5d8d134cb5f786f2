"""The elementwise part of a SwiGLU MLP: the op's contract and its checks."""

from jaxtyping import Array, Float

from kernels import contract, dispatch
from kernels.dispatch import Implementation

__all__ = ["swiglu"]


def swiglu(gate: Float[Array, "*shape"], up: Float[Array, "*shape"], *,
           implementation: Implementation | None = None) -> Float[Array, "*shape"]:
  """SwiGLU's product: y = gate sigmoid(gate) up, entry by entry.

  Args:
    gate, up: of one shape and dtype.
    implementation: "pallas_triton" (a multiple of 128 entries) or "reference"; None takes the first that supports the
      inputs and the default backend.
  Returns:
    The output in the dtype of the inputs.
  Raises:
    ValueError: a shape or dtype breaks a rule; the message names the value and the rule.
    NotImplementedError: the named implementation cannot run these inputs.
  Precision: everything between the inputs and the output is float32, so that a 16-bit output is rounded once.
  Memory: the backward pass keeps the inputs alone. "pallas_triton" forms both gradients in one pass, 10 bytes per entry
    of 16 bits, where XLA forms them in two passes of 6 and 8 bytes. The forward pass is XLA's in either case.
  Derivatives: both have reverse mode, second derivatives and forward mode over reverse mode; on a GPU the kernel has
    the first derivatives and jnp has the others. "reference" alone supports jax.jvp of the op itself.
  Source: Shazeer 2020, arXiv:2002.05202, equation 6.
  Example:
    >>> import jax
    >>> from kernels import swiglu
    >>> gate, up = jax.random.normal(jax.random.key(0), (2, 3, 100, 64))  # [batch, time, channels]
    >>> swiglu(gate, up).shape
    (3, 100, 64)
  """

  def rule(ok, message):
    contract.require("swiglu", ok, message)

  contract.require_arrays("swiglu", gate=gate, up=up)
  rule(gate.dtype in contract.DTYPES, f"gate has dtype {gate.dtype}; it must be bfloat16, float16 or float32")
  rule(up.shape == gate.shape and up.dtype == gate.dtype,
       f"up is {up.dtype}{up.shape}; it must be as gate, {gate.dtype}{gate.shape}")
  return dispatch.choose("swiglu", implementation, gate, up)(gate, up)
