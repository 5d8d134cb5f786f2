"""Selective scan in plain jnp, for every device: forward and backward with one state kept per chunk of tokens.

`README.md` of this folder has the symbols and the gradients. Every entry of the state has a decay of its own, so a
chunk has no form as matrix products: inside a chunk the tokens follow one another.

The forward pass saves its inputs and, when a gradient is wanted, the state that enters each chunk. The backward pass
takes the chunks from the last to the first, forms the states of each again, and walks back through it.
"""

import jax
import jax.numpy as jnp

from kernels import chunks

CHUNK = 64


def supports(*arrays, chunk_size=None) -> str | None:
  """None: everything that `kernels.selective_scan` accepts."""
  return None


@jax.custom_vjp
def selective_scan(x, step_size, a, b, c, resets, initial_state):
  """See `kernels.selective_scan`. The state is given; `resets` [B, T], if any, are below 0 where the state restarts."""
  output, _, final_state = _scan(x, step_size, a, b, c, resets, initial_state)
  return output, final_state


def _forward(x, step_size, a, b, c, resets, initial_state):
  output, states, final_state = _scan(x, step_size, a, b, c, resets, initial_state)
  return (output, final_state), (x, step_size, a, b, c, resets, states)


def _scan(x, step_size, a, b, c, resets, initial_state):
  """The output, the state that enters each chunk, and the final state."""

  def token(state, now):
    x, step, b, c, reset = now
    state = chunks.decayed(_decay(step, a, reset), state) + _outer(step * _wide(x), _wide(b))
    return state, jnp.sum(state * _wide(c)[:, None], axis=-1).astype(x.dtype)

  def chunk(state, arrays):
    after, output = jax.lax.scan(token, state, arrays)
    return after, (output, state)

  final_state, (output, states) = jax.lax.scan(chunk, initial_state, _chunks(x, step_size, b, c, resets))
  return _merge(output, x.shape[1]), states, final_state


def _backward(residuals, cotangents):
  x, step_size, a, b, c, resets, states = residuals
  doutput, dfinal_state = cotangents

  def token(state, now):
    x, step, b, _, reset, _ = now
    kept = chunks.decayed(_decay(step, a, reset), state)
    return kept + _outer(step * _wide(x), _wide(b)), kept

  def token_back(carry, now):
    (dstate, da), ((x, step, b, c, reset, dy), kept) = carry, now
    x, b, c, dy = (_wide(array) for array in (x, b, c, dy))
    dstate = dstate + _outer(dy, c)
    through = dstate * kept
    dc = jnp.sum((kept + _outer(step * x, b)) * dy[:, :, None], axis=1)
    db = jnp.sum(dstate * (step * x)[:, :, None], axis=1)
    du = jnp.sum(dstate * b[:, None], axis=-1)
    dstep = x * du + jnp.sum(through * a[None], axis=-1)
    da = da + jnp.sum(step[:, :, None] * through, axis=0)
    return (chunks.decayed(_decay(step, a, reset), dstate), da), (step * du, dstep, db, dc)

  def chunk(carry, arrays):
    arrays, state = arrays
    _, kept = jax.lax.scan(token, state, arrays)
    return jax.lax.scan(token_back, carry, (arrays, kept), reverse=True)

  arrays = _chunks(x, step_size, b, c, resets, doutput)
  (dinitial_state, da), gradients = jax.lax.scan(
      chunk, (dfinal_state, jnp.zeros_like(a)), (arrays, states), reverse=True)
  dx, dstep_size, db, dc = (_merge(array, x.shape[1]) for array in gradients)
  dx, db, dc = (array.astype(x.dtype) for array in (dx, db, dc))
  return dx, dstep_size, da, db, dc, None, dinitial_state


selective_scan.defvjp(_forward, _backward)


def _decay(step, a, reset):
  """exp(step a), or 0 where there is a reset: `[B, D, N]`."""
  decay = jnp.exp(step[:, :, None] * a[None])
  return decay if reset is None else jnp.where(reset[:, None, None] < 0, 0.0, decay)


def _outer(u, b):
  return u[:, :, None] * b[:, None]


def _wide(x):
  return x.astype(jnp.float32)


def _chunks(*arrays):
  """`[B, T, ...]` to `[T / C, C, B, ...]`. Zeros fill up the last chunk: a step size of 0 leaves states unchanged."""

  def cut(x):
    x = jnp.moveaxis(x, 1, 0)
    size = min(CHUNK, x.shape[0])
    x = jnp.pad(x, ((0, -x.shape[0] % size), *((0, 0) for _ in x.shape[1:])))
    return x.reshape(-1, size, *x.shape[1:])

  return tuple(None if x is None else cut(x) for x in arrays)


def _merge(x, T):
  """Inverse of `_chunks` for one array."""
  return jnp.moveaxis(x.reshape(-1, *x.shape[2:])[:T], 0, 1)
