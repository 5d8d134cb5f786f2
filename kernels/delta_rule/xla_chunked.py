"""The delta rule chunk by chunk in plain jnp, for every device; forward and backward.

With q scaled, S the state entering and S' the one leaving a chunk, `between`, `upto`, `after`, `total` as in
`kernels.chunks.exponents` and D = exp(between), what the tokens of a chunk write, U, solves a triangular system
(arXiv:2406.06484, section 3.2; with decay arXiv:2412.06464, section 3.3)

  (I + L) U = beta * E                         L = beta * D * (K K^T) below the diagonal, 0 elsewhere
  E = V - (K * exp(upto)) S                    P = D * (Q K^T) below and on the diagonal, 0 above
  O = P U + (Q * exp(upto)) S                  S' = exp(total) S + (K * exp(after))^T U

so keys read as queries do, through L and the state, and Z = [Q; K], W = [P; L] hold both. E takes the place of the
published form's difference of two products with (I + L)^-1. Given dO and dS'

  dU = P^T dO + (K * exp(after)) dS'           dV = beta * dR with dR = (I + L)^-T dU
  dW = [dO; -dR] U^T                           dbeta = rowsum(dR * E) + rowsum(dL * D * (K K^T))

and with dG = [D; beta * D] * dW, zero where W is, and Y = [dO; -dV] the cotangent of what Z reads from the state

  dZ = dG K + exp(upto) * (Y S^T)              dK = its share of dZ + dG^T Z + exp(after) * (U dS'^T)
  dS = exp(total) dS' + (Z * exp(upto))^T Y

The cotangent of an exponent is W * dW summed over its halves, Z times its share of dZ likewise, K times its share of
dK, or for the total exp(total) * sum(S * dS'). Their sums are dlog_decay: none is a difference of larger terms, and
without decay there is nothing to form.

The forward pass saves its inputs only. The backward pass recomputes the state entering each chunk, then walks back.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels import chunks

# Chunks per iteration of the compiled loops.
UNROLL = 2

exact = chunks.product(jnp.float32)


def supports(q, k, v, beta, log_decay=None, *, chunk_size=None) -> str | None:
  """None: everything that `kernels.delta_rule` accepts."""
  return None


def delta_rule(q, k, v, beta, log_decay, initial_state, *, scale, normalize_qk, chunk_size=None):
  """See `kernels.delta_rule`. Heads are equal, the state is given, segments are already resets in `log_decay`."""
  if chunk_size is None:
    chunk_size = _chunk_size(q.shape[1], q.shape[3], v.shape[3])
  return _delta_rule(q, k, v, beta, log_decay, initial_state, scale, normalize_qk, chunk_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _delta_rule(q, k, v, beta, log_decay, initial_state, scale, normalize_qk, chunk_size):
  xs = _split(q, k, v, beta, log_decay, chunk_size)
  body = functools.partial(_forward_chunk, scale, normalize_qk)
  final_state, output = jax.lax.scan(body, initial_state, xs, unroll=UNROLL)
  return chunks.merge(output, q.shape[1]), final_state


def _forward(q, k, v, beta, log_decay, initial_state, scale, normalize_qk, chunk_size):
  residuals = q, k, v, beta, log_decay, initial_state
  return _delta_rule(*residuals, scale, normalize_qk, chunk_size), residuals


def _backward(scale, normalize_qk, chunk_size, residuals, cotangents):
  *inputs, initial_state = residuals
  doutput, dfinal_state = cotangents
  xs = _split(*inputs, chunk_size)
  _, states = jax.lax.scan(functools.partial(_state_chunk, normalize_qk), initial_state, xs[1:], unroll=UNROLL)
  body = functools.partial(_backward_chunk, scale, normalize_qk)
  dinitial_state, gradients = jax.lax.scan(
      body, dfinal_state, (xs, chunks.split(doutput, chunk_size), states), reverse=True, unroll=UNROLL)
  dq, dk, dv, dbeta, dlog_decay = (x if x is None else chunks.merge(x, doutput.shape[1]) for x in gradients)
  return dq, dk, dv, dbeta[..., 0], None if dlog_decay is None else dlog_decay[..., 0], dinitial_state


_delta_rule.defvjp(_forward, _backward, optimize_remat=True)


def _split(q, k, v, beta, log_decay, size):
  numbers = [x if x is None else x[..., None] for x in (beta, log_decay)]
  return [x if x is None else chunks.split(x, size) for x in (q, k, v, *numbers)]


# Bodies of the scans over chunks: x holds one chunk `[B, C, H, .]` of each array. Heads move before time here and not
# in the whole arrays, because a chunk stays in the cache.


def _forward_chunk(scale, normalize_qk, state, x):
  q, k, v, beta, gate = _heads_first(x)
  dtype, dot = q.dtype, chunks.product(q.dtype)
  if normalize_qk:
    q, k = chunks.normalize(q), chunks.normalize(k)
  q, k = scale * chunks.wide(q), chunks.wide(k)
  between, upto, after, total = _decays(gate, k.shape[2])
  _, new, _, _ = _write(k, v, beta, between, upto, state, dot)
  scores = between * dot("bhik,bhjk->bhij", q, k)
  output = exact("bhij,bhjv->bhiv", scores, new) + dot("bhik,bhkv->bhiv", q * upto, state)
  return _next_state(state, total, k * after, new), jnp.swapaxes(output, 1, 2).astype(dtype)


def _state_chunk(normalize_qk, state, x):
  k, v, beta, gate = _heads_first(x)
  dot = chunks.product(k.dtype)
  k = chunks.normalize(k) if normalize_qk else chunks.wide(k)
  between, upto, after, total = _decays(gate, k.shape[2])
  _, new, _, _ = _write(k, v, beta, between, upto, state, dot)
  return _next_state(state, total, k * after, new), state


def _write(k, v, beta, between, upto, state, dot):
  """L / beta, U, E, (I + L)^-1."""
  below = np.tril(np.ones((k.shape[2],) * 2, np.float32), -1)[None, None]
  overlaps = below * between * dot("bhik,bhjk->bhij", k, k)
  inverse = chunks.unit_lower_inverse(beta * overlaps)
  error = chunks.wide(v) - dot("bhik,bhkv->bhiv", k * upto, state)
  return overlaps, exact("bhij,bhjv->bhiv", inverse, beta * error), error, inverse


def _backward_chunk(scale, normalize_qk, dstate, x):
  q, k, v, beta, gate = _heads_first(x[0])
  (do,), state = chunks.heads_first(x[1:2]), x[2]
  dtype, dot = q.dtype, chunks.product(q.dtype)
  do = chunks.wide(do)
  normalize = chunks.normalize if normalize_qk else chunks.wide
  q, transpose_q = jax.vjp(normalize, q)
  k, transpose_k = jax.vjp(normalize, k)
  q = scale * q
  exponents, transpose = (None, None) if gate is None else jax.vjp(chunks.exponents, gate)
  between, upto, after, total = _from_exponents(exponents, k.shape[2])
  below = np.tril(np.ones((k.shape[2],) * 2, np.float32), -1)[None, None]
  overlaps, new, error, inverse = _write(k, v, beta, between, upto, state, dot)
  scores = between * dot("bhik,bhjk->bhij", q, k)

  dnew = exact("bhij,bhiv->bhjv", scores, do) + exact("bhik,bhkv->bhiv", k * after, dstate)
  dr = exact("bhij,bhiv->bhjv", inverse, dnew)
  dscores = exact("bhiv,bhjv->bhij", do, new)
  doverlaps = -exact("bhiv,bhjv->bhij", dr, new)
  dbeta = chunks.rowsum(dr * error) + chunks.rowsum(doverlaps * overlaps)
  dv = beta * dr
  doverlaps = beta * doverlaps
  dqk, dkk = between * dscores, below * between * doverlaps
  dq_state = upto * exact("bhiv,bhkv->bhik", do, state)
  dk_read = -upto * exact("bhiv,bhkv->bhik", dv, state)
  dk_state = after * exact("bhiv,bhkv->bhik", new, dstate)
  dq = exact("bhij,bhjk->bhik", dqk, k) + dq_state
  dk = exact("bhij,bhik->bhjk", dqk, q) + exact("bhij,bhjk->bhik", dkk + dkk.mT, k) + dk_read + dk_state
  dgate = None
  if gate is not None:
    dtotal = total * jnp.sum(state * dstate, axis=(-2, -1), keepdims=True)
    dgate, = transpose((scores * dscores + overlaps * doverlaps, chunks.rowsum(q * dq_state + k * dk_read),
                        chunks.rowsum(k * dk_state), dtotal))
  dstate = (total * dstate + exact("bhik,bhiv->bhkv", q * upto, do) - exact("bhik,bhiv->bhkv", k * upto, dv))
  dq, = transpose_q(scale * dq)
  dk, = transpose_k(dk)
  gradients = dq, dk, dv.astype(dtype), dbeta, dgate
  return dstate, _heads_first(gradients)


def _heads_first(arrays):
  return [x if x is None else jnp.swapaxes(x, 1, 2) for x in arrays]


def _decays(gate, size):
  return _from_exponents(None if gate is None else chunks.exponents(gate), size)


def _from_exponents(exponents, size):
  """exp of the exponents, zero above the diagonal; ones without decay."""
  causal = np.tril(np.ones((1, 1, size, size), bool))
  if exponents is None:
    return causal.astype(np.float32), 1.0, 1.0, 1.0
  between, *others = exponents
  return jnp.exp(jnp.where(causal, between, -jnp.inf)), *(jnp.exp(x) for x in others)


def _next_state(state, total, x, y):
  return total * state + exact("bhik,bhiv->bhkv", x, y)


def _chunk_size(T, K, V):
  """Long enough that the saved states of the backward pass stay comparable to the inputs."""
  return 16 if T <= 16 else 32 if T <= 32 else 64 if K * V <= 128 * 128 else 128
