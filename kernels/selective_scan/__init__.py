"""Selective scan (Mamba): the op's contract, its checks, and what every implementation may rely on."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels import chunks, containment, contract, dispatch
from kernels.dispatch import Implementation
from kernels.selective_scan import reference, xla_chunked
from kernels.selective_scan.reference import step

__all__ = ["selective_scan", "step"]

# Faster rates count as this one. Kernels multiply rates by log2(e), so half of the largest float32 stays finite.
FASTEST = -0.5 * float(jnp.finfo(jnp.float32).max)


def selective_scan(
    x: Float[Array, "B T D"], step_size: Float[Array, "B T D"], a: Float[Array, "D N"], b: Float[Array, "B T N"],
    c: Float[Array, "B T N"], *, initial_state: Float[Array, "B D N"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None, implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
  """Selective scan: h_t = exp(step_size_t a) h_{t-1} + step_size_t x_t b_t and y_t = sum of c_t h_t, per channel.

  Args:
    step_size: float32, >= 0 and finite, because it also multiplies the input; the layer's softplus is not part of the
      op, nor are its skip term, gate and convolution.
    a: float32, <= 0: N rates of decay for each of D channels. Where it is -inf, a step above 0 forgets the state, a
      step of 0 keeps it, and the gradient of a is 0.
    b, c: the vectors with which all channels write and read, in x's dtype.
    initial_state: h_0 in float32, zeros if None; it feeds the first segment of each row.
    segment_ids: the state restarts from zero at each token whose id differs from the id before it. A value that is not
      finite reaches no other segment; "pallas_triton" then makes NaN of all channels (`kernels.containment`).
    implementation: "pallas_triton" (N up to 32), "xla_chunked" or "reference"; None takes the first that supports the
      inputs and the default backend (`kernels.explain` says which).
  Returns:
    The output in x's dtype, and h_T in float32.
  Raises:
    ValueError: a shape, dtype or implementation breaks a rule; the message names the value and the rule.
    NotImplementedError: the named implementation cannot run these inputs.
  Precision: everything except the inputs and the output is float32. The relative RMS error of the output against
    "reference" is at most 5e-3 for 16-bit inputs and 1e-5 (`pallas_triton`: 1e-4) for float32 inputs.
  Memory: the backward pass keeps the inputs, 6 bytes per token and channel for 16-bit x, and one state every 64 tokens,
    4 N / 64 bytes: 7 bytes for N = 16. `pallas_triton` keeps a bfloat16 state every 8 tokens, which makes 10 bytes.
  Derivatives: "xla_chunked" has first derivatives in reverse mode, and second derivatives in either mode over them:
    jax.grad and jax.jvp of jax.grad, jax.hessian. "pallas_triton" has first derivatives in reverse mode only.
    "reference" has all derivatives, and it alone supports jax.jvp of the op itself.
  Source: Gu and Dao, arXiv:2312.00752, section 3.2, with exp(step_size a) for the decay and step_size b for the input.
  Example:
    >>> import jax, jax.numpy as jnp
    >>> from lin_jax.ops import selective_scan
    >>> x, step = jax.random.normal(jax.random.key(0), (2, 2, 100, 64))  # [batch, time, channels]
    >>> b, c = jax.random.normal(jax.random.key(1), (2, 2, 100, 16))  # [batch, time, states]
    >>> rates = -jnp.broadcast_to(jnp.arange(1.0, 17.0), (64, 16))
    >>> output, state = selective_scan(x, jax.nn.softplus(step), rates, b, c)
    >>> output.shape, state.shape
    ((2, 100, 64), (2, 64, 16))
  """
  _check(x, step_size, a, b, c, initial_state, segment_ids)
  # A step size of 0 times -inf would be NaN, and sequences are filled up with such steps.
  a = jnp.where(a < FASTEST, FASTEST, a)
  if initial_state is None:
    initial_state = jnp.zeros((x.shape[0], *a.shape), jnp.float32)
  starts = None if segment_ids is None else chunks.segment_starts(segment_ids)
  resets = None if starts is None else jnp.where(starts, jnp.float32(chunks.RESET), 0.0)
  run = dispatch.choose("selective_scan", implementation, x, step_size, a, b, c)
  # The other implementations go from token to token, where a reset selects.
  selects = run in (reference.selective_scan, xla_chunked.selective_scan)
  op = containment.Op(containment.Call(_run, run), lead=2, selects=selects)
  return containment.contain(op, starts, (c, x, step_size, b), initial_state, (a, resets))


def _run(run, _, tokens, state, shared):
  (c, x, step_size, b), (a, resets) = tokens, shared
  return run(x, step_size, a, b, c, resets, state)


def _check(x, step_size, a, b, c, initial_state, segment_ids):
  """Raises ValueError with one message for the first broken rule."""

  def rule(ok, message):
    contract.require("selective_scan", ok, message)

  contract.require_arrays("selective_scan", x=x, step_size=step_size, a=a, b=b, c=c, initial_state=initial_state,
                          segment_ids=segment_ids)
  rule(x.ndim == 3 and min(x.shape) >= 1, f"x has shape {x.shape}; it must be [batch, time, channels], none of them 0")
  rule(step_size.shape == x.shape, f"step_size has shape {step_size.shape}; it must equal x's {x.shape}")
  rule(a.ndim == 2 and a.shape[0] == x.shape[2] and a.shape[1] >= 1,
       f"a has shape {a.shape}; it must be [channels, state], with x's {x.shape[2]} channels and a state of at least 1")
  expected = (*x.shape[:2], a.shape[1])
  for name, array in (("b", b), ("c", c)):
    rule(array.shape == expected, f"{name} has shape {array.shape}; it must be [batch, time, state] {expected}")
  rule(x.dtype in contract.DTYPES, f"x has dtype {x.dtype}; it must be bfloat16, float16 or float32")
  rule(x.dtype == b.dtype == c.dtype, f"x, b, c have dtypes {x.dtype}, {b.dtype}, {c.dtype}; they must be equal")
  for name, array in (("step_size", step_size), ("a", a)):
    rule(array.dtype == jnp.float32, f"{name} has dtype {array.dtype}; it must be float32")
  if initial_state is not None:
    expected = (x.shape[0], *a.shape)
    rule(initial_state.shape == expected and initial_state.dtype == jnp.float32,
         f"initial_state is {initial_state.dtype}{initial_state.shape}; it must be float32{expected}")
  if segment_ids is not None:
    rule(segment_ids.shape == x.shape[:2] and jnp.issubdtype(segment_ids.dtype, jnp.integer),
         f"segment_ids is {segment_ids.dtype}{segment_ids.shape}; it must be integers of shape {x.shape[:2]}")
