"""The delta rule chunk by chunk in plain jnp, for every device; forward and backward.

With q scaled, S the state entering and S' the one leaving a chunk, `between`, `upto`, `after`, `total` as in
`kernels.chunks.exponents`, and D = exp(between) below and on the diagonal, 0 above, token i writes k_i^T U_i, where U
solves a triangular system (arXiv:2406.06484, section 3.2; with decay arXiv:2412.06464, section 3.3):

  (I + L) U = beta * E                         L = beta * X with X = D * (K K^T) below the diagonal, 0 elsewhere
  E = V - exp(upto) * (K S)                    P = D * (Q K^T)
  O = P U + exp(upto) * (Q S)                  S' = exp(total) S + (K * exp(after))^T U

The papers apply A = (I + L)^-1 to beta * V and to beta * exp(upto) * K. One product, with what the state S lacks, needs
fewer operations, and no gradient of A:

  dU = P^T dO + exp(after) * (K dS')           dV = beta * dR with dR = A^T dU
  dP = dO U^T                                  dX = beta * dL with dL = -dR U^T below the diagonal, 0 elsewhere
  dbeta = rowsum(dR * E) + rowsum(dL * X)      dS = exp(total) dS' + (Q * exp(upto))^T dO - (K * exp(upto))^T dV
  dQ = (D * dP) K + exp(upto) * (dO S^T)
  dK = (D * dP)^T Q + (D * dX + its transpose) K + exp(after) * (U dS'^T) - exp(upto) * (dV S^T)

The cotangent of an exponent is P * dP + X * dX, query and key times their shares of dQ and dK, or for the total
exp(total) * sum(S * dS'). The sums that form the exponents, transposed, give dlog_decay: none is a difference of larger
terms. Without decay there is nothing to form.

Every product takes float32 operands, whatever the inputs are. Where keys are alike, the writes of a chunk all but
cancel in its sums, and so do their cotangents; where beta is 2, no error fades. Rounding normalised keys to bfloat16
alone costs more than the results for 16-bit inputs may be off.

The forward pass saves its inputs only. The backward pass recomputes the state entering each chunk, then walks back.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels import chunks
from kernels.chunk_states import next_state, scalar_decays

dot = chunks.product(jnp.float32)


def supports(q, k, v, beta, log_decay=None, *, chunk_size=None) -> str | None:
  """None: everything that `kernels.delta_rule` accepts."""
  return None


def delta_rule(q, k, v, beta, log_decay, initial_state, *, scale, normalize_qk, chunk_size=None):
  """See `kernels.delta_rule`. Heads are equal, the state is given, segments are already resets in `log_decay`."""
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
  xs = _split(chunk_size, q, k, v, beta, log_decay)
  body = functools.partial(_forward_chunk, scale, rows)
  final_state, output = jax.lax.scan(body, initial_state, xs)
  return chunks.merge(output, q.shape[1]), final_state


def _backward(scale, rows, chunk_size, residuals, cotangents):
  *inputs, initial_state = residuals
  doutput, dfinal_state = cotangents
  xs, do = _split(chunk_size, *inputs), chunks.split(doutput, chunk_size)
  _, states = jax.lax.scan(functools.partial(_state_chunk, rows), initial_state, xs[1:])
  body = functools.partial(_backward_chunk, scale, rows)
  dinitial_state, gradients = jax.lax.scan(body, dfinal_state, (xs, do, states), reverse=True)
  *arrays, dbeta, dlog_decay = jax.tree.map(lambda x: chunks.merge(x, doutput.shape[1]), gradients)
  return *arrays, *jax.tree.map(lambda x: x[..., 0], (dbeta, dlog_decay)), dinitial_state


_delta_rule.defvjp(_forward, _backward)


def _split(size, q, k, v, beta, log_decay):
  """Chunks `[N, B, C, H, .]` of each array, the last axis of beta and log_decay 1."""
  beta, log_decay = jax.tree.map(lambda x: x[..., None], (beta, log_decay))
  return jax.tree.map(lambda x: chunks.split(x, size), (q, k, v, beta, log_decay))


# Bodies of the scans over chunks: x holds one chunk `[B, C, H, .]` of each array. Heads move before time here and not
# in the whole arrays, because a chunk stays in the cache. `rows` makes float32 rows of q and k, of norm 1 if asked.


def _forward_chunk(scale, rows, state, x):
  q, k, v, beta, gate = _heads_first(x)
  q, k = scale * rows(q), rows(k)
  decays = between, upto, after, total = scalar_decays(_exponents(gate), k.shape[2])
  *_, new = _write(k, v, beta, decays, state)
  scores = between * dot("bhik,bhjk->bhij", q, k)
  output = dot("bhij,bhjv->bhiv", scores, new) + upto * dot("bhik,bhkv->bhiv", q, state)
  return next_state(state, total, k * after, new, dot), jnp.swapaxes(output.astype(v.dtype), 1, 2)


def _state_chunk(rows, state, x):
  k, v, beta, gate = _heads_first(x)
  k = rows(k)
  decays = _, _, after, total = scalar_decays(_exponents(gate), k.shape[2])
  *_, new = _write(k, v, beta, decays, state)
  return next_state(state, total, k * after, new, dot), state


def _backward_chunk(scale, rows, dstate, x):
  (q, k, v, beta, gate), do = _heads_first(x[:2])
  state = x[2]
  (q, transpose_q), (k, transpose_k) = (jax.vjp(rows, x) for x in (q, k))
  q = scale * q
  exponents, transpose = jax.vjp(_exponents, gate)
  decays = between, upto, after, total = scalar_decays(exponents, k.shape[2])
  overlaps, error, inverse, new = _write(k, v, beta, decays, state)

  scores = between * dot("bhik,bhjk->bhij", q, k)
  dnew = dot("bhij,bhiv->bhjv", scores, do) + after * dot("bhik,bhkv->bhiv", k, dstate)
  dright = dot("bhij,bhiv->bhjv", inverse, dnew)
  dscores = dot("bhiv,bhjv->bhij", do, new)
  dlower = -_below(k.shape[2]) * dot("bhiv,bhjv->bhij", dright, new)
  dv, doverlaps = beta * dright, beta * dlower
  dbeta = chunks.rowsum(dright * error) + chunks.rowsum(dlower * overlaps)
  dqk, dkk = between * dscores, between * doverlaps
  dq_state = upto * dot("bhiv,bhkv->bhik", do, state)
  dk_error = -upto * dot("bhiv,bhkv->bhik", dv, state)
  dk_state = after * dot("bhiv,bhkv->bhik", new, dstate)
  dq = dot("bhij,bhjk->bhik", dqk, k) + dq_state
  dk = (dot("bhij,bhik->bhjk", dqk, q) + dot("bhij,bhjk->bhik", dkk + dkk.mT, k)) + dk_error + dk_state

  dgate = None
  if gate is not None:
    dtotal = total * jnp.sum(state * dstate, axis=(-2, -1), keepdims=True)
    dgate, = transpose((scores * dscores + overlaps * doverlaps, chunks.rowsum(q * dq_state + k * dk_error),
                        chunks.rowsum(k * dk_state), dtotal))
  dstate = next_state(dstate, total, q * upto, do, dot) - dot("bhik,bhiv->bhkv", k * upto, dv)
  gradients = *transpose_q(scale * dq), *transpose_k(dk), dv.astype(v.dtype), dbeta, dgate
  return dstate, _heads_first(gradients)


def _write(k, v, beta, decays, state):
  """X, E, A and U."""
  between, upto, _, _ = decays
  overlaps = _below(k.shape[2]) * between * dot("bhik,bhjk->bhij", k, k)
  error = chunks.wide(v) - upto * dot("bhik,bhkv->bhiv", k, state)
  inverse = chunks.unit_lower_inverse(beta * overlaps)
  return overlaps, error, inverse, dot("bhij,bhjv->bhiv", inverse, beta * error)


def _exponents(gate):
  return None if gate is None else chunks.exponents(gate)


def _below(size):
  return np.tril(np.ones((1, 1, size, size), np.float32), -1)


def _heads_first(arrays):
  return jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), arrays)
