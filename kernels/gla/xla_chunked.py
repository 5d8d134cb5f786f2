"""Gated linear attention chunk by chunk in plain jnp, for every device; forward and backward.

With q scaled, S the state entering and S' the one leaving a chunk, and `upto`, `after`, P as in `kernels.chunks`
(arXiv:2312.06635, section 4.3):

  O = (Q * exp(upto)) S + P V                  S' = diag(exp(total)) S + (K * exp(after))^T V

Given dO and dS', with dP_ij = dO_i . V_j:

  dS = diag(exp(total)) dS' + (Q * exp(upto))^T dO          dV = P^T dO + (K * exp(after)) dS'
  dQ = exp(upto) * (dO S^T) + share of P                    dK = exp(after) * (V dS'^T) + share of P

An exponent's cotangent is query times its share of dQ, or key times its share of dK, and that of the total is
exp(total) * rowsum(S * dS'); the transpose of `chunks.exponents` sums them into dlog_decay. So no gradient is a
difference of larger terms, and gates that all but close keep their relative precision.

The forward pass saves its inputs only. The backward pass recomputes the state entering each chunk, then walks back.
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
  if chunk_size is None:
    chunk_size = next((size for size in (16, 32) if q.shape[1] <= size), 64)
  return _gla(q, k, v, log_decay, initial_state, scale, chunk_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _gla(q, k, v, log_decay, initial_state, scale, chunk_size):
  xs = [chunks.split(x, chunk_size) for x in (q, k, v, log_decay)]
  final_state, output = jax.lax.scan(functools.partial(_forward_chunk, scale), initial_state, xs)
  return chunks.merge(output, q.shape[1]), final_state


def _forward(q, k, v, log_decay, initial_state, scale, chunk_size):
  return _gla(q, k, v, log_decay, initial_state, scale, chunk_size), (q, k, v, log_decay, initial_state)


def _backward(scale, chunk_size, residuals, cotangents):
  *inputs, initial_state = residuals
  doutput, dfinal_state = cotangents
  q, k, v, g, do = (chunks.split(x, chunk_size) for x in (*inputs, doutput))
  _, states = jax.lax.scan(_state_chunk, initial_state, (k, v, g))
  dinitial_state, gradients = jax.lax.scan(
      functools.partial(_backward_chunk, scale), dfinal_state, (q, k, v, g, do, states), reverse=True)
  return *(chunks.merge(x, inputs[0].shape[1]) for x in gradients), dinitial_state


_gla.defvjp(_forward, _backward, optimize_remat=True)


# Bodies of the scans over chunks: x holds one chunk `[B, H, C, .]` of each array.


def _forward_chunk(scale, state, x):
  q, k, v, g = x
  dot, q, k = _dot(q.dtype), scale * _wide(q), _wide(k)
  levels, upto, after = chunks.exponents(g)
  output = dot("bhck,bhkv->bhcv", q * jnp.exp(upto), state) + _rowsum(q * k) * _wide(v)
  output = chunks.blocks(output, 1)
  for upto_s, after_s in levels:
    s = upto_s.shape[-2]
    scores = dot("bhmik,bhmjk->bhmij", _second(q, s) * jnp.exp(upto_s), _first(k, s) * jnp.exp(after_s))
    first, second = chunks.halves(output)
    output = chunks.join(first, second + dot("bhmij,bhmjv->bhmiv", scores, _first(v, s)))
  return _exit_state(state, k, v, upto, after, dot), output[..., 0, :, :].astype(v.dtype)


def _state_chunk(state, x):
  k, v, g = x
  _, upto, after = chunks.exponents(g)
  return _exit_state(state, _wide(k), v, upto, after, _dot(k.dtype)), state


def _exit_state(state, k, v, upto, after, dot):
  return jnp.exp(upto[..., -1, :])[..., None] * state + dot("bhck,bhcv->bhkv", k * jnp.exp(after), v)


def _backward_chunk(scale, dstate, x):
  q, k, v, g, do, state = x
  dtype, dot, q, k = q.dtype, _dot(q.dtype), scale * _wide(q), _wide(k)
  levels, upto, after = chunks.exponents(g)
  decay_upto, decay_after = jnp.exp(upto), jnp.exp(after)
  total = decay_upto[..., -1, :]

  dq = decay_upto * dot("bhcv,bhkv->bhck", do, state)
  dk = decay_after * dot("bhcv,bhkv->bhck", v, dstate)
  dv = dot("bhck,bhkv->bhcv", k * decay_after, dstate)
  dupto, dafter = q * dq, k * dk
  dupto = dupto.at[..., -1, :].add(total * jnp.sum(state * dstate, axis=-1))
  dstate = total[..., None] * dstate + dot("bhck,bhcv->bhkv", q * decay_upto, do)

  # The diagonal of P carries no gate.
  diagonal, ddiagonal = _rowsum(q * k), _rowsum(_wide(do) * _wide(v))
  dq, dk, dv = dq + ddiagonal * k, dk + ddiagonal * q, dv + diagonal * _wide(do)
  dq, dk, dv = (chunks.blocks(x, 1) for x in (dq, dk, dv))
  dlevels = []
  for upto_s, after_s in levels:
    s = upto_s.shape[-2]
    q_s, k_s, v_s, do_s = _second(q, s), _first(k, s), _first(v, s), _second(do, s)
    decay_q, decay_k = jnp.exp(upto_s), jnp.exp(after_s)
    scores = dot("bhmik,bhmjk->bhmij", q_s * decay_q, k_s * decay_k)
    dscores = dot("bhmiv,bhmjv->bhmij", do_s, v_s)
    dq_s = decay_q * dot("bhmij,bhmjk->bhmik", dscores, k_s * decay_k)
    dk_s = decay_k * dot("bhmij,bhmik->bhmjk", dscores, q_s * decay_q)
    dv_s = dot("bhmij,bhmiv->bhmjv", scores, do_s)
    dlevels.append((q_s * dq_s, k_s * dk_s))
    (dq_1, dq_2), (dk_1, dk_2), (dv_1, dv_2) = (chunks.halves(x) for x in (dq, dk, dv))
    dq, dk, dv = chunks.join(dq_1, dq_2 + dq_s), chunks.join(dk_1 + dk_s, dk_2), chunks.join(dv_1 + dv_s, dv_2)

  dg, = jax.linear_transpose(chunks.exponents, g)((dlevels, dupto, dafter))
  dq, dk, dv = (x[..., 0, :, :].astype(dtype) for x in (scale * dq, dk, dv))
  return dstate, (dq, dk, dv, dg)


def _first(x, size):
  return chunks.halves(chunks.blocks(x, size))[0]


def _second(x, size):
  return chunks.halves(chunks.blocks(x, size))[1]


def _wide(x):
  return x.astype(jnp.float32)


def _rowsum(x):
  return jnp.sum(x, axis=-1, keepdims=True)


def _dot(dtype):
  """einsum for inputs of `dtype`: float32 exactly, 16-bit as bfloat16, because states and cotangents may leave the
  range of float16; accumulated in float32."""
  operand = jnp.float32 if dtype == jnp.float32 else jnp.bfloat16

  def dot(subscripts, a, b):
    return jnp.einsum(
        subscripts, a.astype(operand), b.astype(operand), precision="highest", preferred_element_type=jnp.float32)

  return dot
