"""The delta rule with any form of decay: the op's contract, its checks, and what every implementation may rely on."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from kernels import chunks, containment, contract, dispatch, steps
from kernels.delta_rule import reference
from kernels.dispatch import Implementation

__all__ = ["delta_rule", "step"]

step = steps.on_gpu(reference.step)


def delta_rule(
    q: Float[Array, "B T G K"], k: Float[Array, "B T G K"], v: Float[Array, "B T H V"], beta: Float[Array, "B T H"],
    log_decay: Float[Array, "B T H"] | Float[Array, "B T H K"] | None = None, *, normalize_qk: bool = False,
    initial_state: Float[Array, "B H K V"] | None = None, segment_ids: Int[Array, "B T"] | None = None,
    scale: float | Real[Array, ""] | None = None, chunk_size: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
  """The delta rule: S_t = a_t S_{t-1} + beta_t k_t^T (v_t - k_t a_t S_{t-1}) and o_t = scale * q_t S_t, per head.

  The value that the decayed state holds under the key, k_t a_t S_{t-1}, moves towards v_t by the share beta_t. This is
  a step of gradient descent on |k_t S - v_t|^2 / 2. The decay a_t is a number, or a diagonal matrix of one number per
  key channel.

  Args:
    q, k: key heads G divide the value heads H; value head h reads key head h // (H / G).
    beta: in [0, 2] for keys of norm 1, which is not checked at run time. Beyond 1 the state may change sign along the
      key. A longer key needs a smaller beta: the state grows without bound where beta_t |k_t|^2 stays above 2.
    log_decay: natural log of a_t, <= 0. None means no decay (DeltaNet), an array one decay per token (Gated DeltaNet)
      or one per token and key channel (Kimi Delta Attention). Where it is -inf the state, or the channel's row of it,
      is forgotten, and its gradient is 0. Decays per key channel belong to value heads, unlike q and k.
    normalize_qk: divides q and k by their norm in each head, x * rsqrt(sum(x^2) + 1e-6) in float32.
    initial_state: S_0 in float32, zeros if None; it feeds the first segment of each row.
    segment_ids: the state restarts from zero at each token whose id differs from the id before it. A value that is not
      finite reaches no other segment (`kernels.containment` says how, and at which cost). Without segment_ids a NaN
      also reaches the tokens before it in its chunk, except with "reference".
    scale: K**-0.5 if None. A number is static; an array of no dimensions may be traced and has a gradient.
    chunk_size: tokens per chunk, a power of two in [16, 128]; T need not be a multiple. On a GPU leave it None: a
      number skips the configuration that was measured for the device, and "pallas_triton" does not take 128.
    implementation: "mosaic_gpu" (Hopper GPUs, bfloat16, K up to 256, no decay per key channel, chunks of 64 tokens),
      "pallas_triton" (K up to 256), "xla_chunked" or "reference"; None takes the first that suits the inputs and the
      default backend (`kernels.explain` says which, and why not the others).
  Returns:
    The output in v's dtype, and S_T in float32.
  Raises:
    ValueError: a shape, dtype, number or implementation breaks a rule; the message names the value and the rule.
    NotImplementedError: the named implementation cannot run these inputs.
  Precision: "xla_chunked" multiplies in float32 for inputs of any dtype, "pallas_triton" for all but bfloat16. The
    relative RMS error of the output against "reference", over at least 64 tokens and heads, is at most 5e-3 for 16-bit
    inputs and 1e-5 for float32 inputs; `kernels.accuracy` has the bound for a single entry. The bounds do
    not hold for nearly parallel keys of norm 1 with a beta of 2 and no decay: the state then turns back and forth
    undamped, the rounding of |k|^2 adds up over tokens, and the error reaches 1e-4 after 300 tokens. Nor do they quite
    hold for the GPU kernels on bfloat16 where nearly parallel keys meet gates of very different strength: the output
    was off by 5.2e-3, and the gradient of the gates by 5e-2.
  Memory: the backward pass keeps the inputs, which take for 16-bit inputs 4 K bytes per token and key head, and per
    token and value head 2 V, 4 for beta, and 4 for a decay or 4 K for decays per channel. "xla_chunked" keeps q and k
    for each value head. In the place of v, "pallas_triton" keeps the error that each token corrects. For bfloat16 it
    also keeps 4 C bytes of inverses in chunks of C tokens (C = 32) and 2 K V / 64 bytes of states, or 2 K V / 32 with
    decays per key channel.
  Derivatives: "xla_chunked" has first derivatives in reverse mode, and second derivatives in either mode over them:
    jax.grad and jax.jvp of jax.grad, jax.hessian. "pallas_triton" has first derivatives in reverse mode only.
    "reference" has all derivatives, and it alone supports jax.jvp of the op itself.
  Source: Yang et al., arXiv:2406.06484, section 3 (delta rule, chunks); arXiv:2412.06464, section 3 (with decay);
    Grazzi et al., arXiv:2411.12537, section 4 (beta in [0, 2]); arXiv:2510.26692 (decay per key channel).
  Example:
    >>> import jax, jax.numpy as jnp
    >>> from lin_jax.ops import delta_rule
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 100, 4, 32))  # [batch, time, heads, channels]
    >>> beta = jax.nn.sigmoid(jax.random.normal(jax.random.key(1), (2, 100, 4)))
    >>> output, state = delta_rule(q, k, v, beta, normalize_qk=True)
    >>> output.shape, state.shape
    ((2, 100, 4, 32), (2, 4, 32, 32))
  """
  contract.check("delta_rule", q, k, v, log_decay, initial_state, segment_ids)
  chunk_size = contract.chunk_size_of("delta_rule", chunk_size)
  contract.require_arrays("delta_rule", beta=beta)
  contract.require("delta_rule", isinstance(normalize_qk, bool | np.bool_),
                   f"normalize_qk={normalize_qk!r}; it must be True or False")
  per_token, K = v.shape[:3], q.shape[-1]
  contract.require("delta_rule", beta.shape == per_token,
                   f"beta has shape {beta.shape}; it must be [batch, time, heads] {per_token}")
  if log_decay is not None:
    contract.require("delta_rule", log_decay.shape in (per_token, (*per_token, K)),
                     f"log_decay has shape {log_decay.shape}; it must be [batch, time, heads] {per_token}, "
                     f"[batch, time, heads, key channels] {(*per_token, K)}, or None")
  contract.require("delta_rule", beta.dtype in contract.DTYPES,
                   f"beta has dtype {beta.dtype}; it must be bfloat16, float16 or float32")
  B, _, H, V = v.shape
  beta = beta.astype(jnp.float32)
  if log_decay is not None:
    log_decay = chunks.bounded(log_decay.astype(jnp.float32))
  starts = None if segment_ids is None else chunks.segment_starts(segment_ids)
  if initial_state is None:
    initial_state = jnp.zeros((B, H, K, V), jnp.float32)
  scale, factor = contract.scale_of("delta_rule", scale, K)
  arrays = q, k, v, beta, log_decay, segment_ids
  run = dispatch.choose("delta_rule", implementation, *arrays, chunk_size=chunk_size)
  options = ("scale", scale), ("normalize_qk", bool(normalize_qk)), ("chunk_size", chunk_size)
  op = containment.Op(containment.Call(_run, run, options), lead=3, gates=4, selects=run is reference.delta_rule)
  output, final_state = containment.contain(op, starts, (q, k, v, beta, log_decay), initial_state)
  return contract.scaled(output, factor), final_state


def _run(run, starts, tokens, state, _, **options):
  return run(*tokens, state, starts=starts, **options)
