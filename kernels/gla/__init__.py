"""Gated linear attention: the op's contract, its checks, and what every implementation may rely on."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real

from kernels import chunks, containment, contract, dispatch, steps
from kernels.dispatch import Implementation
from kernels.gla import reference

__all__ = ["gla", "step"]

step = steps.on_gpu(reference.step)


def gla(q: Float[Array, "B T G K"], k: Float[Array, "B T G K"], v: Float[Array, "B T H V"],
        log_decay: Float[Array, "B T G K"], *, initial_state: Float[Array, "B H K V"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None, scale: float | Real[Array, ""] | None = None,
        chunk_size: int | None = None, implementation: Implementation | None = None,
        ) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
  """Gated linear attention: S_t = diag(exp(log_decay_t)) S_{t-1} + k_t^T v_t and o_t = scale * q_t S_t, per head.

  Args:
    q, k: key heads G divide the value heads H; value head h reads key head h // (H / G).
    log_decay: natural log of the forget gate, <= 0, one per key channel, accumulated in float32. A gate of -inf forgets
      its channel, and its gradient is 0.
    initial_state: S_0 in float32, zeros if None; it feeds the first segment of each row.
    segment_ids: the state restarts from zero at each token whose id differs from the id before it. A value that is not
      finite reaches no other segment (`kernels.containment` says how, and at which cost). Without segment_ids a NaN
      also reaches the tokens before it in its chunk, except with "reference".
    scale: K**-0.5 if None. A number is static; an array of no dimensions may be traced and has a gradient.
    chunk_size: tokens per chunk, a power of two in [16, 128]; T need not be a multiple. On a GPU leave it None: a
      number skips the configuration that was measured for the device, and "pallas_triton" does not take 128.
    implementation: "pallas_triton", "xla_chunked" or "reference"; None takes the first that supports the inputs and
      the default backend (`kernels.explain` says which).
  Returns:
    The output in v's dtype, and S_T in float32.
  Raises:
    ValueError: a shape, dtype, number or implementation breaks a rule; the message names the value and the rule.
    NotImplementedError: the named implementation cannot run these inputs.
  Precision: products accumulate in float32. Their operands are bfloat16 for 16-bit inputs and float32 for float32
    inputs (`pallas_triton`: in three TF32 passes). The relative RMS error of the output against "reference", over at
    least 64 tokens and heads, is at most 5e-3 for 16-bit inputs and 1e-5 (`pallas_triton`: 1e-4) for float32 inputs;
    `kernels.accuracy` has the bound for a single entry. `pallas_triton` takes gates below -40 (a decay of
    4e-18), also -inf, as -40. Their gradient is then not 0 but the rounding error of the flow through the other gates.
  Memory: the backward pass keeps the inputs, for 16-bit inputs 8 K bytes per token and key head and 2 V per token and
    value head, and in `pallas_triton` also the state of each chunk of C tokens, 2 K V / C per value head: at H = G,
    K = V = 128 and C = 64, 1280 + 512 bytes. "xla_chunked" keeps q, k and log_decay for each value head.
  Derivatives: "xla_chunked" has first derivatives in reverse mode, and second derivatives in either mode over them:
    jax.grad and jax.jvp of jax.grad, jax.hessian. "pallas_triton" has first derivatives in reverse mode only.
    "reference" has all derivatives, and it alone supports jax.jvp of the op itself.
  Source: Yang et al., arXiv:2312.06635, sections 4.2 and 4.3.
  Example:
    >>> import jax, jax.numpy as jnp
    >>> from lin_jax.ops import gla
    >>> q, k, v, gate = jax.random.normal(jax.random.key(0), (4, 2, 100, 4, 32))  # [batch, time, heads, channels]
    >>> output, state = gla(q, k, v, jax.nn.log_sigmoid(gate) / 16)
    >>> output.shape, state.shape
    ((2, 100, 4, 32), (2, 4, 32, 32))
  """
  contract.check("gla", q, k, v, log_decay, initial_state, segment_ids)
  chunk_size = contract.chunk_size_of("gla", chunk_size)
  contract.require("gla", log_decay.shape == q.shape,
                   f"log_decay has shape {log_decay.shape}; it must equal q's {q.shape}")
  (B, _, H, V), K = v.shape, q.shape[-1]
  log_decay = log_decay.astype(jnp.float32)
  starts = None if segment_ids is None else chunks.segment_starts(segment_ids)
  if starts is not None:
    log_decay = jnp.where(starts[:, :, None, None], chunks.RESET, chunks.bounded(log_decay))
  if initial_state is None:
    initial_state = jnp.zeros((B, H, K, V), jnp.float32)
  scale, factor = contract.scale_of("gla", scale, K)
  run = dispatch.choose("gla", implementation, q, k, v, log_decay, chunk_size=chunk_size)
  call = containment.Call(_run, run, (("scale", scale), ("chunk_size", chunk_size)))
  op = containment.Op(call, lead=3, gates=3, selects=run is reference.gla)
  output, final_state = containment.contain(op, starts, (q, k, v, log_decay), initial_state)
  return contract.scaled(output, factor), final_state


def _run(run, starts, tokens, state, _, **options):
  return run(*tokens, state, **options)
