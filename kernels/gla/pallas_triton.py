"""Gated linear attention as Pallas kernels for the Triton backend: the op and its `custom_vjp`.

`README.md` of this folder derives the factors X and Y, the chunk form and its backward pass, and lists each kernel with
what it reads and writes. The kernels are `pallas_triton_factors.py`, `pallas_triton_scan.py`,
`pallas_triton_gradients.py`, and `exact_chunks.py` for the chunks whose gates are too strong for factors.

16-bit inputs use bfloat16 operands, states and factors; float32 inputs keep float32. Gates below e^-40 count as e^-40.
Residuals are the inputs, the factors and scores, and the chunk states. For 16-bit inputs the last three take
4 K + 2 C + 2 K V / C bytes per token and head. Source: arXiv:2312.06635, section 4.3.
"""

import functools

import jax
import jax.numpy as jnp

from kernels import chunks, pieces, triton_blocks, tuned
from kernels.gla import exact_chunks
from kernels.gla.pallas_triton_config import Config, heuristic
from kernels.gla.pallas_triton_factors import factors
from kernels.gla.pallas_triton_gradients import dqkg
from kernels.gla.pallas_triton_scan import scan
from kernels.triton_blocks import tile_width


def supports(q, k, v, log_decay, *, chunk_size=None) -> str | None:
  """Why these inputs cannot run here, or None."""
  return triton_blocks.declines(q, chunk_size)


def gla(q, k, v, log_decay, initial_state, *, scale, chunk_size=None):
  """See `kernels.gla`. The state is given, segments are resets in `log_decay`."""
  K, V = q.shape[3], v.shape[3]
  config = None if chunk_size else tuned.lookup("gla", Config, gate="channel", K=K, V=V, dtype=q.dtype)
  config = config or heuristic(K, V, q.dtype, chunk_size)
  return configured(q, k, v, log_decay, initial_state, scale=scale, config=config)


def configured(q, k, v, log_decay, initial_state, *, scale, config):
  """The op under an explicit configuration."""
  (B, T, H, V), K = v.shape, q.shape[3]
  widest = max(config.scan.block, config.reverse_scan.block, min(config.dqkg.block, tile_width(V)))
  dK, dV = tile_width(K) - K, -V % widest
  count = pieces.count(B * H * (V + dV) // config.scan.block, T, config.chunk)
  pad = lambda x, extra: pieces.fold(jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, extra))), count, config.chunk)
  state = jnp.pad(initial_state, ((0, 0), (0, 0), (0, dK), (0, dV)))
  output, final_state = _gla(pad(q, dK), pad(k, dK), pad(v, dV), pad(log_decay, dK), state, scale, config)
  return pieces.unfold(output, B)[:, :T, :, :V], final_state[:, :, :K, :V]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _gla(q, k, v, log_decay, initial_state, scale, config):
  output, _, final_state = scan(factors(q, k, log_decay, scale, config), v, initial_state, config, save=False)
  return output, final_state


def _forward(q, k, v, log_decay, initial_state, scale, config):
  found = factors(q, k, log_decay, scale, config)
  output, states, final_state = scan(found, v, initial_state, config)
  return (output, final_state), (q, k, v, log_decay, *triton_blocks.residuals((found, states)))


def _backward(scale, config, residuals, cotangents):
  q, k, v, log_decay, found, states = residuals
  do, dfinal_state = cotangents
  x, y, decays, bounded, _ = found
  dv, dstates, dinitial_state = scan(found, do, dfinal_state, config, reverse=True)
  gradients = dqkg(x, y, log_decay, v, do, states, dstates, scale, config, q.dtype)
  gradients = exact_chunks.dqkg(
      bounded, decays, q, k, log_decay, v, do, states, dstates, gradients, scale, config.chunk)
  dq, dk, dlog_decay = (chunks.sum_heads(x, q.shape[2]) for x in gradients)
  return dq, dk, dv, dlog_decay, dinitial_state


_gla.defvjp(_forward, _backward)
