"""Selective scan token by token, in float32: the definition, and the decode step."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import chunks


def step(state: Float[Array, "B D N"], x: Float[Array, "B D"], step_size: Float[Array, "B D"], a: Float[Array, "D N"],
         b: Float[Array, "B N"], c: Float[Array, "B N"], reset: Float[Array, "B"] | None = None,
         ) -> tuple[Float[Array, "B D N"], Float[Array, "B D"]]:
  """One token: h' = exp(step_size a) h + step_size x b and the output h' c, both float32; a `reset` < 0 forgets h."""
  x, step_size, b, c = (array.astype(jnp.float32) for array in (x, step_size, b, c))
  decay = jnp.exp(step_size[:, :, None] * a[None])
  if reset is not None:
    decay = jnp.where(reset[:, None, None] < 0, 0.0, decay)
  state = chunks.decayed(decay, state) + (step_size * x)[:, :, None] * b[:, None]
  return state, jnp.sum(state * c[:, None], axis=-1)


def selective_scan(x, step_size, a, b, c, resets, initial_state):
  """See `kernels.selective_scan`: the scan of `step`. `resets` [B, T], if any, are below 0 where the state restarts."""
  by_time = jax.tree.map(lambda array: jnp.moveaxis(array, 1, 0), (x, step_size, b, c, resets))
  body = lambda state, now: step(state, *now[:2], a, *now[2:])
  final_state, output = jax.lax.scan(body, initial_state, by_time)
  return jnp.moveaxis(output, 0, 1).astype(x.dtype), final_state


def supports(*arrays, chunk_size=None) -> str | None:
  """None: the definition runs everything."""
  return None
