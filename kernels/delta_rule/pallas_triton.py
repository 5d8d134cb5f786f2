"""The delta rule, gated or not, as Pallas kernels for the Triton backend: the op and its `custom_vjp`.

`README.md` of this folder derives the chunk form and its backward pass, and lists each kernel with what it reads and
writes. The kernels are `inverse.py`, `pallas_triton_scan.py` and `pallas_triton_gradients.py`. A decay per key channel
has kernels of its own in `pallas_triton_channels.py`.

bfloat16 inputs use bfloat16 operands and states; float32 inputs keep float32. Similar keys make products with Y nearly
cancel, so these products, P^T dO and terms of a new state take 16 significant bits of their operands. float16
inputs run as float32: operands of bfloat16 would change which keys are alike. Source: arXiv:2406.06484, section 3.2.
"""

import functools

import jax
import jax.numpy as jnp

from kernels import chunks, pieces, triton_blocks, tuned
from kernels.delta_rule import pallas_triton_channels, pallas_triton_channels_config, pallas_triton_config
from kernels.delta_rule.pallas_triton_gradients import gradients
from kernels.delta_rule.pallas_triton_operands import prepare
from kernels.delta_rule.pallas_triton_scan import scan
from kernels.triton_blocks import tile_width

# With so many programs of an uncut scan, about one per multiprocessor, cutting the sequence loses, because the map of a
# piece takes K more columns.
ENOUGH = 128


def supports(q, k, v, beta, log_decay=None, segment_ids=None, *, chunk_size=None) -> str | None:
  """Why these inputs cannot run here, or None."""
  return triton_blocks.declines(q, chunk_size)


def delta_rule(q, k, v, beta, log_decay, initial_state, *, scale, normalize_qk, starts=None, chunk_size=None):
  """See `kernels.delta_rule`. The state is given; `starts` `[B, T]` says where segments start, if any do."""
  if q.dtype == jnp.float16:
    wide = delta_rule(*(chunks.wide(x) for x in (q, k, v)), beta, log_decay, initial_state, scale=scale,
                      normalize_qk=normalize_qk, starts=starts, chunk_size=chunk_size)
    return wide[0].astype(v.dtype), wide[1]
  K, V = q.shape[3], v.shape[3]
  gate = tuned.gate_key(log_decay)
  gate = "token" if starts is not None and gate == "none" else gate  # resets are gates
  configs = configurations(gate)
  config = None if chunk_size else tuned.lookup("delta_rule", configs.Config, gate=gate, K=K, V=V, dtype=q.dtype)
  config = config or configs.heuristic(K, V, q.dtype, chunk_size)
  return configured(q, k, v, beta, log_decay, initial_state, scale=scale, normalize_qk=normalize_qk, config=config,
                    starts=starts)


def configurations(gate: str):
  """The module with the configurations for a form of decay, named as in `tuned.gate_key`."""
  return pallas_triton_channels_config if gate == "channel" else pallas_triton_config


def configured(q, k, v, beta, log_decay, initial_state, *, scale, normalize_qk=False, config, starts=None):
  """The op under an explicit configuration, one of `configurations` for this form of decay."""
  if log_decay is not None and log_decay.ndim == 4:
    return pallas_triton_channels.configured(q, k, v, beta, log_decay, initial_state, scale=scale,
                                             normalize_qk=normalize_qk, config=config, starts=starts)
  (B, T, H, V), K = v.shape, q.shape[3]
  dK, dV = tile_width(K) - K, -V % max(config.scan.block, config.reverse_scan.block, min(config.width, tile_width(V)))
  count = pieces.count(B * H * (V + dV) // config.scan.block, T, config.span, enough=ENOUGH)
  fold = functools.partial(pieces.fold, count=count, chunk=config.span)
  pad = lambda x, extra: fold(jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, extra))))
  state = jnp.pad(initial_state, ((0, 0), (0, 0), (0, dK), (0, dV)))
  flows = log_decay is not None  # resets alone have no gradient
  if starts is not None:
    log_decay = chunks.with_resets(log_decay, starts, H)
  output, final_state = _delta_rule(pad(q, dK), pad(k, dK), pad(v, dV), fold(beta), None if log_decay is None
                                    else fold(log_decay), state, scale, normalize_qk, config, flows)
  return pieces.unfold(output, B)[:, :T, :, :V], final_state[:, :, :K, :V]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _delta_rule(q, k, v, beta, log_decay, initial_state, scale, normalize_qk, config, flows):
  """`flows` says whether `log_decay` has a gradient."""
  operands = prepare(q, k, beta, log_decay, normalize_qk, config.chunk)
  output, final_state, _ = scan(operands, v, initial_state, scale, config, save=False)
  return output, final_state


def _forward(q, k, v, beta, log_decay, initial_state, scale, normalize_qk, config, flows):
  operands = prepare(q, k, beta, log_decay, normalize_qk, config.chunk)
  output, e, states, final_state, kept = scan(operands, v, initial_state, scale, config)
  return (output, final_state), (operands, *triton_blocks.residuals((e, states, kept)))


def _backward(scale, normalize_qk, config, flows, residuals, cotangents):
  operands, e, states, kept = residuals
  do, dfinal_state = cotangents
  minus_f, dstates, dinitial_state, _ = scan(operands, do, dfinal_state, scale, config, reverse=True, kept=kept)
  dq, dk, dv, dbeta, dlog_decay = gradients(operands, e, do, minus_f, states, dstates, scale, config, flows)
  return dq, dk, dv, dbeta, dlog_decay, dinitial_state


_delta_rule.defvjp(_forward, _backward)
