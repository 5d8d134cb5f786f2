"""Gated linear attention chunk by chunk in plain jnp, for every device; forward and backward.

With q scaled, S the state entering and S' the one leaving a chunk, and `upto`, `after`, P as in `kernels.chunks`
(arXiv:2312.06635, section 4.3):

  O = (Q * exp(upto)) S + P V                  S' = diag(exp(total)) S + (K * exp(after))^T V

Given dO and dS', with dP_ij = dO_i . V_j:

  dS = diag(exp(total)) dS' + (Q * exp(upto))^T dO          dV = P^T dO + (K * exp(after)) dS'
  dQ = exp(upto) * (dO S^T) + intra                         dK = exp(after) * (V dS'^T) + intra

An exponent's cotangent is query times its share of dQ, or key times its share of dK; the transpose of
`chunks.exponents` sums those into dlog_decay. Nothing is divided by a decay and no large terms cancel.
"""

import functools

import jax
import jax.numpy as jnp

from kernels import chunks


def supports(q, k, v, log_decay, *, chunk_size=None) -> str | None:
  """None: everything that `kernels.gla` accepts."""
  return None


def gla(q, k, v, log_decay, initial_state, *, scale, chunk_size=None):
  """See `kernels.gla`. Heads are equal, the state is given, segments are already resets in `log_decay`."""
  return _gla(q, k, v, log_decay, initial_state, float(scale), chunk_size or 64)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _gla(q, k, v, log_decay, initial_state, scale, C):
  return _forward(q, k, v, log_decay, initial_state, scale, C)[0]


def _forward(q, k, v, log_decay, initial_state, scale, C):
  qs, ks, vs, g = _split(q, k, v, log_decay, scale, C)
  levels, upto, after = chunks.exponents(g)
  states, final_state = _states(ks, vs, upto, after, initial_state)
  output = _dot("bhnck,bhnkv->bhncv", _scaled(qs, upto), states.astype(qs.dtype))
  output += jnp.sum(qs * ks, axis=-1, keepdims=True) * vs.astype(jnp.float32)
  for upto_s, after_s in levels:
    (_, q2), (k1, _), (v1, _) = (_halves(x, upto_s.shape) for x in (qs, ks, vs))
    scores = _dot("bhnmik,bhnmjk->bhnmij", _scaled(q2, upto_s), _scaled(k1, after_s))
    intra = _dot("bhnmij,bhnmjv->bhnmiv", scores.astype(vs.dtype), v1)
    output += _second(intra, output.shape)
  output = chunks.merge(output, q.shape[1]).astype(v.dtype)
  return (output, final_state), (q, k, v, log_decay, initial_state)


def _backward(scale, C, residuals, cotangents):
  q, k, v, log_decay, initial_state = residuals
  do, dfinal_state = cotangents
  T, dtype = q.shape[1], _operand(q.dtype)
  qs, ks, vs, g = _split(q, k, v, log_decay, scale, C)
  do = chunks.split(do, C).astype(dtype)
  levels, upto, after = chunks.exponents(g)
  transpose = jax.linear_transpose(chunks.exponents, g)
  states, _ = _states(ks, vs, upto, after, initial_state)
  total = jnp.exp(upto[..., -1, :])

  def back(dstate, x):
    total, contribution = x
    return total[..., None] * dstate + contribution, dstate

  by_chunk = lambda x: jnp.moveaxis(x, 2, 0)
  contribution = _dot("bhnck,bhncv->bhnkv", _scaled(qs, upto), do)
  dinitial_state, dstates = jax.lax.scan(back, dfinal_state, (by_chunk(total), by_chunk(contribution)), reverse=True)
  dstates = jnp.moveaxis(dstates, 0, 2)
  dq = jnp.exp(upto) * _dot("bhncv,bhnkv->bhnck", do, states.astype(dtype))
  dk = jnp.exp(after) * _dot("bhncv,bhnkv->bhnck", vs, dstates.astype(dtype))
  dv = _dot("bhnck,bhnkv->bhncv", _scaled(ks, after), dstates.astype(dtype))
  dupto, dafter = qs * dq, ks * dk
  dupto = dupto.at[..., -1, :].add(total * jnp.sum(states * dstates, axis=-1))
  diagonal = jnp.sum(do.astype(jnp.float32) * vs.astype(jnp.float32), axis=-1, keepdims=True)
  dq, dk, dv = dq + diagonal * ks, dk + diagonal * qs, dv + jnp.sum(qs * ks, -1, keepdims=True) * do.astype(jnp.float32)
  dlevels = []
  for upto_s, after_s in levels:
    (_, q2), (k1, _), (v1, _), (_, do2) = (_halves(x, upto_s.shape) for x in (qs, ks, vs, do))
    qe, ke = _scaled(q2, upto_s), _scaled(k1, after_s)
    scores = _dot("bhnmik,bhnmjk->bhnmij", qe, ke).astype(dtype)
    dscores = _dot("bhnmiv,bhnmjv->bhnmij", do2, v1).astype(dtype)
    dq2 = jnp.exp(upto_s) * _dot("bhnmij,bhnmjk->bhnmik", dscores, ke)
    dk1 = jnp.exp(after_s) * _dot("bhnmij,bhnmik->bhnmjk", dscores, qe)
    dv1 = _dot("bhnmij,bhnmiv->bhnmjv", scores, do2)
    dlevels.append((q2 * dq2, k1 * dk1))
    dq, dk, dv = dq + _second(dq2, dq.shape), dk + _first(dk1, dk.shape), dv + _first(dv1, dv.shape)
  dg, = transpose((dlevels, dupto, dafter))
  dq, dk, dv = (chunks.merge(x, T) for x in (scale * dq, dk, dv))
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), chunks.merge(dg, T), dinitial_state


_gla.defvjp(_forward, _backward, optimize_remat=True)


def _operand(dtype):
  return jnp.float32 if dtype == jnp.float32 else jnp.bfloat16


def _split(q, k, v, log_decay, scale, C):
  q, k, v, g = (chunks.split(x, C) for x in (q, k, v, log_decay))
  return scale * q.astype(jnp.float32), k.astype(jnp.float32), v.astype(_operand(v.dtype)), g


def _scaled(x, exponent):
  return x * jnp.exp(exponent)


def _states(k, v, upto, after, initial_state):
  def step(state, x):
    total, contribution = x
    return total[..., None] * state + contribution, state

  by_chunk = lambda x: jnp.moveaxis(x, 2, 0)
  contribution = _dot("bhnck,bhncv->bhnkv", _scaled(k, after), v)
  final_state, states = jax.lax.scan(step, initial_state, (by_chunk(jnp.exp(upto[..., -1, :])), by_chunk(contribution)))
  return jnp.moveaxis(states, 0, 2), final_state


def _dot(subscripts, a, b):
  return jnp.einsum(subscripts, a.astype(b.dtype), b, precision="highest", preferred_element_type=jnp.float32)


def _halves(x, shape):
  B, H, N, M, s, _ = shape
  x = x.reshape(B, H, N, M, 2, s, x.shape[-1])
  return x[..., 0, :, :], x[..., 1, :, :]


def _second(x, shape):
  return jnp.concatenate([jnp.zeros_like(x), x], axis=-2).reshape(shape)


def _first(x, shape):
  return jnp.concatenate([x, jnp.zeros_like(x)], axis=-2).reshape(shape)
