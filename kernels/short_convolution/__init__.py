"""Short convolution: the op's contract, its checks, and the inputs that it keeps for the next call."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import chunks, contract, dispatch
from kernels.dispatch import Implementation

__all__ = ["short_convolution"]


def short_convolution(
    x: Float[Array, "B T C"], kernel: Float[Array, "taps C"], bias: Float[Array, "C"] | None = None, *,
    silu: bool = False, initial_inputs: Float[Array, "B past C"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None, implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B past C"]]:
  """Depthwise causal convolution: y_t = f(bias + sum over i < taps of kernel_i x_{t-taps+1+i}), f SiLU or identity.

  Args:
    kernel, bias: float32; the last tap meets the present token.
    silu: whether f is SiLU.
    initial_inputs: the last taps - 1 inputs before x, in x's dtype; zeros if None. The first segment continues them.
    segment_ids: inputs of another segment count as zero, whatever they are; the segment changes where the id does.
    implementation: "pallas_triton" (C a multiple of 16) or "reference"; None takes the first that supports the inputs
      and the default backend.
  Returns:
    The output in x's dtype, and the last taps - 1 inputs, of which those of other segments than the last token's are
    zero.
  Raises:
    ValueError: a shape or dtype breaks a rule; the message names the value and the rule.
    NotImplementedError: the named implementation cannot run these inputs.
  Precision: everything between the inputs and the output is float32, so that a 16-bit output is rounded once.
  Memory: the backward pass keeps the inputs alone. Each pass reads every array once and writes every result once.
  Derivatives: both have reverse mode, second derivatives and forward mode over reverse mode; on a GPU the kernels
    have the first derivatives and jnp has the others. "reference" alone supports jax.jvp of the op itself.
  Source: the convolution of Gu and Dao 2023, arXiv:2312.00752, section 3.4, and of Yang et al. 2024,
    arXiv:2406.06484, section 3.3.
  Example:
    >>> import jax, jax.numpy as jnp
    >>> from kernels import short_convolution
    >>> x = jax.random.normal(jax.random.key(0), (2, 100, 64))  # [batch, time, channels]
    >>> y, inputs = short_convolution(x, jnp.full((4, 64), 0.25), silu=True)
    >>> y.shape, inputs.shape
    ((2, 100, 64), (2, 3, 64))
  """
  _check(x, kernel, bias, initial_inputs, segment_ids)
  past = kernel.shape[0] - 1
  runs = None if segment_ids is None else jnp.cumsum(chunks.segment_starts(segment_ids), axis=1, dtype=jnp.int32)
  run = dispatch.choose("short_convolution", implementation, x, kernel)
  y = run(x, kernel, bias, initial_inputs, runs, silu)
  # Only the last inputs are kept, so nothing as long as x is formed.
  before = jnp.zeros((x.shape[0], past, x.shape[2]), x.dtype) if initial_inputs is None else initial_inputs
  kept = jnp.concatenate([before, x[:, -past:]], axis=1)[:, -past:]
  if runs is not None:
    last = jnp.pad(runs[:, -past:], ((0, 0), (past, 0)))[:, -past:]
    kept = jnp.where((last == runs[:, -1:])[..., None], kept, 0)
  return y, kept


def _check(x, kernel, bias, initial_inputs, segment_ids):
  """Raises ValueError with one message for the first broken rule."""

  def rule(ok, message):
    contract.require("short_convolution", ok, message)

  contract.require_arrays("short_convolution", optional=("bias", "initial_inputs", "segment_ids"), x=x, kernel=kernel,
                          bias=bias, initial_inputs=initial_inputs, segment_ids=segment_ids)
  rule(x.ndim == 3 and min(x.shape) >= 1, f"x has shape {x.shape}; it must be [batch, time, channels], none of them 0")
  rule(x.dtype in contract.DTYPES, f"x has dtype {x.dtype}; it must be bfloat16, float16 or float32")
  rule(kernel.ndim == 2 and kernel.shape[0] >= 2 and kernel.shape[1] == x.shape[2] and kernel.dtype == jnp.float32,
       f"kernel is {kernel.dtype}{kernel.shape}; it must be float32 [taps, {x.shape[2]}] with at least 2 taps")
  if bias is not None:
    rule(bias.shape == x.shape[2:] and bias.dtype == jnp.float32,
         f"bias is {bias.dtype}{bias.shape}; it must be float32{x.shape[2:]}")
  if initial_inputs is not None:
    expected = (x.shape[0], kernel.shape[0] - 1, x.shape[2])
    rule(initial_inputs.shape == expected and initial_inputs.dtype == x.dtype,
         f"initial_inputs is {initial_inputs.dtype}{initial_inputs.shape}; it must be {x.dtype}{expected}")
  if segment_ids is not None:
    rule(segment_ids.shape == x.shape[:2] and jnp.issubdtype(segment_ids.dtype, jnp.integer),
         f"segment_ids is {segment_ids.dtype}{segment_ids.shape}; it must be integers of shape {x.shape[:2]}")
