"""Linear attention with scalar decay token by token, in float32: the definition, and the decode step."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import chunks


def step(state: Float[Array, "B H K V"], q: Float[Array, "B H K"], k: Float[Array, "B H K"], v: Float[Array, "B H V"],
         log_decay: Float[Array, "H"] | Float[Array, "B H"] | None = None,
         ) -> tuple[Float[Array, "B H K V"], Float[Array, "B H V"]]:
  """One token: S' = exp(log_decay) S + k^T v and the unscaled output q S', both float32."""
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  if log_decay is not None:
    decay = jnp.broadcast_to(jnp.exp(log_decay.astype(jnp.float32)), state.shape[:2])
    state = chunks.decayed(decay[..., None, None], state)
  state = state + k[..., None] * v[..., None, :]
  return state, chunks.einsum("bhk,bhkv->bhv", q, state)


def linear_attention(q, k, v, log_decay, initial_state, *, scale, starts=None, chunk_size=None):
  """See `kernels.linear_attention`: the scan of `step`. `chunk_size` has no effect."""
  del chunk_size
  q, k = (chunks.repeat_heads(x, v.shape[2]) for x in (q, k))
  if starts is not None:
    log_decay = chunks.with_resets(log_decay, starts, v.shape[2])
  elif log_decay is not None:
    log_decay = jnp.broadcast_to(log_decay, v.shape[:3])
  by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, log_decay))
  final_state, output = jax.lax.scan(lambda state, x: step(state, *x), initial_state, by_time)
  return (scale * jnp.moveaxis(output, 0, 1)).astype(v.dtype), final_state


def supports(q, k, v, log_decay=None, *, chunk_size=None) -> str | None:
  """None: the definition runs everything."""
  return None
