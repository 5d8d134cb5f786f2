"""The delta rule chunk by chunk in plain jnp, for every device; forward and backward.

`README.md` of this folder has the symbols and derives both passes, which the bodies below follow line by line. They
multiply q by the scale first.

Every product takes float32 operands, whatever the inputs are. Where keys are alike, the writes of a chunk nearly cancel
in its sums, and so do their cotangents. Where beta is 2, no error fades. Rounding the normalised keys to bfloat16 would
alone cost more than the bounds for 16-bit inputs allow.

The forward pass saves its inputs only. The backward pass recomputes the state entering each chunk, then walks back.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels import chunks
from kernels.chunk_states import next_state, scalar_decays

dot = chunks.product(jnp.float32)


def supports(q, k, v, beta, log_decay=None, segment_ids=None, *, chunk_size=None) -> str | None:
  """None: everything that `kernels.delta_rule` accepts."""
  return None


def delta_rule(q, k, v, beta, log_decay, initial_state, *, scale, normalize_qk, starts=None, chunk_size=None):
  """See `kernels.delta_rule`. The state is given; `starts` `[B, T]` says where segments start, if any do."""
  if starts is not None:
    log_decay = chunks.with_resets(log_decay, starts, v.shape[2])
  q, k = (chunks.repeat_heads(x, v.shape[2]) for x in (q, k))
  if chunk_size is None:
    chunk_size = 16 if q.shape[1] <= 16 else 32 if q.shape[1] <= 32 else 64
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
  _, states = jax.lax.scan(functools.partial(_state_chunk, rows), initial_state, xs[1:])
  body = functools.partial(_backward_chunk, scale, rows)
  dinitial_state, gradients = jax.lax.scan(body, dfinal_state, (xs, do, states), reverse=True)
  *arrays, dbeta, dlog_decay = jax.tree.map(lambda x: chunks.merge(x, doutput.shape[1]), gradients)
  return *arrays, *jax.tree.map(lambda x: x[..., 0], (dbeta, dlog_decay)), dinitial_state


_delta_rule.defvjp(_forward, _backward)


def _to_chunks(size, q, k, v, beta, log_decay):
  """Chunks `[N, B, C, H, .]` of each array, the last axis of beta and log_decay 1."""
  beta, log_decay = jax.tree.map(lambda x: x[..., None], (beta, log_decay))
  return jax.tree.map(lambda x: chunks.to_chunks(x, size), (q, k, v, beta, log_decay))


# Bodies of the scans over chunks: x holds one chunk `[B, C, H, .]` of each array. Heads move before time here and not
# in the whole arrays, because a chunk stays in the cache. `rows` makes float32 rows of q and k, of norm 1 if asked.


def _forward_chunk(scale, rows, state, x):
  q, k, v, beta, gate = _heads_first(x)
  q, k = scale * rows(q), rows(k)
  decays = between, upto, after, total = scalar_decays(_exponents(gate), k.shape[2])
  *_, u = _write(k, v, beta, decays, state)
  scores = between * dot("bhik,bhjk->bhij", q, k)
  output = dot("bhij,bhjv->bhiv", scores, u) + upto * dot("bhik,bhkv->bhiv", q, state)
  return next_state(state, total, k * after, u, dot), jnp.swapaxes(output.astype(v.dtype), 1, 2)


def _state_chunk(rows, state, x):
  k, v, beta, gate = _heads_first(x)
  k = rows(k)
  decays = _, _, after, total = scalar_decays(_exponents(gate), k.shape[2])
  *_, u = _write(k, v, beta, decays, state)
  return next_state(state, total, k * after, u, dot), state


def _backward_chunk(scale, rows, dstate, x):
  (q, k, v, beta, gate), do = _heads_first(x[:2])
  state = x[2]
  (q, transpose_q), (k, transpose_k) = (jax.vjp(rows, x) for x in (q, k))
  q = scale * q
  exponents, transpose = jax.vjp(_exponents, gate)
  decays = between, upto, after, total = scalar_decays(exponents, k.shape[2])
  overlaps, right, inverse, u = _write(k, v, beta, decays, state)

  scores = between * dot("bhik,bhjk->bhij", q, k)
  du = dot("bhij,bhiv->bhjv", scores, do) + after * dot("bhik,bhkv->bhiv", k, dstate)
  f = dot("bhij,bhiv->bhjv", inverse, du)
  dscores = dot("bhiv,bhjv->bhij", do, u)
  dlower = -_below(k.shape[2]) * dot("bhiv,bhjv->bhij", f, u)
  dv, doverlaps = beta * f, beta * dlower
  dbeta = chunks.rowsum(f * right) + chunks.rowsum(dlower * overlaps)
  dqk, dkk = between * dscores, between * doverlaps
  dq_state = upto * dot("bhiv,bhkv->bhik", do, state)
  dk_right = -upto * dot("bhiv,bhkv->bhik", dv, state)
  dk_state = after * dot("bhiv,bhkv->bhik", u, dstate)
  dq = dot("bhij,bhjk->bhik", dqk, k) + dq_state
  dk = (dot("bhij,bhik->bhjk", dqk, q) + dot("bhij,bhjk->bhik", dkk + dkk.mT, k)) + dk_right + dk_state

  dgate = None
  if gate is not None:
    dtotal = total * jnp.sum(state * dstate, axis=(-2, -1), keepdims=True)
    dgate, = transpose((scores * dscores + overlaps * doverlaps, chunks.rowsum(q * dq_state + k * dk_right),
                        chunks.rowsum(k * dk_state), dtotal))
  dstate = next_state(dstate, total, q * upto, do, dot) - dot("bhik,bhiv->bhkv", k * upto, dv)
  gradients = *transpose_q(scale * dq), *transpose_k(dk), dv.astype(v.dtype), dbeta, dgate
  return dstate, _heads_first(gradients)


def _write(k, v, beta, decays, state):
  """X, R, A and U."""
  between, upto, _, _ = decays
  overlaps = _below(k.shape[2]) * between * dot("bhik,bhjk->bhij", k, k)
  right = chunks.wide(v) - upto * dot("bhik,bhkv->bhiv", k, state)
  inverse = chunks.unit_lower_inverse(beta * overlaps)
  return overlaps, right, inverse, dot("bhij,bhjv->bhiv", inverse, beta * right)


def _exponents(gate):
  return None if gate is None else chunks.exponents(gate)


def _below(size):
  return np.tril(np.ones((1, 1, size, size), np.float32), -1)


def _heads_first(arrays):
  return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), arrays)
