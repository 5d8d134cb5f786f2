"""The delta rule with a decay per key channel as Pallas kernels for the Triton backend: the op and its `custom_vjp`.

`README.md` of this folder derives the chunk form and its backward pass, and lists each kernel with what it reads and
writes. The kernels are `pallas_triton_channels_factors.py`, `inverse.py`, `pallas_triton_channels_scan.py` and
`pallas_triton_channels_gradients.py`. Residuals are q, k, beta, sums of gates, Y, E and the chunk states. The backward
pass forms P and decayed queries and keys again, because they take more memory than all else. Source: arXiv:2510.26692.
"""

import functools

import jax
import jax.numpy as jnp

from kernels import pieces, triton_blocks
from kernels.delta_rule.inverse import inverse_of_overlaps
from kernels.delta_rule.pallas_triton_channels_factors import chunk_sums, factors
from kernels.delta_rule.pallas_triton_channels_gradients import gradients
from kernels.delta_rule.pallas_triton_channels_scan import scan
from kernels.delta_rule.reference import with_resets
from kernels.triton_blocks import tile_width

# With so many programs of an uncut scan, cutting the sequence loses: the map of a piece takes K more columns.
ENOUGH = 128


def configured(q, k, v, beta, log_decay, initial_state, *, scale, normalize_qk, config, starts=None):
  """The op under an explicit configuration; `log_decay` is `[B, T, H, K]`."""
  (B, T, H, V), K = v.shape, q.shape[3]
  dK, dV = tile_width(K) - K, -V % max(config.scan.block, config.reverse_scan.block, min(config.width, tile_width(V)))
  count = pieces.count(B * H * (V + dV) // config.scan.block, T, config.chunk, enough=ENOUGH)
  fold = functools.partial(pieces.fold, count=count, chunk=config.chunk)
  pad = lambda x, extra: fold(jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, extra))))
  state = jnp.pad(initial_state, ((0, 0), (0, 0), (0, dK), (0, dV)))
  if starts is not None:
    log_decay = with_resets(log_decay, starts, H)
  output, final_state = _delta_rule(pad(q, dK), pad(k, dK), pad(v, dV), fold(beta), pad(log_decay, dK), state, scale,
                                    normalize_qk, config)
  return pieces.unfold(output, B)[:, :T, :, :V], final_state[:, :, :K, :V]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _delta_rule(q, k, v, beta, log_decay, initial_state, scale, normalize_qk, config):
  sums, found, y = _prepare(q, k, beta, log_decay, scale, normalize_qk, config)
  output, final_state, _ = scan(found, sums, y, beta, v, initial_state, config, save=False)
  return output, final_state


def _prepare(q, k, beta, log_decay, scale, normalize_qk, config):
  """Sums of gates, factors and Y."""
  sums = chunk_sums(log_decay, config.chunk)
  found = factors(q, k, sums, scale, normalize_qk, config, overlaps=True)
  return sums, found, inverse_of_overlaps(found.x, beta, q.dtype)


def _forward(q, k, v, beta, log_decay, initial_state, scale, normalize_qk, config):
  sums, found, y = _prepare(q, k, beta, log_decay, scale, normalize_qk, config)
  output, e, states, final_state, kept = scan(found, sums, y, beta, v, initial_state, config)
  return (output, final_state), (q, k, beta, *triton_blocks.residuals((sums, y, e, states, kept)))


def _backward(scale, normalize_qk, config, residuals, cotangents):
  q, k, beta, sums, y, e, states, kept = residuals
  do, dfinal_state = cotangents
  found = factors(q, k, sums, scale, normalize_qk, config, overlaps=False)
  minus_f, dstates, dinitial_state, _ = scan(found, sums, y, beta, do, dfinal_state, config, reverse=True, kept=kept)
  norms = (found.q_norm, found.k_norm) if normalize_qk else ()
  dq, dk, dv, dbeta, dlog_decay = gradients(q, k, sums, norms, beta, e, do, minus_f, states, dstates, scale, config)
  return dq, dk, dv, dbeta, dlog_decay, dinitial_state


_delta_rule.defvjp(_forward, _backward)
