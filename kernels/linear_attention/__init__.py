"""Linear attention with scalar decay: the op's contract, its checks, and what every implementation may rely on."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real

from kernels import chunks, containment, contract, dispatch, steps
from kernels.dispatch import Implementation
from kernels.linear_attention import reference

__all__ = ["linear_attention", "step"]

step = steps.on_gpu(reference.step)


def linear_attention(
    q: Float[Array, "B T G K"], k: Float[Array, "B T G K"], v: Float[Array, "B T H V"],
    log_decay: Float[Array, "H"] | Float[Array, "B T H"] | None = None, *,
    initial_state: Float[Array, "B H K V"] | None = None, segment_ids: Int[Array, "B T"] | None = None,
    scale: float | Real[Array, ""] | None = None, chunk_size: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
  """Linear attention: S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t and o_t = scale * q_t S_t, per head.

  Args:
    q, k: key heads G divide the value heads H; value head h reads key head h // (H / G).
    log_decay: natural log of the decay, <= 0, accumulated in float32. None: plain linear attention. `[H]`: constant in
      time (RetNet, Lightning Attention). `[B, T, H]`: per token (simple GLA, Mamba-2). Where it is -inf the state is
      forgotten, and its gradient is 0.
    initial_state: S_0 in float32, zeros if None; it feeds the first segment of each row.
    segment_ids: the state restarts from zero at each token whose id differs from the id before it. A value that is not
      finite reaches no other segment (`kernels.containment` says how, and at which cost). Without segment_ids a NaN
      also reaches the tokens before it in its chunk, except with "reference".
    scale: K**-0.5 if None. A number is static; an array of no dimensions may be traced and has a gradient.
    chunk_size: tokens per chunk, a power of two in [16, 128]; T need not be a multiple. On a GPU leave it None: a
      number skips the configuration that was measured for the device, and "pallas_triton" does not take 128.
    implementation: "pallas_triton" (K up to 256), "xla_chunked" or "reference"; None takes the first that supports the
      inputs and the default backend (`kernels.explain` says which).
  Returns:
    The output in v's dtype, and S_T in float32.
  Raises:
    ValueError: a shape, dtype, number or implementation breaks a rule; the message names the value and the rule.
    NotImplementedError: the named implementation cannot run these inputs.
  Precision: products accumulate in float32. Their operands are bfloat16 for 16-bit inputs and float32 for float32
    inputs (`pallas_triton`: in three TF32 passes). The relative RMS error of the output against "reference", over at
    least 64 tokens and heads, is at most 5e-3 for 16-bit inputs and 1e-5 (`pallas_triton`: 1e-4) for float32 inputs;
    `kernels.accuracy` has the bound for a single entry.
  Memory: the backward pass keeps the inputs, for 16-bit inputs 4 K bytes per token and key head, 2 V per token and
    value head, and 4 for a decay per token, and in `pallas_triton` also the state of each chunk of C tokens, 2 K V / C
    per value head: at H = G, K = V = 128 and C = 64, 768 + 512 bytes. "xla_chunked" keeps q and k for each value head.
  Derivatives: "xla_chunked" has first derivatives in reverse mode, and second derivatives in either mode over them:
    jax.grad and jax.jvp of jax.grad, jax.hessian. "pallas_triton" has first derivatives in reverse mode only.
    "reference" has all derivatives, and it alone supports jax.jvp of the op itself.
  Source: Sun et al., arXiv:2307.08621, section 2 (constant); Qin et al., arXiv:2405.17381, section 3 (chunks); Dao and
    Gu, arXiv:2405.21060, section 6 (per token).
  Example:
    >>> import jax, jax.numpy as jnp
    >>> from lin_jax.ops import linear_attention
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 100, 4, 32))  # [batch, time, heads, channels]
    >>> log_decay = jnp.log1p(-jnp.exp2(-5.0 - jnp.arange(4.0)))  # RetNet's, one per head
    >>> output, state = linear_attention(q, k, v, log_decay)
    >>> output.shape, state.shape
    ((2, 100, 4, 32), (2, 4, 32, 32))
  """
  contract.check("linear_attention", q, k, v, log_decay, initial_state, segment_ids)
  chunk_size = contract.chunk_size_of("linear_attention", chunk_size)
  if log_decay is not None:
    contract.require("linear_attention", log_decay.shape in (v.shape[2:3], v.shape[:3]),
                     f"log_decay has shape {log_decay.shape}; it must be [heads] {v.shape[2:3]} or [batch, time, "
                     f"heads] {v.shape[:3]}, or None")
  (B, _, H, V), K = v.shape, q.shape[-1]
  if log_decay is not None:
    log_decay = chunks.bounded(log_decay.astype(jnp.float32))
  starts = None if segment_ids is None else chunks.segment_starts(segment_ids)
  if initial_state is None:
    initial_state = jnp.zeros((B, H, K, V), jnp.float32)
  scale, factor = contract.scale_of("linear_attention", scale, K)
  run = dispatch.choose("linear_attention", implementation, q, k, v, log_decay, chunk_size=chunk_size)
  # A decay that the tokens share belongs to none of them.
  shared = log_decay is not None and log_decay.ndim == 1
  tokens, constant = ((q, k, v), (log_decay,)) if shared else ((q, k, v, log_decay), ())
  call = containment.Call(_run, run, (("scale", scale), ("chunk_size", chunk_size)))
  op = containment.Op(call, lead=3, gates=None if shared else 3, selects=run is reference.linear_attention)
  output, final_state = containment.contain(op, starts, tokens, initial_state, constant)
  return contract.scaled(output, factor), final_state


def _run(run, starts, tokens, state, constant, **options):
  return run(*tokens, *constant, state, starts=starts, **options)
