"""Gated linear attention chunk by chunk in plain jnp, for every device; forward and backward.

`README.md` of this folder has the symbols and derives both passes. The scores P of a chunk and their gradients come
from the dyadic levels of `kernels.chunks`, so every exponent is a sum of gates and never a difference of sums, and
gates that almost close keep their relative precision.

The forward pass saves its inputs only. The backward pass recomputes the state entering each chunk, then walks back.
Source: arXiv:2312.06635, section 4.3.
"""

import functools

import jax
import jax.numpy as jnp

from kernels import chunks
from kernels.chunk_states import next_state


def supports(q, k, v, log_decay, *, chunk_size=None) -> str | None:
  """None: everything that `kernels.gla` accepts."""
  return None


def gla(q, k, v, log_decay, initial_state, *, scale, chunk_size=None):
  """See `kernels.gla`. The state is given, segments are resets in `log_decay`."""
  q, k, log_decay = (chunks.repeat_heads(x, v.shape[2]) for x in (q, k, log_decay))
  if chunk_size is None:
    chunk_size = _chunk_size(q.shape[1], q.shape[3], v.shape[3])
  return _gla(q, k, v, log_decay, initial_state, scale, chunk_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _gla(q, k, v, log_decay, initial_state, scale, chunk_size):
  return _output(q, k, v, log_decay, initial_state, scale, chunk_size)


def _forward(q, k, v, log_decay, initial_state, scale, chunk_size):
  return _output(q, k, v, log_decay, initial_state, scale, chunk_size), (q, k, v, log_decay, initial_state)


def _output(q, k, v, log_decay, initial_state, scale, chunk_size):
  xs = [chunks.to_chunks(x, chunk_size) for x in (q, k, v, chunks.bounded(log_decay))]
  final_state, output = jax.lax.scan(functools.partial(_forward_chunk, scale), initial_state, xs)
  return chunks.merge(output, q.shape[1]), final_state


def _backward(scale, chunk_size, residuals, cotangents):
  q, k, v, log_decay, initial_state = residuals
  doutput, dfinal_state = cotangents
  q, k, v, g, do = (chunks.to_chunks(x, chunk_size) for x in (q, k, v, chunks.bounded(log_decay), doutput))
  _, states = jax.lax.scan(_state_chunk, initial_state, (k, v, g))
  dinitial_state, gradients = jax.lax.scan(
      functools.partial(_backward_chunk, scale), dfinal_state, (q, k, v, g, do, states), reverse=True)
  return *(chunks.merge(x, doutput.shape[1]) for x in gradients), dinitial_state


_gla.defvjp(_forward, _backward)


# Bodies of the scans over chunks: x holds one chunk `[B, C, H, .]` of each array. Heads move before time here and not
# in the whole arrays, because a chunk stays in the cache.


def _forward_chunk(scale, state, x):
  q, k, v, g = chunks.heads_first(x)
  dot, q, k = chunks.product(q.dtype), scale * chunks.wide(q), chunks.wide(k)
  scores, upto, after, _, _ = _intra(q, k, g, dot)
  output = (dot("bhij,bhjv->bhiv", scores, v) + dot("bhik,bhkv->bhiv", q * upto, state) +
            chunks.rowsum(q * k) * chunks.wide(v))
  return next_state(state, upto[:, :, -1, :, None], k * after, v, dot), jnp.swapaxes(output, 1, 2).astype(v.dtype)


def _state_chunk(state, x):
  k, v, g = chunks.heads_first(x)
  after_terms = chunks.level_masks(g.shape[2])[0][-1]
  after = jnp.exp(chunks.einsum("ij,bhjk->bhik", after_terms, g))
  total = jnp.exp(jnp.sum(g, axis=2))
  return next_state(state, total[..., None], chunks.wide(k) * after, v, chunks.product(k.dtype)), state


def _backward_chunk(scale, dstate, x):
  (q, k, v, g, do), state = chunks.heads_first(x[:-1]), x[-1]
  dtype, dot, q, k = q.dtype, chunks.product(q.dtype), scale * chunks.wide(q), chunks.wide(k)
  scores, upto, after, decay, rows = _intra(q, k, g, dot)
  _, pairs, second = chunks.level_masks(g.shape[2])
  total = upto[:, :, -1]

  dscores = pairs[None, None] * dot("bhiv,bhjv->bhij", do, v)[:, :, None]
  drows = dot("bhlij,bhljk->bhlik", dscores + dscores.mT, rows)
  dlevels = decay * drows
  dq_state = upto * dot("bhiv,bhkv->bhik", do, state)
  dk_state = after * dot("bhiv,bhkv->bhik", v, dstate)
  # The diagonal of P carries no gate.
  diagonal, ddiagonal = chunks.rowsum(q * k), chunks.rowsum(chunks.wide(do) * chunks.wide(v))
  dq = jnp.sum(second[None, None] * dlevels, axis=2) + dq_state + ddiagonal * k
  dk = jnp.sum((1 - second[None, None]) * dlevels, axis=2) + dk_state + ddiagonal * q
  dv = (dot("bhij,bhiv->bhjv", scores, do) + diagonal * chunks.wide(do) +
        dot("bhik,bhkv->bhiv", k * after, dstate))

  dexponents = jnp.concatenate([rows * drows, (q * dq_state)[:, :, None], (k * dk_state)[:, :, None]], axis=2)
  dtotal = total * jnp.sum(state * dstate, axis=-1)
  dg = chunks.sum_exponent_cotangents(dexponents) + dtotal[:, :, None]
  dstate = next_state(dstate, total[..., None], q * upto, do, dot)
  return dstate, chunks.heads_first([*(x.astype(dtype) for x in (scale * dq, dk, dv)), dg])


def _intra(q, k, g, dot):
  """Pair weights without their diagonal, exp of `upto` and `after`, decays `[B, H, L, C, K]` of the levels, and Z."""
  _, pairs, second = chunks.level_masks(g.shape[2])
  decay = chunks.decays(g)
  decay, upto, after = decay[:, :, :-2], decay[:, :, -2], decay[:, :, -1]
  rows = decay * jnp.where(second[None, None] > 0, q[:, :, None], k[:, :, None])
  scores = jnp.sum(pairs[None, None] * dot("bhlik,bhljk->bhlij", rows, rows), axis=2)
  return scores, upto, after, decay, rows


def _chunk_size(T, K, V):
  """Long enough that the saved states of the backward pass stay comparable to the inputs."""
  return 16 if T <= 16 else 32 if T <= 32 or K * V <= 128 * 128 else 64
