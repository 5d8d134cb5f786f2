"""Linear attention with scalar decay as Pallas kernels for the Triton backend: the op and its `custom_vjp`.

`README.md` of this folder has the chunk form and its backward pass, and lists each kernel with what it reads and
writes. The kernels are `pallas_triton_scan.py` and `pallas_triton_gradients.py`; `kernels.scalar_decay` forms the
decays.

16-bit inputs use bfloat16 operands and states; float32 inputs keep float32. Residuals are the inputs and the chunk
states, 2 K V / C bytes per token and head for 16-bit inputs. Source: arXiv:2405.17381, section 3.
"""

import functools

import jax
import jax.numpy as jnp

from kernels import chunks, pieces, triton_blocks, tuned
from kernels.linear_attention.pallas_triton_config import Config, heuristic
from kernels.linear_attention.pallas_triton_gradients import dqk
from kernels.linear_attention.pallas_triton_scan import scan
from kernels.scalar_decay import chunk_sums
from kernels.triton_blocks import tile_width


def supports(q, k, v, log_decay=None, *, chunk_size=None) -> str | None:
  """Why these inputs cannot run here, or None."""
  return triton_blocks.declines(q, chunk_size)


def linear_attention(q, k, v, log_decay, initial_state, *, scale, starts=None, chunk_size=None):
  """See `kernels.linear_attention`. The state is given; `starts` `[B, T]` says where segments start, if any do."""
  K, V = q.shape[3], v.shape[3]
  gate = tuned.gate_key(log_decay) if starts is None else "token"
  config = None if chunk_size else tuned.lookup("linear_attention", Config, gate=gate, K=K, V=V, dtype=q.dtype)
  config = config or heuristic(K, V, q.dtype, chunk_size)
  return configured(q, k, v, log_decay, initial_state, scale=scale, config=config, starts=starts)


def configured(q, k, v, log_decay, initial_state, *, scale, config, starts=None):
  """The op under an explicit configuration."""
  (B, T, H, V), K = v.shape, q.shape[3]
  # Tiles are powers of two, so the widest is a multiple of the tiles of every kernel.
  widest = max(min(block, tile_width(V)) for block in (
      config.scan.block, config.reverse_scan.block, config.dqk.block, heuristic(K, V, jnp.float32).scan.block))
  dK, dV = tile_width(K) - K, -V % widest
  count = pieces.count(B * H * (V + dV) // config.scan.block, T, config.chunk)
  fold = functools.partial(pieces.fold, count=count, chunk=config.chunk)
  pad = lambda x, extra: fold(jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, extra))))
  state = jnp.pad(initial_state, ((0, 0), (0, 0), (0, dK), (0, dV)))
  if log_decay is not None and log_decay.ndim == 3:
    log_decay = fold(log_decay if starts is None else chunks.with_resets(log_decay, starts, H))
    starts = None
  # The tokens that fill up the last chunk must not decay the final state.
  whole = T % (count * config.chunk) == 0
  real = None if whole else fold(jnp.ones((B, T, 1), bool))
  starts = None if starts is None else fold(starts)
  output, final_state = _linear_attention(pad(q, dK), pad(k, dK), pad(v, dV), log_decay, state, real, starts, scale,
                                          config)
  return pieces.unfold(output, B)[:, :T, :, :V], final_state[:, :, :K, :V]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _linear_attention(q, k, v, log_decay, initial_state, real, starts, scale, config):
  """`real` `[B, T, 1]` is false at tokens that fill up a chunk, or None if there are none.

  `starts` `[B, T]` says where segments start, None if nowhere or if `log_decay` has a reset there. With either, a decay
  that the tokens share becomes one per token.
  """
  sums = _sums(log_decay, real, starts, v.shape[2], config)
  output, _, final_state = scan(q, k, v, sums, initial_state, scale, config, save=False)
  return output, final_state


def _forward(q, k, v, log_decay, initial_state, real, starts, scale, config):
  sums = triton_blocks.residuals(_sums(log_decay, real, starts, v.shape[2], config))
  output, states, final_state = scan(q, k, v, sums, initial_state, scale, config)
  residuals = q, k, v, log_decay, sums, initial_state, real, starts, triton_blocks.residuals(states)
  return (output, final_state), residuals


def _backward(scale, config, residuals, cotangents):
  q, k, v, log_decay, sums, initial_state, real, starts, states = residuals
  do, dfinal_state = cotangents
  dv, dstates, dinitial_state = scan(k, q, do, sums, dfinal_state, scale, config, reverse=True)
  wanted = log_decay is not None and log_decay.ndim == 3
  dq, dk, dlog_decay = dqk(q, k, v, sums, do, states, dstates, scale, config, dgates=wanted)
  if log_decay is not None and log_decay.ndim == 1:
    dlog_decay = _dconstant(q, k, v, log_decay, initial_state, real, starts, do, dfinal_state, scale)
  return dq, dk, dv, dlog_decay, dinitial_state, None, None


_linear_attention.defvjp(_forward, _backward)


def _sums(log_decay, real, starts, heads, config):
  """What the kernels read of the gates: one per token where a segment starts, or where a chunk is filled up."""
  if starts is not None:
    log_decay = chunks.with_resets(log_decay, starts, heads)
  shared = log_decay is not None and (log_decay.ndim == 1 or starts is not None)
  if shared and real is not None:
    log_decay = jnp.where(real, log_decay if log_decay.ndim == 3 else log_decay[None, None], 0.0)
  return chunk_sums(log_decay, config.chunk, "linear_attention")


def _dconstant(q, k, v, log_decay, initial_state, real, starts, do, dfinal_state, scale):
  """The gradient of a constant decay: the sum of the gradients of a decay per token. Most of the sum cancels, so its
  terms need float32 products. The compiler drops all of this when nobody asks for the gradient."""
  q, k, v, do = (x.astype(jnp.float32) for x in (q, k, v, do))
  config = heuristic(q.shape[3], v.shape[3], q.dtype, min(triton_blocks.CHUNKS))  # divides every chunk
  real = jnp.ones((*do.shape[:2], 1), bool) if real is None else real
  sums = _sums(log_decay, real, starts, v.shape[2], config)
  _, states, _ = scan(q, k, v, sums, initial_state, scale, config, outputs=False)
  _, dstates, _ = scan(k, q, do, sums, dfinal_state, scale, config, outputs=False, reverse=True)
  decays = real if starts is None else real & ~starts[:, :, None]
  dgates = dqk(q, k, v, sums, do, states, dstates, scale, config, dgates=True)[2]
  return jnp.sum(jnp.where(decays, dgates, 0.0), axis=(0, 1))
