"""Linear attention with scalar decay chunk by chunk in plain jnp, for every device; forward and backward.

`README.md` of this folder has the symbols and derives both passes. The logarithms of the decays are sums of log_decay,
each formed directly, so a reset costs no precision. dlog_decay is the transpose of these sums, so no part of it is a
difference of larger terms. With a constant decay the logarithms are multiples of it, and without
a decay there is nothing to form.

The forward pass saves its inputs only. The backward pass recomputes the state entering each chunk, then walks back.
Source: arXiv:2405.17381, section 3.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels import chunks
from kernels.chunk_states import next_state, scalar_decays

# Chunks per iteration of the compiled loops: on a CPU, two take three quarters of the time that one takes.
UNROLL = 2


def supports(q, k, v, log_decay=None, *, chunk_size=None) -> str | None:
  """None: everything that `kernels.linear_attention` accepts."""
  return None


def linear_attention(q, k, v, log_decay, initial_state, *, scale, starts=None, chunk_size=None):
  """See `kernels.linear_attention`. The state is given; `starts` `[B, T]` says where segments start, if any do."""
  if starts is not None:
    # Segments start at different tokens in each row, so a decay that the tokens share becomes one per token.
    log_decay = chunks.with_resets(log_decay, starts, v.shape[2])
  q, k = (chunks.repeat_heads(x, v.shape[2]) for x in (q, k))
  if chunk_size is None:
    chunk_size = _chunk_size(q.shape[1], q.shape[3], v.shape[3])
  return _linear_attention(q, k, v, log_decay, initial_state, scale, chunk_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _linear_attention(q, k, v, log_decay, initial_state, scale, chunk_size):
  return _output(q, k, v, log_decay, initial_state, scale, chunk_size)


def _forward(q, k, v, log_decay, initial_state, scale, chunk_size):
  return _output(q, k, v, log_decay, initial_state, scale, chunk_size), (q, k, v, log_decay, initial_state)


def _output(q, k, v, log_decay, initial_state, scale, chunk_size):
  xs = [chunks.to_chunks(x, chunk_size) for x in (q, k, v)]
  constant, gates = _gates(log_decay, q.shape[1], chunk_size)
  body = functools.partial(_forward_chunk, scale, constant)
  final_state, output = jax.lax.scan(body, initial_state, (xs, gates), unroll=UNROLL)
  return chunks.merge(output, q.shape[1]), final_state


def _backward(scale, chunk_size, residuals, cotangents):
  q, k, v, log_decay, initial_state = residuals
  doutput, dfinal_state = cotangents
  xs = q, k, v, do = [chunks.to_chunks(x, chunk_size) for x in (q, k, v, doutput)]
  T = doutput.shape[1]
  constant, gates = _gates(log_decay, T, chunk_size)
  _, states = jax.lax.scan(functools.partial(_state_chunk, constant), initial_state, (k, v, gates), unroll=UNROLL)
  body = functools.partial(_backward_chunk, scale, constant)
  dinitial_state, (gradients, dgates) = jax.lax.scan(
      body, dfinal_state, (xs, gates, states), reverse=True, unroll=UNROLL)
  if log_decay is None:
    dlog_decay = None
  elif log_decay.ndim == 1:
    dlog_decay = jnp.sum(dgates, axis=0)
  else:
    dlog_decay = chunks.merge(dgates, T)[..., 0]
  return *(chunks.merge(x, T) for x in gradients), dlog_decay, dinitial_state


_linear_attention.defvjp(_forward, _backward)


def _gates(log_decay, T, size):
  """The constant decay that all chunks share, and each chunk's own gates `[N, B, C, H, 1]` or count of tokens `[N]`."""
  if log_decay is None:
    return None, None
  if log_decay.ndim == 1:
    return log_decay, np.minimum(size, T - np.arange(0, T, size)).astype(np.float32)
  return None, chunks.to_chunks(log_decay[..., None], size)


# Bodies of the scans over chunks: x holds one chunk `[B, C, H, .]` of each array. Heads move before time here and not
# in the whole arrays, because a chunk stays in the cache.


def _forward_chunk(scale, constant, state, x):
  (q, k, v), gate = chunks.heads_first(x[0]), x[1]
  dot, k = chunks.product(q.dtype), chunks.wide(k)
  between, upto, after, total = scalar_decays(_exponents(constant, gate, v.shape[2]), v.shape[2])
  # Weights come after the products. Before them they would round, and a sum over channels that cancels magnifies that.
  scores = scale * between * dot("bhik,bhjk->bhij", q, k)
  output = dot("bhij,bhjv->bhiv", scores, v) + scale * upto * dot("bhik,bhkv->bhiv", q, state)
  return next_state(state, total, k * after, v, dot), jnp.swapaxes(output, 1, 2).astype(v.dtype)


def _state_chunk(constant, state, x):
  (k, v), gate = chunks.heads_first(x[:2]), x[2]
  _, _, after, total = scalar_decays(_exponents(constant, gate, v.shape[2]), v.shape[2])
  return next_state(state, total, chunks.wide(k) * after, v, chunks.product(k.dtype)), state


def _backward_chunk(scale, constant, dstate, x):
  (q, k, v, do), gate, state = chunks.heads_first(x[0]), x[1], x[2]
  dtype, dot, k = q.dtype, chunks.product(q.dtype), chunks.wide(k)
  exponents, transpose = jax.vjp(lambda *x: _exponents(*x, v.shape[2]), constant, gate)
  between, upto, after, total = scalar_decays(exponents, v.shape[2])

  scores = scale * between * dot("bhik,bhjk->bhij", q, k)
  q = scale * chunks.wide(q)
  dscores = dot("bhiv,bhjv->bhij", do, v)
  dproducts = between * dscores
  dq_state = upto * dot("bhiv,bhkv->bhik", do, state)
  dk_state = after * dot("bhiv,bhkv->bhik", v, dstate)
  dq = dot("bhij,bhjk->bhik", dproducts, k) + dq_state
  dk = dot("bhij,bhik->bhjk", dproducts, q) + dk_state
  dv = dot("bhij,bhiv->bhjv", scores, do) + dot("bhik,bhkv->bhiv", k * after, dstate)

  dgate = None
  if exponents is not None:
    dtotal = total * jnp.sum(state * dstate, axis=(-2, -1), keepdims=True)
    dexponents = scores * dscores, chunks.rowsum(q * dq_state), chunks.rowsum(k * dk_state), dtotal
    if constant is None:
      _, dgate = transpose(dexponents)
    else:
      dgate, _ = transpose(tuple(jnp.sum(x, axis=0, keepdims=True) for x in dexponents))
  dstate = next_state(dstate, total, q * upto, do, dot)
  return dstate, (chunks.heads_first(x.astype(dtype) for x in (scale * dq, dk, dv)), dgate)


def _exponents(constant, gate, size):
  """`between`, `upto`, `after`, `total`: `[B, H, C, C]`, two `[B, H, C, 1]`, `[B, H, 1, 1]`; B = 1 if constant."""
  if gate is None:
    return None
  if constant is None:
    return chunks.exponents(jnp.swapaxes(gate, 1, 2))
  row, column = np.indices((size, size))
  constant, rows = constant[None, :, None, None], np.arange(size, dtype=np.float32)[None, None, :, None]
  # Nothing decays after the last token, where the zeros that fill up its chunk are.
  return (constant * np.float32(np.maximum(row - column, 0))[None, None], constant * (rows + 1),
          constant * jnp.maximum(gate - 1 - rows, 0), constant * gate)


def _chunk_size(T, K, V):
  """Long enough that the saved states of the backward pass stay comparable to the inputs."""
  return 16 if T <= 16 else 32 if T <= 32 else 64 if K * V <= 128 * 128 else 128
