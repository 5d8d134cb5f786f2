"""The delta rule chunk by chunk in plain jnp, for every device; forward and backward.

`README.md` of this folder has the symbols and derives both passes, which the bodies below follow line by line. They
multiply q by the scale first. `chunk_factors.py` has all that depends on the decay, and JAX transposes it.

Every product takes float32 operands, whatever the inputs are. Where keys are alike, the writes of a chunk nearly cancel
in its sums, and so do their cotangents. Where beta is 2, no error fades. Rounding the normalised keys to bfloat16 would
alone cost more than the bounds for 16-bit inputs allow.

The forward pass saves its inputs only. The backward pass recomputes the state entering each chunk, then walks back.
"""

import functools

import jax
import jax.numpy as jnp

from kernels import chunks
from kernels.chunk_states import next_state
from kernels.delta_rule.chunk_factors import Factors, dot, factors
from kernels.delta_rule.reference import with_resets


def supports(q, k, v, beta, log_decay=None, segment_ids=None, *, chunk_size=None) -> str | None:
  """None: everything that `kernels.delta_rule` accepts."""
  return None


def delta_rule(q, k, v, beta, log_decay, initial_state, *, scale, normalize_qk, starts=None, chunk_size=None):
  """See `kernels.delta_rule`. The state is given; `starts` `[B, T]` says where segments start, if any do."""
  if starts is not None:
    log_decay = with_resets(log_decay, starts, v.shape[2])
  q, k = (chunks.repeat_heads(x, v.shape[2]) for x in (q, k))
  chunk_size = chunk_size or _chunk_size(q.shape[1], q.shape[3], v.shape[3], log_decay)
  rows = chunks.normalize if normalize_qk else chunks.wide
  return _delta_rule(q, k, v, beta, log_decay, initial_state, scale, rows, chunk_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _delta_rule(q, k, v, beta, log_decay, initial_state, scale, rows, chunk_size):
  return _output(q, k, v, beta, log_decay, initial_state, scale, rows, chunk_size)


def _forward(q, k, v, beta, log_decay, initial_state, scale, rows, chunk_size):
  residuals = q, k, v, beta, log_decay, initial_state
  return _output(*residuals, scale, rows, chunk_size), residuals


def _output(q, k, v, beta, log_decay, initial_state, scale, rows, chunk_size):
  xs = _to_chunks(chunk_size, q, k, v, beta, log_decay)
  body = functools.partial(_forward_chunk, scale, rows)
  final_state, output = jax.lax.scan(body, initial_state, xs)
  return chunks.merge(output, q.shape[1]), final_state


def _backward(scale, rows, chunk_size, residuals, cotangents):
  *inputs, initial_state = residuals
  doutput, dfinal_state = cotangents
  xs, do = _to_chunks(chunk_size, *inputs), chunks.to_chunks(doutput, chunk_size)
  _, states = jax.lax.scan(functools.partial(_state_chunk, scale, rows), initial_state, xs)
  body = functools.partial(_backward_chunk, scale, rows)
  dinitial_state, gradients = jax.lax.scan(body, dfinal_state, (xs, do, states), reverse=True)
  gradients = jax.tree.map(lambda x, like: chunks.merge(x, doutput.shape[1]).reshape(like.shape), gradients,
                           tuple(inputs))
  return *gradients, dinitial_state


_delta_rule.defvjp(_forward, _backward)


def _chunk_size(T, K, V, log_decay):
  """With a decay per channel a longer chunk has more levels, but the backward pass saves fewer states."""
  most = 32 if log_decay is not None and log_decay.ndim == 4 and K * V <= 128 * 128 else 64
  return min(most, 16 if T <= 16 else 32 if T <= 32 else 64)


def _to_chunks(size, q, k, v, beta, log_decay):
  """Chunks `[N, B, C, H, .]` of each array, the last axis of beta and of a decay per token 1."""
  beta, log_decay = jax.tree.map(lambda x: x.reshape(*q.shape[:3], -1), (beta, log_decay))
  return jax.tree.map(lambda x: chunks.to_chunks(x, size), (q, k, v, beta, log_decay))


# Bodies of the scans over chunks: x holds one chunk `[B, C, H, .]` of each array. Heads move before time here and not
# in the whole arrays, because a chunk stays in the cache. `rows` makes float32 rows of q and k, of norm 1 if asked.


def _forward_chunk(scale, rows, state, x):
  q, k, v, beta, gate = _heads_first(x)
  chunk = factors(scale * rows(q), rows(k), gate)
  *_, u = _write(chunk, v, beta, state)
  output = dot("bhij,bhjv->bhiv", chunk.scores, u) + dot("bhik,bhkv->bhiv", chunk.q_upto, state)
  return next_state(state, chunk.total, chunk.k_after, u, dot), jnp.swapaxes(output.astype(v.dtype), 1, 2)


def _state_chunk(scale, rows, state, x):
  """The compiler drops the output, which nothing reads."""
  return _forward_chunk(scale, rows, state, x)[0], state


def _backward_chunk(scale, rows, dstate, x):
  (q, k, v, beta, gate), do = _heads_first(x[:2])
  state = x[2]
  chunk, transpose = jax.vjp(lambda q, k, gate: factors(scale * rows(q), rows(k), gate), q, k, gate)
  right, inverse, u = _write(chunk, v, beta, state)

  du = dot("bhij,bhiv->bhjv", chunk.scores, do) + dot("bhik,bhkv->bhiv", chunk.k_after, dstate)
  f = dot("bhij,bhiv->bhjv", inverse, du)
  dlower = -dot("bhiv,bhjv->bhij", f, u)
  dv = beta * f
  dbeta = chunks.rowsum(f * right) + chunks.rowsum(dlower * chunk.overlaps)
  dq, dk, dgate = transpose(Factors(
      scores=dot("bhiv,bhjv->bhij", do, u), overlaps=beta * dlower, q_upto=dot("bhiv,bhkv->bhik", do, state),
      k_upto=-dot("bhiv,bhkv->bhik", dv, state), k_after=dot("bhiv,bhkv->bhik", u, dstate),
      total=chunks.rowsum(state * dstate)))
  dstate = next_state(dstate, chunk.total, chunk.q_upto, do, dot) - dot("bhik,bhiv->bhkv", chunk.k_upto, dv)
  return dstate, _heads_first((dq, dk, dv.astype(v.dtype), dbeta, dgate))


def _write(chunk, v, beta, state):
  """R, A and U."""
  right = chunks.wide(v) - dot("bhik,bhkv->bhiv", chunk.k_upto, state)
  inverse = chunks.unit_lower_inverse(beta * chunk.overlaps)
  return right, inverse, dot("bhij,bhjv->bhiv", inverse, beta * right)


def _heads_first(arrays):
  return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), arrays)
