"""The delta rule token by token, in float32: the definition, and the decode step."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import chunks


def step(state: Float[Array, "B H K V"], q: Float[Array, "B H K"], k: Float[Array, "B H K"], v: Float[Array, "B H V"],
         beta: Float[Array, "B H"], log_decay: Float[Array, "B H"] | Float[Array, "B H K"] | None = None, *,
         normalize_qk: bool = False) -> tuple[Float[Array, "B H K V"], Float[Array, "B H V"]]:
  """One token: S' = a S + beta k^T (v - k a S) with a = exp(log_decay), and the unscaled output q S', both float32.

  A decay per key channel multiplies the rows of S.
  """
  q, k, v, beta = (x.astype(jnp.float32) for x in (q, k, v, beta))
  if normalize_qk:
    q, k = chunks.normalize(q), chunks.normalize(k)
  if log_decay is not None:
    decay = jnp.exp(log_decay.astype(jnp.float32))
    state = chunks.decayed(decay.reshape(*decay.shape, *[1] * (4 - decay.ndim)), state)
  error = v - chunks.einsum("bhk,bhkv->bhv", k, state)
  state = state + k[..., None] * (beta[..., None] * error)[..., None, :]
  return state, chunks.einsum("bhk,bhkv->bhv", q, state)


def delta_rule(q, k, v, beta, log_decay, initial_state, *, scale, normalize_qk, starts=None, chunk_size=None):
  """See `kernels.delta_rule`: the scan of `step`. `chunk_size` has no effect."""
  del chunk_size
  q, k = (chunks.repeat_heads(x, v.shape[2]) for x in (q, k))
  if starts is not None:
    log_decay = with_resets(log_decay, starts, v.shape[2])
  by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, beta, log_decay))
  final_state, output = jax.lax.scan(
      lambda state, x: step(state, *x, normalize_qk=normalize_qk), initial_state, by_time)
  return (scale * jnp.moveaxis(output, 0, 1)).astype(v.dtype), final_state


def with_resets(log_decay, starts, heads):
  """Any form of `log_decay` as one per token or key channel that is RESET where a segment starts."""
  if log_decay is not None and log_decay.ndim == 4:
    return jnp.where(starts[:, :, None, None], chunks.RESET, log_decay)
  return chunks.with_resets(log_decay, starts, heads)


def supports(q, k, v, beta, log_decay=None, segment_ids=None, *, chunk_size=None) -> str | None:
  """None: the definition runs everything."""
  return None
